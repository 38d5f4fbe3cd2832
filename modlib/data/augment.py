"""Augmentation of whole batches on the device: crop, flip, cutout, normalise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modlib.data.dataset import Dataset


@dataclass(frozen=True)
class Augment:
    """What is done to a training image; defaults are the usual ones for CIFAR.

    Args:
        pad: pixels added on each side before a crop of the original size at random; 0: no crop.
        flip: mirror left to right with probability 1/2.
        cutout: side in pixels of a square set to the mean colour, centred anywhere in the image
            and clipped at its edge (DeVries and Taylor 2017, arXiv:1708.04552); 0: none.
        mode: what the padding shows, "reflect" or "zeros" (black, as torchvision's RandomCrop).

    Raises:
        ValueError: if ``pad`` or ``cutout`` is negative, or ``mode`` is unknown.

    >>> Augment(pad=2, flip=False)
    Augment(pad=2, flip=False, cutout=0, mode='reflect')
    """

    pad: int = 4
    flip: bool = True
    cutout: int = 0
    mode: Literal["reflect", "zeros"] = "reflect"

    def __post_init__(self) -> None:
        for what, value in (("pad", self.pad), ("cutout", self.cutout)):
            if value < 0:
                raise ValueError(f"{what} is {value}; give 0 or a number of pixels.")
        if self.mode not in ("reflect", "zeros"):
            raise ValueError(f"mode is {self.mode!r}; give 'reflect' or 'zeros'.")


_NO_FLIP = ("digits", "mnist", "fashion-mnist", "svhn")


def default_augment(dataset: Dataset) -> Augment | Literal[False]:
    """The customary augmentation of a data set: an eighth of the side to crop by, and a flip.

    Digits keep their handedness; vectors are left alone.

    >>> from modlib.data import load
    >>> default_augment(load("digits")), default_augment(load("spirals"))
    (Augment(pad=1, flip=False, cutout=0, mode='reflect'), False)
    """
    if dataset.is_vector:
        return False
    flip = not dataset.name.startswith(_NO_FLIP)
    return Augment(pad=min(dataset.shape[1:]) // 8, flip=flip)


def pad_images(images: Tensor, pad: int, mode: str) -> Tensor:
    """uint8 (N, H, W, C) to (N, H+2p, W+2p, C); torch pads no uint8 by reflection."""
    if pad == 0:
        return images
    if mode == "zeros":
        return torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad))
    rows, columns = (_reflected(n, pad, images.device) for n in images.shape[1:3])
    return images[:, rows][:, :, columns]


def _reflected(n: int, pad: int, device: torch.device) -> Tensor:
    """Indices of a side of n pixels reflected by pad: 2 1 | 0 1 2 3 | 2 1."""
    position = torch.arange(-pad, n + pad, device=device).abs()
    return torch.minimum(position, 2 * (n - 1) - position)
