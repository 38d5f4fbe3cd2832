r"""Descent by old gradients: how large a rate a delay allows, and a search for what would break the bound.

.. math:: v^{s+1} = v^s - \eta\,\bigl(G(w^s, v^s) + \xi^s\bigr), \qquad w_k^s = v_k^{\max(0,\, s - d_k)}

v are a network's weights sorted by batch: block k as module k has it when it goes back over batch s; w as it
had it when the batch came by. Delayed gradients have G(w, v) = ∇f(w), replayed ones run each module with v on
inputs made with w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        worst: the largest ratio of the mean squared gradient to its bound; above 1 it is broken.
        trials: functions that were tried.
    """

    worst: float
    trials: int


def search(trials: int = 200, seed: int = 0, faster: float = 1.0, steps: int = 60) -> Search:
    """Try functions whose constants are known, and delays, at the largest rate that the theorem allows.

    They are sums of a quadratic and of cosines along random directions, convex or not, or a parabola
    alone. Gradients are delayed; there is no noise.

    Args:
        trials: how many.
        seed: of the choice.
        faster: a factor on the rate; above 1 the theorem says nothing.
        steps: of each run.
    """
    rng = np.random.default_rng(seed)
    worst = max(_ratio(rng, faster, steps) for _ in range(trials))
    return Search(worst, trials)


def _ratio(rng: np.random.Generator, faster: float, steps: int) -> float:
    size = int(rng.integers(1, 5))
    delays = rng.integers(0, 5, size)
    directions = rng.standard_normal((3, size))
    # a (1 - cos u) has curvature at most a along its direction: L is the largest sum of them
    heights = rng.uniform(0, 1, 3) * rng.integers(0, 2)
    curvature = rng.uniform(0, 1, size)
    bumps = directions.T @ (heights[:, None] * directions)
    smoothness = float(np.linalg.eigvalsh(bumps + np.diag(curvature)).max())

    def value(v: Array) -> float:
        return float(heights @ (1 - np.cos(directions @ v)) + curvature @ v**2 / 2)

    def gradient(w: Array, _: Array) -> Array:
        slope: Array = directions.T @ (heights * np.sin(directions @ w)) + curvature * w
        return slope

    largest = int(delays.max())
    rate = faster * safe_rate(largest) / smoothness
    start = 3 * rng.standard_normal(size)
    path = descend(gradient, start, delays.tolist(), rate, steps)
    mean = float(np.mean([np.sum(gradient(v, v) ** 2) for v in path[:-1]]))
    limit = bound(value(start), rate, steps, smoothness=smoothness, drift=smoothness, delay=largest)
    return mean / limit
