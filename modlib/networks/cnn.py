"""A plain convolutional network, cut-able before (or after) every nonlinearity."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import nn

from modlib.kernels import FeatureMap
from modlib.networks.boundary import check_boundary
from modlib.networks.seeding import seeded
from modlib.networks.sizes import check_list, check_whole


class ConvUnit(nn.Sequential):
    """[activation →] 3×3 convolution → batch norm [→ activation]: kept whole when a network is cut."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        stride: int,
        first: bool,
        boundary: str = "before",
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        convolution = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        start = [] if first or boundary == "after" else [activation()]
        end = [activation()] if boundary == "after" else []
        super().__init__(*start, convolution, nn.BatchNorm2d(channels), *end)


def cnn(
    widths: Sequence[int] = (24, 48, 96),
    classes: int = 10,
    *,
    channels: int = 3,
    size: int = 32,
    stride: int = 2,
    boundary: str = "before",
    kernel: str = "relu-pool",
    activation: Callable[[], nn.Module] = nn.ReLU,
    seed: int | None = None,
) -> nn.Sequential:
    """Blocks of two 3×3 convolutions with batch norm, a feature map of unit norm, a linear layer.

    Its layers are ``conv1`` … ``conv{2B}``, ``features`` and ``head``. Every convolution unit ends
    before its nonlinearity, so a cut anywhere is a cut where the theorems of proxy objectives want
    it; papers on auxiliary heads cut after it.

    Args:
        widths: channels of each of the B blocks. All blocks but the first halve the image's side.
        classes: number of outputs.
        channels: of the image, 3 for colour.
        size: side H = W of the images, in pixels.
        stride: of the first convolution; 2 makes everything after it four times cheaper.
        boundary: "before" lets each convolution begin with the ReLU of the one before it; "after"
            lets it end with its own. With ReLU and a kernel whose first step is a ReLU ("relu-pool") both are
            the same function of the image, cut in other places.
        kernel: of the feature map in front of the linear layer.
        activation: makes the nonlinearity; target propagation wants a smooth one, such as ``nn.ELU``.
        seed: of the initial weights; None takes PyTorch's global state.

    Returns:
        A network from images (N, channels, H, W) to logits (N, classes).

    Raises:
        ValueError: ``boundary`` is neither "before" nor "after", a number is no whole one above 0, or
            the last maps are too small for the kernel.

    >>> import torch
    >>> cnn(seed=0)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_boundary(boundary)
    check_list("widths", widths)
    check_whole(classes=classes, channels=channels, size=size, stride=stride)
    with seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before, sides = channels, (boundary, activation)
        for block, width in enumerate(widths):
            step = 2 if block else stride
            layers[f"conv{2 * block + 1}"] = ConvUnit(before, width, step, block == 0, *sides)
            layers[f"conv{2 * block + 2}"] = ConvUnit(width, width, 1, False, *sides)
            before = width
        return with_head(layers, kernel, classes, (channels, size, size))


def with_head(
    layers: OrderedDict[str, nn.Module], kernel: str, classes: int, shape: tuple[int, int, int]
) -> nn.Sequential:
    """The layers, a feature map and a linear layer that takes its features; ``shape`` is the image's."""
    features = FeatureMap(kernel)
    with torch.no_grad():
        maps = nn.Sequential(layers).eval()(torch.zeros(1, *shape))
        try:
            units = features(maps).shape[1]
        except ValueError as error:
            raise ValueError(
                f"size={shape[1]}: the image ends as a map of {maps.shape[2]}×{maps.shape[3]} pixels, too "
                f"few for kernel={kernel!r}; give larger images, or kernel='relu'."
            ) from error
    layers["features"] = features
    layers["head"] = nn.Linear(units, classes)
    return nn.Sequential(layers).train()
