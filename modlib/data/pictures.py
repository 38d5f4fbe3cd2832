"""Image files and arrays to square uint8 pictures of one size."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from modlib.data.dataset import Array, Dataset

# What decoders raise on broken files.
BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, ArithmeticError, TypeError),
    *(struct.error, Image.DecompressionBombError),
)
_16_BITS = (
    "PNG",
    "PPM",
)  # formats that Pillow has read as 32 bits though they have no more than 16


def square(picture: Image.Image, size: int) -> Array:
    """The middle of a picture, its shorter side scaled to ``size``: (size, size, 3) uint8.

    >>> square(Image.new("L", (40, 30), 255), 8).shape
    (8, 8, 3)
    """
    side = min(picture.size)
    left, top = ((length - side) / 2 for length in picture.size)
    box = (left, top, left + side, top + side)
    # Scaling and cropping at once; Pillow filters so that fine lines do not alias.
    scaled = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box)
    return np.asarray(scaled)


def decode(path: Path, size: int, exact: bool) -> Array:
    """An image file as (size, size, 3) uint8.

    A photograph is turned upright as its EXIF data say, 16 bits become the 8 high ones, grey becomes three equal
    channels, CMYK becomes RGB, and what is transparent shows white.

    Args:
        path: the file.
        size: side in pixels.
        exact: refuse a picture that does not have this size already.

    Raises:
        ValueError: naming the file, if it cannot be read or must not be resized.
    """
    try:
        with Image.open(path) as picture:
            wide, high = picture.size
            if not exact or (wide, high) == (size, size):
                # A JPEG can be read at a fraction of its size: much faster, and still filtered below.
                picture.draft("RGB", (2 * size, 2 * size))
                ImageOps.exif_transpose(picture, in_place=True)
                return square(_rgb(picture), size)
    except BROKEN as error:
        raise unreadable(path, error) from error
    raise ValueError(
        f"{path} is {wide}x{high} but others are {size}x{size}; pass size= to bring all images to one size."
    )


def unreadable(path: Path, error: Exception) -> ValueError:
    """One sentence on a file that is no image, or a broken one."""
    why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ValueError(
        f"{path} cannot be read as an image ({why}); repair or remove it and load again."
    )


def _rgb(picture: Image.Image) -> Image.Image:
    sixteen = picture.mode.startswith("I;16") or (
        picture.mode == "I" and picture.format in _16_BITS
    )
    if sixteen:  # Pillow's own conversion would show all but the darkest values white
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError("it holds 32-bit numbers, and which of them is white is not said")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def resized(dataset: Dataset, size: int) -> Dataset:
    """The data set with square RGB images of another size, held in memory.

    >>> from modlib.data import load
    >>> resized(load("digits"), 32)
    Dataset('digits-32px', shape=(3, 32, 32), train=1437, test=360, classes=10)
    """
    if len(dataset.shape) == 1:
        raise ValueError(f"size is {size} but {dataset.name} holds no images; leave size out.")
    train, test = (
        np.stack([square(Image.fromarray(image.squeeze()), size) for image in images])
        for images in (dataset.train_images, dataset.test_images)
    )
    return Dataset(
        f"{dataset.name}-{size}px",
        train,
        dataset.train_labels,
        test,
        dataset.test_labels,
        dataset.classes,
    )
