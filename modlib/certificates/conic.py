r"""The dual of the unbalanced program as a cone program, solved by Clarabel.

The unknowns are the flows :math:`F_{kc} = p_c q_c(k)`, :math:`V` and :math:`u` of
`modlib.certificates.unbalanced`. With :math:`r \sqrt S = \min_{s > 0} \frac r2 (s + S / s)`, and with :math:`V`
and :math:`u` divided by :math:`s`, its dual is

.. math:: \max\; \sum_{k, c} -F_{kc} \log \frac{F_{kc}}{p_c}
          - \frac r2 \Bigl( s + \sum_c u_c - \beta \sum_{c \ne d} V_{cd} \Bigr)
          \quad\text{s.t.}\quad A \mathbf 1 = 0, \quad V \ge 0, \quad
          \begin{pmatrix} s I & A \\ A^\top & \operatorname{diag}(u) - V \end{pmatrix} \succeq 0 .

With the penalty :math:`\lambda \lVert W \rVert^2`, :math:`s = 2 \lambda r` is fixed and costs nothing; the
program is then the same for every :math:`r`, and a good guess of the norm keeps the numbers of one size.
Each term of the entropy is an exponential cone.

**Groups.** The dual is concave, and classes of equal share may trade places; so some optimum treats them
alike. A matrix that does so has one entry ``x[a, b]`` for two classes of groups a and b, and ``d[a]`` on the
diagonal. It is positive semidefinite if and only if two kinds of smaller ones are: the matrix over groups
of ``√(n_a n_b) x[a, b]``, with ``d[a] + (n_a - 1) x[a, a]`` on its diagonal, and the numbers
``d[a] - x[a, a]`` of the groups of two classes or more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import clarabel
import numpy as np
from scipy import sparse

_TOLERANCE = 1e-10  # asked of the solver; `certify` finds out what came of it

Array = np.ndarray[Any, np.dtype[np.float64]]
Index = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class DualPoint:
    """What the solver found; true or not, `certify` makes a bound of it.

    Attributes:
        flows: ``(C, C)`` ``p_c q_c(k)`` in row k and column c.
        v, u: ``(C, C)`` and ``(C,)`` the multipliers.
        gram: ``(C, C)`` the Gram matrix of the class points, up to a factor.
    """

    flows: Array
    v: Array
    u: Array
    gram: Array


def solve_dual(
    shares: Array, group: Index, floor: float, norm: float, penalty: float | None
) -> DualPoint:
    """Maximise the dual, the classes of each group alike.

    Arguments:
        shares: ``(C,)``. If they differ in a group, the program has their mean, and its answer is scaled.
        group: ``(C,)`` from 0 on.
        floor: ``β``.
        norm: the budget, or with a penalty a guess of the best norm.
        penalty: ``λ``, or None.
    """
    member = np.eye(int(group.max()) + 1)[group]
    n = member.sum(0)
    p = shares @ member / n
    program = _Program(p, n)
    s = None if penalty is None else 2 * penalty * norm
    x, multipliers = _minimise(program.cost(floor, norm, s), program.cones(s))
    flows, v, u = program.point(x)
    between, within = program.gram(multipliers)
    scale, root, pairs = shares / p[group], member / np.sqrt(n), np.ix_(group, group)
    return DualPoint(
        flows=np.outer(scale, scale) * flows[pairs],
        v=np.outer(scale, scale) * v[pairs],
        u=scale**2 * u[group],
        gram=root @ (between - np.diag(within)) @ root.T + np.diag(within[group]),
    )


class _Program:
    """The program for ``(G,)`` groups of ``n`` classes of share ``p`` each.

    An expression is a sparse matrix with a column for each unknown: the flows from a class of one group to a
    class of another (or the same), what stays at a class, the terms of the entropy, ``V``, ``u`` and ``s``.
    """

    def __init__(self, p: Array, n: Array) -> None:
        self.p, self.n, self.groups, self.many = p, n, len(p), np.flatnonzero(n > 1)
        # Classes of the row's group other than one class of the column's.
        self.others = n[:, None] - np.eye(len(p))
        self.to, self.source = np.nonzero(self.others)
        self.i, self.j = np.nonzero(np.triu(self.others))
        self.twin = 1.0 * (self.i == self.j)
        pairs = len(self.to)
        lengths = [pairs + len(p), pairs + len(p), len(self.i), len(p), 1]
        unknowns, ends = sparse.eye_array(sum(lengths), format="csr"), np.cumsum(lengths)
        parts = np.split(np.arange(ends[-1]), ends[:-1])
        self.flows, self.terms, self.v, self.u, self.s = (unknowns[part] for part in parts)
        self.moving, self.staying = self.flows[:pairs], self.flows[pairs:]
        self.leaving = _sum(self.source, self.others[self.to, self.source], len(p)) @ self.moving

    def cost(self, floor: float, norm: float, s: float | None) -> Array:
        pairs = (2 - self.twin) * self.n[self.i] * self.others[self.j, self.i]
        price: Array = self.n @ self.u - floor * pairs @ self.v
        if s is None:
            price = price + self.s.toarray()[0]
        count = np.append(self.n[self.source] * self.others[self.to, self.source], self.n)
        cost: Array = norm / 2 * price - count @ self.terms
        return cost

    def cones(self, s: float | None) -> list[tuple[Any, Any, list[Any]]]:
        """Each as an expression, the constant that is added to it, and the cones that hold the sum."""
        zero, to, source = clarabel.ZeroConeT, self.to, self.source
        arriving = _sum(to, self.others[source, to], self.groups) @ self.moving
        row = 3 * np.arange(len(to) + self.groups)
        entropy = (
            _sum(row, 1.0, 3 * len(row)) @ self.terms
            + _sum(row + 1, 1.0, 3 * len(row)) @ self.flows
        )
        own = _sum(row + 2, 1.0, 3 * len(row)) @ np.append(self.p[source], self.p)
        fixed = [] if s is None else [(self.s, -s, [zero(1)])]
        return [
            (self._between(), 0.0, [clarabel.PSDTriangleConeT(2 * self.groups)]),
            (self._within(), 0.0, [clarabel.PSDTriangleConeT(2)] * len(self.many)),
            (self.leaving + self.staying, -self.p, [zero(self.groups)]),
            (self.leaving - arriving, 0.0, [zero(self.groups)]),
            (self.v, 0.0, [clarabel.NonnegativeConeT(len(self.i))]),
            (entropy, own, [clarabel.ExponentialConeT()] * len(row)),
            *fixed,
        ]

    def _between(self) -> Any:
        g, to, source, i, j = self.groups, self.to, self.source, self.i, self.j
        a, root, apart = np.arange(g), np.sqrt(self.n), to != source
        return (
            _entries(a, a, 1.0, 2 * g) @ self.s[0 * a]
            + _entries(to, g + source, -root[to] * root[source] * apart, 2 * g) @ self.moving
            + _entries(source, g + source, self.n[to] * apart, 2 * g) @ self.moving
            + _entries(g + a, g + a, 1.0, 2 * g) @ self.u
            + _entries(g + i, g + j, self.twin - root[i] * root[j], 2 * g) @ self.v
        )

    def _within(self) -> Any:
        many, row, height = self.many, 3 * np.arange(len(self.many)), 3 * len(self.many)
        side = (
            self.leaving + _sum(self.to, 1.0 * (self.to == self.source), self.groups) @ self.moving
        )
        end = self.u + _sum(self.i, self.twin, self.groups) @ self.v
        return (
            _sum(row, 1.0, height) @ self.s[0 * many]
            + _sum(row + 1, math.sqrt(2), height) @ side[many]
            + _sum(row + 2, 1.0, height) @ end[many]
        )

    def point(self, x: Array) -> tuple[Array, Array, Array]:
        """``(G, G)`` flows and ``V``, and ``(G,)`` ``u``."""
        flows, v = np.zeros((2, self.groups, self.groups))
        s = float((self.s @ x)[0])
        flows[self.to, self.source] = self.moving @ x
        v[self.i, self.j] = v[self.j, self.i] = s * (self.v @ x)
        return flows, v, s * (self.u @ x)

    def gram(self, multipliers: list[Array]) -> tuple[Array, Array]:
        """The two kinds of parts of the Gram matrix, ``(G, G)`` and ``(G,)``, from those of the matrices."""
        g, low = self.groups, np.tril_indices(2 * self.groups)
        whole, within = np.zeros((2 * g, 2 * g)), np.zeros(g)
        whole[low] = multipliers[0] / np.where(low[0] == low[1], 1.0, math.sqrt(2))
        within[self.many] = multipliers[1][2::3] / (self.n - 1)[self.many]
        return (whole + np.tril(whole, -1).T)[g:, g:], within


def _sum(index: Index, factor: Any, height: int) -> Any:
    """The matrix that adds ``factor`` times row t of an expression to row ``index[t]`` of ``height`` rows."""
    data = np.broadcast_to(factor, len(index))
    return sparse.csr_array((data, (index, np.arange(len(index)))), shape=(height, len(index)))


def _entries(i: Index, j: Index, factor: Any, size: int) -> Any:
    """The same for entries i <= j of a symmetric matrix: its upper triangle by columns, √2 off the diagonal."""
    return _sum(
        j * (j + 1) // 2 + i, factor * np.where(i == j, 1.0, math.sqrt(2)), size * (size + 1) // 2
    )


def _minimise(cost: Array, cones: list[tuple[Any, Any, list[Any]]]) -> tuple[Array, list[Array]]:
    """The minimiser of ``cost @ x``, and a multiplier for each expression."""
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.direct_solve_method, settings.max_threads = "faer", 1
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = _TOLERANCE
    rows = sparse.vstack([expression for expression, _, _ in cones], format="csc")
    constants = [np.broadcast_to(c, expression.shape[0]) for expression, c, _ in cones]
    kinds = [cone for _, _, several in cones for cone in several]
    square = sparse.csc_array((len(cost), len(cost)))
    solver = clarabel.DefaultSolver(square, cost, -rows, np.concatenate(constants), kinds, settings)
    found = solver.solve()
    x, z = (np.nan_to_num(answer, posinf=0.0, neginf=0.0) for answer in (found.x, found.z))
    return x, np.split(z, np.cumsum([len(c) for c in constants])[:-1])
