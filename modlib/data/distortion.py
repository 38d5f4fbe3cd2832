"""Random resized crops and changes of colour, of whole batches, on the device.

Pixels are on the scale 0..255 here, images float32 (B, C, H, W). With a crop's top left corner (t, l), its
size (h, w) and the image's own size (H, W), the pixel (i, j) of the result is the image at

    row t + (i + 1/2) h/H - 1/2,    column l + (j + 1/2) w/W - 1/2,

both kept inside the crop, read off by bilinear interpolation. A crop is never scaled down, so nothing aliases.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from modlib.data.dataset import Array

if TYPE_CHECKING:
    from modlib.data.augment import Augment

_TRIES = 10  # to draw a box that fits into the image, as torchvision does
_CACHED = 1 << 20  # bytes that a processor's cache holds: larger batches are distorted in pieces
_WHITE = 255.0
_GREY = (0.299, 0.587, 0.114)  # brightness of red, green and blue, ITU-R BT.601


class Distortion:
    """What is drawn for the images of an epoch, and then done to its batches.

    Args:
        augment: what to draw.
        rng: decides it.
        flip: (n,), 1 where an image is to be mirrored; used with resized crops only.
        height: of the images.
        width: likewise.
        device: where the batches are.
    """

    def __init__(
        self,
        augment: Augment,
        rng: np.random.Generator,
        flip: Array,
        height: int,
        width: int,
        device: torch.device,
    ) -> None:
        def on_device(drawn: Array) -> Tensor:
            return torch.from_numpy(drawn.astype(np.float32)).to(device)

        n = len(flip)
        self._boxes = None
        if augment.scale is not None:
            boxes = draw_boxes(rng, n, height, width, augment.scale, augment.ratio)
            self._boxes = on_device(np.stack([*boxes, flip]))
        factors = {}
        for what in ("brightness", "contrast", "saturation"):
            if strength := getattr(augment, what):
                factors[what] = on_device(rng.uniform(max(0, 1 - strength), 1 + strength, n))
        if augment.hue:
            factors["hue"] = on_device(rng.uniform(-augment.hue, augment.hue, n))
        self._factors = factors

    def __call__(self, x: Tensor, part: slice) -> Tensor:
        """Those images of the epoch, (B, C, H, W), distorted in place."""
        step = max(1, _CACHED // x[0].nbytes) if x.device.type == "cpu" else len(x)
        for first in range(0, len(x), step):
            piece = x[first : first + step]
            start = part.start + first
            piece.copy_(self._distorted(piece, slice(start, start + len(piece))))
        return x

    def _distorted(self, x: Tensor, part: slice) -> Tensor:
        if self._boxes is not None:
            x = resized_crops(x, self._boxes[:, part])
        for what, drawn in self._factors.items():
            x = _CHANGES[what](x, drawn[part].view(-1, 1, 1, 1))
        return x


def draw_boxes(
    rng: np.random.Generator,
    n: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Array, Array, Array, Array]:
    """Random crops as torchvision's RandomResizedCrop draws them: top, left, height, width, all (n,).

    Share of the area and logarithm of width/height are uniform. A crop that does not fit is drawn anew, ten
    times in all; then the largest in the middle is taken that keeps the ratio within its bounds.

    >>> rng = np.random.default_rng(0)
    >>> [side.tolist() for side in draw_boxes(rng, 2, 8, 8, scale=(1, 1), ratio=(1, 1))]
    [[0, 0], [0, 0], [8, 8], [8, 8]]
    """
    nearest = min(max(width / height, ratio[0]), ratio[1])
    high = np.full(n, min(height, round(width / nearest)))
    wide = np.full(n, min(width, round(height * nearest)))
    top, left = (height - high) // 2, (width - wide) // 2
    open_ = np.arange(n)
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*scale, len(open_))
        aspect = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), len(open_)))
        h, w = (np.rint(np.sqrt(a)).astype(np.int64) for a in (area / aspect, area * aspect))
        fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
        done, h, w = open_[fits], h[fits], w[fits]
        high[done], wide[done] = h, w
        top[done], left[done] = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        open_ = open_[~fits]
    return top, left, high, wide


def resized_crops(x: Tensor, boxes: Tensor) -> Tensor:
    """Crops of each image, scaled up to its own size.

    Args:
        x: (B, C, H, W), float.
        boxes: (5, B), float: top, left, height and width in pixels, and 1 to mirror, else 0.

    >>> x = torch.arange(16.0).view(1, 1, 4, 4)
    >>> resized_crops(x, torch.tensor([[1.0], [0], [1], [4], [1]]))[0, 0, 0]
    tensor([7., 6., 5., 4.])
    """
    top, left, high, wide, flip = boxes.unsqueeze(2)
    rows = _places(top, high, x.shape[2])
    columns = _places(left, wide, x.shape[3])
    columns = torch.where(flip > 0, columns.flip(1), columns)
    across = columns[:, None, :].expand(-1, x.shape[2], -1)
    down = rows[:, :, None].expand(-1, -1, x.shape[3])
    grid = torch.stack([across, down], -1)
    return grid_sample(x, grid, align_corners=False)


def _places(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where a side's pixels lie, (B, size), in grid_sample's unit: -1 and 1 are the image's borders."""
    steps = torch.arange(size, device=start.device) + 0.5
    inside = torch.minimum((steps * (length / size) - 0.5).clamp_(min=0), length - 1)
    return (2 * (start + inside) + 1) / size - 1


def brighter(x: Tensor, factor: Tensor) -> Tensor:
    """All values times a factor, (B, 1, 1, 1)."""
    return x.mul_(factor).clamp_(0, _WHITE)


def contrasted(x: Tensor, factor: Tensor) -> Tensor:
    """Away from the image's mean grey, if the factor is above 1, or towards it."""
    grey = _grey(x.mean((2, 3), keepdim=True))
    return torch.lerp(grey, x, factor).clamp_(0, _WHITE)


def saturated(x: Tensor, factor: Tensor) -> Tensor:
    """Away from each pixel's own grey, or towards it."""
    return torch.lerp(_grey(x), x, factor).clamp_(0, _WHITE)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Hue moved on by a part of the circle; value and saturation of HSV stay.

    With sextant h of the hue, value v and chroma c = max - min, channel k of the result is
    v - c max(0, min(a, 4 - a, 1)), a = (k + h) mod 6, k = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    divisor = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = hue + 6 * turn[:, 0]
    channels = []
    for k in (5, 3, 1):
        a = hue + k
        a = a.sub_(torch.floor(a / 6), alpha=6)  # modulo 6, five times faster than remainder
        channels.append(value - chroma * torch.minimum(a, 4 - a).clamp_(0, 1))
    return torch.stack(channels, 1)


_CHANGES = {
    "brightness": brighter,
    "contrast": contrasted,
    "saturation": saturated,
    "hue": turned,
}


def _grey(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    grey = _GREY[0] * x[:, :1]
    return grey.add_(x[:, 1:2], alpha=_GREY[1]).add_(x[:, 2:], alpha=_GREY[2])
