"""Batches from images that stay on the device as uint8 and are augmented there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from modlib.data.augment import PLAIN, Augment, Windows, cutout_mask, default_augment
from modlib.data.dataset import Array, Dataset, take
from modlib.data.distortion import Distortion
from modlib.data.memory import ahead, free_memory
from modlib.data.stratified import check_batch, lonely, stratified_batches
from modlib.device import moved, pick_device

Batch = tuple[Tensor, Tensor]
Split = Literal["train", "test"]
Memory = Literal["auto", "device", "map"]
Sampler = Literal["uniform", "stratified"]


class Loader:
    """Normalised batches of one split, with no worker processes.

    The images are held on the device as uint8, padded for the crops, and with their mirror
    images if there are flips; each batch is then a few operations there. Where they do not fit,
    batches are gathered from the memory map instead, one ahead of the training, in the background; the
    batches are the same.

    Args:
        dataset: what to load from.
        split: "train" or "test".
        batch_size: images in a batch; all of them where the split has fewer.
        device: where batches are delivered, as in ``modlib.fit``.
        augment: an ``Augment``, True for ``default_augment(dataset)``, False for none.
        shuffle: take the images in a new random order in each epoch.
        drop_last: leave out a last batch that is not full.
        channels_last: deliver images in torch's channels_last memory format.
        memory: "device" holds the images there, "map" leaves them where they are, "auto" holds
            them if they take no more than half of the memory that is free.
        sampler: "uniform" deals the shuffled images out; "stratified" fills each batch with every
            class in proportion, and at least two of each class that has two (for losses on pairs), or
            two of as many classes as there is room for. Images of a rare class then come more than once
            an epoch.

    Attributes:
        n: number of images.

    Raises:
        ValueError: naming the argument, if one is out of range or two cannot go together.

    >>> from modlib.data import load
    >>> loader = Loader(load("digits"), batch_size=100, augment=Augment(pad=1, flip=False))
    >>> len(loader), loader.n, loader.random
    (14, 1437, True)
    >>> x, y = next(loader.epoch(seed=0, epoch=0))
    >>> tuple(x.shape), x.dtype, tuple(y.shape), y.dtype
    ((100, 1, 8, 8), torch.float32, (100,), torch.int64)
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split = "train",
        batch_size: int = 128,
        device: str | torch.device = "cpu",
        augment: Augment | bool = False,
        shuffle: bool = True,
        drop_last: bool = True,
        channels_last: bool = False,
        memory: Memory = "auto",
        sampler: Sampler = "uniform",
    ) -> None:
        if memory not in get_args(Memory):
            raise ValueError(f"memory is {memory!r}; give one of {get_args(Memory)}.")
        images, labels = dataset.part(split)
        self.n = len(labels)
        self.dataset, self.split, self.batch_size = dataset, split, min(_whole(batch_size), self.n)
        self.shuffle, self.drop_last, self.channels_last = shuffle, drop_last, channels_last
        self.device = pick_device(device)
        self.augment = _checked_augment(augment, dataset)
        # A vector is an image of one pixel with many channels: there is one way for both.
        self._images = images[:, None, None, :] if images.ndim == 2 else images
        self._labels = np.array(labels)  # out of the memory map: looked up in each epoch
        self.sampler = self._checked_sampler(sampler)
        self._planar = not channels_last or self.augment.distorts
        self._scale, self._shift = self._normalisation()
        self._windows = None
        if memory == "device" or (
            memory == "auto"
            and Windows.bytes_needed(self._images, self.augment.copied)
            <= free_memory(self.device) // 2
        ):
            self._windows = Windows(self._images, self.augment.copied, self.device, self._planar)

    @property
    def random(self) -> bool:
        """True if images are augmented, so that no two epochs show the same ones."""
        return self.augment.random

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def epoch(self, seed: int, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch; order and augmentation depend on (seed, epoch) alone.

        There is no state to save: to resume, ask for the next epoch.

        Args:
            seed: 0 or more.
            epoch: 0 or more.

        Yields:
            x, float32 (B, C, H, W) or (B, d), normalised (tokens: int64 (B, T), as they are), and
            y, int64 (B,), both on the device.

        Raises:
            ValueError: if ``seed`` or ``epoch`` is negative.
        """
        for what, value in (("seed", seed), ("epoch", epoch)):
            if value < 0:
                raise ValueError(f"{what} is {value}; give 0 or more.")
        return self._batches(seed, epoch)

    def sample(self, n: int) -> Batch:
        """The first n images, not augmented, as (x, y); of a fixed random order if shuffled.

        Args:
            n: from 1 to ``self.n``.

        Raises:
            ValueError: if ``n`` is out of range.

        >>> from modlib.data import load
        >>> x, y = Loader(load("digits"), "test", shuffle=False).sample(5)
        >>> tuple(x.shape), y.tolist() == load("digits").test_labels[:5].tolist()
        ((5, 1, 8, 8), True)
        """
        if not 1 <= n <= self.n:
            raise ValueError(f"n is {n}; give a number from 1 to {self.n}.")
        rng = np.random.default_rng((0, 0))
        index = rng.permutation(self.n)[:n] if self.shuffle else np.arange(n)
        windows = Windows(take(self._images, index), PLAIN, self.device, self._planar)
        zero = np.zeros(n, np.int64)
        starts = windows.starts(np.arange(n), zero, zero, zero)
        return self._finish(windows.crops(starts)), self._on_device(self._labels[index])

    def paired(self) -> Loader:
        """The same images; sampled "stratified" if a class would have fewer than two in a mean batch.

        >>> from modlib.data import load
        >>> Loader(load("digits")).paired().sampler
        'uniform'
        """
        other = copy.copy(self)  # the images are held once
        if lonely(self._labels, self.batch_size):
            other.sampler = self._checked_sampler("stratified")
        return other

    def _order(self, rng: np.random.Generator) -> Array:
        if self.sampler == "stratified":
            return stratified_batches(self._labels, self.batch_size, rng).ravel()
        return rng.permutation(self.n) if self.shuffle else np.arange(self.n)

    def _batches(self, seed: int, epoch: int) -> Iterator[Batch]:
        rng = np.random.default_rng((seed, epoch))
        order = self._order(rng)
        n = len(order)
        # Numpy draws for all devices alike; one transfer an epoch, not one a batch.
        row, column = rng.integers(0, 2 * self.augment.pad + 1, (2, n))
        flip = rng.integers(0, 1 + bool(self.augment.flip), n)
        if self.augment.flip == "alternate":
            coin: Array = np.random.default_rng(seed).integers(0, 2, self.n)
            flip = (coin[order] + epoch) % 2
        height, width = self._images.shape[1:3]
        centre = self._on_device(rng.integers(0, [[height], [width]], (2, n)))
        labels = self._on_device(self._labels[order])
        distortion = None
        if self.augment.distorts:
            distortion = Distortion(self.augment, rng, flip, height, width, self.device)
            if self.augment.scale is not None:  # a resized crop mirrors by itself
                flip = np.zeros_like(flip)
        ends = range(0, len(self) * self.batch_size, self.batch_size)
        parts = [slice(first, first + self.batch_size) for first in ends]
        for part, crops in zip(parts, self._crops(order, flip, row, column, parts), strict=True):
            x = self._finish(crops, partial(distortion, part=part) if distortion else None)
            if side := self.augment.cutout:
                mask = cutout_mask(centre[0, part], centre[1, part], side, height, width)
                x.mul_((~mask)[:, None].float())  # normalised: 0 is the mean colour
            yield x, labels[part]

    def _crops(
        self, image: Array, flip: Array, row: Array, column: Array, parts: list[slice]
    ) -> Iterator[Tensor]:
        """Crops that are copies of memory, a part at a time."""
        if held := self._windows:
            starts = held.starts(image, flip, row, column)
            yield from (held.crops(starts[part]) for part in parts)
            return

        def gathered(part: slice) -> Array:
            return take(self._images, image[part])

        for part, images in zip(parts, ahead(gathered, parts), strict=True):
            if self.augment.copied == PLAIN:
                whole = self._on_device(images)
                yield whole.permute(0, 3, 1, 2) if self._planar else whole
                continue
            windows = Windows(images, self.augment.copied, self.device, self._planar)
            every = np.arange(len(images))
            yield windows.crops(windows.starts(every, flip[part], row[part], column[part]))

    def _checked_sampler(self, sampler: Sampler) -> Sampler:
        if sampler not in get_args(Sampler):
            raise ValueError(f"sampler is {sampler!r}; give one of {get_args(Sampler)}.")
        if sampler == "stratified":
            if not (self.shuffle and self.drop_last):
                raise ValueError(
                    "sampler='stratified' makes full batches in random order; leave shuffle and "
                    "drop_last at True, or give sampler='uniform'."
                )
            check_batch(self._labels, self.batch_size)
        return sampler

    def _on_device(self, array: Array) -> Tensor:
        return moved(torch.from_numpy(array), self.device)

    def _finish(self, crops: Tensor, distort: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Normalised float32 in the shape and memory format that was asked for; tokens as they are."""
        if self.dataset.is_tokens:
            return crops.reshape(len(crops), -1)
        x = crops.to(torch.float32, memory_format=torch.contiguous_format)
        if distort:
            x = distort(x)
        # One long row an image: broadcasting over channels would be three times slower.
        rows = x.view(len(x), -1)
        torch.addcmul(self._shift, rows, self._scale, out=rows)
        if self.dataset.is_vector:
            return x.view(len(x), -1)
        x = x if self._planar else x.permute(0, 3, 1, 2)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (H W C,) that take stored numbers to mean 0 and standard deviation 1."""
        unit = 255.0 if self._images.dtype == np.uint8 else 1.0
        mean, std = np.array(self.dataset.mean), np.array(self.dataset.std)
        pixels = int(np.prod(self._images.shape[1:3]))
        repeat = np.repeat if self._planar else np.tile
        scale, shift = repeat(1 / (unit * std), pixels), repeat(-mean / std, pixels)
        return self._on_device(scale.astype(np.float32)), self._on_device(shift.astype(np.float32))


def _whole(batch_size: object) -> int:
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; give a whole number of at least 1.")
    return int(batch_size)


def _checked_augment(augment: Augment | bool, dataset: Dataset) -> Augment:
    if augment is True:
        augment = default_augment(dataset)
    if augment is False:
        return PLAIN
    if not isinstance(augment, Augment):
        raise TypeError(f"augment is {augment!r}; give True, False or an Augment.")
    flat = len(dataset.shape) == 1
    if (augment.saturation or augment.hue) and not flat and dataset.shape[0] != 3:
        what = "saturation" if augment.saturation else "hue"
        raise ValueError(
            f"augment changes the {what} but {dataset.name} has {dataset.shape[0]} colour channel(s), not "
            f"red, green and blue; leave {what} at 0."
        )
    if flat and augment.random:
        kind = "vectors" if dataset.is_vector else "tokens"
        raise ValueError(
            f"augment is {augment} but {dataset.name} holds {kind}; leave augment out."
        )
    if not flat and augment.mode == "reflect":
        side = min(dataset.shape[1:])
        if augment.pad >= side:
            raise ValueError(
                f"augment pads by {augment.pad} but {dataset.name} has a side of {side} pixels; "
                f"reflect fewer than {side}."
            )
    return augment
