r"""Descent by old gradients: how large a rate a delay allows, and a search for what would break the bound.

.. math:: v^{s+1} = v^s - \eta\,\bigl(G(w^s, v^s) + \xi^s\bigr), \qquad w_k^s = v_k^{\max(0,\, s - d_k)}

v are a network's weights sorted by batch: block k as module k has it when it goes back over batch s; w as it
had it when the batch came by. Delayed gradients have G(w, v) = ∇f(w), replayed ones run each module with v on
inputs made with w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def largest_rate(delay: int) -> float:
    """The rate, times the curvature L, up to which delayed descent on a parabola converges.

    Source: Levin & May 1976; the chapter on delayed gradients proves it.

    >>> [round(largest_rate(d), 3) for d in (0, 1, 2, 3)]
    [2.0, 1.0, 0.618, 0.445]
    """
    return 2 * math.sin(math.pi / (2 * (2 * delay + 1)))


def safe_rate(delay: int) -> float:
    """The rate, times max(L, M), up to which the bound holds for every function.

    >>> [round(safe_rate(d), 3) for d in (0, 1, 2, 3)]
    [1.0, 0.414, 0.261, 0.191]
    """
    return 1 / (1 + math.sqrt(2) * delay)


def bound(
    gap: float,
    rate: float,
    steps: int,
    *,
    smoothness: float,
    drift: float,
    delay: int,
    variance: float = 0.0,
) -> float:
    """Of the mean over steps of the squared gradient's expectation.

    Args:
        gap: f at the start, less its infimum.
        rate: η, at most ``safe_rate(delay) / max(smoothness, drift)``.
        steps: T.
        smoothness: L, the Lipschitz constant of the gradient.
        drift: M, with ‖G(w, v) - ∇f(v)‖ ≤ M ‖w - v‖; L for delayed gradients.
        delay: the largest delay D.
        variance: σ² of the gradients' noise.

    >>> bound(1.0, 0.1, 100, smoothness=1.0, drift=1.0, delay=0)
    0.2
    """
    noise = rate * smoothness * variance + 2 * (rate * drift) ** 2 * delay * variance
    return 2 * gap / (rate * steps) + noise


def descend(
    gradient: Callable[[Array, Array], Array],
    start: Array,
    delays: Sequence[int],
    rate: float,
    steps: int,
) -> list[Array]:
    """The sequence v (steps + 1 of them), for G = ``gradient(w, v)`` and one delay for each coordinate.

    >>> path = descend(lambda w, v: w, np.ones(1), [1], rate=0.5, steps=3)
    >>> [float(v[0]) for v in path]
    [1.0, 0.5, 0.0, -0.25]
    """
    path = [np.asarray(start, dtype=np.float64)]
    for s in range(steps):
        w = np.array([path[max(0, s - d)][k] for k, d in enumerate(delays)])
        path.append(path[-1] - rate * gradient(w, path[-1]))
    return path


def expected_squares(
    hessian: Array,
    old: Array,
    start: Array,
    delays: Sequence[int],
    rate: float,
    steps: int,
    variance: float = 0.0,
) -> list[float]:
    """E‖∇f(v^s)‖² of each step on a parabola, exactly: second moments of v and its past are linear in the last.

    Args:
        hessian: (n, n), of f.
        old: (n, n), C in G(w, v) = ∇f(v) + C (w - v); the Hessian for delayed gradients.
        start: (n,), v^0.
        delays: n of them.
        rate: η.
        steps: how many.
        variance: of the noise in each entry of a gradient.

    >>> one = np.eye(1)  # each step from v to v/2, and noise
    >>> expected_squares(one, one, np.ones(1), [0], rate=0.5, steps=3, variance=4.0)
    [1.0, 1.25, 1.3125]
    """
    size, stacked = start.size, start.size * (max(delays) + 1)
    present, earlier = np.eye(size, stacked), np.zeros((size, stacked))
    earlier[range(size), [d * size + k for k, d in enumerate(delays)]] = 1
    push = np.eye(stacked, k=-size)  # v becomes the past
    push[:size] = present - rate * (hessian @ present + old @ (earlier - present))
    past = np.tile(start, max(delays) + 1)
    moments, found = np.outer(past, past), []
    for _ in range(steps):
        found.append(float(np.trace(hessian @ moments[:size, :size] @ hessian)))
        moments = push @ moments @ push.T
        moments[:size, :size] += rate**2 * variance * np.eye(size)
    return found


def search(delay: int, trials: int = 80, seed: int = 0, faster: float = 1.0) -> float:
    """The largest ratio, over problems drawn at random, of the mean squared gradient to its bound.

    Every problem runs at the largest rate that the theorem allows. One to four coordinates have delays of their
    own; the largest is ``delay``. Half of the problems are parabolas, with and without noise; expectations
    are computed, not sampled. The others are sums of a parabola and of cosines along random directions, without
    noise. In half of either kind gradients are delayed, G(w, v) = ∇f(w); in the others
    G(w, v) = ∇f(v) + M Q (w - v), with a random orthogonal Q and M from L/4 to 4 L.

    Args:
        delay: the largest delay D.
        trials: how many problems.
        seed: of the choice.
        faster: a factor on the rate; above 1 the theorem says nothing.

    The constant √2 and the last noise term are not tested: problems so hard are not among those drawn.

    Returns:
        Above 1 (by more than rounding) the bound is broken. At ``delay=0`` it is 1: a parabola at the
        rate 1/L attains the bound.

    >>> round(search(0), 6), search(2, trials=20) <= 1, search(2, trials=20, faster=2.0) > 1
    (1.0, True, True)
    """
    rng = np.random.default_rng([seed, delay])
    return float(max((_parabola, _waves)[n % 2](rng, delay, faster) for n in range(trials)))


STEPS = 60  # of each run


def _parabola(rng: np.random.Generator, delay: int, faster: float) -> float:
    delays = _delays(rng, delay)
    hessian = np.diag(rng.uniform(0, 1, delays.size))
    smoothness = float(hessian.max())
    old, drift = _old(rng, delays.size, smoothness)
    rate = faster * safe_rate(delay) / max(smoothness, drift)
    variance = rng.uniform(0, 4) * rng.integers(0, 2)
    start = 3 * rng.standard_normal(delays.size)
    found = expected_squares(
        hessian,
        hessian if old is None else old,
        start,
        delays.tolist(),
        rate,
        STEPS,
        variance / delays.size,
    )
    limit = bound(
        float(start @ hessian @ start) / 2,
        rate,
        STEPS,
        smoothness=smoothness,
        drift=drift,
        delay=delay,
        variance=variance,
    )
    return float(np.mean(found)) / limit


def _waves(rng: np.random.Generator, delay: int, faster: float) -> float:
    delays = _delays(rng, delay)
    directions = rng.standard_normal((3, delays.size))
    # a (1 - cos u) has curvature at most a along its direction: L is the largest sum of them
    heights, curvature = rng.uniform(0, 1, 3), rng.uniform(0, 1, delays.size)
    bumps = directions.T @ (heights[:, None] * directions)
    smoothness = float(np.linalg.eigvalsh(bumps + np.diag(curvature)).max())
    old, drift = _old(rng, delays.size, smoothness)

    def value(v: Array) -> float:
        return float(heights @ (1 - np.cos(directions @ v)) + curvature @ v**2 / 2)

    def slope(v: Array) -> Array:
        found: Array = directions.T @ (heights * np.sin(directions @ v)) + curvature * v
        return found

    def gradient(w: Array, v: Array) -> Array:
        return slope(w) if old is None else slope(v) + old @ (w - v)

    rate = faster * safe_rate(delay) / max(smoothness, drift)
    start = 3 * rng.standard_normal(delays.size)
    path = descend(gradient, start, delays.tolist(), rate, STEPS)
    mean = float(np.mean([np.sum(slope(v) ** 2) for v in path[:-1]]))
    return mean / bound(value(start), rate, STEPS, smoothness=smoothness, drift=drift, delay=delay)


def _delays(rng: np.random.Generator, largest: int) -> NDArray[np.int64]:
    """One for each of 1 to 4 coordinates; one of them is the largest."""
    delays = rng.integers(0, largest + 1, rng.integers(1, 5))
    delays[rng.integers(delays.size)] = largest
    return delays


def _old(rng: np.random.Generator, size: int, smoothness: float) -> tuple[Array | None, float]:
    """M Q for a random orthogonal Q, or None for delayed gradients; and M."""
    if rng.integers(0, 2):
        return None, smoothness
    drift = smoothness * float(4 ** rng.uniform(-1, 1))
    rotation, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return drift * rotation, drift
