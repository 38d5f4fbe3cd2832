r"""Supervised local objectives: a classifier of a module's own, thrown away after training.

.. math:: L_k = \mathrm{CE}(a_k(h_k), y)

Sources of the auxiliary networks: Belilovsky et al. 2020 (arXiv 1901.08164), section 4.1 and
appendix; Belilovsky et al. 2019 (arXiv 1812.11446), section 3; Nøkland & Eidnes 2019 (arXiv
1901.06656); Mostafa et al. 2018 (arXiv 1711.06756); Gong et al. 2025 (arXiv 2501.09238).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self, cast

from torch import Tensor, nn

from modlib.objectives.cross_entropy import checked_share, cross_entropy
from modlib.objectives.objective import Objective
from modlib.tokens import MeanToken, pooled_shape


class AuxiliaryClassifier(Objective):
    """Cross-entropy of an auxiliary network on top of a module.

    Args:
        network: a network of your own from h to logits, or one of these, for maps (C, H, W) unless said
            (those that take vectors also take the mean of tokens):

            - "linear": pool to 2×2, one linear layer (vectors too).
            - "mlp": pool to 2×2, three hidden linear layers with batch norm (vectors too).
            - "mlp-sr": reduce the map to a quarter of its side, three 1×1 convolutions, then as
              "mlp" (vectors too: then it is "mlp"). The default of decoupled greedy learning.
            - "cnn": two 3×3 convolutions at full resolution, then "linear".
            - "greedy-1", "greedy-2", "greedy-3": k - 1 blocks of 3×3 convolution, batch norm and
              ReLU, pool to 2×2, batch norm, one linear layer. Greedy layer-wise training solves
              k-hidden-layer problems: the module is the first of the k.
            - "pred": pool until 2048 numbers are left, one linear layer whose weights start at 0, so
              that the first value is log(classes) (vectors too, which are not pooled).
            - "flat": one linear layer without bias on all of h (vectors too).

            "linear", "greedy-1", "pred" and "flat" have no nonlinearity of their own. Let modules end
            after theirs (``networks.cnn(..., boundary="after")``), as the papers do: under such a head
            a module that ends before it learns one hidden layer less (the book proves it beside greedy
            learning).
        smoothing: of the labels, as in ``CrossEntropy``.
        trainable: False leaves the auxiliary network as it was drawn: no step and no weight decay
            changes its parameters, and the module learns to suit a random classifier.

    Raises:
        ValueError: the name is unknown, a module's output has a shape that the kind does not take, or
            the labels do not fit the outputs.

    >>> import torch
    >>> objective = AuxiliaryClassifier("mlp-sr").for_module((8, 16, 16), classes=10)
    >>> bool(objective(torch.randn(4, 8, 16, 16), torch.arange(4)) > 0)
    True
    >>> decoder = AuxiliaryClassifier("pred").for_module((64, 16, 16), classes=10)
    >>> round(decoder(torch.randn(4, 64, 16, 16), torch.arange(4)).exp().item(), 4)
    10.0
    """

    def __init__(
        self,
        network: str | nn.Module = "mlp-sr",
        trainable: bool = True,
        *,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.smoothing = checked_share("smoothing", smoothing)
        self.kind = network if isinstance(network, str) else "own"
        if isinstance(network, str) and network not in _KINDS:
            raise ValueError(
                f"network={network!r} is unknown; choose from {', '.join(_KINDS)} or give a module."
            )
        self.network = network if isinstance(network, nn.Module) else None
        self.trainable = trainable
        self._freeze()

    def for_module(self, shape: Sequence[int], classes: int) -> Self:
        ready = super().for_module(shape, classes)
        if ready.network is None:
            if len(shape) not in (1, 2, 3):
                raise ValueError(
                    f"network={self.kind!r} needs outputs (d,), (C, H, W) or tokens (T, d), but the "
                    f"module's output has shape {tuple(shape)}; give a network of your own."
                )
            network = _KINDS[self.kind](pooled_shape(shape), classes)
            ready.network = nn.Sequential(MeanToken(), *network) if len(shape) == 2 else network
        ready._freeze()
        return ready

    def _freeze(self) -> None:
        if not self.trainable:
            # Without gradients optimisers pass them over, weight decay included.
            self.requires_grad_(False)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.logits(h), y, self.smoothing)

    def logits(self, h: Tensor) -> Tensor:
        """The auxiliary network's logits (N, classes) for a module's output h."""
        if self.network is None:
            raise ValueError(
                f"This {type(self).__name__} has no network yet; call .for_module(shape, classes) with "
                "the shape of the module's output."
            )
        return cast(Tensor, self.network(h))

    def extra_repr(self) -> str:
        smoothing = f", smoothing={self.smoothing}" if self.smoothing else ""
        return repr(self.kind) + ("" if self.trainable else ", trainable=False") + smoothing


class MonoForward(AuxiliaryClassifier):
    r"""Cross-entropy of the goodness :math:`G = h M^\top`, with a learned matrix M (classes × n).

    h is flattened to n numbers (tokens: their mean). The paper takes h after its nonlinearity; let modules
    end there (``boundary="after"`` in ``networks.mlp`` and ``networks.cnn``) to do the same. ``logits`` gives
    G, from which the paper predicts. It is ``AuxiliaryClassifier("flat")`` by the name that its
    authors gave.

    Source: Gong, Li & Abdulla 2025 (arXiv 2501.09238).

    >>> import torch
    >>> objective = MonoForward().for_module((8,), classes=3)
    >>> h, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    >>> bool(objective(h, y) == torch.nn.functional.cross_entropy(h @ next(objective.parameters()).T, y))
    True
    """

    def __init__(self) -> None:
        super().__init__("flat")

    def extra_repr(self) -> str:
        return ""


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
    _check_maps("cnn", shape)
    return nn.Sequential(*_convolutions(shape[0], 2), *_linear(shape, classes))


def _greedy(hidden_layers: int, shape: Shape, classes: int) -> nn.Sequential:
    """The rest of a problem with k hidden layers, of which the module is the first."""
    _check_maps(f"greedy-{hidden_layers}", shape)
    channels = shape[0]
    end = [nn.AdaptiveAvgPool2d(2), nn.BatchNorm2d(channels), nn.Flatten()]
    layers = [*_convolutions(channels, hidden_layers - 1), *end]
    return nn.Sequential(*layers, nn.Linear(4 * channels, classes))


def _pred(shape: Shape, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    if len(shape) == 3:
        window, shape = _pooled(shape)
        # Where the side is odd the last window is smaller, and averages what it has.
        layers = [nn.AvgPool2d(window, ceil_mode=True), nn.Flatten()]
    decoder = nn.Linear(math.prod(shape), classes)
    nn.init.zeros_(decoder.weight)
    nn.init.zeros_(decoder.bias)
    return nn.Sequential(*layers, decoder)


def _flat(shape: Shape, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes, bias=False))


def _pooled(shape: Shape) -> tuple[tuple[int, int], Shape]:
    """The window, doubled in height and width by turns, after which few enough numbers are left."""
    channels, height, width = shape
    window, pooled = [1, 1], [height, width]
    side = 0
    while channels * pooled[0] * pooled[1] > _DECODED and pooled != [1, 1]:
        window[side] = min(2 * window[side], shape[1 + side])
        pooled[side] = math.ceil(shape[1 + side] / window[side])
        side = 1 - side
    return (window[0], window[1]), (channels, *pooled)


def _convolutions(channels: int, count: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(count):
        convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
    return layers


def _check_maps(kind: str, shape: Shape) -> None:
    if len(shape) != 3:
        raise ValueError(
            f"network={kind!r} needs maps (C, H, W), but gets vectors of shape {shape}; use 'mlp' or "
            "'linear' there."
        )


_DECODED = 2048  # numbers that "pred" decodes, at most (unless there are more channels)

_KINDS: dict[str, Callable[[Shape, int], nn.Sequential]] = {
    "linear": _linear,
    "mlp": _mlp,
    "mlp-sr": _mlp_sr,
    "cnn": _cnn,
    "greedy-1": partial(_greedy, 1),
    "greedy-2": partial(_greedy, 2),
    "greedy-3": partial(_greedy, 3),
    "pred": _pred,
    "flat": _flat,
}
