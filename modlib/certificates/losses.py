"""The four losses as functions of the scores of a linear head: value, slope, curvature.

A score matrix is ``(n, K)``: ``K = C`` for the softmax cross-entropy, ``K = 1`` for the binary
losses, whose class 1 is the positive one. All losses are convex in the scores, and every one of them
dominates its own linearisation; that is all that the duality gap of `best_head` uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOSSES = ("cross_entropy", "logistic", "hinge", "squared_hinge")


@dataclass(frozen=True)
class Local:
    """A loss at given scores: ``values`` (n,), ``slopes`` (n, K), and its second-order model."""

    values: Tensor
    slopes: Tensor
    bend: Callable[[Tensor], Tensor]  # (n, K) score changes -> (n, K) slope changes
    weight: Tensor  # (n,) size of the curvature, for preconditioning


def cross_entropy(scores: Tensor, labels: Tensor) -> Local:
    """Softmax cross-entropy, natural logarithm."""
    index = labels[:, None]
    logs = torch.log_softmax(scores, dim=1)
    q = logs.exp()
    slopes = q.scatter_add(1, index, -torch.ones_like(index, dtype=q.dtype))
    # 1 - q_y summed over the other classes: no cancellation when q_y is close to one.
    others = q.scatter(1, index, 0.0).sum(1)
    slopes.scatter_(1, index, -others[:, None])

    def bend(change: Tensor) -> Tensor:
        return q * (change - (q * change).sum(1, keepdim=True))

    values = torch.where(others < 0.5, -torch.log1p(-others), -logs.gather(1, index)[:, 0])
    return Local(values, slopes, bend, others * (2 - others) / 2)


def _binary(signs: Tensor, values: Tensor, slopes: Tensor, curvature: Tensor) -> Local:
    return Local(
        values, slopes[:, None] * signs[:, None], lambda d: curvature[:, None] * d, curvature
    )


def logistic(scores: Tensor, labels: Tensor) -> Local:
    """``log(1 + exp(-m))`` of the margin ``m = ±score``."""
    signs = 2.0 * labels.to(scores.dtype) - 1.0
    margin = signs * scores[:, 0]
    q = torch.sigmoid(-margin)
    return _binary(signs, torch.nn.functional.softplus(-margin, threshold=700), -q, q * (1 - q))


def squared_hinge(scores: Tensor, labels: Tensor) -> Local:
    """``max(0, 1 - m)²`` of the margin ``m = ±score``."""
    signs = 2.0 * labels.to(scores.dtype) - 1.0
    short = (1.0 - signs * scores[:, 0]).clamp_min(0)
    return _binary(signs, short**2, -2 * short, 2.0 * (short > 0).to(scores.dtype))


def hinge(scores: Tensor, labels: Tensor, width: float = 0.0) -> Local:
    """``max(0, 1 - m)``; with ``width > 0`` its smoothing, at most ``width / 2`` smaller."""
    signs = 2.0 * labels.to(scores.dtype) - 1.0
    short = (1.0 - signs * scores[:, 0]).clamp_min(0)
    if width == 0:
        return _binary(signs, short, -(short > 0).to(scores.dtype), torch.zeros_like(short))
    bent = short < width
    values = torch.where(bent, short**2 / (2 * width), short - width / 2)
    curvature = (bent & (short > 0)).to(scores.dtype) / width
    return _binary(signs, values, -(short / width).clamp_max(1), curvature)


def named(loss: str) -> Callable[[Tensor, Tensor], Local]:
    """The loss called ``loss``; `ValueError` if there is none."""
    table = {
        "cross_entropy": cross_entropy,
        "logistic": logistic,
        "hinge": hinge,
        "squared_hinge": squared_hinge,
    }
    if loss not in table:
        raise ValueError(f"loss is {loss!r}: choose one of {', '.join(LOSSES)}")
    return table[loss]
