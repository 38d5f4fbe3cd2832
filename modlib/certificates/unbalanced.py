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
some classes are so rare that merging them pays. Else Newton's method on the dual with logarithmic
barriers. Classes of equal share may be treated alike, since the dual is concave and symmetric in them.
With more than `_GROUPS` different shares neighbouring ones are tied too: the bound stays true but is loose
(thirty shares that fall by a tenth each, in the cases tried: by 1 % of the risk at floor 0, by up to 15 %
at floor -1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from modlib.certificates.head import BestHead, best_head

_TOLERANCE = 1e-8  # between the bound and the risk of class points that were found
_GROUPS = 16  # classes of different share that the interior-point method tells apart

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class UnbalancedBound:
    """A dual bound and the class points that nearly reach it.

    Attributes:
        value: no input module has a smaller risk.
        reached: the risk of the class points whose Gram matrix is ``gram``.
        gram: ``(C, C)`` Gram matrix of the class points, feature norm 1.
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
            tolerance=_TOLERANCE / 10,
            weights=self.shares,
        )

    def cost(self, s: float) -> float:
        if self.penalty is not None:
            return s / (4 * self.penalty)
        assert self.norm is not None
        return self.norm * math.sqrt(s)


def unbalanced_bound(
    shares: Sequence[float],
    floor: float,
    feature_norm: float = 1.0,
    head_norm: float | None = None,
    penalty: float | None = None,
) -> UnbalancedBound:
    """A lower bound of the cross-entropy for classes with these shares, and points that nearly reach it.

    Arguments: as in `global_bound`, which checks them and calls this for unequal shares.

    >>> bound = unbalanced_bound([0.5, 0.3, 0.2], floor=0.0, head_norm=2.0)
    >>> 0 <= bound.reached - bound.value < 1e-7
    True
    """
    program = Program(
        np.asarray(shares, dtype=np.float64),
        max(floor, -1.0),
        None if head_norm is None else head_norm * feature_norm,
        None if penalty is None else penalty / feature_norm**2,
    )
    classes = len(shares)
    ideal = max(program.floor, -1 / (classes - 1))
    points = _points((1 - ideal) * np.eye(classes) + ideal, program.floor)
    head = program.head(points)
    flows = softmax_flows(_scores(head, points), program.shares)
    value = certify(program, flows)
    best = UnbalancedBound(value, head.risk, points.T @ points)
    if best.reached - best.value <= _TOLERANCE:
        return best
    found = interior_point(program, flows)
    value = certify(program, found.flows, found.v, found.u)
    best = replace(best, value=max(value, best.value))
    for gram in found.grams:
        points = _points(gram, program.floor)
        reached = program.head(points).risk
        if reached < best.reached:
            best = replace(best, reached=reached, gram=points.T @ points)
    return best


def _points(gram: Array, floor: float) -> Array:
    """Unit columns whose cosines are those of ``gram``, moved together until none is below the floor.

    Adding the same amount of a new direction to all of them turns every cosine ``x`` into
    ``(x + t) / (1 + t)``.
    """
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    points = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    points /= np.linalg.norm(points, axis=0)
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
    negative entries of ``K``, and ``u`` is its diagonal; then it is raised until it dominates.
    """
    p = program.shares
    flows = _circulation(flows)
    flows *= min(
        1.0, float((p / np.maximum(flows.sum(0), 1e-300)).min())
    )  # class c has p_c to send
    leaving = flows.sum(0)
    others = np.minimum(leaving / p, 1.0)  # 1 - q_c(c)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropies = -np.where(flows > 0, flows * np.log(flows / p), 0.0).sum(0)
        entropies -= np.where(others < 1, p * (1 - others) * np.log1p(-others), 0.0)
    a = np.diag(leaving) - flows
    k = a.T @ a
    v = np.maximum(-k if v is None else (v + v.T) / 2, 0)
    np.fill_diagonal(v, 0)
    s = _covered(k + v, k.diagonal() if u is None else u) - program.floor * float(v.sum())
    cost = program.cost(max(s, 0.0))
    rounding = 1e-15 * len(p) * (float(entropies.sum()) + cost)
    return max(0.0, float(entropies.sum()) - cost - rounding)


def softmax_flows(scores: Array, shares: Array) -> Array:
    """The flows of ``q_c``, the softmax of column c."""
    q = np.exp(scores - scores.max(0))
    flows: Array = q / q.sum(0) * shares
    return flows


def _circulation(flows: Array) -> Array:
    """The flows, repaired until each class receives what it sends.

    That is the constraint ``A 1 = 0``, which the optimal bias meets up to rounding; adding flow from the
    classes that receive too much to those that send too much meets it exactly.
    """
    flows = flows.copy()
    np.fill_diagonal(flows, 0)
    surplus = flows.sum(1) - flows.sum(0)
    give, take = np.maximum(surplus, 0), np.maximum(-surplus, 0)
    if give.sum() > 0 and take.sum() > 0:
        flows += np.outer(take, give) / max(give.sum(), take.sum())
    return flows


def _covered(matrix: Array, u: Array) -> float:
    """``Σ u`` after ``u`` is raised, by a common sum or a common factor, to dominate ``matrix``."""
    u = np.maximum(u, 0)
    lack = max(0.0, float(np.linalg.eigvalsh(matrix - np.diag(u))[-1]))
    added = float(u.sum()) + len(u) * lack
    if u.min() <= 0:
        return added
    root = 1 / np.sqrt(u)
    factor = max(1.0, float(np.linalg.eigvalsh(matrix * np.outer(root, root))[-1]))
    return min(added, factor * float(u.sum()))


def _grouped(shares: Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The group of each class: equal shares together; neighbours too, if there are too many groups."""
    order = np.argsort(shares, kind="stable")
    steps = np.diff(shares[order], prepend=shares[order[0]]) > 1e-9 * shares[order]
    labels: Any = np.cumsum(steps)
    if labels[-1] >= _GROUPS:
        labels = np.arange(len(shares)) * _GROUPS // len(shares)
    groups = np.empty(len(shares), dtype=np.int64)
    groups[order] = labels
    return groups


class _Barrier:
    r"""The dual as a conic program with logarithmic barriers, in one vector ``x`` of free variables.

    With :math:`r \sqrt S = \min_{s > 0} \frac r2 (s + S / s)` the dual is to minimise
    ``-Σ p H + r/2 (s + Σ u - β Σ V)`` over flows F > 0, V > 0, u and s, such that the matrix
    ``[[s I, A], [Aᵀ, diag(u) - V]]`` is positive definite. (Penalty: s = 1, and 1/4λ for r/2.)
    Everything is linear in x but the entropy: ``cost @ x``, ``rows(x) > 0`` and ``matrix(x)``.
    """

    def __init__(self, program: Program) -> None:
        groups = _grouped(program.shares)
        n, count = len(groups), int(groups.max()) + 1
        member = np.eye(count)[groups]
        self.p = program.shares
        self.member, self.products = member, np.outer(self.p, self.p)
        np.fill_diagonal(self.products, 0)
        flows, v = _tied_flows(member, self.products), _tied_symmetric(member, self.products)
        cover = member * self.p[:, None]
        scaled = program.penalty is None
        self.sizes = (flows.shape[2], v.shape[2], count, int(scaled))
        self.splits = np.cumsum(self.sizes)[:-1]
        self.flows, self.v, self.cover, off = flows, v, cover, ~np.eye(n, dtype=bool)

        leaving = flows.sum(0)
        self.rows = np.zeros((2 * n * (n - 1) + n, sum(self.sizes)))
        self.rows[: n * n - n, : self.splits[0]] = flows[off]
        self.rows[n * n - n : n * n, : self.splits[0]] = -leaving
        self.rows[n * n :, self.splits[0] : self.splits[1]] = v[off]
        self.constant = np.zeros(len(self.rows))
        self.constant[n * n - n : n * n] = self.p  # what stays: p_c q_c(c)
        self.shares = np.concatenate([np.broadcast_to(self.p, (n, n))[off], self.p])

        a = np.einsum("cj,kc->kcj", leaving, np.eye(n)) - flows
        self.matrices = np.zeros((sum(self.sizes), 2 * n, 2 * n))
        i, j, k = self.splits
        self.matrices[:i, :n, n:] = a.transpose(2, 0, 1)
        self.matrices[:i, n:, :n] = a.transpose(2, 1, 0)
        self.matrices[i:j, n:, n:] = -v.transpose(2, 0, 1)
        self.matrices[j:k, n:, n:] = np.einsum("cg,cd->gcd", cover, np.eye(n))
        self.matrices[k:, :n, :n] = np.eye(n)
        self.offset = np.zeros((2 * n, 2 * n))
        if not scaled:
            self.offset[:n, :n] = np.eye(n)
        price = program.norm / 2 if program.norm is not None else 1 / (4 * (program.penalty or 1))
        self.cost = price * np.concatenate(
            [np.zeros(i), -program.floor * v.sum((0, 1)), cover.sum(0), np.ones(int(scaled))]
        )

    def matrix(self, x: Array) -> Array:
        out: Array = self.offset + np.tensordot(x, self.matrices, 1)
        return out

    def dual(self, x: Array) -> float:
        kept = (self.rows @ x + self.constant)[: len(self.shares)]
        return -float(self.cost @ x) - float(kept @ np.log(kept / self.shares))

    def value(self, x: Array, mu: float) -> float:
        """``-dual / μ`` with the barriers; infinite outside the domain."""
        rows = self.rows @ x + self.constant
        if not bool((rows > 0).all()):
            return math.inf
        try:
            root = np.linalg.cholesky(self.matrix(x))
        except np.linalg.LinAlgError:
            return math.inf
        return (
            -self.dual(x) / mu
            - float(np.log(rows).sum())
            - 2 * float(np.log(root.diagonal()).sum())
        )

    def newton(self, x: Array, mu: float) -> tuple[Array, float]:
        """The Newton step of ``-dual / μ + barriers`` and its decrement."""
        kept = len(self.shares)
        values = self.rows @ x + self.constant
        slope, bend = -1 / values, 1 / values**2
        slope[:kept] += (np.log(values[:kept] / self.shares) + 1) / mu
        bend[:kept] += 1 / (mu * values[:kept])
        root = np.linalg.inv(np.linalg.cholesky(self.matrix(x)))
        products = root @ self.matrices @ root.T  # symmetric, so that the Hessian is a Gram matrix
        flat = products.reshape(len(x), -1)
        gradient = self.cost / mu + self.rows.T @ slope - np.trace(products, axis1=1, axis2=2)
        hessian = self.rows.T @ (bend[:, None] * self.rows) + flat @ flat.T
        scale = 1 / np.sqrt(hessian.diagonal())  # the variables differ by many powers of ten
        scaled = hessian * scale[:, None] * scale
        scaled.flat[:: len(x) + 1] += 1e-14
        step = -scale * np.linalg.solve(scaled, scale * gradient)
        return step, math.sqrt(max(-float(gradient @ step), 0.0))

    def room(self, x: Array, step: Array) -> float:
        """How many steps lead to the boundary of the domain."""
        rows = (self.rows @ step) / (self.rows @ x + self.constant)
        root = np.linalg.inv(np.linalg.cholesky(self.matrix(x)))
        change = root @ np.tensordot(step, self.matrices, 1) @ root.T
        return 1 / max(1e-9, -float(rows.min()), -float(np.linalg.eigvalsh(change)[0]))

    def multiplier(self, x: Array, mu: float) -> Array:
        """Of the matrix constraint, after one Newton step: the lower right block is a multiple of G.

        The inverse alone would do at the very centre; its change along the step is what makes ``G``
        obey its constraints although x is only near it.
        """
        inverse = np.linalg.inv(self.matrix(x))
        change = np.tensordot(self.newton(x, mu)[0], self.matrices, 1)
        out: Array = inverse - inverse @ change @ inverse
        return out

    def start(self, flows: Array) -> Array:
        """Flows summed over the groups, small ``V``, and a ``u`` that makes the matrix dominant."""
        m = self.member
        np.fill_diagonal(flows, 0)
        rates = (m.T @ flows @ m) / np.maximum(m.T @ self.products @ m, 1e-300)
        flows = self.products * (m @ rates @ m.T)
        f = np.linalg.lstsq(self.flows.reshape(-1, self.sizes[0]), flows.ravel(), rcond=None)[0]
        f *= min(1.0, 0.9 * float((self.p / (self.flows @ f).sum(0)).min()))  # class c sends < p_c
        matrix = self.flows @ f
        a = np.diag(matrix.sum(0)) - matrix
        s = float(np.linalg.norm(a)) if self.sizes[3] else 1.0
        k = a.T @ a / s
        v = 0.1 * float(k.diagonal().sum() / self.products.sum()) * np.ones(self.sizes[1])
        needed = (np.abs(k) + self.v @ v).sum(1) + 0.1 * k.diagonal().mean()
        u = (self.member * (needed / self.p)[:, None]).max(0)
        return np.concatenate([f, v, u, [s] * self.sizes[3]])


def _tied_flows(member: Array, products: Array) -> Array:
    """``(C, C, a)``: a basis of the circulations that treat the classes of a group alike.

    Alike means that the flow from c to k is ``p_c p_k`` times a number that their groups share.
    """
    n, count = member.shape
    pairs = np.einsum("ka,cb,kc->kcab", member, member, products).reshape(n, n, count**2)
    pairs = pairs[:, :, pairs.sum((0, 1)) > 0]
    balance = member.T @ (pairs.sum(1) - pairs.sum(0))  # what groups receive less what they send
    _, sizes, right = np.linalg.svd(balance)
    basis: Array = pairs @ right[int((sizes > 1e-9 * sizes.max()).sum()) :].T
    return basis


def _tied_symmetric(member: Array, products: Array) -> Array:
    """``(C, C, b)``: symmetric matrices, as the products are, that treat a group's classes alike."""
    count = member.shape[1]
    pairs = np.einsum("ka,cb,kc->kcab", member, member, products)
    upper = np.triu_indices(count)
    both = np.maximum(pairs, pairs.transpose(0, 1, 3, 2))[:, :, upper[0], upper[1]]
    return np.asarray(both[:, :, both.sum((0, 1)) > 0])


@dataclass(frozen=True)
class _DualPoint:
    """Flows, ``V``, ``u``, and Gram matrices of the class points up to a factor, best last.

    Rounding may spoil the last one.
    """

    flows: Array
    v: Array
    u: Array
    grams: list[Array]


def interior_point(program: Program, flows: Array) -> _DualPoint:
    """Maximise the dual, starting from flows."""
    barrier = _Barrier(program)
    x = barrier.start(flows)
    terms = len(barrier.rows) + 2 * len(barrier.p)  # terms * μ is the gap at the centre for μ
    n, mu, gap = len(flows), 1.0, math.inf
    grams: list[Array] = []
    while gap > 0.1 * _TOLERANCE:
        x = _centre(barrier, x, mu)
        gap = mu * terms / min(1.0, max(barrier.dual(x), 1e-9))
        grams.append(barrier.multiplier(x, mu)[n:, n:])
        mu /= 30
    f, v, u, free = np.split(x, barrier.splits)
    scale = free[0] if len(free) else 1.0
    flows = np.maximum(barrier.flows @ f, 0)
    multipliers: Array = (barrier.v @ v) * scale
    cover: Array = (barrier.cover @ u) * scale
    return _DualPoint(flows, multipliers, cover, grams[-3:])


def _centre(barrier: _Barrier, x: Array, mu: float) -> Array:
    """Newton's method with backtracking, for one weight of the barriers, as far as 80 steps lead."""
    value = barrier.value(x, mu)
    for _ in range(80):
        step, decrement = barrier.newton(x, mu)
        size = min(1.0, barrier.room(x, step) / 2)  # far from the walls, Newton's model is good
        while (new := barrier.value(x + size * step, mu)) > value - 0.1 * size * decrement**2:
            size /= 2
            if size < 1e-10:  # rounding: no descent can be seen any more
                return x
        x, value = x + size * step, new
        if decrement < 0.1:
            return x
    return x
