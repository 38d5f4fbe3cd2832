r"""Online alternating minimisation: on each batch, codes go down the loss, then modules go to their codes.

.. math::
    c_k \leftarrow \text{a few steps down} \quad
    \tfrac12 \lVert f_{k+1}(c_k) - c_{k+1} \rVert^2
    + \tfrac12 \lVert c_k - f_k(\dots f_1(x)) \rVert^2, \qquad k = K-1, \dots, 1

    \theta_k \leftarrow \text{one step down} \quad \tfrac12 \lVert f_k(c_{k-1}) - c_k \rVert^2,
    \qquad c_0 = x

For the code of the last hidden module the first term is the task's loss over :math:`\mu`, and the last module
descends the task's loss on that code. Codes live as long as their batch: nothing is kept.

Source: Choromanska et al. 2019 (arXiv 1806.09077), algorithms 1 and 2, with codes before the nonlinearity: cut a
network so that its modules begin with it (``boundary="before"``). Category measured by the audit: weakly
modular.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from modlib.methods.method import Method, Optimizers, Stage, update
from modlib.network import ModularNetwork
from modlib.networks.sizes import check_positive, check_whole
from modlib.objectives import CrossEntropy


class AlternatingMinimisation(Method):
    """Train each module, batch by batch, towards codes that have gone down the task's loss.

    Args:
        mu: μ; the smaller, the more the task's loss counts beside staying near the network's own output.
        step_size: of the codes' steps.
        steps: on the codes of each module.
        optimizer: makes one module's optimiser, or a list with one for each; Adam at rate 1e-3 if None.

    Raises:
        ValueError: a number is out of range; (when training starts) there is only one module.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 10], seed=0), 3)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> history = modlib.fit(net, AlternatingMinimisation(), data, epochs=1, progress=False)
    >>> len(history.rows[0]["losses"])
    3
    """

    def __init__(
        self,
        mu: float = 0.1,
        step_size: float = 0.1,
        steps: int = 5,
        optimizer: Optimizers = None,
    ) -> None:
        check_positive(mu=mu, step_size=step_size)
        check_whole(steps=steps)
        super().__init__(optimizer or partial(torch.optim.Adam, lr=1e-3))
        self.mu, self.step_size, self.steps = mu, step_size, steps

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        if len(net) < 2:
            raise ValueError(
                "net: alternating minimisation trains modules on codes of hidden outputs, but there is "
                "only one module; cut the network into two or more."
            )
        optimizers = self.make_optimizers([[module] for module in net])
        stage = CodesOfBatches(list(net), [CrossEntropy()], optimizers)
        stage.mu, stage.step_size, stage.steps = self.mu, self.step_size, self.steps
        return [stage]


class CodesOfBatches(Stage):
    """All modules in each step; gradients end at the codes."""

    value = "distance to its code"
    remedy = "lower step_size, the codes' rate, or the optimiser's learning rate"
    mu: float
    step_size: float
    steps: int

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Codes first, from the top down, then one step of every module.

        Returns:
            For each hidden module half the squared distance to its code before the update, summed over
            units and averaged over images; for the last module the task's loss.
        """
        with self.autocast():
            codes = self._codes(x, y)
        losses = []
        inputs = [x, *codes]
        for k, module in enumerate(self.modules):
            with self.autocast():
                loss = self._loss(module(inputs[k]), codes[k] if k < len(codes) else y) / len(x)
            update(loss, self.optimizers[k], self.scalers[k])
            losses.append(loss.detach())
        return torch.stack(losses)

    def _codes(self, x: Tensor, y: Tensor) -> list[Tensor]:
        codes = []
        with torch.no_grad():
            for module in self.modules[:-1]:
                x = module(x)
                codes.append(x)
        goal = y
        for k in reversed(range(len(codes))):
            codes[k] = goal = self._moved(k, codes[k], goal)
        return codes

    def _moved(self, k: int, own: Tensor, goal: Tensor) -> Tensor:
        """Codes of module k, gone a few steps from the network's own output towards the goal above."""
        share = 1 / self.mu if k == len(self.modules) - 2 else 1.0
        code = own
        for _ in range(self.steps):
            code = code.detach().requires_grad_()
            above = share * self._loss(self.modules[k + 1](code), goal)
            (gradient,) = torch.autograd.grad(above, code)
            code = (code - self.step_size * (gradient + code - own)).detach()
        return code

    def _loss(self, out: Tensor, goal: Tensor) -> Tensor:
        """Summed over images: the task's loss on labels (N,), half the squared distance to codes."""
        if not goal.is_floating_point():
            loss: Tensor = self.objectives[0](out, goal)
            return loss * len(out)
        return (out - goal).square().sum() / 2
