r"""Transport-regularised local learning: a module classifies better, but moves its input little.

.. math:: L_k = \mathrm{CE}_{0.1}(a_k(h_k), y) + \frac{1}{2\tau} \sum_m \mathrm{mean}\, r_m^2

r_m is the output of the module's m-th residual branch, CE has smoothed labels. Every module takes one
step of a minimising movement: a descent of the classification loss with a price on the distance.

Source: Karkar, Ayed, de Bézenac & Gallinari 2023 (arXiv 2309.17357). Category measured by the
audit: weakly modular; modular with ``in_turn=True``.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from modlib.kernels import wide
from modlib.methods.local import LocalLearning
from modlib.methods.method import Optimizers, Stage, sgd
from modlib.network import ModularNetwork
from modlib.objectives import AuxiliaryClassifier

_LAST_NORM = {"BasicBlock": "bn2", "Bottleneck": "bn3"}  # torchvision's, which takes long to import


def residual_branches(module: nn.Module) -> list[nn.Module]:
    """The layers whose outputs are added to a shortcut.

    Residual blocks are known by an attribute ``branch``, as in ``networks.resnet``, or as
    torchvision's BasicBlock and Bottleneck, whose branches end in their last norm layer.

    >>> import torchvision
    >>> len(residual_branches(torchvision.models.resnet18()))
    8
    """
    names = [(layer, _LAST_NORM.get(type(layer).__name__, "branch")) for layer in module.modules()]
    ends = [getattr(layer, name, None) for layer, name in names]
    return [end for end in ends if isinstance(end, nn.Module)]


class _Transport(AuxiliaryClassifier):
    """Label-smoothed cross-entropy, plus the movements noted while the module ran."""

    def __init__(self, network: str | nn.Module, smoothing: float, tau: float) -> None:
        super().__init__(network, smoothing=smoothing)
        self.tau = tau
        self.movements: list[Tensor] = []

    def local(self, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
        price = sum(self.movements, start=torch.zeros((), device=h.device)) / (2 * self.tau)
        return cast(Tensor, self(h, y)) + price

    def note(self, branch: nn.Module, inputs: Any, r: Tensor) -> None:
        """A forward hook: remember mean(r²)."""
        # torchvision adds the shortcut to r in place, which would spoil what autograd has saved of it
        self.movements.append(wide(r.clone()).square().mean())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.tau}"


class _TransportStage(Stage):
    """A stage whose modules' residual branches are watched while it steps, and at no other time."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        with ExitStack() as hooks:
            for module, objective in zip(self.modules, self.objectives, strict=True):
                assert isinstance(objective, _Transport)
                hooks.callback(objective.movements.clear)  # each holds the graph of its module
                for branch in residual_branches(module):
                    hooks.callback(branch.register_forward_hook(objective.note).remove)
            return super().step(x, y)


class TransportRegularised(LocalLearning):
    """Train every module on its classifier's loss and on how far its residual blocks move.

    Args:
        tau: τ > 0, the step of the movement; the larger, the less a distance costs. Distances are
            means over a residual's entries: for sums over them divide τ by their number.
        network: the hidden modules' classifiers, as for ``AuxiliaryClassifier``.
        smoothing: of the labels.
        in_turn: train one module after another.
        optimizer: makes one module's optimiser, or a list with one for each module.

    Raises:
        ValueError: τ is not above 0; (when training starts) no module has a residual block.

    >>> import modlib
    >>> net = modlib.networks.resnet((4, 8), 1, channels=1, size=8, kernel="relu")
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> method = TransportRegularised(tau=1.0)
    >>> history = modlib.fit(modlib.partition(net, 2), method, data, epochs=1, progress=False)
    >>> len(history.rows[0]["losses"])
    2
    """

    stage_type = _TransportStage

    def __init__(
        self,
        tau: float = 1.0,
        network: str | nn.Module = "mlp-sr",
        smoothing: float = 0.1,
        *,
        in_turn: bool = False,
        optimizer: Optimizers = None,
    ) -> None:
        if not tau > 0:
            raise ValueError(f"tau={tau}: give a number above 0; a large one moves freely.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: give a share of at least 0 and below 1.")
        super().__init__(
            _Transport(network, smoothing, tau),
            in_turn=in_turn,
            optimizer=optimizer,
            output=_Transport(nn.Identity(), smoothing, tau),  # the last output IS logits
        )

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        if not residual_branches(net):
            raise ValueError(
                "net: no module has a residual block whose movement could be watched; give a residual "
                "network, such as modlib.networks.resnet()."
            )
        return super().stages(net, x)


def transport(tau: float = 1.0, *, optimizer: Optimizers = None) -> TransportRegularised:
    """Transport-regularised learning of residual modules.

    Published: SGD at rate 0.002 to 0.003, momentum 0.9, weight decay 2e-4, 300 epochs; orthogonal initial
    weights with gain 0.1 (which a method does not set); τ halved for the first half of the modules in
    one variant (not built here).

    Args:
        tau: step of the movement; the larger, the less a distance costs.
        optimizer: the published one at rate 0.003 if None.

    Raises:
        ValueError: τ is not above 0.

    Source: Karkar, Ayed, de Bézenac & Gallinari 2023 (arXiv 2309.17357).

    >>> transport(tau=2.0).objective.tau
    2.0
    """
    published = sgd(lr=0.003, weight_decay=2e-4, nesterov=False)
    return TransportRegularised(tau, optimizer=optimizer or published)
