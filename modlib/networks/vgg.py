"""VGG8b, the network on which local error signals were published."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from modlib.networks.seeding import seeded
from modlib.networks.sizes import check_whole

_MULTIPLES = (1, 2, 2, 4, 4, 4)  # channels of the convolutions, in units of the first one's
_POOLED = (
    2,
    4,
    5,
)  # convolutions that begin with pooling, counted from 0; so does the hidden layer


class VGGUnit(nn.Sequential):
    """[dropout →] [pooling →] weights → batch norm → leaky ReLU: kept whole when a network is cut.

    It ends before its dropout, where local objectives are published to look.

    >>> import torch
    >>> net = vgg8b(width=4, seed=0)
    >>> isinstance(net.conv2, VGGUnit), net.conv2[-1]
    (True, LeakyReLU(negative_slope=0.01))
    """


def vgg8b(
    classes: int = 10,
    *,
    width: int = 128,
    channels: int = 3,
    size: int = 32,
    dropout: float = 0.2,
    slope: float = 0.01,
    seed: int | None = None,
) -> nn.Sequential:
    """Six 3×3 convolutions, one hidden and one output layer, with batch norm and leaky ReLU.

    Its layers are ``conv1`` … ``conv6``, ``hidden`` and ``head``.

    Args:
        classes: number of outputs.
        width: channels of the first convolution, 128 as published; the others and the hidden layer
            have 2, 4 and 8 times as many.
        channels: of the image, 3 for colour.
        size: side H = W of the images, in pixels; at least 16.
        dropout: probability.
        slope: of the leaky ReLU, as published for sim and predsim; 0 makes it the plain ReLU that
            was published for pred and for end-to-end training.
        seed: of the initial weights; None takes PyTorch's global state.

    Returns:
        A network from images (N, channels, H, W) to logits (N, classes).

    Raises:
        ValueError: the image is too small for four poolings, or a number is no whole one above 0.

    Source: Nøkland & Eidnes 2019 (arXiv 1901.06656), VGG8b.

    >>> import torch
    >>> vgg8b(width=4, seed=0)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_whole(classes=classes, width=width, channels=channels, size=size)
    if size < 16:
        raise ValueError(f"size={size}: four poolings need images of at least 16 pixels a side.")
    with seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before = channels
        for number, multiple in enumerate(_MULTIPLES):
            after = multiple * width
            convolution = nn.Conv2d(before, after, 3, padding=1)
            start = _start(number in _POOLED, dropout if number else 0.0)
            layers[f"conv{number + 1}"] = _unit(start, convolution, nn.BatchNorm2d(after), slope)
            before = after
        hidden = nn.Linear(before * (size // 16) ** 2, 8 * width)
        start = [*_start(True, dropout), nn.Flatten()]
        layers["hidden"] = _unit(start, hidden, nn.BatchNorm1d(8 * width), slope)
        layers["head"] = nn.Sequential(nn.Dropout(dropout), nn.Linear(8 * width, classes))
        return nn.Sequential(layers)


def _start(pooled: bool, dropout: float) -> list[nn.Module]:
    start: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
    return [*start, nn.MaxPool2d(2)] if pooled else start


def _unit(start: list[nn.Module], weights: nn.Module, norm: nn.Module, slope: float) -> VGGUnit:
    return VGGUnit(*start, weights, norm, nn.LeakyReLU(slope))
