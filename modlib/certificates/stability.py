r"""How much can a nearly ideal Gram matrix lose? The stability theorem as a number.

Let :math:`g_{ik}` be the mean kernel value of example i with class k, over :math:`\alpha^2`. It falls short
of the ideal by :math:`\delta_i = 1 - g_{i y_i}` within the class and exceeds it by
:math:`\varepsilon_{ik} = g_{ik} - \beta` between classes. (A floor below :math:`-1/(C-1)` cannot bind for all
pairs of classes, so :math:`\beta` is at least that; then some :math:`\varepsilon_{ik}` may be negative.) With
:math:`\omega_i = (\delta_i + \max_k \varepsilon_{ik}) / (1 - \beta)`, :math:`t` the mean of
:math:`(\delta_i + \varepsilon_{ik}) / (1 - \beta)` over examples and other classes, :math:`\psi(x) = \log(1 +
(C-1) e^{-x})` and :math:`x^* = \alpha r \sqrt{(1-\beta)/(C-1)}`, the input module's share of the gap is, for
balanced classes,

.. math:: \psi(x^* \sqrt{1 - t}) - \psi(x^*) \;\le\; \text{share} \;\le\;
          \frac1n \sum_i \psi\!\left(x^* \frac{1 - \omega_i}{\sqrt{1 - t}}\right) - \psi(x^*)
          ,\qquad \text{share} \le x^* \frac1n \sum_i \max(\omega_i, 0) .

Both sides agree to first order when every example deviates alike. For the binary losses of slope at most
one, any proportions and :math:`D = \alpha \sqrt{2 (1-\beta)}`: share :math:`\le \frac{r D}{2} \frac1n \sum_i
\max(\omega_i, 0)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from modlib.certificates.arguments import attainable
from modlib.certificates.bounds import softplus
from modlib.certificates.head import Rows, count_classes

_ROUNDING = 1e-4  # of deviations of half-precision features


@dataclass(frozen=True)
class Deviations:
    """How far the Gram matrix is from ideal, example by example.

    Attributes:
        within: ``(n,)`` one less the mean kernel value with the own class, over ``α²``.
        between: ``(n,)`` the largest mean kernel value with another class, over ``α²``, less the floor.
        mean_between: ``(n,)`` the same with the mean over the other classes for the largest.
        floor: ``β``: the kernel's floor, but at least ``-1/(C - 1)``, below which no floor can bind for all
            pairs of classes. Where it is that, the two above may be negative.
        feature_norm, classes: what else they are measured against.
        balanced: whether all classes have the same number of examples.

    >>> found = Deviations.of(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 0, 1]), floor=0.0)
    >>> found.within.tolist(), found.between.tolist()    # collapsed and orthogonal: ideal
    ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    """

    within: Tensor
    between: Tensor
    mean_between: Tensor
    floor: float
    feature_norm: float
    classes: int
    balanced: bool = True

    def __post_init__(self) -> None:
        if not -1 / (self.classes - 1) <= self.floor < 1:
            raise ValueError(
                f"floor is {self.floor}: deviations are measured from a cosine of at least "
                f"-1/(C - 1), and below 1"
            )

    @staticmethod
    def of(
        features: ArrayLike | Tensor,
        labels: ArrayLike | Tensor,
        floor: float,
        feature_norm: float = 1.0,
    ) -> Deviations:
        """Measure them: ``(n, d)`` features, ``(n,)`` labels with every class present, the kernel's floor.

        The mean kernel value with a class is the inner product with its mean feature: no (n, n) matrix
        is built.
        """
        x = features.detach() if isinstance(features, Tensor) else np.asarray(features)
        y = torch.as_tensor(labels).detach().cpu().long()
        if x.ndim != 2 or y.ndim != 1 or len(x) != len(y) or len(y) == 0:
            raise ValueError(
                f"features {tuple(x.shape)}, labels {tuple(y.shape)}: give (n, d) and (n,)"
            )
        classes = count_classes(y)
        floor = attainable(floor, classes)
        counts = torch.bincount(y, minlength=classes)
        rows = Rows(x, y, torch.ones(len(y), dtype=torch.float64))
        means = rows.pull(torch.nn.functional.one_hot(y, classes).double() / counts)
        means[:, -1] = 0
        g = rows.scores(means) / feature_norm**2
        own = g.gather(1, y[:, None])[:, 0]
        others = g.scatter(1, y[:, None], -math.inf)
        return Deviations(
            within=1 - own,
            between=others.max(1).values - floor,
            mean_between=(g.sum(1) - own) / (classes - 1) - floor,
            floor=floor,
            feature_norm=feature_norm,
            classes=classes,
            balanced=bool((counts == counts[0]).all()),
        )

    @staticmethod
    def uniform(
        within: float, between: float, classes: int, floor: float, feature_norm: float = 1.0
    ) -> Deviations:
        """Every example deviates alike, ``between`` being what exceeds the floor that all can attain."""
        if classes < 2:
            raise ValueError(f"classes is {classes}: give at least 2")
        d, e = torch.tensor([within]).double(), torch.tensor([between]).double()
        return Deviations(d, e, e, attainable(floor, classes), feature_norm, classes)


@dataclass(frozen=True)
class StabilityBound:
    """The input module's share of the gap lies between ``lower`` and ``upper``.

    ``linear`` is the simpler upper bound, proportional to the mean deviation and to the head norm.

    >>> ideal = Deviations.uniform(0.0, 0.0, classes=10, floor=0.0)
    >>> bound = stability_bound(ideal, head_norm=10.0)
    >>> bound.lower == bound.upper == bound.linear == 0
    True
    """

    lower: float
    upper: float
    linear: float

    def __str__(self) -> str:
        return (
            f"input module's share between {self.lower:.6f} and {self.upper:.6f} "
            f"(linear bound {self.linear:.6f})"
        )


def stability_bound(
    deviations: Deviations, head_norm: float, loss: str = "cross_entropy"
) -> StabilityBound:
    """Bounds on the input module's share of the optimality gap from the Gram matrix alone.

    Arguments:
        deviations: of the Gram matrix, from `Deviations.of` or `Deviations.uniform`.
        head_norm: the norm budget ``r`` of the head.
        loss: ``"cross_entropy"`` (balanced classes), ``"logistic"`` or ``"hinge"`` (two classes, any
            proportions; only an upper bound, the lower one is zero).

    Raises:
        ValueError: for unbalanced classes with cross-entropy, more than two with another loss, an unknown
            loss, a head norm that is not positive and finite, and deviations that no features have: of
            features longer than ``α`` or below the floor.

    Source: this book, the stability theorem.

    >>> print(stability_bound(Deviations.uniform(0.1, 0.0, classes=10, floor=0.0), head_norm=10.0))
    input module's share between 0.044342 and 0.044342 (linear bound 0.333333)
    """
    if loss not in ("cross_entropy", "logistic", "hinge"):
        raise ValueError(f"loss is {loss!r}: choose cross_entropy, logistic or hinge")
    if not (math.isfinite(head_norm) and head_norm > 0):
        raise ValueError(f"head_norm is {head_norm}: it must be positive and finite")
    others, width = deviations.classes - 1, 1 - deviations.floor
    if loss != "cross_entropy" and others > 1:
        raise ValueError(f"loss is {loss!r}: it has two classes, the deviations {others + 1}")
    if loss == "cross_entropy" and not deviations.balanced:
        raise ValueError("deviations are of unbalanced classes: the theorem is about balanced ones")
    t = float((deviations.within + deviations.mean_between).mean()) / width
    _check_possible(deviations, t)
    omega = (deviations.within + deviations.between) / width
    worst = float(omega.clamp_min(0).mean())
    if loss != "cross_entropy":
        distance = deviations.feature_norm * math.sqrt(2 * width)
        linear = head_norm * distance / 2 * worst
        return StabilityBound(0.0, linear, linear)
    ideal = deviations.feature_norm * head_norm * math.sqrt(width / others)
    least_risk = _psi(ideal, others)
    linear = ideal * worst
    lower = max(0.0, _psi(ideal * math.sqrt(max(1 - t, 0.0)), others) - least_risk)
    if t >= 1:  # the class means coincide: no head does better than guessing
        return StabilityBound(lower, max(lower, math.log1p(others) - least_risk), linear)
    margins = ideal * (1 - omega) / math.sqrt(1 - t)
    upper = float(torch.nn.functional.softplus(math.log(others) - margins).mean()) - least_risk
    upper = min(upper, linear, math.log1p(others) - least_risk)
    return StabilityBound(lower, max(upper, lower), linear)


def _check_possible(deviations: Deviations, t: float) -> None:
    """Features in the ball and above the floor have these deviations, but for rounding."""
    least = [float(deviations.within.min()), t]
    if deviations.floor > -1 / (deviations.classes - 1) + _ROUNDING:
        least.append(float(deviations.between.min()))
    if not min(least) > -_ROUNDING:
        raise ValueError(
            f"deviations are as low as {min(least):.3g}: the features are too long or below the floor"
        )


def _psi(x: float, others: int) -> float:
    return softplus(math.log(others) - x)
