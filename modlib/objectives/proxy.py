r"""Proxy objectives: train a hidden module without ever running what comes after it.

With the Gram matrix :math:`G_{ij} = k(h_i, h_j)` of a module's outputs on a batch, the ideal matrix
:math:`K^*_{ij} = k_{\max}` if :math:`y_i = y_j` else :math:`k_{\min}`, and the sets S and D of
ordered pairs :math:`i \ne j` of the same and of different classes:

============================  =====================================================================
``Raw``                       :math:`-(\sum_S G - \sum_D G) / (B^2 - B)`
``NMSE``                      :math:`+\,\mathrm{mean}\,(G - K^*)^2`, the diagonal included
``Alignment``                 :math:`-\cos(G, K^*)`, the diagonal included
``UpperTriangleAlignment``    :math:`-\cos` of the entries above the diagonal
``Contrastive``               :math:`-\sum_S e^G / \sum_{S \cup D} e^G`
``LogContrastive``            its logarithm, negated
``CentredAlignment``          :math:`-\cos(HGH, HK^*H)`, :math:`H = I - \mathbf{1}\mathbf{1}^\top/B`
``SupCon``                    :math:`-` mean over anchors of the mean log-softmax of their positives
============================  =====================================================================

``negatives_only`` keeps the pairs in D alone. ``balanced`` gives S and D equal weight (with ten
classes nine pairs in ten are in D, and S hardly counts). Labels are used as same/different pairs
only; in place of labels (B,) each takes those pairs themselves, a boolean matrix (B, B).

Sources: Duan, Yu & Principe 2022 (arXiv 2005.05541), section IV; their released training objectives
are maximised, ours are minimised. Centred alignment: Cortes, Mohri & Rostamizadeh 2012. SupCon:
Khosla et al. 2020 (arXiv 2004.11362), equation 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from modlib import kernels
from modlib.device import full_precision
from modlib.kernels import Kernel
from modlib.objectives.cross_entropy import check_labels
from modlib.objectives.objective import Objective


class ProxyLoss(Objective):
    """What the objectives on pairs share: a kernel, and which pairs count how much.

    Args:
        kernel: "relu", "tanh", "sigmoid", "relu-pool", "cosine", or a ``kernels.Gaussian``.
        negatives_only: use pairs of different classes alone.
        balanced: weigh same-class and different-class pairs equally; the diagonal is then left out, so
            balanced alignment fixes no scale.

    Raises:
        ValueError: the kernel is unknown, or both options are chosen; (when called) the labels do not fit, or the
            batch has no pairs of a kind that is needed.

    >>> class Mean(ProxyLoss):    # an objective on pairs of your own
    ...     def loss(self, gram, same):
    ...         return (self.weights(gram, same) * (gram - self.target(gram, same))).mean()
    >>> h = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> Mean()(h, torch.tensor([0, 0, 1]))    # as the ideal matrix
    tensor(0.)
    """

    diagonal = False  # does the paper's formula count the pairs i = j?

    def __init__(
        self, kernel: str | Kernel = "relu", negatives_only: bool = False, balanced: bool = False
    ) -> None:
        super().__init__()
        if negatives_only and balanced:
            raise ValueError(
                "balanced=True weighs two kinds of pairs, but negatives_only=True leaves one; "
                "choose one of the two."
            )
        self.kernel = kernels.get(kernel)
        self.negatives_only = negatives_only
        self.balanced = balanced

    def for_module(self, shape: Sequence[int], classes: int) -> Self:
        self.kernel.gram(torch.zeros(2, *shape))  # a kernel that cannot take this shape says so now
        return super().for_module(shape, classes)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        same = _same(h, y, self._positives)
        with full_precision(h):  # values near 1 need all their digits
            return self.loss(self.kernel.gram(h), same)

    @property
    def pairs(self) -> bool:
        return True

    @property
    def _positives(self) -> bool:
        """Is a pair of different images of the same class needed?"""
        return not (self.negatives_only or self.diagonal) or self.balanced

    def accepts(self, y: Tensor) -> bool:
        return not _lacks(y[:, None] == y[None, :], self._positives)

    def loss(self, gram: Tensor, same: Tensor) -> Tensor:
        """The objective from a Gram matrix (B, B) and the mask (B, B) of equal labels."""
        raise NotImplementedError

    def weights(self, gram: Tensor, same: Tensor) -> Tensor:
        """The weight (B, B) of every ordered pair, in the Gram matrix's precision."""
        eye = torch.eye(len(same), dtype=torch.bool, device=same.device)
        if self.negatives_only:
            return (~same).to(gram)
        if not self.balanced:
            return (torch.ones_like(same) if self.diagonal else ~eye).to(gram)
        positives, negatives = (same & ~eye).to(gram), (~same).to(gram)
        return positives / positives.sum() + negatives / negatives.sum()

    def target(self, gram: Tensor, same: Tensor) -> Tensor:
        """The ideal Gram matrix (B, B), in the Gram matrix's precision."""
        return torch.where(same, self.kernel.ceiling, self.kernel.floor).to(gram)

    def extra_repr(self) -> str:
        options = [repr(self.kernel.name)]
        options += ["negatives_only=True"] * self.negatives_only + ["balanced=True"] * self.balanced
        return ", ".join(options)


class Raw(ProxyLoss):
    """Mean similarity of different-class pairs minus that of same-class pairs.

    >>> import torch
    >>> h = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> Raw()(h, torch.tensor([0, 0, 1]))    # the one pair of class 0, both orders, among 6 pairs
    tensor(-0.3333)
    """

    def loss(self, gram: Tensor, same: Tensor) -> Tensor:
        weights = self.weights(gram, same)
        signs = torch.where(same, -1.0, 1.0)
        return (weights * signs * gram).sum() / weights.sum()


class NMSE(ProxyLoss):
    """Mean squared distance from the ideal Gram matrix.

    >>> import torch
    >>> NMSE()(torch.ones(2, 3), torch.tensor([0, 1]))    # two of four entries are off by one
    tensor(0.5000)
    """

    diagonal = True

    def loss(self, gram: Tensor, same: Tensor) -> Tensor:
        weights = self.weights(gram, same)
        return (weights * (gram - self.target(gram, same)).square()).sum() / weights.sum()


class Alignment(ProxyLoss):
    """Negative cosine of the Gram matrix and the ideal one (kernel-target alignment).

    Raises:
        ValueError: ``negatives_only`` with a kernel of floor 0, whose ideal matrix is then all
            zeros and has no direction.

    >>> import torch
    >>> Alignment()(torch.eye(3), torch.tensor([0, 1, 2]))
    tensor(-1.)
    """

    diagonal = True

    def __init__(
        self, kernel: str | Kernel = "relu", negatives_only: bool = False, balanced: bool = False
    ) -> None:
        super().__init__(kernel, negatives_only, balanced)
        if negatives_only and self.kernel.floor == 0:
            raise ValueError(
                f"{type(self).__name__}(negatives_only=True) is undefined for kernel "
                f"{self.kernel.name!r}: its ideal entries are all 0 and have no direction; use "
                "kernel='tanh', or another objective."
            )

    def loss(self, gram: Tensor, same: Tensor) -> Tensor:
        return -_cosine(gram, self.target(gram, same), self.weights(gram, same))


class UpperTriangleAlignment(Alignment):
    """Alignment of the entries above the diagonal (UTAL), the default of its authors.

    >>> import torch
    >>> h = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    >>> bool(UpperTriangleAlignment()(h, torch.tensor([0, 0, 1])) < -0.9)
    True
    """

    diagonal = False  # G is symmetric: all entries off the diagonal have the same cosine


class Contrastive(ProxyLoss):
    """Negative share of the same-class pairs in the sum of exponentiated similarities.

    >>> import torch
    >>> Contrastive()(torch.ones(3, 2), torch.tensor([0, 0, 1]))    # 2 of 6 equal pairs
    tensor(-0.3333)
    """

    def loss(self, gram: Tensor, same: Tensor) -> Tensor:
        weights = self.weights(gram, same) * gram.exp()
        if self.negatives_only:
            return weights.sum() / (~same).sum()
        return -(weights * same).sum() / weights.sum()


class LogContrastive(ProxyLoss):
    """Logarithm of ``Contrastive``: the gradient does not fade while the share is small.

    >>> import torch
    >>> round(LogContrastive()(torch.ones(3, 2), torch.tensor([0, 0, 1])).exp().item(), 4)
    3.0
    """

    def loss(self, gram: Tensor, same: Tensor) -> Tensor:
        logs = (
            gram + self.weights(gram, same).log()
        )  # log of the weighted terms; log 0 = -inf drops out
        if self.negatives_only:
            return _logsumexp(logs) - (~same).sum().to(gram).log()
        return _logsumexp(logs) - _logsumexp(logs.masked_fill(~same, -torch.inf))


class CentredAlignment(ProxyLoss):
    """Alignment of the centred Gram matrices: insensitive to what all outputs share.

    >>> import torch
    >>> CentredAlignment()(torch.eye(3), torch.tensor([0, 1, 2]))
    tensor(-1.)
    """

    diagonal = True

    def __init__(self, kernel: str | Kernel = "relu") -> None:
        super().__init__(kernel)

    def loss(self, gram: Tensor, same: Tensor) -> Tensor:
        target = _centred(self.target(gram, same))
        return -_cosine(_centred(gram), target, torch.ones_like(gram))


class SupCon(ProxyLoss):
    r"""Supervised contrastive loss: each anchor must pick its positives out of the batch.

    .. math:: \frac1B \sum_i \frac{-1}{|P(i)|} \sum_{p \in P(i)}
              \log \frac{\exp(G_{ip}/\tau)}{\sum_{a \ne i} \exp(G_{ia}/\tau)}

    An anchor without positives counts as 0 in the mean.

    Args:
        temperature: τ > 0.
        kernel: "cosine" takes inner products of normalised outputs, as in the paper.

    Raises:
        ValueError: the temperature is not above 0; and what ``ProxyLoss`` raises.

    >>> import torch
    >>> SupCon(temperature=1.0)(torch.eye(3), torch.tensor([0, 0, 1]))    # 2 of 3 anchors: log 2
    tensor(0.4621)
    """

    def __init__(self, temperature: float = 0.07, kernel: str | Kernel = "cosine") -> None:
        super().__init__(kernel)
        if isinstance(temperature, str) or not temperature > 0:
            raise ValueError(f"temperature={temperature!r}: give a number above 0, such as 0.07.")
        self.temperature = temperature

    def loss(self, gram: Tensor, same: Tensor) -> Tensor:
        eye = torch.eye(len(same), dtype=torch.bool, device=same.device)
        positives = same & ~eye
        logits = gram / self.temperature
        log_share = logits - logits.masked_fill(eye, -torch.inf).logsumexp(1, keepdim=True)
        counts = positives.sum(1)
        per_anchor = (log_share * positives).sum(1) / counts.clamp_min(1)
        return -per_anchor.mean()

    def extra_repr(self) -> str:
        return f"{self.kernel.name!r}, temperature={self.temperature}"


# --- pairs ----------------------------------------------------------------------------------------


def _same(h: Tensor, y: Tensor, positives: bool) -> Tensor:
    """Mask (B, B) of equal labels, after checking that the batch has the pairs that are needed."""
    same = y if _is_mask(y, len(h)) else _equal_labels(y, len(h))
    if lack := _lacks(same, positives):
        raise ValueError(lack)
    return same


def _lacks(same: Tensor, positives: bool) -> str:
    """What is missing in a batch with these equal labels (B, B), in a sentence; "" if nothing is."""
    n, equal = len(same), int(same.sum())
    if equal == n * n:
        return (
            f"y: all {n} labels of the batch are of one class, so it has no different-class "
            "pair; use larger or shuffled batches."
        )
    if positives and equal == n:
        return (
            f"y: the {n} labels of the batch are all different, so it has no same-class pair; "
            "use larger batches."
        )
    return ""


def _is_mask(y: Tensor, n: int) -> bool:
    """Does y hold the answers for pairs in place of labels?"""
    return y.dtype == torch.bool and y.shape == (n, n)


def _equal_labels(y: Tensor, n: int) -> Tensor:
    if y.dim() != 1 or len(y) != n:
        raise ValueError(
            f"y must hold one label for each of the {n} outputs, or a boolean matrix ({n}, {n}) of "
            f"the pairs of the same class, but is {str(y.dtype)[6:]} of shape {tuple(y.shape)}."
        )
    check_labels(y, n)  # float32 numbers are all different: each would be a class of its own
    return y[:, None] == y[None, :]


def _cosine(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    inner = (weights * a * b).sum()
    norms = (weights * a * a).sum() * (weights * b * b).sum()
    return inner / norms.clamp_min(1e-24).sqrt()


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()


def _logsumexp(logs: Tensor) -> Tensor:
    return logs.flatten().logsumexp(0)
