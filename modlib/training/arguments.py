"""The arguments of ``fit``, checked and turned into what the loop needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch.optim.lr_scheduler import LRScheduler

from modlib.data import Augment, Dataset, default_augment
from modlib.networks.sizes import check_whole

Schedule = Callable[[float], float]
"""A factor on the learning rates, as a function of progress in [0, 1)."""

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda progress: 1.0,
    "one-cycle": lambda progress: progress / 0.2 if progress < 0.2 else (1 - progress) / 0.8,
    "cosine": lambda progress: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item()),
}


def augmentation(augment: Augment | str | None, data: Dataset) -> Augment | None:
    if augment is None or isinstance(augment, Augment):
        return augment
    if augment != "auto":
        raise ValueError(f"augment={augment!r}: give 'auto', None or a data.Augment.")
    return default_augment(data) or None


def schedule_function(schedule: str | Schedule) -> Schedule:
    """The function of progress that a schedule's name stands for, or the one that is given.

    >>> own: Schedule = lambda progress: 1 - progress    # a schedule of your own, for ``fit``
    >>> schedule_function(own)(0.25)
    0.75
    """
    own = (
        f"choose from {', '.join(SCHEDULES)} or give a function from progress in [0, 1) to a factor, "
        "such as lambda progress: 1 - progress"
    )
    kind = schedule if isinstance(schedule, type) else type(schedule)
    if issubclass(kind, LRScheduler):
        raise TypeError(
            f"schedule: {kind.__name__} is torch's and steps an optimiser that it is given, but fit makes "
            f"the optimisers; {own}."
        )
    if not callable(schedule):
        if not isinstance(schedule, str) or schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r:.60}: {own}.")
        return SCHEDULES[schedule]
    try:
        first = schedule(0.0)
    except Exception as error:
        raise TypeError(
            f"schedule={schedule!r:.60} fails at progress 0 ({error}); {own}."
        ) from error
    if not isinstance(first, Real):
        raise TypeError(f"schedule={schedule!r:.60} gives {first!r:.60} at progress 0; {own}.")
    return schedule


def stage_lengths(epochs: int | Sequence[int], stages: int) -> tuple[int, ...]:
    lengths = tuple(epochs) if isinstance(epochs, Sequence) else (epochs,) * stages
    if len(lengths) != stages:
        raise ValueError(
            f"epochs={list(lengths)} has {len(lengths)} numbers, but the method trains in {stages} "
            "stages; give one number for all, or one for each."
        )
    for length in lengths:
        check_whole(epochs=length)
    return lengths


def check_kind(name: str, value: object, kind: type, example: str) -> None:
    if not isinstance(value, kind):
        what = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r:.60}"
        raise TypeError(f"{name}: {what} is no {kind.__name__}; give one, such as {example}.")


def check_budget(recompute: int | str | None) -> None:
    """Refuse what is no number of bytes for ``fit``'s ``recompute``.

    Raises:
        ValueError: it is none.

    >>> check_budget("most")
    Traceback (most recent call last):
    ValueError: recompute='most': give a number of bytes, "least", or None to run nothing again.
    """
    whole = isinstance(recompute, int) and not isinstance(recompute, bool) and recompute > 0
    if not (whole or recompute is None or recompute == "least"):
        raise ValueError(
            f'recompute={recompute!r}: give a number of bytes, "least", or None to run nothing again.'
        )
