"""Placeholder replaced in this same piece of work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class UnbalancedBound:
    value: float


def unbalanced_bound(
    shares: Sequence[float],
    floor: float,
    norm: float,
    head_norm: float | None,
    penalty: float | None,
) -> UnbalancedBound:
    raise NotImplementedError
