r"""AugLocal: a module's classifier begins with layers like those that follow it in the network.

.. math:: L_k = \mathrm{CE}\bigl(W\, \mathrm{pool}(g_{d_k} \circ \dots \circ g_1 (h_k)), y\bigr)

Count the network's L convolutional layers from 0 (in a transformer, the embedding and the blocks), and
let module k end with layer l. Then :math:`g_i` is a freshly initialised copy of layer

.. math:: \mathrm{round}\Bigl(l + \frac{L - 1 - l}{d_k}\, i\Bigr), \quad i = 1, \dots, d_k, \qquad
          d_k = \max\Bigl(1, \mathrm{round}\bigl(d\,(1 - \tfrac{l c}{L - 2})
          + \tfrac{l c}{L - 2}\bigr)\Bigr)

but never more than the L - 1 - l layers that follow. On ResNet-32 with d = 3 and c = 0.5, network and
classifiers then have the published 2.42 million parameters; without the limit they have 2.50.

Source: Ma, Wu, Si & Tan 2024 (arXiv 2402.17318). Category measured by the audit: weakly
modular.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from modlib.methods.local import LocalLearning
from modlib.methods.method import Optimizers
from modlib.network import ModularNetwork, evaluating
from modlib.networks.cnn import ConvUnit
from modlib.networks.residual import ResidualUnit
from modlib.networks.seeding import redraw
from modlib.networks.whitened import WhitenedUnit
from modlib.objectives import AuxiliaryClassifier, CrossEntropy, Objective
from modlib.tokens import MeanToken


class AugLocal(LocalLearning):
    """Train every module on the cross-entropy of a classifier built from copies of later layers.

    A copy gives maps of the same shape as the layer it was made of: its first convolution, and a
    residual block's short cut, are made anew for the channels and the side of what it gets instead.
    ReLU, global average pooling and a linear layer follow the last copy. Layers of
    ``modlib.networks.cnn``, ``whitened_cnn`` and ``resnet`` and the blocks of torchvision's ResNets can
    be copied; what has no convolution (a stem's batch norm, pooling, a classifier) is not counted as a layer.

    The blocks of a transformer count as layers too, and are copied as they are; layer norm, the mean of
    the tokens and a linear layer follow the last copy. (Not in the paper.)

    Published setting: every residual block, and the stem, a module; SGD with Nesterov momentum
    0.9, weight decay 1e-4, batches of 1024 at rate 0.8, cosine over 400 epochs.

    Args:
        depth: d, layers in the classifier of the first module; at least 1.
        shrink: c in [0, 1], by how much the depth falls towards the output.
        smoothing: of the labels, as in ``objectives.CrossEntropy``; an ``output`` that is given has its own.
        optimizer, output: as in ``LocalLearning``.

    Raises:
        ValueError: an argument is out of range; or (when training starts) a hidden module's output is
            neither map nor tokens, or a chosen layer cannot be copied or made to fit.

    >>> import modlib
    >>> net = modlib.networks.cnn((4, 8), channels=1, size=8, stride=1, kernel="relu", seed=0)
    >>> net = modlib.partition(net, ["conv3", "features"])
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> history = modlib.fit(net, AugLocal(depth=2), data, epochs=1, progress=False)
    >>> len(history.rows[0]["losses"])
    3
    """

    def __init__(
        self,
        depth: int = 3,
        shrink: float = 0.5,
        *,
        smoothing: float = 0.0,
        optimizer: Optimizers = None,
        output: Objective | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, output=output or CrossEntropy(smoothing))
        if depth < 1:
            raise ValueError(f"depth={depth}: give at least 1 layer.")
        if not 0 <= shrink <= 1:
            raise ValueError(f"shrink={shrink}: give a number from 0 (equal depths) to 1.")
        self.depth, self.shrink = depth, shrink
        self._objective = partial(AuxiliaryClassifier, smoothing=smoothing)

    def hidden_objectives(
        self, net: ModularNetwork, x: Tensor, shapes: Sequence[tuple[int, ...]], classes: int
    ) -> list[Objective]:
        units, ends = _units(net, x)
        local: list[Objective] = []
        for end, shape in zip(ends[:-1], shapes, strict=True):
            chosen = chosen_layers(end, len(units), self.depth, self.shrink)
            classifier = _classifier([units[i] for i in chosen], shape, classes)
            local.append(self._objective(classifier))
        return local


def chosen_layers(layer: int, layers: int, depth: int, shrink: float = 0.5) -> list[int]:
    """The layers whose copies classify the output of ``layer``; all are counted from 0.

    >>> chosen_layers(0, 16, depth=3), chosen_layers(13, 16, depth=3)
    ([5, 10, 15], [14, 15])
    """
    fall = layer * shrink / max(1, layers - 2)
    following = layers - 1 - layer
    count = min(following, max(1, round(depth * (1 - fall) + fall)))
    return [round(layer + following / count * i) for i in range(1, count + 1)]


# --- the network's layers -------------------------------------------------------------------------


class _Unit(NamedTuple):
    """A layer that counts: its name, itself, and its output's shape, (C, H, W) or (T, d)."""

    name: str
    layer: nn.Module
    shape: tuple[int, ...]


def _units(net: ModularNetwork, x: Tensor) -> tuple[list[_Unit], list[int]]:
    """All layers that count; and for each module the last of them by its end."""
    units: list[_Unit] = []
    ends = []
    with evaluating(net):
        for module, names in zip(net, net.names, strict=True):
            for name, layer in zip(names, module, strict=True):
                x = layer(x)
                if _counts(layer, x):
                    units.append(_Unit(name, layer, tuple(x.shape[1:])))
            ends.append(len(units) - 1)
    return units, ends


def _counts(layer: nn.Module, output: Tensor) -> bool:
    """Has it a convolution, or, where tokens come out, a linear layer?"""
    kinds = (nn.Conv2d, nn.Linear) if output.dim() == 3 else nn.Conv2d
    return any(isinstance(part, kinds) for part in layer.modules())


# --- the classifier -------------------------------------------------------------------------------


def _classifier(units: list[_Unit], shape: tuple[int, ...], classes: int) -> nn.Sequential:
    if len(shape) not in (2, 3):
        raise ValueError(
            f"net: AugLocal needs hidden modules that end with maps (C, H, W) or tokens (T, d), but one "
            f"ends with shape {shape}; cut the network before the layer that flattens."
        )
    shapes = [shape, *(unit.shape for unit in units)]
    copies = [
        _fitted(unit, before) for unit, (before, _) in zip(units, pairwise(shapes), strict=True)
    ]
    if len(shape) == 2:
        width = shape[1]
        return nn.Sequential(*copies, nn.LayerNorm(width), MeanToken(), nn.Linear(width, classes))
    # A residual block has ended with a ReLU, which a second one leaves as it is.
    end = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shapes[-1][0], classes)]
    return nn.Sequential(*copies, *end)


def _fitted(unit: _Unit, before: tuple[int, ...]) -> nn.Module:
    """A fresh copy that turns outputs of shape ``before`` into those of the unit's own shape."""
    from torchvision.models.resnet import BasicBlock, Bottleneck  # slow to import, seldom needed

    new = copy.deepcopy(unit.layer)
    if len(before) == 2 and before == unit.shape:  # a transformer's block fits as it is
        redraw(new)
        return new
    if isinstance(new, WhitenedUnit):
        fitted = new.like(before[0], pool=before[1] // unit.shape[1])
        redraw(fitted)
        return fitted
    if not isinstance(new, ConvUnit | ResidualUnit | BasicBlock | Bottleneck):
        raise ValueError(
            f"net: AugLocal cannot copy layer {unit.name!r}, a {type(unit.layer).__name__}; it can copy "
            "the layers of modlib.networks.cnn, whitened_cnn and resnet, torchvision's BasicBlock and "
            "Bottleneck, and blocks from tokens to as many tokens."
        )
    channels, stride = before[0], _stride(unit, before)
    if isinstance(new, ConvUnit):
        for position, part in enumerate(new):
            if isinstance(part, nn.Conv2d):
                new[position] = _convolution(part, channels, stride)
    elif isinstance(new, ResidualUnit):
        new = ResidualUnit(channels, unit.shape[0], stride[0], new.boundary)
    elif isinstance(new, BasicBlock):
        new.conv1 = _convolution(new.conv1, channels, stride)
        new.downsample = _short_cut(channels, unit.shape[0], stride, new.bn2)
    else:
        new.conv1 = _convolution(new.conv1, channels, (1, 1))
        new.conv2 = _convolution(new.conv2, new.conv2.in_channels, stride)
        new.downsample = _short_cut(channels, unit.shape[0], stride, new.bn3)
    redraw(new)
    return new


def _stride(unit: _Unit, before: tuple[int, ...]) -> tuple[int, int]:
    """The stride by which a padded convolution takes the side before to the unit's own."""
    sides = list(zip(before[1:], unit.shape[1:], strict=True))
    down, right = (math.ceil(side / own) for side, own in sides)
    if any(math.ceil(side / s) != own for (side, own), s in zip(sides, (down, right), strict=True)):
        raise ValueError(
            f"net: AugLocal finds no stride that takes maps of {before[1]}×{before[2]} to the "
            f"{unit.shape[1]}×{unit.shape[2]} of layer {unit.name!r}; choose another depth or cut."
        )
    return down, right


def _convolution(old: nn.Conv2d, channels: int, stride: tuple[int, int]) -> nn.Conv2d:
    """One like ``old`` that takes other channels at another stride; its weights are yet to be drawn."""
    new = copy.deepcopy(old)
    new.in_channels, new.stride = channels, stride
    shape = (old.out_channels, channels // old.groups, *old.kernel_size)
    new.weight = nn.Parameter(old.weight.new_empty(shape))
    return new


def _short_cut(
    channels: int, channels_out: int, stride: tuple[int, int], norm: nn.Module
) -> nn.Module | None:
    if channels == channels_out and stride == (1, 1):
        return None
    convolution = nn.Conv2d(channels, channels_out, 1, stride, bias=False)
    return nn.Sequential(convolution, copy.deepcopy(norm))
