r"""The best linear head on given features: a convex problem, solved to a certified duality gap.

.. math::

    \min_{W, b} \frac1n \sum_i \ell(W \varphi_i + b, y_i)
    \quad\text{s.t. } \lVert W \rVert_F \le r
    \qquad\text{or}\qquad + \lambda \lVert W \rVert_F^2 .

**Solver.** Newton steps by preconditioned conjugate gradients on the penalised problem; a norm budget is
met by moving the penalty until :math:`\lVert W \rVert_F = r` (the multiplier of the constraint). Libraries
solve the penalised softmax, without a budget or a certificate: 10,000 features in 64 dimensions, ten classes
and penalty 1e-4 take 0.14 s here (certified gap 5e-9), 0.22 s by scikit-learn's L-BFGS (gap by our certificate
1e-6), 0.86 s by its Newton method (1e-8); one thread, process time, tolerance 1e-8 there.

**Certificate.** The risk is convex, so with the gradient :math:`(\Gamma, \gamma)` at the answer, for every
head :math:`(W', b')`

.. math:: R(W', b') \ge R(W, b) + \langle \Gamma, W' - W \rangle + \langle \gamma, b' - b \rangle .

The minimum of the right side over the heads that could be optimal is a lower bound on the optimum; it
does not depend on how the answer was found. The bias is bounded by `Problem.bias_reach`, so the last term is
bounded too, instead of being assumed to vanish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from modlib.certificates import losses
from modlib.certificates.arguments import budget
from modlib.certificates.losses import Local

_CHUNK = 1 << 16  # rows turned into float64 at a time
_IN_MEMORY = 1 << 28  # bytes of float64 features that are kept rather than converted in every pass


@dataclass(frozen=True)
class BestHead:
    """A head whose risk is within ``duality_gap`` of the least possible.

    Attributes:
        risk: mean loss of the head plus, in the penalised problem, ``penalty * ||W||²``.
        weight: ``(C, d)``, or ``(1, d)`` for a binary loss; float64.
        bias: ``(C,)`` or ``(1,)``; float64.
        duality_gap: certified: no head in the budget has a risk below ``risk - duality_gap``.
        penalty: the penalty, or the multiplier of the norm constraint.

    >>> head = best_head(torch.eye(2), torch.tensor([0, 1]), head_norm=2.0)
    >>> head.weight.shape, round(float(head.weight.norm()), 4), head.lower_bound < head.risk
    (torch.Size([2, 2]), 2.0, True)
    """

    risk: float
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    duality_gap: float
    penalty: float

    @property
    def lower_bound(self) -> float:
        """No head in the budget has a smaller risk."""
        return self.risk - self.duality_gap

    def __str__(self) -> str:
        return (
            f"best head: risk {self.risk:.6f} (certified to {self.duality_gap:.1e}), "
            f"norm {float(self.weight.norm()):.4g}"
        )


class Rows:
    """Feature rows ``(n, d)`` with their labels and weights; float64 a chunk at a time."""

    def __init__(
        self, features: Tensor | np.ndarray[Any, Any], labels: Tensor, weights: Tensor
    ) -> None:
        self.n, self.d = len(features), int(features.shape[1])
        self.labels, self.weights = labels, weights
        self.features = features
        self.original = torch.as_tensor(
            np.array(features[:1]) if isinstance(features, np.ndarray) else features[:1]
        ).dtype
        if 8 * self.n * self.d <= _IN_MEMORY:
            self.features = _double(features)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        step = self.n if isinstance(self.features, Tensor) and self._kept else _CHUNK
        for start in range(0, self.n, step):
            rows = slice(start, min(start + step, self.n))
            yield rows, _double(self.features[rows])

    @property
    def _kept(self) -> bool:
        return isinstance(self.features, Tensor) and self.features.dtype == torch.float64

    def scores(self, theta: Tensor) -> Tensor:
        """``W φ_i + b`` for every row, ``(n, K)``; ``theta`` is ``[W | b]``, ``(K, d + 1)``."""
        out = torch.empty(self.n, len(theta), dtype=torch.float64)
        for rows, x in self:
            torch.addmm(theta[:, -1], x, theta[:, :-1].T, out=out[rows])
        return out

    def pull(self, slopes: Tensor) -> Tensor:
        """The weighted mean of ``slopes_i [φ_i | 1]ᵀ``, ``(K, d + 1)``."""
        slopes = slopes * self.weights[:, None]
        out = torch.zeros(slopes.shape[1], self.d + 1, dtype=torch.float64)
        for rows, x in self:
            out[:, :-1] += slopes[rows].T @ x
        out[:, -1] = slopes.sum(0)
        return out

    def second_moment(self, weight: Tensor) -> Tensor:
        """The weighted mean of ``weight_i [φ_i | 1][φ_i | 1]ᵀ``, ``(d + 1, d + 1)``."""
        weight = weight * self.weights
        out = torch.zeros(self.d + 1, self.d + 1, dtype=torch.float64)
        for rows, x in self:
            scaled = x * weight[rows, None]
            out[:-1, :-1] += x.T @ scaled
            out[-1, :-1] += scaled.sum(0)
        out[:-1, -1] = out[-1, :-1]
        out[-1, -1] = weight.sum()
        return out


def _double(features: Tensor | np.ndarray[Any, Any]) -> Tensor:
    if isinstance(features, np.ndarray):  # a copy: the array may be a read-only map of a file
        features = torch.from_numpy(np.array(features, dtype=np.float64))
    return features.cpu().double()  # moved first: Apple's GPUs have no float64


class Problem:
    """Mean loss of a head ``theta = [W | b]`` with the penalty ``λ ||W||²``."""

    def __init__(self, rows: Rows, loss: Callable[[Tensor, Tensor], Local], outputs: int) -> None:
        self.rows, self.loss, self.outputs = rows, loss, outputs
        means = torch.zeros(max(outputs, 2), dtype=torch.float64)
        self.least_share = float(means.index_add_(0, rows.labels, rows.weights).min())
        self.radius = math.sqrt(max(float(x.square().sum(1).max()) for _, x in rows))

    def at(self, theta: Tensor) -> tuple[float, Local]:
        local = self.loss(self.rows.scores(theta), self.rows.labels)
        return float(local.values @ self.rows.weights), local

    def bias_reach(self, risk: float, theta: Tensor, norm: float) -> float:
        """A bound on how far the bias of any head with no more norm and risk is from this one.

        Each loss is at least minus its margin, so the mean over class y alone gives
        ``b'_k - b'_y <= risk / p_y + 2 norm radius`` for every k (binary: the same bounds ``|b'|``).
        Only differences of biases matter to the softmax: the distance is that of their ranges.
        """
        bias = theta[:, -1]
        here = bias.abs().max() if self.outputs == 1 else bias.max() - bias.min()
        return risk / self.least_share + 2 * norm * self.radius + float(here)

    def bias_slack(self, risk: float, theta: Tensor, slope: Tensor, norm: float) -> float:
        """A bound on ``|<γ, b' - b>|`` over those heads; ``γ`` sums to zero for the softmax."""
        half = 1.0 if self.outputs == 1 else 0.5
        return half * float(slope[:, -1].abs().sum()) * self.bias_reach(risk, theta, norm)


def best_head(
    features: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    loss: str = "cross_entropy",
    *,
    head_norm: float | None = None,
    penalty: float | None = None,
    tolerance: float = 1e-7,
    weights: ArrayLike | Tensor | None = None,
    start: tuple[Tensor, Tensor] | None = None,
) -> BestHead:
    """The linear head of least risk on these features, with a certified duality gap.

    Arguments:
        features: ``(n, d)``, any float type (a memory-mapped array is read in chunks); computed in
            float64, so half-precision features are taken as exactly the numbers they hold.
        labels: ``(n,)`` integers ``0 .. C-1``, every class present; ``0`` and ``1`` for the binary
            losses, 1 being the positive class.
        loss: ``"cross_entropy"``, ``"logistic"``, ``"hinge"`` or ``"squared_hinge"``.
        head_norm: the budget ``r`` of the Frobenius norm of the weights; or
        penalty: ``λ`` of the added ``λ ||W||_F²``. Give exactly one of the two. The bias is free.
        tolerance: the wanted duality gap; the one that was reached is in the result.
        weights: ``(n,)`` positive, scaled to sum to one; equal by default.
        start: a weight and a bias to start from, for speed alone.

    Raises:
        ValueError: for features or labels that are not finite, of wrong shape, or miss a class, and for
            a budget that is not positive and finite.

    Source: this book, chapter on certificates; the duality gap is the one of Frank & Wolfe (1956).

    >>> import torch
    >>> head = best_head(torch.eye(2), torch.tensor([0, 1]), head_norm=2.0)
    >>> round(head.risk, 5), head.duality_gap < 1e-7
    (0.12693, True)
    """
    local = losses.named(loss)
    rows, classes = _checked(features, labels, loss, weights)
    limit = budget(head_norm, penalty)
    outputs = classes if loss == "cross_entropy" else 1
    theta = torch.zeros(outputs, rows.d + 1, dtype=torch.float64)
    if start is not None:
        theta[:, :-1], theta[:, -1] = start[0].detach(), start[1].detach()
    solve = _solve_norm if penalty is None else _solve_penalty
    if loss != "hinge":
        return solve(Problem(rows, local, outputs), theta, limit, tolerance)
    return _solve_hinge(rows, theta, limit, tolerance, solve)


def _checked(
    features: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    loss: str,
    weights: ArrayLike | Tensor | None,
) -> tuple[Rows, int]:
    x = features.detach() if isinstance(features, Tensor) else np.asarray(features)
    y = torch.as_tensor(labels).detach().cpu()
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y) or len(y) == 0:
        raise ValueError(
            f"features {tuple(x.shape)}, labels {tuple(y.shape)}: give (n, d) features and (n,) labels"
        )
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"labels have type {y.dtype}: give integers 0 .. C-1")
    y = y.long()
    counts = count_classes(y, 2 if loss != "cross_entropy" else None)
    if weights is None:
        w = torch.full((len(y),), 1.0 / len(y), dtype=torch.float64)
    else:
        given = weights if isinstance(weights, Tensor) else np.asarray(weights, dtype=np.float64)
        w = torch.as_tensor(given).detach().cpu().double()
        if w.shape != y.shape or not bool((torch.isfinite(w) & (w > 0)).all()):
            raise ValueError("weights: give one positive finite number for each row of features")
        w = w / w.sum()
    rows = Rows(x, y, w)
    for _, chunk in rows:
        if not bool(torch.isfinite(chunk).all()):
            raise ValueError("features contain NaN or infinity: mend the network or the data first")
    return rows, counts


def count_classes(labels: Tensor, classes: int | None = None) -> int:
    """The number of classes of integer labels; `ValueError` if one of them has no example."""
    if int(labels.min()) < 0:
        raise ValueError(f"labels contain {int(labels.min())}: they must be 0 .. C-1")
    counts = torch.bincount(labels, minlength=classes or 2)
    if classes is not None and len(counts) > classes:
        raise ValueError(f"labels reach {len(counts) - 1}, but there are {classes} classes")
    if missing := torch.nonzero(counts == 0).flatten().tolist():
        raise ValueError(
            f"labels miss class {missing[0]} of 0..{len(counts) - 1}: relabel, or add examples"
        )
    return len(counts)


def _solve_penalty(problem: Problem, theta: Tensor, penalty: float, tolerance: float) -> BestHead:
    theta = _newton(problem, theta, penalty, tolerance)
    risk, gap = _penalised(problem, theta, penalty)
    return _result(theta, risk, gap, penalty)


def _penalised(problem: Problem, theta: Tensor, penalty: float) -> tuple[float, float]:
    """Risk and certified gap: the linearised loss plus ``λ||W'||²`` is minimised in closed form."""
    mean, local = problem.at(theta)
    slope = problem.rows.pull(local.slopes)
    weight = theta[:, :-1]
    risk = mean + penalty * float(weight.square().sum())
    gap = float((slope[:, :-1] + 2 * penalty * weight).square().sum()) / (4 * penalty)
    return risk, gap + problem.bias_slack(risk, theta, slope, math.sqrt(risk / penalty))


def _solve_norm(problem: Problem, theta: Tensor, norm: float, tolerance: float) -> BestHead:
    """Moves the multiplier until the weights have norm ``norm``; keeps the best certified head.

    Scaling the weights back to the sphere leaves a gap that is quadratic in the error of the
    multiplier, so a few secant steps in log-log coordinates are enough.
    """
    slope = problem.rows.pull(problem.at(theta)[1].slopes)[:, :-1]
    weight = theta[:, :-1]
    # Any minimiser has ||W|| <= ||slope at zero|| / 2λ; at a trained head the multiplier is nearly known.
    guess = -float((slope * weight).sum()) / (2 * norm**2)
    least = tolerance / (2 * norm**2)  # with a smaller multiplier, slack in the norm costs nothing
    lam = max(guess if float(weight.norm()) > 0 else float(slope.norm()) / (2 * norm), least)
    best: BestHead | None = None
    seen: list[tuple[float, float]] = []
    for _ in range(60):
        # A gap of λr²e² leaves an error of e in log norm: no finer than the last misfit calls for.
        error = 0.1 if not seen else min(0.1, 0.2 * abs(seen[-1][1]))
        enough = max(tolerance / 4, lam * norm**2 * error**2)
        theta = _newton(problem, theta, lam, enough, norm)
        for candidate in _candidates(problem, theta, norm, lam):
            if best is None or candidate.duality_gap < best.duality_gap:
                best = candidate
        assert best is not None
        if best.duality_gap <= tolerance:
            break
        seen.append((math.log(lam), math.log(max(float(theta[:, :-1].norm()), 1e-300) / norm)))
        last, lam = lam, max(_secant(seen), least)
        # Nothing more to gain; also where the least multiplier leaves a part of the budget unused.
        if abs(lam - last) <= 1e-12 * last and enough <= tolerance / 4:
            break
    assert best is not None
    return best


def _candidates(problem: Problem, theta: Tensor, norm: float, lam: float) -> Iterator[BestHead]:
    """The head on the sphere of the budget, and as it is where it is inside."""
    size = float(theta[:, :-1].norm())
    if size <= norm:
        yield _certified(problem, theta, norm, lam)
    if size > 0:
        scaled = theta.clone()
        scaled[:, :-1] *= norm / size
        yield _certified(problem, scaled, norm, lam)


def _secant(seen: list[tuple[float, float]]) -> float:
    """The next multiplier: where log norm, as a function of log multiplier, would cross zero."""
    (x, y) = seen[-1]
    low = max((p for p in seen if p[1] >= 0), default=None)  # norms that are too large
    high = min((p for p in seen if p[1] < 0), default=None)
    if len(seen) > 1 and abs(x - seen[-2][0]) > 1e-14 and abs(y - seen[-2][1]) > 1e-14:
        step = -y * (x - seen[-2][0]) / (y - seen[-2][1])
    else:
        step = 2 * y
    target = x + max(-8.0, min(8.0, step))
    if low is not None and high is not None and not low[0] < target < high[0]:
        target = (low[0] + high[0]) / 2
    return math.exp(target)


def _certified(problem: Problem, theta: Tensor, norm: float, lam: float) -> BestHead:
    """Make the bias optimal again, and certify."""
    theta = _best_bias(problem, theta)
    mean, local = problem.at(theta)
    slope = problem.rows.pull(local.slopes)
    return _result(theta, mean, _inside(problem, theta, slope, mean, norm), lam)


def _result(theta: Tensor, risk: float, gap: float, penalty: float) -> BestHead:
    if not math.isfinite(risk) or not math.isfinite(gap):
        raise ValueError("features: the scores overflow float64; scale the features down")
    return BestHead(risk, theta[:, :-1].clone(), theta[:, -1].clone(), gap, penalty)


def _solve_hinge(
    rows: Rows,
    theta: Tensor,
    limit: float,
    tolerance: float,
    solve: Callable[[Problem, Tensor, float, float], BestHead],
) -> BestHead:
    """Smooth the corner of the hinge, and sharpen it from solution to solution.

    The solutions move on a smooth path, from a width to a quarter of it; its end, at width zero, is
    guessed from the last two. The smoothed slopes are feasible for the dual of the hinge itself.
    """
    problem, penalty = Problem(rows, losses.hinge, 1), None if solve is _solve_norm else limit
    width, multiplier, lower = 0.5, 0.0, -math.inf
    best, least = theta, math.inf
    while True:
        smooth = Problem(rows, _sharpened(width), 1)
        head = solve(smooth, theta, limit, tolerance / 4)
        last, theta = theta, torch.cat([head.weight, head.bias[:, None]], dim=1)
        for trial in (theta, theta + (theta - last) / 3):
            risk, trial = _hinge_risk(problem, trial, limit, penalty)
            if risk < least:
                best, least, multiplier = trial, risk, head.penalty
        lower = max(lower, _hinge_dual(smooth, theta, least, limit, penalty))
        if least - lower <= tolerance or width <= tolerance / 2:
            return _result(best, least, least - lower, multiplier)
        width /= 4


def _sharpened(width: float) -> Callable[[Tensor, Tensor], Local]:
    return lambda scores, labels: losses.hinge(scores, labels, width)


def _hinge_risk(
    problem: Problem, theta: Tensor, limit: float, penalty: float | None
) -> tuple[float, Tensor]:
    """The risk of the head, scaled into the budget if there is one."""
    size = float(theta[:, :-1].norm())
    if penalty is None and size > limit:
        theta = theta.clone()
        theta[:, :-1] *= limit / size
    fine = 0.0 if penalty is None else penalty * size**2
    return problem.at(theta)[0] + fine, theta


def _hinge_dual(
    smooth: Problem, theta: Tensor, risk: float, limit: float, penalty: float | None
) -> float:
    """The hinge is at least ``a (1 - m)`` for every a in [0, 1]: the bound by the smoothed slopes -a."""
    local = smooth.at(theta)[1]
    signs = 2.0 * smooth.rows.labels.double() - 1.0
    slope = smooth.rows.pull(local.slopes)
    active = -signs * local.slopes[:, 0]
    gamma, constant = slope[:, :-1], float(active @ smooth.rows.weights)
    if penalty is None:
        cost, norm = limit * float(gamma.norm()), limit
    else:
        cost, norm = float(gamma.square().sum()) / (4 * penalty), math.sqrt(risk / penalty)
    at_bias = float((slope[:, -1] * theta[:, -1]).sum())
    return constant + at_bias - cost - smooth.bias_slack(risk, theta, slope, norm)


def _newton(
    problem: Problem, theta: Tensor, penalty: float, tolerance: float, norm: float | None = None
) -> Tensor:
    """Minimise the penalised risk until its certified gap is at most ``tolerance``.

    With ``norm``, a head inside that budget may also stop by the gap of the constrained problem: where
    the budget is not used up, the multiplier is nearly zero and the penalised gap divides by it.
    """
    rows = problem.rows
    mean, local = problem.at(theta)
    for _ in range(200):
        slope = rows.pull(local.slopes)
        value = mean + penalty * float(theta[:, :-1].square().sum())
        gradient = slope.clone()
        gradient[:, :-1] += 2 * penalty * theta[:, :-1]
        gap = float(gradient[:, :-1].square().sum()) / (4 * penalty)
        slack = problem.bias_slack(value, theta, slope, math.sqrt(value / penalty))
        if gap + slack <= tolerance or _inside(problem, theta, slope, mean, norm) <= tolerance:
            break
        # The bias is at most `reach` away: damping that a step of that length pays for.
        reach = 1 + problem.bias_reach(value, theta, math.sqrt(value / penalty))
        damping = float(gradient[:, -1].abs().max()) / reach
        step = _conjugate_gradients(problem, local, gradient, penalty, damping)
        slope_along = float((gradient * step).sum())
        size = 1.0
        while True:
            trial = theta + size * step
            mean, local = problem.at(trial)
            new = mean + penalty * float(trial[:, :-1].square().sum())
            if new <= value + 0.25 * size * slope_along:
                break
            size /= 2
            if size < 1e-9:  # rounding: no further descent can be seen
                return theta
        theta = trial
    return theta


def _inside(
    problem: Problem, theta: Tensor, slope: Tensor, mean: float, norm: float | None
) -> float:
    """The gap of the norm-constrained problem at a head inside the budget, else infinity."""
    gamma, weight = slope[:, :-1], theta[:, :-1]
    if norm is None or float(weight.norm()) > norm * (1 + 1e-12):
        return math.inf
    gap = norm * float(gamma.norm()) + float((gamma * weight).sum())
    return max(gap, 0.0) + problem.bias_slack(mean, theta, slope, norm)


def _conjugate_gradients(
    problem: Problem, local: Local, gradient: Tensor, penalty: float, damping: float
) -> Tensor:
    """Solve (Hessian) step = -gradient to 3 %: more would be lost on the next change of the Hessian."""
    rows = problem.rows
    moment = rows.second_moment(local.weight)
    ridge = torch.full((rows.d + 1,), 2 * penalty, dtype=torch.float64)
    ridge[-1] = damping
    # Rounding of the moment may outweigh a tiny ridge, and the bias of the softmax has a null direction.
    ridge += 1e-13 * float(moment.diagonal().sum()) + 1e-300
    factor = torch.linalg.cholesky(moment + torch.diag(ridge))

    def precondition(g: Tensor) -> Tensor:
        return torch.cholesky_solve(g.T, factor).T

    def hessian(step: Tensor) -> Tensor:
        out = rows.pull(local.bend(rows.scores(step)))
        return out + ridge * step

    step = torch.zeros_like(gradient)
    residual = -gradient
    z = precondition(residual)
    direction = z
    start = rho = float((residual * z).sum())
    goal = start * 1e-3
    for _ in range(250):
        image = hessian(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        alpha = rho / curvature
        step = step + alpha * direction
        residual = residual - alpha * image
        z = precondition(residual)
        new = float((residual * z).sum())
        if new <= goal:
            break
        direction = z + (new / rho) * direction
        rho = new
    return step if float((gradient * step).sum()) < 0 else -precondition(gradient)


def _best_bias(problem: Problem, theta: Tensor) -> Tensor:
    """The best bias for fixed weights, to rounding."""
    free = theta.clone()
    free[:, -1] = 0
    base, rows = problem.rows.scores(free), problem.rows

    def at(bias: Tensor) -> tuple[float, Tensor, Local]:
        local = problem.loss(base + bias, rows.labels)
        return float(local.values @ rows.weights), local.slopes.T @ rows.weights, local

    free[:, -1] = _bisect(at, base) if len(theta) == 1 else _newton_bias(at, theta[:, -1], rows)
    return free


_At = Callable[[Tensor], tuple[float, Tensor, Local]]


def _bisect(at: _At, base: Tensor) -> Tensor:
    """The zero of the (increasing) slope in the one bias of a binary loss."""

    def slope(bias: float) -> float:
        return float(at(torch.tensor([bias], dtype=torch.float64))[1])

    high = float(base.abs().max()) + 1
    while slope(-high) > 0 or slope(high) < 0:
        high *= 2
    low = -high
    while high - low > 4e-16 * max(abs(low), abs(high), 1e-8):
        middle = (low + high) / 2
        if slope(middle) > 0:
            high = middle
        else:
            low = middle
    return torch.tensor([min(low, high, key=lambda b: abs(slope(b)))], dtype=torch.float64)


def _newton_bias(at: _At, bias: Tensor, rows: Rows) -> Tensor:
    """Newton in C variables for the softmax, whose Hessian is singular along (1, …, 1) alone."""
    eye = torch.eye(len(bias), dtype=torch.float64)
    value, gradient, local = at(bias)
    for _ in range(50):
        bends = [local.bend(row.expand(rows.n, -1)).T @ rows.weights for row in eye]
        hessian = torch.stack(bends) + 1e-14 * eye + 1.0 / len(bias)
        step = -torch.linalg.solve(hessian, gradient)
        for size in (1.0, 0.25, 1e-2, 1e-4):
            trial = at(bias + size * step)
            if trial[0] <= value + 1e-15 and bool(torch.isfinite(trial[1]).all()):
                break
        else:
            return bias
        if float(trial[1].abs().sum()) >= float(gradient.abs().sum()) and trial[0] >= value:
            return bias
        bias = bias + size * step
        value, gradient, local = trial
    return bias
