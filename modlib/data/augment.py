"""Augmentation of whole batches on the device: what is done, and crops that are a copy of memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from modlib.data.dataset import Array, Dataset

_BLOCK_BYTES = 1 << 22  # padding goes over the images in blocks that stay in the cache
_HANDED = ("digits", "mnist", "svhn")  # a mirrored digit is another sign


@dataclass(frozen=True)
class Augment:
    """What is done to a training image; the defaults are the usual ones for CIFAR.

    Args:
        pad: pixels added on each side before a crop of the original size at random; 0: no crop.
        flip: mirror left to right with probability 1/2; "alternate": in every second epoch, from a first one
            that is drawn for each image (Jordan 2024, arXiv 2404.00498).
        cutout: side in pixels of a square set to the mean colour, its centre anywhere in the
            image, clipped at the border (DeVries and Taylor 2017, arXiv:1708.04552); 0: none.
        mode: what the padding shows, "reflect" or "zeros" (black, as torchvision's RandomCrop).
        scale: least and greatest share of the image's area that a random crop keeps, which is then scaled
            up to the image's size (Szegedy et al. 2015, arXiv:1409.4842), usually (0.08, 1) for ImageNet; it
            takes the place of ``pad``. None: no such crop.
        ratio: least and greatest width/height of that crop.
        brightness: strength s; an image's values are multiplied by a factor from 1 - s to 1 + s.
        contrast: likewise, for the distance from the image's mean grey.
        saturation: likewise, for the distance of each pixel's colour from its grey.
        hue: an image's hues move on by up to this part of the circle, at most 1/2.

    Colours are changed in this order, each time cut off at black and white. 0 leaves one out.

    Raises:
        ValueError: if a number is out of range, ``pad`` and ``scale`` are both given, or ``flip`` or
            ``mode`` is unknown.

    >>> Augment(pad=2, flip=False)
    Augment(pad=2, flip=False, cutout=0, mode='reflect')
    >>> Augment(pad=0, scale=(0.08, 1), brightness=0.4)
    Augment(pad=0, flip=True, cutout=0, mode='reflect', scale=(0.08, 1), brightness=0.4)
    """

    pad: int = 4
    flip: bool | Literal["alternate"] = True
    cutout: int = 0
    mode: Literal["reflect", "zeros"] = "reflect"
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for what, value in (("pad", self.pad), ("cutout", self.cutout)):
            if value < 0:
                raise ValueError(f"{what} is {value}; give 0 or a number of pixels.")
        if self.flip not in (True, False, "alternate"):
            raise ValueError(f"flip is {self.flip!r}; give True, False or 'alternate'.")
        if self.mode not in ("reflect", "zeros"):
            raise ValueError(f"mode is {self.mode!r}; give 'reflect' or 'zeros'.")
        _check_distortion(self)

    def __repr__(self) -> str:
        """The crops and flips of every data set, and of what else there is what is on."""
        always = ("pad", "flip", "cutout", "mode")
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name in always or getattr(self, field.name) != field.default
        ]
        return f"Augment({', '.join(shown)})"

    @property
    def random(self) -> bool:
        """True if an image can come out in more than one way."""
        return bool(self.pad or self.flip or self.cutout or self.distorts)

    @property
    def recolours(self) -> bool:
        """True if colours are changed."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue)

    @property
    def distorts(self) -> bool:
        """True if pixels get values that are not stored: a resized crop, or another colour."""
        return self.scale is not None or self.recolours

    @property
    def copied(self) -> Augment:
        """The part that ``Windows`` does, by copying: all but what distorts, and what goes with that."""
        return PLAIN if self.scale is not None else self


def _check_distortion(augment: Augment) -> None:
    """Refuse what cannot be done, in one sentence."""
    scale, (low, high) = augment.scale, augment.ratio
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(
            f"scale is {scale}; give two shares of the area, 0 < least <= greatest <= 1."
        )
    if scale is not None and augment.pad:
        raise ValueError(
            f"pad is {augment.pad} and scale is {scale}, but only one of them can crop; give pad=0 with scale."
        )
    if not 0 < low <= high < math.inf:
        raise ValueError(f"ratio is {augment.ratio}; give two numbers, 0 < least <= greatest.")
    for what in ("brightness", "contrast", "saturation", "hue"):
        strength = getattr(augment, what)
        most = 0.5 if what == "hue" else math.inf
        if not 0 <= strength <= most or math.isinf(strength):
            asked = "from 0 to 0.5" if what == "hue" else "of 0 or more"
            raise ValueError(f"{what} is {strength}; give a number {asked}.")


PLAIN = Augment(pad=0, flip=False)


def default_augment(dataset: Dataset) -> Augment | Literal[False]:
    """The customary augmentation of a data set: a crop by an eighth of the side, and a flip.

    Digits are not mirrored; vectors and tokens are left alone, and so are images of less than 16
    pixels a side, where one pixel is a long way.

    Returns:
        An ``Augment``, or False: what ``Loader(augment=...)`` takes.

    >>> from modlib.data import load
    >>> default_augment(load("digits", size=16)), default_augment(load("digits"))
    (Augment(pad=2, flip=False, cutout=0, mode='reflect'), False)
    """
    if len(dataset.shape) == 1 or min(dataset.shape[1:]) < 16:
        return False
    return Augment(pad=min(dataset.shape[1:]) // 8, flip=not dataset.name.startswith(_HANDED))


class Windows:
    """Padded images in one flat piece of memory, out of which crops are copied.

    A crop starts ``row`` rows and ``column`` columns later than its padded image. Read from there
    on, the memory looks like an image whose top left corner is the crop, so a batch of crops is
    one contiguous copy an image and then the same slice of all. (A copy may run on into the next
    image: those pixels lie outside the slice.) Mirrored images are stored beside the others, so
    that a flip costs nothing but where the copy starts.

    Args:
        images: (N, H, W, C), uint8, float or integer.
        augment: says how to pad, and whether mirrored images are wanted.
        device: where to hold them.
        planar: lay out each image as (C, H, W) instead of (H, W, C).
    """

    def __init__(self, images: Array, augment: Augment, device: torch.device, planar: bool) -> None:
        self.n, self.height, self.width, self.channels = images.shape
        self.pad, self.planar = augment.pad, planar
        tall, wide = self.height + 2 * self.pad, self.width + 2 * self.pad
        self._step = 1 if planar else self.channels  # elements from a column to the next
        self._row, self._image = wide * self._step, tall * wide * self.channels
        self._length = self._image if planar else self.height * self._row
        copies = 1 + bool(augment.flip)
        layout = (self.channels, tall, wide) if planar else (tall, wide, self.channels)
        size = copies * self.n * self._image
        dtype = torch.from_numpy(np.empty(0, images.dtype)).dtype
        self._flat = torch.zeros(size + self._length, dtype=dtype, device=device)
        store = self._flat[:size].view(copies, self.n, *layout)
        block = max(1, _BLOCK_BYTES // self._image)
        for start in range(0, self.n, block):
            part = torch.from_numpy(np.array(images[start : start + block])).to(device)
            padded = pad_images(part, self.pad, augment.mode)
            for copy, image in zip(store, (padded, padded.flip(2)), strict=False):
                copy[start : start + block] = image.permute(0, 3, 1, 2) if planar else image

    @staticmethod
    def bytes_needed(images: Array, augment: Augment) -> int:
        """Memory that ``images`` (N, H, W, C) will take."""
        n, height, width, channels = images.shape
        pixels = (height + 2 * augment.pad) * (width + 2 * augment.pad)
        return int((1 + bool(augment.flip)) * n * pixels * channels * images.dtype.itemsize)

    def starts(self, image: Array, flip: Array, row: Array, column: Array) -> Tensor:
        """Where crops start: all arguments integers (B,), ``row`` and ``column`` in 0..2 pad."""
        start = (image + flip * self.n) * self._image + row * self._row + column * self._step
        return torch.from_numpy(start).to(self._flat.device)

    def crops(self, starts: Tensor) -> Tensor:
        """The crops that start there, (B, C, H, W) if planar, else (B, H, W, C); not contiguous."""
        copies = spans(self._flat, starts, self._length)
        wide = self.width + 2 * self.pad
        if self.planar:
            padded = copies.view(len(starts), self.channels, self.height + 2 * self.pad, wide)
            return padded[:, :, : self.height, : self.width]
        return copies.view(len(starts), self.height, wide, self.channels)[:, :, : self.width]


def spans(flat: Tensor, starts: Tensor, length: int) -> Tensor:
    """Rows ``flat[s : s + length]`` for s in ``starts``: (B, length).

    >>> spans(torch.arange(6), torch.tensor([3, 0]), 2)
    tensor([[3, 4],
            [0, 1]])
    """
    if flat.device.type == "cpu":
        # Overlapping rows, one for each start there could be: selecting rows is a plain copy of
        # memory, ten times faster here than an index for each element. Other devices would rather
        # have the index, and not all can look at memory in this way.
        rows = flat.as_strided((len(flat) - length + 1, length), (1, 1))
        return rows.index_select(0, starts)
    return spans_by_index(flat, starts, length)


def spans_by_index(flat: Tensor, starts: Tensor, length: int) -> Tensor:
    """``spans`` for devices other than the CPU; the result is the same."""
    return flat[starts[:, None] + torch.arange(length, device=flat.device)]


def pad_images(images: Tensor, pad: int, mode: str) -> Tensor:
    """(N, H, W, C) to (N, H + 2 pad, W + 2 pad, C), "reflect" (3 2 | 1 2 3 ...) or "zeros".

    Written out because torch reflects no uint8.

    >>> pad_images(torch.arange(1, 4).view(1, 3, 1, 1).expand(1, 3, 3, 1), 1, "reflect")[0, :, 0, 0]
    tensor([2, 1, 2, 3, 2])
    """
    if pad == 0:
        return images
    n, height, width, channels = images.shape
    out = images.new_zeros((n, height + 2 * pad, width + 2 * pad, channels))
    out[:, pad:-pad, pad:-pad] = images
    if mode == "reflect":
        for side in (out, out.transpose(1, 2)):  # rows, then whole columns: corners come right
            side[:, :pad] = side[:, pad + 1 : 2 * pad + 1].flip(1)
            side[:, -pad:] = side[:, -2 * pad - 1 : -pad - 1].flip(1)
    return out


def cutout_mask(row: Tensor, column: Tensor, side: int, height: int, width: int) -> Tensor:
    """True inside a square with ``side`` pixels centred at (row, column), both (B,): (B, H, W).

    >>> cutout_mask(torch.tensor([0]), torch.tensor([2]), 2, 2, 4).int()
    tensor([[[0, 1, 1, 0],
             [0, 0, 0, 0]]], dtype=torch.int32)
    """
    y = torch.arange(height, device=row.device) - (row[:, None] - side // 2)
    x = torch.arange(width, device=row.device) - (column[:, None] - side // 2)
    return ((y >= 0) & (y < side))[:, :, None] & ((x >= 0) & (x < side))[:, None, :]
