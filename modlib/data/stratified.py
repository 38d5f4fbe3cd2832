"""Batches in which every class keeps its share, and no class is alone.

A loss on pairs needs two of a class in the batch. With 5 % positives and batches of 16, four random
batches in five do not hold two. Here a batch holds every class in proportion, and at least two of each; where
it has no room for that, two of as many classes as it has room for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modlib.data.dataset import Labels

Integers = NDArray[np.int64]


def stratified_batches(labels: Labels, batch_size: int, rng: np.random.Generator) -> Integers:
    """Positions of the images of each batch, (len(labels) // batch_size, batch_size).

    A class whose share of a batch is s images has floor(s) or ceil(s) in each, in the epoch as many
    as its share, none twice. A class with s < 2 is lifted to two in each batch (one, if it has but one
    image): its images come several times an epoch, never twice in a batch. A batch too small for two of
    each holds two of some classes (and one of another, if its size is odd), all classes equally often.

    Args:
        labels: (N,).
        batch_size: from ``smallest_batch(labels)`` to N.
        rng: decides everything that is left open.

    Raises:
        ValueError: if ``batch_size`` is out of range.

    >>> labels = np.array([0] * 95 + [1] * 5)
    >>> rows = stratified_batches(labels, 10, np.random.default_rng(0))
    >>> rows.shape, (labels[rows] == 1).sum(1).tolist()
    ((10, 10), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    check_batch(labels, batch_size)
    batches = len(labels) // batch_size
    quotas = _quotas(np.bincount(labels), batch_size, batches, rng)
    chosen = []
    for c, total in enumerate(quotas.sum(0)):
        members = rng.permutation(np.flatnonzero(labels == c))
        # Round and round in one order: a batch asks for no more than there are, so none comes twice.
        chosen.append(members[np.arange(total) % max(1, len(members))])
    batch_of = np.concatenate([np.repeat(np.arange(batches), quota) for quota in quotas.T])
    rows = np.concatenate(chosen)[np.argsort(batch_of, kind="stable")].reshape(batches, batch_size)
    return rng.permuted(rows, axis=1)


def smallest_batch(labels: Labels) -> int:
    """The least ``batch_size``: two of a class and one of another.

    >>> smallest_batch(np.array([0, 0, 0, 1, 1, 2]))
    3
    """
    counts = np.bincount(labels)
    return 3 if (counts > 0).sum() > 1 and (counts > 1).any() else 1


def lonely(labels: Labels, batch_size: int) -> bool:
    """Has a class fewer images in a mean batch than it would have in a stratified one?

    >>> labels = np.array([0] * 95 + [1] * 5)
    >>> [lonely(labels, size) for size in (2, 3, 39, 40)]
    [False, True, True, False]
    """
    counts = np.bincount(labels)
    fewer = counts * batch_size < _least(counts, batch_size) * len(labels)
    return smallest_batch(labels) <= batch_size and bool(fewer.any())


def check_batch(labels: Labels, batch_size: int) -> None:
    """Refuse a ``batch_size`` that ``stratified_batches`` cannot fill."""
    least = smallest_batch(labels)
    if not least <= batch_size <= len(labels):
        raise ValueError(
            f"batch_size is {batch_size}; stratified batches take a number from {least} (two of a class "
            f"and one of another) to {len(labels)} (all images)."
        )


def _quotas(counts: Integers, batch_size: int, batches: int, rng: np.random.Generator) -> Integers:
    """Images of each class in each batch, (batches, classes); rows add up to ``batch_size``."""
    if batch_size >= _least(counts, batch_size).sum():
        return _dealt(*_shares(counts, batch_size), batches, rng)
    paired = counts >= 2
    chosen = -(-batch_size // 2)  # classes in a batch
    quotas = 2 * _dealt(chosen * paired, int(paired.sum()), batches, rng)
    if batch_size % 2:
        one = (rng.random(quotas.shape) * quotas).argmax(1)  # of the chosen, drawn at random
        quotas[np.arange(batches), one] = 1
    return quotas


def _dealt(share: Integers, unit: int, batches: int, rng: np.random.Generator) -> Integers:
    """How many each class gets in each batch, (batches, classes), if its share is share/unit.

    Systematic sampling: the shares of a batch are laid end to end, and a comb with one tooth an
    image is dropped on them. Over the batches the comb moves by 1/batches of a tooth; by Hermite's
    identity a class then gets, in all, its share of the epoch. Integers throughout.
    """
    classes = rng.permutation(len(share))  # neighbours shut each other out: other ones each epoch
    ends = batches * share[classes].cumsum()
    comb = unit * rng.permutation(batches) + rng.integers(unit)
    teeth = (ends + comb[:, None]) // (unit * batches)
    quotas = np.empty((batches, len(share)), np.int64)
    quotas[:, classes] = np.diff(teeth, axis=1, prepend=0)
    return quotas


def _least(counts: Integers, batch_size: int) -> Integers:
    """How many images of each class a batch should hold: two, or one where there is but one."""
    least = np.minimum(counts, 2)
    return least if least.sum() <= batch_size else np.where(counts >= 2, 2, 0)


def _shares(counts: Integers, batch_size: int) -> tuple[Integers, int]:
    """Each class's share of a batch, in units of 1/unit images: (classes,) and unit."""
    least = _least(counts, batch_size)
    lifted = np.zeros(len(counts), bool)
    while True:
        rest = batch_size - int(least[lifted].sum())
        unit = max(1, int(counts[~lifted].sum()))
        share = np.where(lifted, least * unit, rest * counts)
        rare = share < least * unit
        if not rare.any():
            return share, unit
        lifted |= rare
