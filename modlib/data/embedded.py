"""Data sets that need no network: scikit-learn's digits and 2-D sets written in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from modlib.data.dataset import Dataset

_POINTS = 1000  # a split of each 2-D set
_NOISE = 0.08


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
    Learning Repository, 1998.

    Returns:
        A ``Dataset`` of 1,437 training and 360 test images, the test set balanced over classes.

    >>> digits().shape
    (1, 8, 8)
    """
    from sklearn.datasets import load_digits  # here, because the import takes a second

    bunch = load_digits()
    # The original grey levels are 0..16.
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    test = np.zeros(len(labels), bool)
    rng = np.random.default_rng(0)
    for c in range(10):
        test[rng.choice(np.flatnonzero(labels == c), 36, replace=False)] = True
    return Dataset(
        "digits", images[~test], labels[~test], images[test], labels[test], tuple("0123456789")
    )


def spirals() -> Dataset:
    """Three interleaved spirals in the plane, 1,000 points a split.

    >>> spirals().shape
    (2,)
    """
    return _planar("spirals", 3, _spiral_points)


def moons() -> Dataset:
    """Two interleaved half circles in the plane, 1,000 points a split.

    >>> moons().classes
    ('0', '1')
    """
    return _planar("moons", 2, _moon_points)


def rings() -> Dataset:
    """Two concentric rings in the plane, 1,000 points a split: no line separates them.

    >>> rings().train_images.dtype
    dtype('float32')
    """
    return _planar("rings", 2, _ring_points)


def _spiral_points(t: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    radius = 0.1 + 0.9 * t
    angle = 1.5 * np.pi * t + labels * (2 * np.pi / 3)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _moon_points(t: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    x, y = np.cos(np.pi * t), np.sin(np.pi * t)
    return np.stack([np.where(labels, 1 - x, x), np.where(labels, 0.5 - y, y)], axis=1)


def _ring_points(t: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    radius = np.where(labels, 1.0, 0.5)
    return np.stack([radius * np.cos(2 * np.pi * t), radius * np.sin(2 * np.pi * t)], axis=1)


def _planar(
    name: str,
    classes: int,
    points: Callable[[NDArray[np.float64], NDArray[np.int64]], NDArray[np.float64]],
) -> Dataset:
    rng = np.random.default_rng(0)
    noise = _NOISE / 2 if name == "spirals" else _NOISE

    def split() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        labels = rng.permutation(_POINTS).astype(np.int64) % classes
        clean = points(rng.random(_POINTS), labels)
        return (clean + noise * rng.normal(size=clean.shape)).astype(np.float32), labels

    (train_x, train_y), (test_x, test_y) = split(), split()
    return Dataset(name, train_x, train_y, test_x, test_y)


EMBEDDED: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "spirals": spirals,
    "moons": moons,
    "rings": rings,
}
