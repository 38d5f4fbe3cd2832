"""Arguments that the bounds share, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from modlib.certificates.losses import LOSSES


def budget(head_norm: float | None, penalty: float | None) -> float:
    """The one of the two that is given, checked to be positive and finite."""
    if (head_norm is None) == (penalty is None):
        raise ValueError("head_norm, penalty: give exactly one of them (and not None for both)")
    name, value = ("head_norm", head_norm) if penalty is None else ("penalty", penalty)
    number = float(cast("float", value))
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} is {number}: it must be positive and finite")
    return number


def checked_shares(
    loss: str, proportions: Sequence[float], floor: float, feature_norm: float
) -> list[float]:
    """The share of each class, summing to one; `ValueError` for any of the four that makes no sense."""
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}: choose one of {', '.join(LOSSES)}")
    shares = [float(p) for p in proportions]
    if len(shares) < 2 or not all(math.isfinite(p) and p > 0 for p in shares):
        raise ValueError(f"proportions are {_short(shares)}: give a positive share for each class")
    total = math.fsum(shares)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"proportions sum to {total:.8g}: they must sum to one")
    if loss != "cross_entropy" and len(shares) != 2:
        raise ValueError(f"proportions has {len(shares)} entries: the {loss} loss has two classes")
    if not (math.isfinite(floor) and floor <= 1):
        raise ValueError(f"floor is {floor}: it must be a cosine, at most 1")
    if not (math.isfinite(feature_norm) and feature_norm > 0):
        raise ValueError(f"feature_norm is {feature_norm}: it must be positive and finite")
    return [p / total for p in shares]


def _short(shares: list[float]) -> str:
    return str(shares) if len(shares) <= 5 else f"{shares[:5]} and {len(shares) - 5} more"


def attainable(floor: float, classes: int) -> float:
    """``β₊``: no floor below ``-1/(C - 1)`` can bind for all pairs of classes at once."""
    return max(floor, -1 / (classes - 1))
