r"""A lifted network: a convex penalty that is zero exactly where a ReLU holds takes the ReLU's place.

.. math::
    \tfrac12 \lVert V_{K-1} W_K^\top + \mathbf 1 b_K^\top - Y \rVert^2
    + \gamma \sum_{k<K} B(V_k, V_{k-1} W_k^\top + \mathbf 1 b_k^\top), \qquad V_k \ge 0, \quad V_0 = X

    B(v, u) = \tfrac12 \lVert v \rVert^2 + \tfrac12 \lVert \operatorname{ReLU}(u) \rVert^2 - \langle v, u \rangle

B is the Fenchel-Young inequality's gap for :math:`\tfrac12 v^2` on :math:`v \ge 0`: it is 0 exactly if
:math:`v = \operatorname{ReLU}(u)`, and convex in v and in u. So the objective is convex in each block: the
codes of one layer, or the weights of one layer. A sweep minimises over :math:`V_{K-1}, \dots, V_1` and then
over the weights of each module, by accelerated gradient descent with the step that the block's curvature
allows; the last module's weights are a least-squares problem.

Source: Gu, Askari & El Ghaoui 2018 (arXiv 1811.08039), Fenchel lifted networks. Category measured by the audit:
weakly modular.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modlib.kernels import double
from modlib.methods.auxiliary_variables import (
    Assign,
    Codes,
    DenseStage,
    check_perceptron,
    half_square,
)
from modlib.methods.method import Method, Stage
from modlib.network import ModularNetwork
from modlib.networks.sizes import check_positive, check_whole


class LiftedNetwork(Method):
    """Train a ReLU perceptron whose ReLUs are penalties, on all images at once.

    Args:
        gamma: weight of the penalty that stands for the ReLUs.
        alpha: weight, for each image, of a proximal term on weights.
        inner: steps of accelerated gradient descent on a block.

    Raises:
        ValueError: a number is not above 0; (when training starts) the network's modules are not one linear
            layer and a ReLU each, the last without, or images are augmented.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 10], boundary="after", seed=0), 3)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> history = modlib.fit(net, LiftedNetwork(), data, epochs=2, progress=False)
    >>> len(history.rows[0]["losses"])
    3
    """

    def __init__(self, gamma: float = 1.0, alpha: float = 0.1, inner: int = 20) -> None:
        check_positive(gamma=gamma, alpha=alpha)
        check_whole(inner=inner)
        super().__init__(Assign)
        self.gamma, self.alpha, self.inner = gamma, alpha, inner

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        check_perceptron(net, "a lifted network")
        optimizers = self.make_optimizers([[module] for module in net])
        classes = net.shapes(x)[-1][0]
        return [LiftedStage(list(net), optimizers, classes, self.gamma, self.alpha, self.inner)]


class LiftedStage(DenseStage):
    """Codes "V" of the hidden modules, none of them negative."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        classes: int,
        gamma: float,
        alpha: float,
        inner: int,
    ) -> None:
        super().__init__(modules, optimizers, classes)
        self.gamma, self.alpha, self.inner = gamma, alpha, inner

    def begin(self, x: Tensor) -> Codes:
        vs = [x.flatten(1)]
        for k in range(len(self.modules) - 1):
            vs.append(self.linear(k, vs[-1]).relu())
        return {"V": vs[1:]}

    def blocks(self, x: Tensor, y: Tensor) -> Iterator[str]:
        for k in reversed(range(len(self.codes["V"]))):
            self._fit_code(k, x, y)
            yield f"V{k}"
        for k in range(len(self.modules)):
            self._fit_weights(k, x, y)
            yield f"W{k}"

    def _fit_code(self, k: int, x: Tensor, y: Tensor) -> None:
        vs = self.codes["V"]
        u = self.linear(k, vs[k - 1] if k else x.flatten(1))
        weight, _ = self.weights[k + 1]
        top = k == len(vs) - 1
        share = (
            1.0 if top else self.gamma
        )  # of the term above, whose curvature in v is W^T W at most

        def gradient(v: Tensor) -> Tensor:
            above = self.linear(k + 1, v)
            error = above - y if top else above.relu() - vs[k + 1]
            return self.gamma * (v - u) + share * error @ weight

        curvature = self.gamma + share * _largest(weight @ weight.T)
        vs[k] = accelerated(vs[k], gradient, curvature, self.gamma, self.inner, torch.relu)

    def _fit_weights(self, k: int, x: Tensor, y: Tensor) -> None:
        vs = self.codes["V"]
        below = vs[k - 1] if k else x.flatten(1)
        n = len(below)
        if k == len(vs):
            self.fit_linear(k, below, y - self.linear(k, below), 1.0, self.alpha * n)
            return
        rows = torch.cat([below, below.new_ones(n, 1)], 1)
        old = torch.cat([self.weights[k][0], self.weights[k][1][:, None]], 1)

        def gradient(weights: Tensor) -> Tensor:
            error = (rows @ weights.T).relu() - vs[k]
            return self.gamma / n * error.T @ rows + self.alpha * (weights - old)

        curvature = self.gamma / n * _largest(rows.T @ rows) + self.alpha
        new = accelerated(old, gradient, curvature, self.alpha, self.inner)
        self.weights[k] = [new[:, :-1].contiguous(), new[:, -1].contiguous()]

    def terms(self, x: Tensor, y: Tensor) -> list[Tensor]:
        vs = self.codes["V"]
        inputs = [x.flatten(1), *vs]
        terms = [self.gamma * fenchel(v, self.linear(k, inputs[k])).sum() for k, v in enumerate(vs)]
        return [*terms, half_square(self.linear(len(vs), vs[-1]) - y)]

    def targets(self) -> list[Tensor]:
        return self.codes["V"]


def fenchel(v: Tensor, u: Tensor) -> Tensor:
    r"""The penalty B entry by entry, for :math:`v \ge 0`; never negative.

    >>> fenchel(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([2.0, -3.0, -1.0]))
    tensor([0.0000, 0.0000, 1.5000])
    """
    return v.square() / 2 + u.relu().square() / 2 - v * u


def accelerated(
    start: Tensor,
    gradient: Callable[[Tensor], Tensor],
    curvature: float,
    least: float,
    steps: int,
    project: Callable[[Tensor], Tensor] = lambda t: t,
) -> Tensor:
    """Nesterov's method for a function whose curvature lies between ``least`` > 0 and ``curvature``.

    Source: Nesterov 2004, Introductory Lectures on Convex Optimization, scheme 2.2.11 with projection.
    """
    root = math.sqrt(least / curvature)
    momentum = (1 - root) / (1 + root)
    at, ahead = start, start
    for _ in range(steps):
        before, at = at, project(ahead - gradient(ahead) / curvature)
        ahead = at + momentum * (at - before)
    return at


def _largest(gram: Tensor) -> float:
    """The largest eigenvalue of a Gram matrix, or a little more: a step may be too short, never too long."""
    return 1.001 * float(torch.linalg.eigvalsh(double(gram))[-1])
