"""A plain convolutional network, cut-able before every nonlinearity."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from modlib.kernels import FeatureMap
from modlib.networks.seeding import seeded


class ConvUnit(nn.Sequential):
    """[ReLU →] 3×3 convolution → batch norm. It ends before the nonlinearity, where modules may end."""

    def __init__(self, channels_in: int, channels: int, stride: int, first: bool) -> None:
        convolution = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        layers = [convolution, nn.BatchNorm2d(channels)]
        super().__init__(*layers if first else [nn.ReLU(), *layers])


def cnn(
    widths: Sequence[int] = (24, 48, 96),
    classes: int = 10,
    *,
    channels: int = 3,
    size: int = 32,
    stride: int = 2,
    kernel: str = "relu-pool",
    seed: int | None = None,
) -> nn.Sequential:
    """Blocks of two 3×3 convolutions with batch norm, a feature map of unit norm, a linear layer.

    Its layers are ``conv1`` … ``conv{2B}``, ``features`` and ``head``. Every convolution unit ends
    before its nonlinearity, so a cut anywhere is a cut where the theorems want it.

    Args:
        widths: channels of each of the B blocks. All blocks but the first halve the image's side.
        classes: number of outputs.
        channels: of the image, 3 for colour.
        size: side H = W of the images, in pixels.
        stride: of the first convolution; 2 makes everything after it four times cheaper.
        kernel: of the feature map in front of the linear layer.
        seed: of the initial weights; None takes PyTorch's global state.

    Returns:
        A network from images (N, channels, H, W) to logits (N, classes).

    >>> import torch
    >>> cnn(seed=0)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    with seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before = channels
        for block, width in enumerate(widths):
            step = 2 if block else stride
            layers[f"conv{2 * block + 1}"] = ConvUnit(before, width, step, first=block == 0)
            layers[f"conv{2 * block + 2}"] = ConvUnit(width, width, 1, first=False)
            before = width
        return with_head(layers, kernel, classes, (channels, size, size))


def with_head(
    layers: OrderedDict[str, nn.Module], kernel: str, classes: int, shape: tuple[int, int, int]
) -> nn.Sequential:
    """The layers, a feature map and a linear layer that takes its features; ``shape`` is the image's."""
    layers["features"] = FeatureMap(kernel)
    trunk = nn.Sequential(layers).eval()
    with torch.no_grad():
        features = trunk(torch.zeros(1, *shape)).shape[1]
    layers["head"] = nn.Linear(features, classes)
    return nn.Sequential(layers).train()
