r"""The least cross-entropy over all input modules when the classes are unbalanced: a convex program.

Features may be replaced by their class means without raising the risk (Jensen), so with
:math:`\alpha = 1` the bound is the least, over heads :math:`(W, b)` of norm :math:`r` and class points of
Gram matrix :math:`G`, of :math:`\sum_c p_c\, \mathrm{CE}_c(W m_c + b)`, where :math:`G \succeq 0`,
:math:`G_{cc} \le 1` and :math:`G_{cd} \ge \beta`.

**Dual.** :math:`\mathrm{CE}_c(z) \ge H(q) + \langle q - e_c, z \rangle` for every probability vector
:math:`q`. Let :math:`A` have the columns :math:`p_c (e_c - q_c)`, with :math:`A \mathbf 1 = 0` (the free
bias), and :math:`K = A^\top A`. Then the risk is at least

.. math:: \sum_c p_c H(q_c) - r \sqrt{S}, \qquad
          S = \sum_c u_c - \beta \sum_{c \ne d} V_{cd} \ \ge\ \max_G \operatorname{tr}(G K),

for all :math:`V_{cd} \ge 0` and :math:`\operatorname{diag}(u) \succeq K + V` (the penalty
:math:`\lambda \lVert W \rVert^2` has :math:`S / 4 \lambda` for :math:`r \sqrt S`). `certify` turns any class
points and scores into such a :math:`(q, u, V)`, so the bound is true whatever the solver did.

**Solver.** First the ideal points, whose inner products are all :math:`\beta`: they are optimal unless
some classes are so rare that merging them pays. Else the cone program of `modlib.certificates.conic`, by
Clarabel. Its size is the number of *different* shares, of which it takes up to `_GROUPS`. If there are more,
it sees the nearest ones as equal; `certify` takes the dual point back to the true shares, so the bound stays
true, but may be loose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from modlib.certificates.arguments import attainable, budget, checked_shares
from modlib.certificates.conic import Array, Index, solve_dual
from modlib.certificates.head import BestHead, best_head

_TOLERANCE = 1e-8  # between the bound and the risk of class points that were found
# Different shares that the cone program tells apart: they cost seconds, 40 cost a minute.
_GROUPS = 30
_EPSILON = 2.0**-52


@dataclass(frozen=True)
class UnbalancedBound:
    """A dual bound and the class points that nearly reach it.

    Attributes:
        value: no input module has a smaller risk.
        reached: the risk of the class points whose Gram matrix is ``gram``.
        gram: ``(C, C)`` Gram matrix of the class points, feature norm 1.

    >>> bound = unbalanced_bound([0.5, 0.3, 0.2], floor=0.0, head_norm=2.0)
    >>> bound.gram.shape, bound.gram.round(4).diagonal().tolist()
    ((3, 3), [1.0, 1.0, 1.0])
    """

    value: float
    reached: float
    gram: Array = field(repr=False)


@dataclass
class Program:
    """The program for features of norm 1: ``r`` or ``λ`` absorbs the feature norm."""

    shares: Array
    floor: float
    norm: float | None
    penalty: float | None

    def head(self, points: Array) -> BestHead:
        """The best head on class points, the columns of ``points``."""
        return best_head(
            points.T.copy(),
            torch.arange(len(self.shares)),
            head_norm=self.norm,
            penalty=self.penalty,
            tolerance=1e-9,
            weights=self.shares,
        )

    def cost(self, s: float) -> float:
        if self.penalty is not None:
            return s / (4 * self.penalty)
        assert self.norm is not None
        return self.norm * math.sqrt(s)


def unbalanced_bound(
    proportions: Sequence[float],
    floor: float,
    feature_norm: float = 1.0,
    head_norm: float | None = None,
    penalty: float | None = None,
) -> UnbalancedBound:
    """A lower bound of the cross-entropy for classes with these shares, and points that nearly reach it.

    Arguments: as in `global_bound`, which calls this for three classes or more of unequal shares. The loss
    is the cross-entropy, and the penalty ``λ ||W||²``: the program covers no other.

    The time grows with the number of different shares. On one core: 10 take 0.05 s, 20 take 0.6 s, 30 and
    more 3 to 5 s. Up to 30 the two numbers agree to 1e-7 (floors above 0.99: to 1e-5). Beyond, shares
    that are near each other share a dual point: the bound is true, but lower than it could be, for sixty
    shares that fall by a tenth each by 0.4 % to 1.8 %, for a hundred between 0.7 % and 1.3 % of the
    examples by up to 0.02 %.

    Raises:
        ValueError: as `global_bound`.

    >>> bound = unbalanced_bound([0.5, 0.3, 0.2], floor=0.0, head_norm=2.0)
    >>> 0 <= bound.reached - bound.value < 1e-7
    True
    """
    shares = checked_shares("cross_entropy", proportions, floor, feature_norm)
    budget(head_norm, penalty)
    program = Program(
        np.array(shares),
        max(floor, -1.0),
        None if head_norm is None else head_norm * feature_norm,
        None if penalty is None else penalty / feature_norm**2,
    )
    classes = len(shares)
    ideal = attainable(floor, classes)
    points = _points((1 - ideal) * np.eye(classes) + ideal, program.floor)
    head = program.head(points)
    flows = softmax_flows(_scores(head, points), program.shares)
    value = certify(program, flows)
    best = UnbalancedBound(value, head.risk, points.T @ points)
    if best.reached - best.value <= _TOLERANCE:
        return best
    norm = program.norm or max(float(head.weight.norm()), 1e-3)
    groups = _groups(program.shares)
    found = solve_dual(program.shares, groups, program.floor, norm, program.penalty)
    value = max(best.value, certify(program, found.flows, found.v, found.u))
    points = _points(found.gram, program.floor)
    reached = program.head(points).risk
    if reached < best.reached:
        return UnbalancedBound(value, reached, points.T @ points)
    return replace(best, value=value)


def _points(gram: Array, floor: float) -> Array:
    """Unit columns whose cosines are those of ``gram``, moved together until none is below the floor.

    Adding the same amount of a new direction to all of them turns every cosine ``x`` into
    ``(x + t) / (1 + t)``.
    """
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    points = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    points /= np.maximum(np.linalg.norm(points, axis=0), 1e-300)
    least = float((points.T @ points).min())
    extra = max(0.0, (floor - least) / (1 - floor)) if floor < 1 else 0.0
    lifted: Array = np.vstack([points, np.full(len(gram), math.sqrt(extra))]) / math.sqrt(1 + extra)
    return lifted


def _scores(head: BestHead, points: Array) -> Array:
    scores: Array = head.weight.numpy() @ points + head.bias.numpy()[:, None]
    return scores


def certify(
    program: Program, flows: Array, v: Array | None = None, u: Array | None = None
) -> float:
    """The dual value at the flows ``p_c q_c(k)`` from class c to class k, for guesses of ``V`` and ``u``.

    ``flows`` is ``(C, C)``, nonnegative, with row k and column c. Without a guess ``V`` cancels the
    negative entries of ``K``, and ``u`` is its diagonal; then it is raised until it dominates. The value is
    rounded down: sums of C numbers carry up to C units of rounding, and the terms of ``S`` may cancel.
    """
    p, unit = program.shares, 4 * len(program.shares) * _EPSILON
    flows = _circulation(flows)
    leaving = flows.sum(0)
    share = min(1.0, (1 - unit) * float((p / np.maximum(leaving, 1e-300)).min()))
    flows, leaving = share * flows, share * leaving  # class c has p_c to send
    others = leaving / p  # 1 - q_c(c)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropies = -np.where(flows > 0, flows * np.log(flows / p), 0.0).sum(0)
        entropies -= p * (1 - others) * np.log1p(-others)
    a = np.diag(leaving) - flows
    k = a.T @ a
    v = np.maximum(-k if v is None else (v + v.T) / 2, 0)
    np.fill_diagonal(v, 0)
    cover = _covered(k + v, k.diagonal() if u is None else u)
    relief = program.floor * float(v.sum())
    cost = program.cost(max(cover - relief, 0.0) + unit * (cover + abs(relief)))
    gain = float(entropies.sum())
    return max(0.0, gain - cost - unit * (gain + float(leaving.sum()) + cost))


def softmax_flows(scores: Array, shares: Array) -> Array:
    """The flows of ``q_c``, the softmax of column c."""
    q = np.exp(scores - scores.max(0))
    flows: Array = q / q.sum(0) * shares
    return flows


def _circulation(flows: Array) -> Array:
    """The flows in whole units of 2⁻⁵², repaired until each class receives exactly what it sends.

    That is the constraint ``A 1 = 0``, which solvers and optimal biases meet nearly: flow is added from the
    class that receives most too much to the one that sends most too much.
    """
    units = np.rint(np.clip(flows, 0, 1) / _EPSILON).astype(np.int64)
    np.fill_diagonal(units, 0)
    surplus = units.sum(1) - units.sum(0)
    while surplus.any():
        source, to = surplus.argmax(), surplus.argmin()
        amount = min(surplus[source], -surplus[to])
        units[to, source] += amount
        surplus[[source, to]] += [-amount, amount]
    repaired: Array = (units * _EPSILON).astype(np.float64)
    return repaired


def _covered(matrix: Array, u: Array) -> float:
    """``Σ u`` after ``u`` is raised, by a common sum or a common factor, to dominate ``matrix``."""
    u = np.maximum(u, 0)
    added = float(u.sum()) + len(u) * _excess(matrix - np.diag(u))
    if u.min() <= 0:
        return added
    root = 1 / np.sqrt(u)
    factor = 1 + _excess(matrix * np.outer(root, root) - np.eye(len(u)))
    return min(added, factor * float(u.sum()))


def _excess(matrix: Array) -> float:
    """How far the largest eigenvalue is above zero, its rounding included."""
    values = np.linalg.eigvalsh(matrix)
    return max(0.0, float(values[-1] + 4 * len(matrix) * _EPSILON * np.abs(values).max()))


def _groups(shares: Array) -> Index:
    """The group of each class: equal shares together; neighbours too, if there are too many groups."""
    order = np.argsort(shares, kind="stable")
    steps = np.diff(shares[order], prepend=shares[order[0]]) > 1e-9 * shares[order]
    labels: Any = np.cumsum(steps)
    if labels[-1] >= _GROUPS:
        labels = np.arange(len(shares)) * _GROUPS // len(shares)
    groups = np.empty(len(shares), dtype=np.int64)
    groups[order] = labels
    return groups
