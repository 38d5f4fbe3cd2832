r"""Supervised local objectives: a classifier of a module's own, thrown away after training.

.. math:: L_k = \mathrm{CE}(a_k(h_k), y)

Source: Belilovsky et al. 2020 (arXiv 1901.08164), section 4.1 and appendix for the auxiliary
networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self, cast

from torch import Tensor, nn
from torch.nn import functional as F

from modlib.objectives.objective import Objective


class CrossEntropy(Objective):
    """Softmax cross-entropy (nats) of logits h (N, C) and labels y (N,): E2EBP's objective.

    >>> import torch
    >>> round(CrossEntropy()(torch.zeros(3, 4), torch.tensor([0, 1, 3])).exp().item(), 4)
    4.0
    """

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(h, y)


class AuxiliaryClassifier(Objective):
    """Cross-entropy of an auxiliary network on top of a module.

    Args:
        network: "linear" (pool to 2×2, one linear layer), "mlp" (pool to 2×2, three hidden linear
            layers with batch norm), "mlp-sr" (DGL's default: reduce the map to a quarter of its
            side, three 1×1 convolutions, then as "mlp"), "cnn" (two 3×3 convolutions at full
            resolution, then "linear"), or a network of your own from h to logits.

    Raises:
        ValueError: the name is unknown, or a module's output has a shape that the kind does not take.

    >>> import torch
    >>> objective = AuxiliaryClassifier("mlp-sr").for_module((8, 16, 16), classes=10)
    >>> bool(objective(torch.randn(4, 8, 16, 16), torch.arange(4)) > 0)
    True
    """

    def __init__(self, network: str | nn.Module = "mlp-sr") -> None:
        super().__init__()
        self.kind = network if isinstance(network, str) else "own"
        if isinstance(network, str) and network not in _KINDS:
            raise ValueError(
                f"network={network!r} is unknown; choose from {', '.join(_KINDS)} or give a module."
            )
        self.network = network if isinstance(network, nn.Module) else None

    def for_module(self, shape: Sequence[int], classes: int) -> Self:
        ready = super().for_module(shape, classes)
        if ready.network is None:
            if len(shape) not in (1, 3):
                raise ValueError(
                    f"network={self.kind!r} needs outputs (d,) or (C, H, W), but the module's output "
                    f"has shape {tuple(shape)}; give a network of your own."
                )
            ready.network = _KINDS[self.kind](tuple(shape), classes)
        return ready

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(h), y)

    def logits(self, h: Tensor) -> Tensor:
        """The auxiliary network's logits (N, C) for a module's output h."""
        if self.network is None:
            raise ValueError(
                "This AuxiliaryClassifier has no network yet; call .for_module(shape, classes) with "
                "the shape of the module's output."
            )
        return cast(Tensor, self.network(h))

    def extra_repr(self) -> str:
        return repr(self.kind)


# --- auxiliary networks ---------------------------------------------------------------------------

Shape = tuple[int, ...]


def _linear(shape: Shape, classes: int) -> nn.Sequential:
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(shape[0], classes))
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * shape[0], classes))


def _mlp(shape: Shape, classes: int) -> nn.Sequential:
    if len(shape) == 1:
        width, layers = shape[0], []
    else:
        width, layers = 4 * shape[0], [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for _ in range(3):
        layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _mlp_sr(shape: Shape, classes: int) -> nn.Sequential:
    if len(shape) == 1:
        return _mlp(shape, classes)
    channels, height, width = shape
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d((math.ceil(height / 4), math.ceil(width / 4)))]
    for _ in range(3):
        layers += [
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, *_mlp(shape, classes))


def _cnn(shape: Shape, classes: int) -> nn.Sequential:
    if len(shape) != 3:
        raise ValueError(
            f"network='cnn' needs maps (C, H, W), but the module's output has shape {shape}; "
            "use 'mlp' or 'linear' there."
        )
    layers: list[nn.Module] = []
    for _ in range(2):
        convolution = nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(shape[0]), nn.ReLU()]
    return nn.Sequential(*layers, *_linear(shape, classes))


_KINDS: dict[str, Callable[[Shape, int], nn.Sequential]] = {
    "linear": _linear,
    "mlp": _mlp,
    "mlp-sr": _mlp_sr,
    "cnn": _cnn,
}
