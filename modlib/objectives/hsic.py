r"""The HSIC bottleneck: a module forgets the input and keeps the labels.

.. math:: L_k = \mathrm{nHSIC}(h_k, x) - \lambda\, \mathrm{nHSIC}(h_k, y), \qquad
          \mathrm{nHSIC}(a, b) = \mathrm{tr}(R_a R_b), \quad R_a = K_a (K_a + \varepsilon m I)^{-1}

with the centred Gram matrix :math:`K_a` of a batch of m vectors. R is the matrix by
which kernel ridge regression smooths, so nHSIC counts the directions that a and b share. It costs
:math:`O(m^3)` a batch: :math:`L_k = \mathrm{tr}(R_{h_k} (R_x - \lambda R_y))` needs one R for each
layer, and those of x and y once for all layers.

Source: Ma, Lewis & Kleijn 2020 (arXiv 1908.01580), section "Proposed method". Plain HSIC: Gretton et
al. 2005.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from modlib.device import full_precision
from modlib.kernels import Gaussian, double, wide
from modlib.objectives.cross_entropy import check_labels
from modlib.objectives.objective import Objective
from modlib.tokens import pooled

_RIDGE = 1e-5  # ε of the paper


class HSIC(Objective):
    """Dependence on the input, minus ``weight`` times dependence on the labels.

    Labels are compared as one-hot vectors, so they serve as same/different pairs only. Where stored
    features stand in for the input (``cache_features=True``), it is those that a module forgets.

    Args:
        weight: λ > 0 of the labels; 50 to 500 in the paper.
        bandwidth: σ > 0 of all kernels, see ``nhsic``.
        classes: number of classes, the length of the one-hot vectors; methods fill it in.

    Raises:
        ValueError: called as ``objective(h, y)``: without the input half of it is missing. Use
            ``objective.local(h, y, x)``. Or: the labels do not fit.

    >>> objective = HSIC(weight=50.0, classes=2)
    >>> h, y = torch.tensor([[0.0], [0.1], [1.0], [1.1]]), torch.tensor([0, 0, 1, 1])
    >>> bool(objective.local(h, y, x=h) < objective.local(h, y.roll(1), x=h))
    True
    """

    def __init__(
        self, weight: float = 50.0, bandwidth: float = 5.0, classes: int | None = None
    ) -> None:
        super().__init__()
        _check_bandwidth(bandwidth)
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight={weight}: give a finite number above 0, such as 50.")
        self.weight, self.bandwidth, self.classes = weight, bandwidth, classes
        self._held: Tensor | None = None  # the target, while layers share it

    def for_module(self, shape: Sequence[int], classes: int) -> Self:
        ready = super().for_module(shape, classes)
        ready.classes = classes
        return ready

    def local(self, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
        h = pooled(h).flatten(1)
        _check(h, x.flatten(1), self.bandwidth)
        target = self.target(x, y) if self._held is None else self._held
        with full_precision(h):
            value = (_ridge_fit(h, self.bandwidth) * target).sum()
        return value.to(wide(h))

    @torch.no_grad()
    def target(self, x: Tensor, y: Tensor) -> Tensor:
        """R_x - λ R_y, to which every layer of a step compares itself: (m, m) in float64."""
        if self.classes is None:
            raise ValueError("classes=None: say how many classes there are, as HSIC(classes=10).")
        check_labels(y, len(x), self.classes)
        onehot = F.one_hot(y, self.classes)
        with full_precision(x):
            forget, keep = (_ridge_fit(v, self.bandwidth) for v in (x.flatten(1), onehot))
        return forget - self.weight * keep

    @contextmanager
    def holding(self, target: Tensor) -> Iterator[None]:
        """Within this context ``local`` takes its target as given."""
        self._held = target
        try:
            yield
        finally:
            self._held = None

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        raise ValueError(
            "HSIC compares h with the network's input x; call objective.local(h, y, x)."
        )

    def extra_repr(self) -> str:
        return f"weight={self.weight}, bandwidth={self.bandwidth}"


def nhsic(a: Tensor, b: Tensor, bandwidth: float = 5.0) -> Tensor:
    r"""Normalised HSIC (nCCA) of two batches of vectors: 0 if independent, at most m - 1.

    .. math:: \mathrm{tr}(R_a R_b), \qquad k(u, v) = \exp(-\lVert u - v \rVert^2 / (2 \sigma^2 d))

    with d the dimension of the vectors.

    Args:
        a: (m, d).
        b: (m, d').
        bandwidth: σ > 0, the same for both.

    Returns:
        A scalar in a's precision (float32 at least).

    Raises:
        ValueError: the bandwidth, or shapes that do not fit.

    >>> constant, pair = torch.zeros(2, 1), torch.tensor([[0.0], [2.0]])
    >>> nhsic(constant, pair), nhsic(pair, pair)    # two different vectors differ in one direction
    (tensor(0.), tensor(0.9995))
    """
    _check(a, b, bandwidth)
    with full_precision(a):
        value = (_ridge_fit(a, bandwidth) * _ridge_fit(b, bandwidth).T).sum()
    return value.to(wide(a))


def hsic(a: Tensor, b: Tensor, bandwidth: float = 5.0) -> Tensor:
    r"""The classical estimator :math:`\mathrm{tr}(K_a K_b) / (m - 1)^2` of HSIC, biased.

    Arguments and errors as for ``nhsic``. Its value shrinks with the kernels' widths, which is why
    the bottleneck trains on the normalised one.

    Source: Gretton, Bousquet, Smola & Schölkopf 2005, definition 2.

    >>> pair = torch.tensor([[0.0], [2.0]])
    >>> hsic(pair, pair, bandwidth=1.0), (1 - torch.tensor(-2.0).exp()) ** 2
    (tensor(0.7476), tensor(0.7476))
    """
    _check(a, b, bandwidth)
    with full_precision(a):
        product = _centred_gram(a, bandwidth) * _centred_gram(b, bandwidth)
    return (product.sum() / (len(a) - 1) ** 2).to(wide(a))


def _ridge_fit(a: Tensor, bandwidth: float) -> Tensor:
    gram = _centred_gram(a, bandwidth)
    ridge = _RIDGE * len(a) * torch.eye(len(a), device=gram.device, dtype=gram.dtype)
    fit: Tensor = torch.linalg.solve(gram + ridge, gram)  # the two commute
    return fit


def _centred_gram(a: Tensor, bandwidth: float) -> Tensor:
    """H K H in float64; the authors' K H gives nHSIC the same value.

    A wide kernel or small outputs make all entries of K nearly 1, and what centring leaves of them is
    divided by ε: float32 then gets only two or three digits of nHSIC right.
    """
    gram = Gaussian(bandwidth * a.shape[1] ** 0.5).gram(double(a))
    return gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()


def _check(a: Tensor, b: Tensor, bandwidth: float) -> None:
    _check_bandwidth(bandwidth)
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"a, b: give two batches of vectors, (m, d) and (m, d') with m > 1, not shapes "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )


def _check_bandwidth(bandwidth: float) -> None:
    if not 0 < bandwidth < float("inf"):
        raise ValueError(f"bandwidth={bandwidth}: give a finite number above 0, such as 5.")
