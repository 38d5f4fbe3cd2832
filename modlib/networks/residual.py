"""A residual network, cut-able before (or after) every nonlinearity."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from modlib.networks.boundary import check_boundary
from modlib.networks.cnn import ConvUnit, with_head
from modlib.networks.seeding import seeded
from modlib.networks.sizes import check_list, check_whole


class ResidualUnit(nn.Module):
    """u → s + branch(s), s = ReLU(u): the published block, begun and ended before its ReLU.

    With boundary "after" it is begun and ended after it: u → ReLU(u + branch(u)).

    Maps (N, C, H, W) to (N, C', H/stride, W/stride). The shortcut has no parameters: it leaves out
    rows and columns, and fills up with channels of zeros (option A of the paper).

    Attributes:
        branch: what is added to the shortcut.

    >>> import torch
    >>> ResidualUnit(4, 8, stride=2)(torch.zeros(2, 4, 16, 16)).shape
    torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self, channels_in: int, channels: int, stride: int, boundary: str = "before"
    ) -> None:
        super().__init__()
        self.boundary = boundary
        self.stride, self.more = stride, channels - channels_in
        if self.more < 0:
            raise ValueError(f"channels={channels}: give at least the {channels_in} that come in.")
        self.branch = nn.Sequential(
            ConvUnit(channels_in, channels, stride, first=True),  # its ReLU is the shortcut's too
            ConvUnit(channels, channels, 1, first=False),
        )

    def forward(self, u: Tensor) -> Tensor:
        s = F.relu(u) if self.boundary == "before" else u
        shortcut = F.pad(s[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        # In place where no gradient needs what was there: the norm's keeps its input, the sum's nothing.
        out = cast(Tensor, self.branch(s)).add_(shortcut)
        return out.relu_() if self.boundary == "after" else out


def resnet(
    widths: Sequence[int] = (16, 32, 64),
    blocks: int | Sequence[int] = 3,
    classes: int = 10,
    *,
    channels: int = 3,
    size: int = 32,
    stride: int = 1,
    boundary: str = "before",
    kernel: str = "relu-pool",
    seed: int | None = None,
) -> nn.Sequential:
    """The residual network of 6n + 2 layers for small images: blocks=18 makes ResNet-110.

    Its layers are ``stem``, ``block1`` … ``block{L}``, ``features`` and ``head``. Blocks compute what
    the published ones do, but each begins with the nonlinearity of the one before it, unless
    ``boundary`` is "after". In front of the linear layer stands a feature map of unit norm in place
    of global pooling.

    Args:
        widths: channels of each group of blocks, not falling; all groups but the first halve the side.
        blocks: n, residual blocks in each group; or a list, one number for each group.
        classes: number of outputs.
        channels: of the image, 3 for colour.
        size: side H = W of the images, in pixels.
        stride: of the stem's convolution; 2 makes everything after it four times cheaper.
        boundary: on which side of their ReLU layers end: "before", or "after" as published.
        kernel: of the feature map; "relu" where the last maps are smaller than 4×4.
        seed: of the initial weights; None takes PyTorch's global state.

    Returns:
        A network from images (N, channels, H, W) to logits (N, classes).

    Raises:
        ValueError: ``boundary`` is neither "before" nor "after", a number is no whole one above 0,
            widths fall, or the last maps are too small for the kernel.

    Source: He, Zhang, Ren & Sun 2016 (arXiv 1512.03385), section 4.2.

    >>> import torch
    >>> resnet(blocks=1, seed=0)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_boundary(boundary)
    check_list("widths", widths)
    if isinstance(blocks, int):
        check_whole(blocks=blocks)
    counts = [blocks] * len(widths) if isinstance(blocks, int) else list(blocks)
    check_list("blocks", counts)
    if len(counts) != len(widths):
        raise ValueError(
            f"blocks={counts}: give one number for each of the {len(widths)} groups, or one for all."
        )
    check_whole(classes=classes, channels=channels, size=size, stride=stride)
    with seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["stem"] = ConvUnit(channels, widths[0], stride, first=True, boundary=boundary)
        before = widths[0]
        for group, (width, count) in enumerate(zip(widths, counts, strict=True)):
            for position in range(count):
                step = 2 if group and not position else 1
                layers[f"block{len(layers)}"] = ResidualUnit(before, width, step, boundary)
                before = width
        return with_head(layers, kernel, classes, (channels, size, size))
