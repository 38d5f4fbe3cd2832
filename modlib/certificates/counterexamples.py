"""What breaks when an assumption of a theorem is dropped: small configurations, worked out on demand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modlib.certificates.bounds import global_bound
from modlib.certificates.head import best_head


@dataclass(frozen=True)
class Configuration:
    """Features ``(n, d)`` of examples with labels ``(n,)``."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class CounterExample:
    """A theorem without one of its assumptions, refuted; and with it again, confirmed.

    Attributes:
        name: what to call `counterexample` with.
        theorem: the theorem that has the assumption.
        assumption: the one that is dropped.
        claimed: the least risk, if the theorem held without the assumption.
        actual: the risk that shows that it does not.
        restored_claimed, restored_actual: the same two numbers with the assumption; they agree.
        why: what happens, in a sentence or two.
        claimed_by, actual_by: the configurations behind the first two numbers.

    >>> found = counterexample(COUNTEREXAMPLES[0])
    >>> found.broken
    True
    """

    name: str
    theorem: str
    assumption: str
    claimed: float
    actual: float
    restored_claimed: float
    restored_actual: float
    why: str
    claimed_by: Configuration = field(repr=False)
    actual_by: Configuration = field(repr=False)

    @property
    def broken(self) -> bool:
        """Whether the claim fails without the assumption and holds with it."""
        fails = abs(self.claimed - self.actual) > 1e-3
        return fails and abs(self.restored_claimed - self.restored_actual) < 1e-6

    def __str__(self) -> str:
        return (
            f"{self.theorem} without “{self.assumption}”: claimed least risk {self.claimed:.5f}, "
            f"actual {self.actual:.5f}\n"
            f"with it: claimed {self.restored_claimed:.5f}, actual {self.restored_actual:.5f}\n"
            f"{self.why}"
        )


def counterexample(name: str) -> CounterExample:
    """A runnable counter-example, one for each assumption that can be dropped.

    Arguments:
        name: one of `COUNTEREXAMPLES`.

    Raises:
        ValueError: for another name.

    Source: this book, the chapters on the two theorems.

    >>> print(counterexample("negatives-only"))
    The two-class theorem without “features of one class coincide”: claimed least risk 0.16178, actual 0.13742
    with it: claimed 0.13742, actual 0.13742
    Opposite pairs alone leave the positives free to be orthogonal to each other: ...
    """
    if name not in _BUILDERS:
        raise ValueError(f"name is {name!r}: choose one of {', '.join(COUNTEREXAMPLES)}")
    return _BUILDERS[name]()


_PAIR = torch.tensor([1, 0])  # a positive and a negative example


def _rows(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _risk(
    features: Tensor, labels: Tensor, loss: str, r: float, weights: list[float] | None = None
) -> float:
    return best_head(features, labels, loss, head_norm=r, weights=weights, tolerance=1e-9).risk


def _simplex(classes: int, floor: float) -> Tensor:
    """Unit class points whose inner products are all ``floor``."""
    gram = (1 - floor) * torch.eye(classes) + floor
    values, vectors = torch.linalg.eigh(gram.double())
    points: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return points


def _negatives_only() -> CounterExample:
    scattered = _rows([1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1])
    together = _rows([1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1])
    labels = torch.tensor([1, 1, 0, 0])
    apart, least = (
        best_head(x, labels, penalty=0.01, tolerance=1e-9).risk for x in (scattered, together)
    )
    return CounterExample(
        "negatives-only",
        "The two-class theorem",
        "features of one class coincide",
        apart,
        least,
        least,
        global_bound("cross_entropy", [0.5, 0.5], 0.0, penalty=0.01),
        "Opposite pairs alone leave the positives free to be orthogonal to each other: every opposite "
        "inner product is the floor 0 in both configurations (softmax head, penalty 0.01 ||W||²).",
        Configuration(scattered, labels),
        Configuration(together, labels),
    )


def _not_separated() -> CounterExample:
    near, far = _rows([1, 0], [0.5, math.sqrt(0.75)]), _rows([1, 0], [0, 1])
    best = _risk(far, _PAIR, "logistic", 2.0)
    return CounterExample(
        "not-separated",
        "The two-class theorem",
        "the class points are as far apart as features can be",
        _risk(near, _PAIR, "logistic", 2.0),
        best,
        best,
        global_bound("logistic", [0.5, 0.5], 0.0, head_norm=2.0),
        "Each class is one point, but the points are at 60 degrees where the kernel allows 90.",
        Configuration(near, _PAIR),
        Configuration(far, _PAIR),
    )


def _no_bias() -> CounterExample:
    far, near = _rows([0, 2.6], [0, -0.4]), _rows([1.4, 0], [-1.4, 0])
    points = torch.cat([far, near])
    pairs = [points[[i, j]] for i in range(4) for j in range(4) if i != j]
    return CounterExample(
        "no-bias",
        "The two-class theorem",
        "the head has a free bias",
        0.5 * math.log1p(math.exp(-2.6)) + 0.5 * math.log1p(math.exp(-0.4)),
        math.log1p(math.exp(-1.4)),
        _risk(far, _PAIR, "logistic", 1.0),
        min(_risk(pair, _PAIR, "logistic", 1.0) for pair in pairs),
        "Of the features (0, 2.6), (0, -0.4), (±1.4, 0) the first two are the furthest apart, but they "
        "are not centred; without a bias the last two are the better class points (head norm 1).",
        Configuration(far, _PAIR),
        Configuration(near, _PAIR),
    )


def _own_targets() -> CounterExample:
    apart = torch.eye(3).double()
    together = apart[[0, 0, 2]]
    labels = torch.tensor([1, 1, 0])
    own, common = [1.0, 3.0, -1.0], [1.0, 1.0, -1.0]
    best = _square_risk(together, common)
    return CounterExample(
        "own-targets",
        "The two-class theorem",
        "losses are monotone, or common to each class",
        _square_risk(together, own),
        _square_risk(apart, own),
        best,
        min(best, _square_risk(apart, common)),
        "The squared loss with the targets 1 and 3 for the two positives and -1 for the negative: one point "
        "can give only one answer, two points give two (orthogonal features, penalty 0.001 ||w||²).",
        Configuration(together, labels),
        Configuration(apart, labels),
    )


def _square_risk(features: Tensor, targets: list[float], penalty: float = 0.001) -> float:
    """min over w and b of the mean of (w·x + b - target)², plus the penalty times ||w||²."""
    y = torch.tensor(targets, dtype=torch.float64)
    x, y = features - features.mean(0), y - y.mean()  # the best bias
    dimensions = x.shape[1]
    w = torch.linalg.solve(x.T @ x / len(x) + penalty * torch.eye(dimensions), x.T @ y / len(x))
    return float((x @ w - y).square().mean() + penalty * w.square().sum())


def _fixed_budget() -> CounterExample:
    far, half = _rows([1.0], [0.0]), _rows([0.5], [0.0])

    def risk(distance: float, turning: bool = False) -> float:
        """Of the best head of norm 4: its outputs are 4 × distance apart, or less where it may turn aside."""
        apart = min(4 * distance, 2.0) if turning else 4 * distance
        return (apart / 2 - 1) ** 2

    return CounterExample(
        "fixed-budget",
        "The two-class theorem",
        "losses are monotone, or the penalty is nondecreasing, or there are two dimensions",
        risk(1.0),
        risk(0.5),
        risk(1.0, turning=True),
        min(risk(1.0, turning=True), risk(0.5, turning=True)),
        "Features in [0, 1] on a line, the squared loss with targets ±1, and a penalty of 0 for |w| = 4 and 2 "
        "for every other head: at distance 1 the outputs differ by 4, which is too much. In two "
        "dimensions the head turns aside.",
        Configuration(far, _PAIR),
        Configuration(half, _PAIR),
    )


def _other_penalty() -> CounterExample:
    half = 0.9 / math.sqrt(2)
    far, near = _rows([1, 0], [-1, 0]), _rows([half, half], [-half, -half])

    def least(reach: float, lam: float = 0.1) -> float:
        """min over ρ of log(1 + exp(-reach ρ)) + λρ"""
        margin = math.log(reach / lam - 1)
        return math.log1p(math.exp(-margin)) + lam * margin / reach

    return CounterExample(
        "other-penalty",
        "The two-class theorem",
        "the penalty depends on the Euclidean norm of the weights alone",
        least(1.0),
        least(0.9 * math.sqrt(2)),
        least(1.0),
        min(least(1.0), least(0.9)),
        "Under a penalty on the largest weight a direction that uses both coordinates is cheaper, "
        "though its class points are nearer.",
        Configuration(far, _PAIR),
        Configuration(near, _PAIR),
    )


def _three(
    name: str,
    assumption: str,
    why: str,
    claimed: float,
    actual: float,
    restored_actual: float,
    features: Tensor,
    restored_claimed: float | None = None,
) -> CounterExample:
    """The balanced theorem for three classes, floor 0 and head norm 2."""
    labels = torch.arange(3)
    balanced = [1 / 3] * 3
    formula = global_bound("cross_entropy", balanced, 0.0, head_norm=2.0)
    return CounterExample(
        name,
        "The balanced theorem",
        assumption,
        claimed,
        actual,
        formula if restored_claimed is None else restored_claimed,
        restored_actual,
        why,
        Configuration(_simplex(3, 0.0), labels),
        Configuration(features, labels if len(features) == 3 else torch.arange(6) // 2),
    )


def _ideal_three(weights: list[float] | None = None) -> float:
    return _risk(_simplex(3, 0.0), torch.arange(3), "cross_entropy", 2.0, weights)


def _formula_three(floor: float = 0.0, head_norm: float = 2.0, feature_norm: float = 1.0) -> float:
    return global_bound("cross_entropy", [1 / 3] * 3, floor, feature_norm, head_norm=head_norm)


def _unbalanced() -> CounterExample:
    return _three(
        "unbalanced",
        "all classes have the same share",
        "With shares 0.8, 0.1, 0.1 the balanced formula is no lower bound: guessing the large class is "
        "already right four times in five. `global_bound` solves the unbalanced program instead.",
        _formula_three(),
        _ideal_three([0.8, 0.1, 0.1]),
        _ideal_three(),
        _simplex(3, 0.0),
    )


def _unnormalised() -> CounterExample:
    longer = 2 * _simplex(3, 0.0)
    return _three(
        "unnormalised",
        "no feature is longer than α",
        "Features twice as long give the same head twice the margin.",
        _formula_three(),
        _risk(longer, torch.arange(3), "cross_entropy", 2.0),
        _ideal_three(),
        longer,
    )


def _below_floor() -> CounterExample:
    return _three(
        "below-floor",
        "inner products between classes are at least α²β",
        "Class points at 120 degrees, which tanh allows and ReLU does not, are further apart.",
        _formula_three(),
        _risk(_simplex(3, -0.5), torch.arange(3), "cross_entropy", 2.0),
        _ideal_three(),
        _simplex(3, -0.5),
    )


def _unattainable() -> CounterExample:
    balanced = math.log1p(2 * math.exp(-2.0))  # the formula with β = -1
    simplex = _risk(_simplex(3, -0.5), torch.arange(3), "cross_entropy", 2.0)
    return _three(
        "unattainable",
        "the bound takes β₊ in place of β",
        "No three unit vectors are opposite to each other: the matrix of ones and minus ones has the "
        "eigenvalue 2 - C < 0. The best is the simplex, with inner products -1/(C - 1).",
        balanced,
        simplex,
        simplex,
        _simplex(3, -0.5),
        restored_claimed=_formula_three(-0.5),
    )


def _spectral() -> CounterExample:
    points = _simplex(3, 0.0)
    centred = points - points.mean(0)  # singular values 1, 1, 0: a head of Frobenius norm √2
    head = 2.0 * centred
    scores = points @ head.T
    risk = float(torch.nn.functional.cross_entropy(scores, torch.arange(3)))
    return _three(
        "spectral-norm",
        "the budget is on the Frobenius norm",
        "A head of spectral norm 2 may have Frobenius norm 2 √(C - 1).",
        _formula_three(),
        risk,
        _ideal_three(),
        points,
    )


def _scale_free() -> CounterExample:
    root = math.sqrt(0.5)
    labels = torch.arange(6) // 2
    scattered = torch.cat([root * _simplex(3, 0.0)[labels], root * torch.eye(6).double()], dim=1)
    together = _simplex(3, 0.0)[labels]
    best = _risk(together, labels, "cross_entropy", 2.0)
    return CounterExample(
        "scale-free",
        "The balanced theorem",
        "features of one class coincide",
        _risk(scattered, labels, "cross_entropy", 2.0),
        best,
        best,
        _formula_three(),
        "Inner products 1/2 within and 0 between classes have alignment 1 with the ideal matrix above "
        "the diagonal, which upper-triangle alignment calls optimal; the classes have not collapsed.",
        Configuration(scattered, labels),
        Configuration(together, labels),
    )


_BUILDERS: dict[str, Callable[[], CounterExample]] = {
    "negatives-only": _negatives_only,
    "not-separated": _not_separated,
    "no-bias": _no_bias,
    "own-targets": _own_targets,
    "fixed-budget": _fixed_budget,
    "other-penalty": _other_penalty,
    "unbalanced": _unbalanced,
    "unnormalised": _unnormalised,
    "below-floor": _below_floor,
    "unattainable": _unattainable,
    "spectral-norm": _spectral,
    "scale-free": _scale_free,
}
COUNTEREXAMPLES = tuple(_BUILDERS)
"""Names that ``counterexample`` takes, one for each assumption that can be dropped."""
