r"""ADMM of Taylor et al.: closed-form blocks from the input upwards, one multiplier at the output.

.. math::
    \tfrac12 \lVert z_K - Y \rVert^2 + \langle \lambda, z_K \rangle
    + \tfrac{\beta}{2} \sum_k \lVert z_k - a_{k-1} W_k^\top - \mathbf 1 b_k^\top \rVert^2
    + \tfrac{\gamma}{2} \sum_{k<K} \lVert a_k - \sigma(z_k) \rVert^2, \qquad a_0 = X

A sweep solves for :math:`(W_1, b_1), a_1, z_1, \dots, (W_K, b_K), z_K` and then moves the multiplier,
:math:`\lambda \leftarrow \lambda + \beta (z_K - a_{K-1} W_K^\top - \mathbf 1 b_K^\top)`. The first sweeps leave
:math:`\lambda = 0`. As published, :math:`\lambda` weighs :math:`z_K` alone, not the whole constraint; with
``coupled=True`` it weighs the constraint, as in the classical method of multipliers.

Source: Taylor, Burmeister, Xu, Singh, Patel & Goldstein 2016 (arXiv 1605.02026), algorithm 1; biases and the
squared loss are ours, and penalties have the factor 1/2. Category measured by the audit: weakly modular.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modlib.methods.auxiliary_variables import (
    Assign,
    Codes,
    DenseStage,
    check_perceptron,
    half_square,
    relu_prox,
)
from modlib.methods.method import Method, Stage
from modlib.network import ModularNetwork
from modlib.networks.sizes import check_positive, check_whole


class ADMM(Method):
    """Train a ReLU perceptron by alternating directions with one multiplier, on all images at once.

    Args:
        gamma: penalty between a code and the ReLU of the one before it.
        beta: penalty between a code and the linear layer before it, and the multiplier's step.
        alpha: weight of a proximal term on weights, which keeps their systems regular.
        warm_start: sweeps before the multiplier moves.
        coupled: let the multiplier weigh the whole constraint at the output.

    Raises:
        ValueError: a number is not above 0; (when training starts) the network's modules are not one linear
            layer and a ReLU each, the last without, or images are augmented.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 10], boundary="after", seed=0), 3)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> history = modlib.fit(net, ADMM(), data, epochs=2, progress=False)
    >>> len(history.rows[0]["losses"])
    3
    """

    def __init__(
        self,
        gamma: float = 10.0,
        beta: float = 1.0,
        alpha: float = 1.0,
        warm_start: int = 10,
        *,
        coupled: bool = False,
    ) -> None:
        check_positive(gamma=gamma, beta=beta, alpha=alpha)
        check_whole(0, warm_start=warm_start)
        super().__init__(Assign)
        self.gamma, self.beta, self.alpha = gamma, beta, alpha
        self.warm_start, self.coupled = warm_start, coupled

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        check_perceptron(net, "ADMM")
        optimizers = self.make_optimizers([[module] for module in net])
        return [DirectionsStage(list(net), optimizers, net.shapes(x)[-1][0], self)]


class DirectionsStage(DenseStage):
    """Codes "a" behind the ReLUs of hidden modules, "z" before them, and the multiplier "lambda".

    Attributes:
        residuals: of the last sweep, how far the constraints are from holding, as root mean squares over images
            and units: "linear" between z and the layer below it, K numbers; "activation" between a and the ReLU
            of z, K - 1 numbers.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        classes: int,
        method: ADMM,
    ) -> None:
        super().__init__(modules, optimizers, classes)
        self.gamma, self.beta, self.alpha = method.gamma, method.beta, method.alpha
        self.warm_start, self.coupled = method.warm_start, method.coupled
        self.residuals: dict[str, list[float]] = {}
        self.delay = len(modules)  # what the labels say goes down one module a sweep

    def begin(self, x: Tensor) -> Codes:
        zs, activations = [], [x.flatten(1)]
        for k in range(len(self.modules)):
            zs.append(self.linear(k, activations[-1]))
            activations.append(zs[-1].relu())
        return {"a": activations[1:-1], "z": zs, "lambda": [torch.zeros_like(zs[-1])]}

    def blocks(self, x: Tensor, y: Tensor) -> Iterator[str]:
        gamma, beta = self.gamma, self.beta
        activations, zs = self.codes["a"], self.codes["z"]
        (multiplier,) = self.codes["lambda"]
        last = len(zs) - 1
        self.residuals = {"linear": [], "activation": []}
        for k in range(len(zs)):
            below = activations[k - 1] if k else x.flatten(1)
            gap = self._goal(k) - self.linear(k, below)
            self.fit_linear(k, below, gap, beta, self.alpha)
            yield f"W{k}"
            predicted = self.linear(k, below)
            if k == last:
                shifted = y - multiplier + beta * predicted
                zs[k] = shifted / (1 + beta)
                yield f"z{k}"
            else:
                activations[k] = self.fit_code(k + 1, self._goal(k + 1), zs[k].relu(), beta, gamma)
                yield f"a{k}"
                zs[k] = relu_prox(activations[k], predicted, beta / gamma)
                yield f"z{k}"
                self.residuals["activation"].append(_size(activations[k] - zs[k].relu()))
            self.residuals["linear"].append(_size(zs[k] - predicted))
        if self.sweeps >= self.warm_start:
            self.codes["lambda"] = [multiplier + beta * (zs[-1] - predicted)]
            yield "lambda"

    def _goal(self, k: int) -> Tensor:
        """What the linear layer of module k should give."""
        z = self.codes["z"][k]
        if self.coupled and k == len(self.modules) - 1:
            return z + self.codes["lambda"][0] / self.beta
        return z

    def terms(self, x: Tensor, y: Tensor) -> list[Tensor]:
        activations, zs = self.codes["a"], self.codes["z"]
        inputs = [x.flatten(1), *activations]
        gaps = [zs[k] - self.linear(k, inputs[k]) for k in range(len(zs))]
        terms = [self.beta * half_square(gap) for gap in gaps]
        for k, activation in enumerate(activations):
            terms[k] = terms[k] + self.gamma * half_square(activation - zs[k].relu())
        weighed = gaps[-1] if self.coupled else zs[-1]
        terms[-1] = terms[-1] + half_square(zs[-1] - y) + (self.codes["lambda"][0] * weighed).sum()
        return terms

    def targets(self) -> list[Tensor]:
        return self.codes["a"]


def _size(gap: Tensor) -> float:
    """Root mean square over images and units."""
    return float(gap.square().mean().sqrt())
