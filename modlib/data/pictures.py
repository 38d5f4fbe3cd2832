"""Image files and arrays to square uint8 pictures of one size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from modlib.data.dataset import Array, Dataset


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

    Args:
        path: the file.
        size: side in pixels.
        exact: refuse a picture that does not have this size already.

    Raises:
        ValueError: naming the file, if it cannot be read or must not be resized.
    """
    try:
        with Image.open(path) as picture:
            if exact and picture.size != (size, size):
                wide, high = picture.size
                raise ValueError(
                    f"{path} is {wide}x{high} but others are {size}x{size}; pass size= to bring "
                    f"all images to one size."
                )
            # A JPEG can be read at a fraction of its size: much faster, and still filtered below.
            picture.draft("RGB", (2 * size, 2 * size))
            return square(picture, size)
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} cannot be read as an image ({error}); repair or remove it and load again."
        ) from error


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
