r"""The least risk that any input module can reach: the global bounds of the theorems as numbers.

Every number is the value of a *dual* problem at a feasible point, or the closed form for balanced classes, and is
rounded down: a lower bound however the point was found. The points are chosen optimal, so the bound is
also reached. Binary losses (collapse and distance are optimal): with
the two class points at the greatest distance :math:`D` and a head of norm :math:`r`,

.. math:: \min_b\; p_+ \ell(rD + b) + p_- \ell(-b) \;=\;
          \max_{0 \le s}\; p_+ h(s / p_+) + p_- h(s / p_-) - s\, r D,

where :math:`\ell(m) = \max_q\, h(q) - q m` (logistic: :math:`h` the binary entropy; hinge: :math:`h(q) = q`
on :math:`[0, 1]`; squared hinge: :math:`h(q) = q - q^2/4`). With the penalty :math:`\lambda \lVert w
\rVert^2` the last term becomes :math:`s^2 D^2 / 4 \lambda`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from modlib.certificates.arguments import attainable, budget, checked_shares
from modlib.certificates.unbalanced import unbalanced_bound

_BALANCED = 1e-12  # proportions that differ by no more are equal
_UNITS = 2e-15  # relative: nine units of rounding


def global_bound(
    loss: str,
    proportions: Sequence[float],
    floor: float,
    feature_norm: float = 1.0,
    head_norm: float | None = None,
    penalty: float | None = None,
) -> float:
    """The least mean risk that any input module and any head in the budget can have: a lower bound.

    Arguments:
        loss: ``"cross_entropy"`` (softmax; a weight matrix of Frobenius norm ``head_norm`` and a free
            bias), or ``"logistic"``, ``"hinge"``, ``"squared_hinge"`` (two classes; one weight vector of
            norm ``head_norm`` and a free bias).
        proportions: the share of each class; positive, summing to one. Their number is the number of
            classes; for the binary losses the order does not matter.
        floor: ``β``, at most 1: inner products of features of different classes are at least ``α²β``. For
            unit vectors that is the kernel's least cosine, -1 for the whole sphere and 0 for normalised
            ReLU. A floor that not all pairs can attain at once is legal.
        feature_norm: ``α``, the largest norm of a feature.
        head_norm: the norm budget ``r``; or
        penalty: ``λ`` of the penalty ``λ ||w||²`` (not halved) that is added to the risk and is part of
            the returned number. Give exactly one of the two.

    Returns:
        The bound, rounded down: a closed form for balanced classes and a budget, else the value at a dual
        feasible point. How near that is to the optimum, `unbalanced_bound` shows where three classes or
        more are unbalanced; elsewhere the point is optimal to rounding. For five unbalanced classes or more
        and ``floor = 0`` the bound is true but perhaps not reached: positive semidefinite and nonnegative
        relaxes completely positive.

        These are all the losses and penalties covered. For another nondecreasing penalty ``g(||w||)``
        take the least of ``global_bound(..., head_norm=r) + g(r)`` over ``r``.

    Raises:
        ValueError: for an argument outside its range, naming it.

    Source: this book, the theorems on two, on balanced and on unbalanced classes.

    >>> round(global_bound("cross_entropy", [0.5, 0.5], floor=0.0, head_norm=2.0), 5)
    0.12693
    >>> round(global_bound("cross_entropy", [0.5, 0.5], floor=-1.0, head_norm=2.0), 5)
    0.05742
    >>> round(global_bound("cross_entropy", [0.5, 0.5], floor=0.0, penalty=0.01), 5)
    0.13742
    """
    shares = checked_shares(loss, proportions, floor, feature_norm)
    limit = budget(head_norm, penalty)
    floor = max(floor, -1.0)
    if loss != "cross_entropy" or len(shares) == 2:
        return _binary(loss, shares, floor, feature_norm, limit, penalty is not None)
    if max(shares) - min(shares) <= _BALANCED:
        equal = _balanced(len(shares), floor, feature_norm, limit, penalty is not None)
        # No class has less than this part of an equal share.
        return min(shares) * len(shares) * equal
    return unbalanced_bound(shares, floor, feature_norm, head_norm, penalty).value


def _binary(
    loss: str, shares: list[float], floor: float, norm: float, limit: float, penalised: bool
) -> float:
    """Collapse and distance are optimal, as a number; two-class cross-entropy: logistic in ``w_1 - w_2``.

    ``||w_1 - w_2||² <= 2 ||W||²`` with equality for opposite vectors: head norm ``√2 r``, penalty ``λ/2``.
    """
    distance = norm * math.sqrt(2 * (1 - floor))
    if loss == "cross_entropy":
        loss, limit = "logistic", limit / 2 if penalised else limit * math.sqrt(2)
    top = min(shares) * (math.inf if loss == "squared_hinge" else 1.0)
    small, large = sorted(shares)
    if penalised:
        slope = distance**2 / (2 * limit)  # the derivative of s²D²/4λ is s times this

        def price(s: float) -> float:
            return slope * s

        def cost(s: float) -> float:
            return slope * s * s / 2
    else:

        def price(s: float) -> float:
            return limit * distance

        def cost(s: float) -> float:
            return limit * distance * s

    gain, rate = _ENTROPY[loss]

    def marginal(s: float) -> float:  # derivative of the dual; decreasing in s
        return rate(s / small) + rate(s / large) - price(s)

    s = _root(marginal, top)
    terms = [small * gain(s / small), large * gain(s / large), -cost(s)]
    return lowered(terms)


def lowered(terms: Sequence[float]) -> float:
    """The sum of terms known to a few units of rounding, rounded down; not below zero."""
    return max(0.0, math.fsum(terms) - _UNITS * math.fsum(abs(t) for t in terms))


def _logistic_gain(q: float) -> float:
    return -q * math.log(q) - (1 - q) * math.log1p(-q) if 0 < q < 1 else 0.0


def _logistic_rate(q: float) -> float:
    if q <= 0:
        return math.inf
    return math.log1p(-q) - math.log(q) if q < 1 else -math.inf


_ENTROPY: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "logistic": (_logistic_gain, _logistic_rate),
    "hinge": (lambda q: q, lambda q: 1.0),
    "squared_hinge": (lambda q: q - q * q / 4, lambda q: 1 - q / 2),
}


def _root(decreasing: Callable[[float], float], top: float) -> float:
    """The point of ``[0, top]`` where a decreasing function changes sign, bisected to rounding."""
    if math.isinf(top):
        top = 1.0
        while decreasing(top) > 0:
            top *= 2
    low, high = 0.0, top
    if decreasing(top) >= 0:
        return top
    for _ in range(2200):  # in the end relative: s may be as small as exp(-700)
        middle = (low + high) / 2 if low > high / 4 else max(math.sqrt(low * high), high / 16)
        if decreasing(middle) > 0:
            low = middle
        else:
            high = middle
        if high - low <= 4e-16 * high or high < 1e-305:
            break
    return low


def _balanced(classes: int, floor: float, norm: float, limit: float, penalised: bool) -> float:
    """The least cross-entropy of balanced classes."""
    others = classes - 1
    scale = norm * math.sqrt((1 - attainable(floor, classes)) / others)
    if not penalised:
        rounding = _UNITS * (math.log(others) + limit * scale)
        return (1 - _UNITS) * softplus(math.log(others) - limit * scale - rounding)
    # max over q of  h(q) + q log(C-1) - q² scale² / 4λ
    slope = scale**2 / (2 * limit)
    q = _root(lambda q: _logistic_rate(q) + math.log(others) - slope * q, 1.0)
    return lowered([_logistic_gain(q), q * math.log(others), -slope * q * q / 2])


def softplus(x: float) -> float:
    """``log(1 + exp(x))``"""
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))
