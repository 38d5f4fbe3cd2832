"""Images as grids of overlapping patches, in a chain of layers that can be cut."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from modlib.networks.seeding import seeded
from modlib.networks.sizes import check_list, check_whole


class Patches(nn.Module):
    """Cut every image into a grid of patches; later layers see each patch as an image of its own.

    Maps (N, C, S, S) to (N*G*G, C, size, size), image by image and row by row, with
    G = (S - size) / stride + 1.

    Args:
        size: side of a patch, in pixels.
        stride: from one patch to the next; less than ``size`` lets them overlap.

    Raises:
        ValueError: the images are not square, or the patches do not reach their edge.

    >>> import torch
    >>> Patches(16, stride=8)(torch.zeros(2, 1, 64, 64)).shape    # 7×7 patches each
    torch.Size([98, 1, 16, 16])
    """

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        check_whole(size=size, stride=stride)
        self.size, self.stride = size, stride

    def grid(self, side: int) -> int:
        """G, the number of patches along the side of an image."""
        if side < self.size or (side - self.size) % self.stride:
            raise ValueError(
                f"size={self.size}, stride={self.stride}: such patches do not cover {side} pixels; "
                "the side less the size must be a multiple of the stride."
            )
        return (side - self.size) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        if height != width:
            raise ValueError(f"x has images of {height}×{width} pixels; patches need square ones.")
        grid = self.grid(height)
        windows = x.unfold(2, self.size, self.stride).unfold(3, self.size, self.stride)
        by_patch = windows.permute(0, 2, 3, 1, 4, 5)
        return by_patch.reshape(n * grid * grid, channels, self.size, self.size)

    def extra_repr(self) -> str:
        return f"{self.size}, stride={self.stride}"


class JoinPatches(nn.Module):
    """Average an image's patches: (N*G*G, C, H, W) or (N*G*G, C) to (N, C).

    Args:
        grid: G, patches along an image's side.

    Raises:
        ValueError: G is no whole number above 0, or the number of patches no multiple of G*G.

    >>> import torch
    >>> JoinPatches(7)(torch.zeros(98, 32, 4, 4)).shape
    torch.Size([2, 32])
    """

    def __init__(self, grid: int) -> None:
        super().__init__()
        check_whole(grid=grid)
        self.grid = grid

    def forward(self, h: Tensor) -> Tensor:
        if len(h) % self.grid**2:
            raise ValueError(
                f"h holds {len(h)} patches, no multiple of grid² = {self.grid**2}; give the grid into "
                "which the images were cut."
            )
        return h.view(-1, self.grid**2, h.shape[1], h[0, 0].numel()).mean((1, 3))

    def extra_repr(self) -> str:
        return str(self.grid)


def patch_cnn(
    widths: Sequence[int] = (32, 64, 128),
    classes: int = 10,
    *,
    channels: int = 1,
    size: int = 64,
    patch: int = 16,
    stride: int = 8,
    seed: int | None = None,
) -> nn.Sequential:
    """A small encoder of patches for Greedy InfoMax, and a linear layer on their mean.

    Its layers are ``patches``, ``conv1`` … ``conv{B}``, ``join`` and ``head``. Convolutions end before
    their nonlinearity. There is no batch norm, whose statistics would carry news from patch to
    patch.

    Args:
        widths: channels of each of the B 3×3 convolutions; all but the first halve a patch's side.
        classes: number of outputs.
        channels: of the image, 1 for grey.
        size: side of the images, in pixels.
        patch: side of a patch.
        stride: from one patch to the next.
        seed: of the initial weights; None takes PyTorch's global state.

    Returns:
        A network from images (N, channels, size, size) to logits (N, classes).

    Raises:
        ValueError: a number is no whole one above 0, or patches do not reach the image's edge.

    Source: after Löwe, O'Connor & Veeling 2019 (arXiv 1905.11786), section 4.1, which has a ResNet.

    >>> import torch
    >>> patch_cnn(seed=0)(torch.zeros(2, 1, 64, 64)).shape
    torch.Size([2, 10])
    """
    check_list("widths", widths)
    check_whole(classes=classes, channels=channels, size=size)
    cut = Patches(patch, stride)
    layers: OrderedDict[str, nn.Module] = OrderedDict(patches=cut)
    with seeded(seed):
        before = channels
        for number, width in enumerate(widths, start=1):
            layers[f"conv{number}"] = PatchConv(before, width, first=number == 1)
            before = width
        layers["join"] = JoinPatches(cut.grid(size))
        layers["head"] = nn.Linear(before, classes)
    return nn.Sequential(layers)


class PatchConv(nn.Sequential):
    """[ReLU →] 3×3 convolution, which keeps its input's variance, as there is no norm to mend it."""

    def __init__(self, channels_in: int, channels: int, first: bool) -> None:
        convolution = nn.Conv2d(channels_in, channels, 3, 1 if first else 2, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="linear" if first else "relu")
        super().__init__(*[convolution] if first else [nn.ReLU(), convolution])
