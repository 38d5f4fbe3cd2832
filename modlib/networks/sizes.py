"""What a network is built from, and how long it is trained, is counted in whole numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral


def check_whole(least: int = 1, **numbers: object) -> None:
    """Refuse what is no whole number of at least so much.

    Raises:
        ValueError: naming the argument.

    >>> check_whole(classes=10, size=32.0)
    Traceback (most recent call last):
    ValueError: size=32.0: give a whole number of at least 1.
    """
    for name, number in numbers.items():
        if not _whole(number, least):
            raise ValueError(f"{name}={number!r}: give a whole number of at least {least}.")


def check_list(name: str, numbers: object, least: int = 1) -> None:
    """Refuse what is no list of so many whole numbers, each at least 1.

    Raises:
        ValueError: naming the argument.

    >>> check_list("widths", (8, 0))
    Traceback (most recent call last):
    ValueError: widths=(8, 0): give a list of whole numbers of at least 1.
    """
    given = list(numbers) if isinstance(numbers, Sequence) else []
    if len(given) < least or not all(_whole(number) for number in given):
        several = f"at least {least} " if least > 1 else ""
        raise ValueError(
            f"{name}={numbers!r}: give a list of {several}whole numbers of at least 1."
        )


def check_positive(least: float = 0.0, **numbers: object) -> None:
    """Refuse what is no finite number above ``least``.

    Raises:
        ValueError: naming the argument.

    >>> check_positive(step_size=0.0)
    Traceback (most recent call last):
    ValueError: step_size=0.0: give a finite number above 0.
    """
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not least < number < math.inf:
            raise ValueError(f"{name}={number!r}: give a finite number above {least:g}.")


def check_nonnegative(**numbers: object) -> None:
    """Refuse what is neither 0 nor a finite number above it.

    Raises:
        ValueError: naming the argument.
    """
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not 0 <= number < math.inf:
            raise ValueError(f"{name}={number!r}: give a finite number of at least 0.")


def _whole(number: object, least: int = 1) -> bool:
    return isinstance(number, Integral) and int(number) >= least
