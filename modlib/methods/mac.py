r"""The method of auxiliary coordinates: codes may leave the modules' outputs, at a price that grows.

.. math::
    \tfrac12 \lVert f_K(z_{K-1}) - Y \rVert^2
    + \tfrac{\mu}{2} \sum_{k<K} \lVert z_k - f_k(z_{k-1}) \rVert^2
    + \tfrac{\lambda n}{2} \sum_k \lVert \theta_k \rVert^2, \qquad z_0 = X

A sweep minimises over all codes together, then over the weights of each module, which are separate
problems. The penalty :math:`\mu` grows by a factor every few sweeps; as it goes to infinity the codes become
the network's own outputs.

Source: Carreira-Perpinan & Wang 2014 (arXiv 1212.5921), equations 4 to 6. The codes, and modules that end in a
nonlinearity, are trained by L-BFGS in place of Gauss-Newton steps; modules that end in a linear layer are a
least-squares problem. Category measured by the audit: weakly modular.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from modlib.kernels import double
from modlib.methods.auxiliary_variables import (
    Assign,
    Codes,
    CodesStage,
    half_square,
    solve,
    trainable,
)
from modlib.methods.method import Method, Stage
from modlib.network import ModularNetwork
from modlib.networks.sizes import check_positive, check_whole


class MAC(Method):
    """Train modules on codes of their outputs under a quadratic penalty that grows, on all images at once.

    Modules may be any that give the same output for the same input: batch norm and dropout do not.

    Args:
        penalty: μ, at first.
        growth: what it is multiplied by.
        every: sweeps at each value of the penalty.
        weight_decay: λ.
        inner: iterations of L-BFGS on a block, at most.
        tolerance: largest entry of the gradient, averaged over images, at which it stops.

    Raises:
        ValueError: a number is out of range; (when training starts) a module has batch norm or dropout, or an
            output that is no vector, or images are augmented.

    >>> import modlib
    >>> net = modlib.networks.mlp([64, 32, 32, 10], activation=torch.nn.Tanh, seed=0)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> history = modlib.fit(modlib.partition(net, 3), MAC(), data, epochs=2, progress=False)
    >>> len(history.rows[0]["losses"])
    3
    """

    def __init__(
        self,
        penalty: float = 0.1,
        growth: float = 2.0,
        every: int = 5,
        weight_decay: float = 1e-5,
        inner: int = 10,
        tolerance: float = 1e-9,
    ) -> None:
        check_positive(penalty=penalty, weight_decay=weight_decay, tolerance=tolerance)
        check_positive(1.0, growth=growth)
        check_whole(every=every, inner=inner)
        super().__init__(Assign)
        self.penalty, self.growth, self.every = penalty, growth, every
        self.weight_decay, self.inner, self.tolerance = weight_decay, inner, tolerance

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        for k, module in enumerate(net):
            for layer in module.modules():
                if isinstance(layer, _UNSTEADY):
                    raise ValueError(
                        f"net: module {k} has a {type(layer).__name__}, whose output changes from one call "
                        "to the next, so that codes have nothing to hold on to; leave it out."
                    )
        for k, shape in enumerate(net.shapes(x)):
            if len(shape) != 1:
                raise ValueError(
                    f"net: module {k} gives outputs of shape {shape}, but MAC fits codes of vectors; cut a "
                    "multilayer perceptron."
                )
        optimizers = self.make_optimizers([[module] for module in net])
        return [CoordinatesStage(list(net), optimizers, net.shapes(x)[-1][0], self)]


_UNSTEADY = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class CoordinatesStage(CodesStage):
    """Codes "z" of the hidden modules' outputs."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        classes: int,
        method: MAC,
    ) -> None:
        super().__init__(modules, optimizers, classes)
        self.first, self.growth, self.every = method.penalty, method.growth, method.every
        self.weight_decay = method.weight_decay
        self.inner, self.tolerance = method.inner, method.tolerance

    @property
    def penalty(self) -> float:
        """μ of the sweep that is under way, or comes next."""
        return float(self.first * self.growth ** (self.sweeps // self.every))

    @torch.no_grad()
    def begin(self, x: Tensor) -> Codes:
        zs = []
        for module in self.modules[:-1]:
            x = module(x)
            zs.append(x)
        return {"z": zs}

    def blocks(self, x: Tensor, y: Tensor) -> Iterator[str]:
        def of_codes(zs: list[Tensor]) -> Tensor:
            return torch.stack(self._fits(x, y, zs)).sum() / len(x)

        if self.codes["z"]:
            self.codes["z"] = minimise(self.codes["z"], of_codes, self.inner, self.tolerance)
            yield "z"
        inputs, goals = [x, *self.codes["z"]], [*self.codes["z"], y]
        for k, (module, given, goal) in enumerate(zip(self.modules, inputs, goals, strict=True)):
            share = 1.0 if k == len(self.modules) - 1 else self.penalty
            self.weights[k] = self._fit_module(k, module, given, goal, share)
            yield f"W{k}"

    def _fit_module(
        self, k: int, module: nn.Module, given: Tensor, goal: Tensor, share: float
    ) -> list[Tensor]:
        """The module's parameters that minimise its penalty, and weight decay."""
        *front, last = _layers(module)
        linear = isinstance(last, nn.Linear) and last.bias is not None
        if linear and not any(trainable(layer) for layer in front) and len(trainable(last)) == 2:
            with torch.no_grad():
                features = given
                for layer in front:
                    features = layer(features)
            rows = torch.cat([features, features.new_ones(len(features), 1)], 1)
            gram = share / len(rows) * rows.T @ rows
            gram.diagonal().add_(self.weight_decay)
            right = share / len(rows) * rows.T @ goal
            both = solve(double(gram), double(right), f"inputs of module {k}")
            return [both[:-1].T.to(goal).contiguous(), both[-1].to(goal)]

        names = [name for name, p in module.named_parameters() if p.requires_grad]
        before = trainable(module)

        def of_weights(moves: list[Tensor]) -> Tensor:
            now = [p + move for p, move in zip(before, moves, strict=True)]
            out = functional_call(module, dict(zip(names, now, strict=True)), (given,))
            fit = share * half_square(out - goal) / len(given)
            decay = torch.stack([half_square(p) for p in now]).sum()
            return fit + self.weight_decay * decay

        start = [torch.zeros_like(p) for p in before]
        moves = minimise(start, of_weights, self.inner, self.tolerance)
        return [p.detach() + move for p, move in zip(before, moves, strict=True)]

    def _fits(self, x: Tensor, y: Tensor, zs: list[Tensor]) -> list[Tensor]:
        """Each module's penalty, and the last one's loss, summed over images."""
        terms = []
        for module, now, given, goal in zip(
            self.modules, self.present(), [x, *zs], [*zs, y], strict=True
        ):
            names = [name for name, p in module.named_parameters() if p.requires_grad]
            out = functional_call(module, dict(zip(names, now, strict=True)), (given,))
            terms.append(self.penalty * half_square(out - goal))
        terms[-1] = terms[-1] / self.penalty
        return terms

    def terms(self, x: Tensor, y: Tensor) -> list[Tensor]:
        decay = self.weight_decay * len(x)
        return [
            fit + decay * torch.stack([half_square(p) for p in now]).sum()
            for fit, now in zip(self._fits(x, y, self.codes["z"]), self.present(), strict=True)
        ]

    def targets(self) -> list[Tensor]:
        return self.codes["z"]


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a sequence of sequences, in order."""
    if isinstance(module, nn.Sequential):
        return [layer for part in module for layer in _layers(part)]
    return [module]


def minimise(
    start: Sequence[Tensor],
    loss: Callable[[list[Tensor]], Tensor],
    iterations: int,
    tolerance: float,
) -> list[Tensor]:
    """Tensors moved down a loss by L-BFGS with a line search: never to a higher loss.

    Args:
        start: where to begin; left as they are.
        loss: a scalar of such tensors.
        iterations: at most so many.
        tolerance: stop when no entry of the gradient is larger.
    """
    moved = [t.detach().clone().requires_grad_() for t in start]
    solver = torch.optim.LBFGS(
        moved,
        max_iter=iterations,
        max_eval=3 * iterations,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=5,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss(moved)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        before = solver.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        after = loss(moved)
    lower = bool(after <= before)
    return [(m if lower else t).detach() for m, t in zip(moved, start, strict=True)]
