"""A data set: four arrays, the names of the classes, and what normalises the inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Labels = NDArray[np.int64]

_CHUNK_BYTES = 1 << 21  # statistics walk over a memory map in pieces of this size


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images (or vectors, or rows of tokens) with labels, split into train and test.

    Classification only: a label is the number of a class, one for each image.

    Args:
        name: what to call it in records and error messages.
        train_images: uint8 images (N, H, W, C), possibly memory-mapped, float vectors (N, d), or
            integer tokens (N, T) of 0 and more, which are neither normalised nor augmented.
        train_labels: integers in 0..len(classes)-1, of shape (N,).
        test_images: as ``train_images``.
        test_labels: as ``train_labels``.
        classes: one name a class; by default the numbers 0, 1, ... up to the largest label.
        mean: what each channel is normalised with; images on the 0..1 scale, vectors as they
            are; nothing, (), for tokens. By default computed exactly from the training set.
        std: likewise.

    Raises:
        ValueError: naming the array, if shapes do not agree, a label is out of range, a class has
            no image (where ``classes`` is left out), a token is negative or a vector is not finite.
        TypeError: if images are neither uint8 (N, H, W, C) nor numbers (N, d), or labels no integers.

    >>> import numpy as np
    >>> images = np.zeros((4, 8, 8, 3), np.uint8)
    >>> own = Dataset("own", images, np.array([0, 1, 0, 1]), images[:2], np.array([0, 1]))
    >>> own
    Dataset('own', shape=(3, 8, 8), train=4, test=2, classes=2)
    """

    name: str
    train_images: Array
    train_labels: Labels
    test_images: Array
    test_labels: Labels
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images = _checked_images(getattr(self, f"{split}_images"), f"{split}_images", self.name)
            labels = _checked_labels(getattr(self, f"{split}_labels"), f"{split}_labels", self.name)
            if len(images) != len(labels):
                raise ValueError(
                    f"{self.name}: {split}_images has {len(images)} rows but {split}_labels has "
                    f"{len(labels)}; give one label an image."
                )
            object.__setattr__(self, f"{split}_images", images)
            object.__setattr__(self, f"{split}_labels", labels)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"{self.name}: train_images are {self.train_images.shape[1:]} each but test_images "
                f"are {self.test_images.shape[1:]}; give both the same shape."
            )
        if not self.classes:
            object.__setattr__(self, "classes", _numbered(self))
        object.__setattr__(self, "classes", tuple(self.classes))
        for split in ("train", "test"):
            check_range(getattr(self, f"{split}_labels"), f"{split}_labels", self)
        if not self.is_tokens and not (self.mean and self.std):
            mean, std = statistics(self.train_images)
            object.__setattr__(self, "mean", tuple(self.mean) or mean)
            object.__setattr__(self, "std", tuple(self.std) or std)
        channels = 0 if self.is_tokens else self.shape[0]
        usable = np.isfinite([*self.mean, *self.std]).all() and min(self.std, default=1) > 0
        if len(self.mean) != channels or len(self.std) != channels or not usable:
            raise ValueError(
                f"{self.name}: mean and std need {channels} numbers each (finite, std above 0) but are "
                f"{self.mean} and {self.std}; leave them out to have them computed."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input as a network sees it: (C, H, W); (d,) for vectors, (T,) for tokens."""
        if self.train_images.ndim == 2:
            return (int(self.train_images.shape[1]),)
        height, width, channels = self.train_images.shape[1:]
        return (channels, height, width)

    @property
    def is_vector(self) -> bool:
        """True for float vectors (N, d), False for images and tokens."""
        return self.train_images.ndim == 2 and not self.is_tokens

    @property
    def is_tokens(self) -> bool:
        """True for integer tokens (N, T).

        >>> words = np.array([[5, 2, 0], [7, 7, 1]])
        >>> Dataset("words", words, np.array([0, 1]), words, np.array([0, 1])).is_tokens
        True
        """
        return self.train_images.dtype == np.int64

    def part(self, split: str) -> tuple[Array, Labels]:
        """Images and labels of "train" or "test".

        Raises:
            ValueError: there is no such split.

        >>> from modlib.data import load
        >>> images, labels = load("digits").part("test")
        >>> images.shape, labels.shape
        ((360, 8, 8, 1), (360,))
        """
        parts = {
            "train": (self.train_images, self.train_labels),
            "test": (self.test_images, self.test_labels),
        }
        if split not in parts:
            raise ValueError(f"split is {split!r}; give 'train' or 'test'.")
        return parts[split]

    def subset(
        self, n_train: int | None = None, n_test: int | None = None, seed: int = 0
    ) -> Dataset:
        """A smaller data set whose classes are as even as the images allow.

        Args:
            n_train: images to keep for training, None for all.
            n_test: images to keep for testing, None for all.
            seed: chooses the images; they come in random order.

        Returns:
            A ``Dataset`` with the same classes and the same mean and std (of the whole set, so
            that results on subsets of different sizes see the same inputs).

        Raises:
            ValueError: if a number is below 1 or above what there is.

        >>> from modlib.data import load
        >>> small = load("digits").subset(n_train=100, n_test=50)
        >>> [int((small.train_labels == c).sum()) for c in range(10)]
        [10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
        """
        changes: dict[str, Any] = {}
        for position, (split, n) in enumerate((("train", n_train), ("test", n_test))):
            if n is None:
                continue
            labels = getattr(self, f"{split}_labels")
            if not 1 <= n <= len(labels):
                raise ValueError(
                    f"n_{split} is {n} but {self.name} has {len(labels)} {split} images; "
                    f"give a number from 1 to {len(labels)} or None for all."
                )
            chosen = _balanced(
                labels, len(self.classes), n, np.random.default_rng((seed, position))
            )
            changes[f"{split}_images"] = take(getattr(self, f"{split}_images"), chosen)
            changes[f"{split}_labels"] = labels[chosen]
        return replace(self, **changes)

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}, shape={self.shape}, train={len(self.train_labels)}, "
            f"test={len(self.test_labels)}, classes={len(self.classes)})"
        )


def take(images: Array, index: NDArray[np.int64]) -> Array:
    """``images[index]``, read in the order of the file: a disk dislikes jumping back."""
    order = np.argsort(index, kind="stable")
    out = np.empty((len(index), *images.shape[1:]), images.dtype)
    out[order] = images[index[order]]
    return out


def statistics(images: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, (C,) and (C,); images on the 0..1 scale.

    Sums of uint8 are integers, so the result is exact whatever the size. A channel that never
    changes gets std 1, so that it normalises to 0.

    >>> statistics(np.array([[[[0], [255]]]], np.uint8))
    ((0.5,), (0.5,))
    """
    if images.ndim == 2:
        mean, std = images.mean(0, dtype=np.float64), images.std(0, dtype=np.float64)
        return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())
    channels = images.shape[-1]
    total, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    # Squares of so few images still fit in 32 bits, and adding up images is fast (long rows).
    step = min(1 << 16, max(1, _CHUNK_BYTES // int(np.prod(images.shape[1:]))))
    for start in range(0, len(images), step):
        rows = np.asarray(images[start : start + step]).reshape(-1, images[0].size)
        for sums, values in ((total, rows), (squares, np.square(rows, dtype=np.uint16))):
            sums += values.sum(0, dtype=np.uint32).reshape(-1, channels).sum(0, dtype=np.int64)
    count = images.size // channels
    # Integers of any size in Python: nothing is rounded before the last division.
    mean_ = tuple(int(s) / (255 * count) for s in total)
    variances = [count * int(q) - int(s) ** 2 for s, q in zip(total, squares, strict=True)]
    std_ = tuple(v**0.5 / (255 * count) if v > 0 else 1.0 for v in variances)
    return mean_, std_


def check_range(labels: Labels, what: str, data: Dataset) -> None:
    """Refuse labels outside 0..len(classes)-1."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(data.classes):
        raise ValueError(
            f"{data.name}: {what} run from {low} to {high} but there are {len(data.classes)} "
            f"classes; number them 0 to {len(data.classes) - 1}."
        )


def _checked_images(images: Array, what: str, name: str) -> Array:
    if not isinstance(images, np.ndarray):
        raise TypeError(f"{name}: {what} is a {type(images).__name__}; give a numpy array.")
    if images.ndim == 4 and images.dtype == np.uint8:
        good = images
    elif images.ndim == 2 and np.issubdtype(images.dtype, np.floating):
        good = images.astype(np.float32, copy=False)
        if not np.isfinite(good).all():
            raise ValueError(f"{name}: {what} holds NaN or infinity; remove or replace those rows.")
    elif images.ndim == 2 and np.issubdtype(images.dtype, np.integer):
        good = images.astype(np.int64, copy=False)
        if (good < 0).any():
            raise ValueError(
                f"{name}: {what} holds token {int(good.min())}; number tokens 0 and up."
            )
    else:
        raise TypeError(
            f"{name}: {what} is {images.dtype} of shape {images.shape}; give uint8 images "
            f"(N, H, W, C), float vectors (N, d) or integer tokens (N, T)."
        )
    if good.size == 0:
        raise ValueError(f"{name}: {what} is empty (shape {images.shape}); give at least one.")
    return good


def _numbered(data: Dataset) -> tuple[str, ...]:
    """Classes 0, 1, ... up to the largest label, each of which has to occur."""
    present = np.unique(np.concatenate([data.train_labels, data.test_labels]))
    low, high = int(present[0]), int(present[-1])
    missing = np.flatnonzero(present != np.arange(len(present)))
    if low >= 0 and len(missing):  # a negative label is told with the range
        raise ValueError(
            f"{data.name}: labels run from {low} to {high} and class {missing[0]} has no image; number "
            f"the classes 0, 1, ... without a gap, or name all {high + 1} in classes."
        )
    return tuple(map(str, range(high + 1)))


def _checked_labels(labels: Array, what: str, name: str) -> Labels:
    if not isinstance(labels, np.ndarray) or not np.issubdtype(labels.dtype, np.integer):
        given = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(
            f"{name}: {what} is {given}; give a numpy array of integers, the numbers of the classes "
            f"(classification only: there is no regression here)."
        )
    if labels.ndim != 1:
        raise ValueError(f"{name}: {what} has shape {labels.shape}; give one label an image, (N,).")
    return labels.astype(np.int64, copy=False)


def _balanced(labels: Labels, classes: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """n positions, as evenly over the classes as there are images, in random order."""
    # The k-th image of every class comes before the (k+1)-th of any: cut after n.
    shuffled = rng.permutation(len(labels))
    rank = np.empty(len(labels), np.int64)
    for c in range(classes):
        mine = shuffled[labels[shuffled] == c]
        rank[mine] = np.arange(len(mine))
    chosen = shuffled[np.argsort(rank[shuffled], kind="stable")[:n]]
    return rng.permutation(chosen).astype(np.int64)
