"""Search for violations: random networks and gradient descent try to beat the theorems.

An instance is a random embedding of a few examples with a random head, for a random number of classes,
dimension, kernel, floor, feature norm and budget. Adam then lowers its risk, over embedding and head
together, and at every step the risk is compared with the bound. Instances of one shape run as a batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modlib.certificates.bounds import global_bound

THEOREMS = ("binary", "antipodal", "balanced", "unbalanced", "stability")
_ROUNDING = 1e-9  # of the risks that are compared, relative to one plus the bound


@dataclass(frozen=True)
class Search:
    """What came of it.

    Attributes:
        theorem: which one was attacked.
        instances: how many instances, each of which was compared at every step of its descent.
        comparisons: how many numbers were compared.
        violations: how many instances fell below the bound by more than rounding.
        closest: the smallest distance to the bound that was seen; negative if it was violated.
    """

    theorem: str
    instances: int
    comparisons: int
    violations: int
    closest: float

    def __str__(self) -> str:
        return (
            f"{self.theorem}: {self.violations} violations in {self.instances} instances "
            f"({self.comparisons} comparisons), closest {self.closest:.2e}"
        )


def search_violations(
    theorem: str, instances: int = 1000, *, steps: int = 40, seed: int = 0
) -> Search:
    """Try to violate a theorem on random instances, by joint descent over embedding and head.

    Arguments:
        theorem: one of

            - ``"binary"``, two classes. Random networks, whose examples are then moved to two points at the
              greatest distance, with the head of the proof: (a) five losses that never rise with the margin,
              every pair of them for the two classes; (b) four that do, common to each class. And the bound:
              descent for the logistic, hinge and squared hinge losses, and for the squared loss with the
              targets ±1.
            - ``"antipodal"``, where distance implies collapse.
            - ``"balanced"``, the least cross-entropy of balanced classes.
            - ``"unbalanced"``, the convex program; one program for every 250 instances.
            - ``"stability"``.

            Floors are -1, -1/(C - 1), 0, 0.3, and between -1 and 0.9 at random.
        instances: at least this many.
        steps: of Adam; the theorems that are no bound on a risk are checked without descent.
        seed: of everything random.

    Raises:
        ValueError: for another theorem or fewer than one instance.

    >>> search_violations("balanced", 20, steps=5).violations
    0
    """
    table: dict[str, Callable[[torch.Generator, int, int], Tensor]] = {
        "binary": _binary,
        "antipodal": _antipodal,
        "balanced": _balanced,
        "unbalanced": _unbalanced,
        "stability": _stability,
    }
    if theorem not in table:
        raise ValueError(f"theorem is {theorem!r}: choose one of {', '.join(THEOREMS)}")
    if instances < 1:
        raise ValueError(f"instances is {instances}: give at least one")
    generator = torch.Generator().manual_seed(seed)
    done = compared = violated = 0
    closest = math.inf
    while done < instances:
        size = min(250, instances - done)
        distances = table[theorem](generator, size, steps)  # (size, comparisons of each)
        done += size
        compared += distances.numel()
        violated += int((distances < -_ROUNDING).any(1).sum())
        closest = min(closest, float(distances.min()))
    return Search(theorem, done, compared, violated, closest)


def _integer(g: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=g))


def _uniform(g: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _features(raw: Tensor, labels: Tensor, kernel: str, floor: Tensor) -> Tensor:
    """Unit features ``(B, n, d)`` of a kernel with this floor ``(B,)`` between classes.

    ``"sphere"`` meets any floor: adding the same new coordinate to all features raises every cosine
    ``x`` to ``(x + t) / (1 + t)``, and ``t`` is the least that is enough.
    """
    maps = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    active = maps[kernel](raw) + (1e-9 if kernel == "relu" else 0) if kernel in maps else raw
    unit = torch.nn.functional.normalize(active, dim=2)
    if kernel in maps:
        return unit
    gram = unit @ unit.transpose(1, 2)
    other = labels[:, None] != labels[None, :]
    least = gram.masked_fill(~other, 2.0).amin((1, 2))
    extra = ((floor - least) / (1 - floor)).clamp_min(0)[:, None, None]
    column = extra.sqrt().expand(-1, unit.shape[1], 1)
    return torch.cat([unit, column], dim=2) / (1 + extra).sqrt()


def _descend(
    variables: list[Tensor], risk: Callable[[], Tensor], bound: Tensor, steps: int
) -> Tensor:
    """Distances to the bound ``(B, steps + 1)`` along Adam on the sum of the risks."""
    for variable in variables:
        variable.requires_grad_()
    adam = torch.optim.Adam(variables, lr=0.1)
    seen = []
    for _ in range(steps + 1):
        value = risk()
        seen.append((value.detach() - bound) / (1 + bound))
        adam.zero_grad()
        torch.autograd.backward(value.sum())
        for variable in variables:
            if variable.grad is not None:  # √ at zero extra has an infinite slope
                variable.grad.nan_to_num_(0.0, 0.0, 0.0)
        adam.step()
    return torch.stack(seen, dim=1)


def _kernel(g: torch.Generator, size: int, classes: int) -> tuple[str, Tensor]:
    """A kernel and a floor for each instance, none above what its features can have."""
    kernel = ("sphere", "sphere", "relu", "sigmoid", "tanh")[_integer(g, 0, 4)]
    floors = {"relu": 0.0, "sigmoid": 0.0, "tanh": -1.0}
    if kernel in floors:
        return kernel, torch.full((size,), floors[kernel]).double()
    floors_of_sphere = torch.tensor([-1.0, -1 / (classes - 1), 0.0, 0.3, math.nan]).double()
    chosen = floors_of_sphere[torch.randint(5, (size,), generator=g)]
    return kernel, torch.where(chosen.isnan(), _uniform(g, size, low=-1.0, high=0.9), chosen)


def _softmax_attack(
    g: torch.Generator, size: int, steps: int, classes: int, counts: Tensor
) -> Callable[[str, Tensor, Tensor, Tensor, bool, Tensor], Tensor]:
    """Descent on the cross-entropy of examples with these class counts."""
    labels = torch.repeat_interleave(torch.arange(classes), counts)
    d = _integer(g, 2, classes + 2)
    raw = _normal(g, size, len(labels), d) * _uniform(g, size, 1, 1, low=0.1, high=3)
    if _integer(g, 0, 1):  # begin near collapse
        centres = _normal(g, size, classes, d)
        raw = centres[:, labels] + 0.1 * raw
    weight, bias = _normal(g, size, classes, d + 1), 0.1 * _normal(g, size, classes)

    def attack(
        kernel: str, floor: Tensor, alpha: Tensor, limit: Tensor, penalised: bool, bound: Tensor
    ) -> Tensor:
        def risk() -> Tensor:
            x = alpha[:, None, None] * _features(raw, labels, kernel, floor)
            w = weight[:, :, : x.shape[2]]
            if not penalised:
                w = limit[:, None, None] * w / w.norm(dim=(1, 2), keepdim=True)
            scores = x @ w.transpose(1, 2) + bias[:, None]
            losses = -torch.log_softmax(scores, dim=2)[:, torch.arange(len(labels)), labels]
            extra = limit * w.square().sum((1, 2)) if penalised else 0.0
            return losses.mean(1) + extra

        return _descend([raw, weight, bias], risk, bound, steps)

    return attack


def _bounds(
    shares: list[float], loss: str, floor: Tensor, alpha: Tensor, limit: Tensor, penalised: bool
) -> Tensor:
    key = "penalty" if penalised else "head_norm"
    values = [
        global_bound(loss, shares, float(f), float(a), **{key: float(v)})
        for f, a, v in zip(floor, alpha, limit, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _limits(g: torch.Generator, size: int, penalised: bool) -> Tensor:
    low, high = (-3.0, 0.0) if penalised else (-1.0, 1.3)
    return 10 ** _uniform(g, size, low=low, high=high)


def _balanced(g: torch.Generator, size: int, steps: int) -> Tensor:
    classes = _integer(g, 2, 8)
    attack = _softmax_attack(
        g, size, steps, classes, torch.full((classes,), _integer(g, 1, 4), dtype=torch.int64)
    )
    kernel, floor = _kernel(g, size, classes)
    alpha, penalised = _uniform(g, size, low=0.3, high=3), bool(_integer(g, 0, 1))
    limit = _limits(g, size, penalised)
    shares = [1 / classes] * classes
    bound = _bounds(shares, "cross_entropy", floor, alpha, limit, penalised)
    return attack(kernel, floor, alpha, limit, penalised, bound)


def _unbalanced(g: torch.Generator, size: int, steps: int) -> Tensor:
    classes = _integer(g, 3, 6)
    counts = torch.randint(1, 9, (classes,), generator=g)
    counts[0] += 1 if int(counts.max()) == int(counts.min()) else 0
    attack = _softmax_attack(g, size, steps, classes, counts)
    kernel, floors = _kernel(g, 1, classes)
    alpha, penalised = _uniform(g, 1, low=0.3, high=3), bool(_integer(g, 0, 1))
    limit = _limits(g, 1, penalised)
    shares = (counts / counts.sum()).tolist()
    bound = _bounds(shares, "cross_entropy", floors, alpha, limit, penalised)
    wide = [t.expand(size) for t in (floors, alpha, limit, bound)]
    return attack(kernel, wide[0], wide[1], wide[2], penalised, wide[3])


_MARGIN_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda m: torch.nn.functional.softplus(-m),
    "hinge": lambda m: torch.relu(1 - m),
    "squared_hinge": lambda m: torch.relu(1 - m) ** 2,
}


_MONOTONE: list[Callable[[Tensor], Tensor]] = [
    *_MARGIN_LOSSES.values(),
    lambda m: (1 - m).clamp(0, 1),  # ramp
    lambda m: (m < 0).double(),
]
_OTHER: list[Callable[[Tensor], Tensor]] = [
    lambda m: (m - 1) ** 2,
    lambda m: (m + 2) ** 2,  # wants the wrong side
    lambda m: torch.sin(3 * m),
    lambda m: (m**2 - 1) ** 2,
]


def _binary(g: torch.Generator, size: int, steps: int) -> Tensor:
    labels = torch.cat([torch.ones(_integer(g, 1, 6)), torch.zeros(_integer(g, 1, 6))])
    moved = _binary_moved(g, size, labels)
    return torch.cat([moved, _binary_descent(g, size, steps, labels)], dim=1)


def _binary_moved(g: torch.Generator, size: int, labels: Tensor) -> Tensor:
    """The two-class theorem as it stands: risks of random networks, less those of the networks of its proof."""
    n, d = len(labels), _integer(g, 1, 6)
    x, w, b = _normal(g, size, n, d), _normal(g, size, d), _normal(g, size, 1)
    x = x * _uniform(g, size, n, 1, low=0.1, high=3)  # unequal norms
    signs, positive = 2 * labels.double() - 1, labels > 0
    scores = (x @ w[:, :, None])[:, :, 0] + b
    step = _furthest(x)
    low = scores[:, ~positive].amin(1)
    reach = w.norm(dim=1) * step.norm(dim=1)
    found = []
    for losses, monotone in ((_MONOTONE, True), (_OTHER, False)):
        for plus, minus in itertools.product(losses, losses):
            values = torch.where(positive, plus(signs * scores), minus(signs * scores))
            high, least = (low + reach, low) if monotone else _best_served(scores, values, positive)
            head = ((high - least) / step.square().sum(1))[:, None] * step
            # What the head says at the far point; at the other it says `least`.
            far = least + (head * step).sum(1)
            moved = torch.where(positive, plus(signs * far[:, None]), minus(signs * least[:, None]))
            found += [(values - moved).mean(1), w.norm(dim=1) - head.norm(dim=1)]
    return torch.stack(found, dim=1)


def _furthest(x: Tensor) -> Tensor:
    """From one to the other of the two of the points ``(B, n, d)`` that are furthest apart: ``(B, d)``."""
    n = x.shape[1]
    pair = torch.cdist(x, x).flatten(1).argmax(1)
    rows = torch.arange(len(x))
    return x[rows, pair // n] - x[rows, pair % n]


def _best_served(scores: Tensor, values: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """The score of the example of each class whose loss is least."""
    best = [
        scores[:, own].gather(1, values[:, own].argmin(1, keepdim=True))[:, 0]
        for own in (positive, ~positive)
    ]
    return best[0], best[1]


def _binary_descent(g: torch.Generator, size: int, steps: int, labels: Tensor) -> Tensor:
    """The bound, attacked by descent over features and head."""
    n, d = len(labels), _integer(g, 1, 6)
    loss = [*_MARGIN_LOSSES, "square"][_integer(g, 0, 3)]
    kernel, floor = _kernel(g, size, 2)
    alpha, penalised = _uniform(g, size, low=0.3, high=3), bool(_integer(g, 0, 1))
    limit = _limits(g, size, penalised)
    shares = [float(labels.mean()), 1 - float(labels.mean())]
    if loss == "square":
        bound = _square_bound(shares, floor, alpha, limit, penalised)
    else:
        bound = _bounds(shares, loss, floor, alpha, limit, penalised)
    raw, weight, bias = _normal(g, size, n, d + 1), _normal(g, size, d + 2), _normal(g, size, 1)
    signs = 2 * labels.double() - 1

    def risk() -> Tensor:
        features = alpha[:, None, None] * _features(raw, labels, kernel, floor)
        v = weight[:, : features.shape[2]]
        if not penalised:
            v = limit[:, None] * v / v.norm(dim=1, keepdim=True)
        margin = signs * ((features @ v[:, :, None])[:, :, 0] + bias)
        extra = limit * v.square().sum(1) if penalised else 0.0
        values = (margin - 1) ** 2 if loss == "square" else _MARGIN_LOSSES[loss](margin)
        return values.mean(1) + extra

    return _descend([raw, weight, bias], risk, bound, steps)


def _square_bound(
    shares: list[float], floor: Tensor, alpha: Tensor, limit: Tensor, penalised: bool
) -> Tensor:
    """``p₊ p₋ (2 - rD)²``, zero from ``rD = 2`` on: the targets ±1 need outputs that are 2 apart."""
    product, distance = shares[0] * shares[1], alpha * (2 - 2 * floor).sqrt()
    if penalised:  # the least of p₊ p₋ (2 - rD)² + λr²
        return 4 * product * limit / (product * distance**2 + limit)
    return product * (2 - limit * distance).clamp_min(0) ** 2


def _antipodal(g: torch.Generator, size: int, steps: int) -> Tensor:
    """Distance implies collapse, with room: opposite cosines below ``-1 + η``, others above ``1 - 4η``."""
    n, d = _integer(g, 3, 8), _integer(g, 2, 6)
    labels = torch.arange(n) % 2
    pole = torch.nn.functional.normalize(_normal(g, size, 1, d), dim=2)
    noise = _normal(g, size, n, d) * 10 ** _uniform(g, size, 1, 1, low=-6, high=0.5)
    x = torch.nn.functional.normalize((2.0 * labels - 1)[:, None] * pole + noise, dim=2)
    gram = x @ x.transpose(1, 2)
    same = labels[:, None] == labels[None, :]
    eta = 1 + gram.masked_fill(same, -2.0).amax((1, 2))
    least = gram.masked_fill(~same, 2.0).amin((1, 2))
    return (least - (1 - 4 * eta))[:, None]


def _stability(g: torch.Generator, size: int, steps: int) -> Tensor:
    """Upper bounds: the head of class means, or guessing, meets them. Lower: no descended head beats it."""
    from modlib.certificates.stability import Deviations, stability_bound

    classes, each = _integer(g, 2, 6), _integer(g, 2, 6)
    labels = torch.arange(classes).repeat_interleave(each)
    kernel, floor = _kernel(g, size, classes)
    d = classes + _integer(g, 0, 3)
    centres = torch.eye(classes, d).double()[labels]
    spread = 10 ** _uniform(g, size, 1, 1, low=-4, high=0.5)
    x = _features(centres + spread * _normal(g, size, len(labels), d), labels, kernel, floor)
    r = _limits(g, size, False)
    shares = [1 / classes] * classes
    bound = _bounds(shares, "cross_entropy", floor, torch.ones(size).double(), r, False)
    means = x.reshape(size, classes, each, -1).mean(2)
    centred = means - means.mean(1, keepdim=True)
    steepest = centred / centred.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)

    def risk(w: Tensor, b: Tensor) -> Tensor:
        w = r[:, None, None] * w / w.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
        scores = x @ w.transpose(1, 2) + b[:, None]
        return -torch.log_softmax(scores, 2)[:, torch.arange(len(labels)), labels].mean(1)

    reached = risk(steepest, torch.zeros(size, classes).double())
    weight = (steepest + 0.1 * _normal(g, *steepest.shape)).clone()
    bias = 0.1 * _normal(g, size, classes)
    limits = [
        stability_bound(Deviations.of(x[i], labels, float(floor[i])), float(r[i]))
        for i in range(size)
    ]
    lower = torch.tensor([s.lower for s in limits], dtype=torch.float64)
    upper = torch.tensor([s.upper for s in limits], dtype=torch.float64)
    linear = torch.tensor([s.linear for s in limits], dtype=torch.float64)
    below = _descend([weight, bias], lambda: risk(weight, bias), bound + lower, steps)
    least = torch.minimum(reached, below.amin(1) * (1 + bound + lower) + bound + lower)
    least = least.clamp_max(math.log(classes))  # a head without weights guesses
    above = [upper - (least - bound), linear - (least - bound)]
    return torch.cat([below, torch.stack(above, dim=1)], dim=1)
