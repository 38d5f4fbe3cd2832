r"""A head from a few labels: one example a class, and a bound on how often that errs.

With unit features :math:`\varphi(x)`, kernel :math:`k`, and one *anchor* :math:`a_c` a class (an example's
features, or the direction of the mean of several), the nearest-anchor head answers
:math:`\arg\max_c \langle a_c, \varphi(x) \rangle`. With :math:`\delta_c = \max_{c' \ne c} \langle a_c,
a_{c'} \rangle`,

.. math:: \Pr(\text{error}) \le \Pr\Bigl(\langle a_{y}, \varphi(x) \rangle \le
          \sqrt{(1 + \delta_{y})/2}\Bigr) \le \sum_c p_c \min\Bigl(1,
          \frac{1 - m_c}{1 - \sqrt{(1 + \delta_c)/2}}\Bigr)

where :math:`p_c` is the share of class c and :math:`m_c` the mean of :math:`\langle a_c, \varphi(x)
\rangle` over it: entries of a Gram matrix, nothing else. When the classes have collapsed,
:math:`m_c = 1`, and one label a class is enough.

Source: this book, on few labels (theorem and proof). The claim that ten labels suffice: Duan, Yu &
Principe 2022 (arXiv 2005.05541).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from modlib.certificates import best_head
from modlib.certificates.head import count_classes
from modlib.kernels import double
from modlib.objectives.cross_entropy import check_labels
from modlib.reuse.extract import check_features

__all__ = [
    "AnchorBound",
    "anchor_bound",
    "anchors",
    "draw",
    "label_efficiency",
    "logistic_head",
    "nearest_anchor",
    "one_label_bound",
]

Features = tuple[Tensor, Tensor]  # unit feature vectors (n, D) and labels (n,)

_SLACK = 1e-6  # inner products of float32 features are off by so much: one on the edge still counts
_TIE = 1e-12  # and the same sum in another order, in float64, by less: a tie is a tie on every processor


@dataclass(frozen=True)
class AnchorBound:
    """The error of a nearest-anchor head, and what the Gram matrix says about it beforehand.

    Attributes:
        error: the share of examples whose nearest anchor is not their class's alone (ties err).
        counted: the first bound: the share of examples too far from their own anchor.
        markov: the second bound, from the mean similarities alone.
        nearest: δ_c, each anchor's similarity to the nearest other one (C,).

    >>> import torch
    >>> found = anchor_bound(torch.eye(3), torch.eye(3), torch.arange(3))    # collapsed, orthogonal classes
    >>> found.error, found.counted, found.nearest.tolist()
    (0.0, 0.0, [0.0, 0.0, 0.0])
    """

    error: float
    counted: float
    markov: float
    nearest: Tensor = field(repr=False)


def anchor_bound(anchors: Tensor, features: Tensor, labels: Tensor) -> AnchorBound:
    """The bounds of this file for given anchors, and the error that they bound.

    Args:
        anchors: (C, D) of norm at most 1, one a class.
        features: (n, D) of norm at most 1.
        labels: (n,) in 0..C-1.

    Raises:
        ValueError: shapes do not agree, or a norm is above 1 or not finite.

    >>> import torch
    >>> anchors = torch.eye(2)
    >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    >>> found = anchor_bound(anchors, features, torch.tensor([0, 0, 0, 1]))
    >>> found.error, found.counted    # only the third is nearer to the other anchor
    (0.25, 0.25)
    """
    _check_unit(anchors, features, labels)
    anchors, features = double(anchors), double(features)
    labels = labels.to(features.device)
    among = (anchors @ anchors.T).fill_diagonal_(-1.0)
    nearest = among.max(1).values
    threshold = ((1 + nearest) / 2).clamp(0, 1).sqrt()
    scores = features @ anchors.T
    own = scores.gather(1, labels[:, None]).squeeze(1)
    others = scores.scatter(1, labels[:, None], -torch.inf).max(1).values
    shares = double(torch.bincount(labels, minlength=len(anchors))) / len(labels)
    means = torch.zeros_like(shares).index_add_(0, labels, own) / (shares * len(labels)).clamp_min(
        1
    )
    room = 1 - threshold  # none where two anchors coincide: then nothing is known
    markov = torch.where(room > _SLACK, ((1 - means + _SLACK) / room).clamp(0, 1), 1.0)
    return AnchorBound(
        _share(others >= own - _TIE),
        _share(own <= threshold[labels] + _SLACK),
        float((shares * markov).sum()),
        nearest,
    )


def draw(labels: Tensor, per_class: int, seed: int = 0) -> Tensor:
    """Positions (C · per_class,) of examples drawn at random, the same number from every class.

    Raises:
        ValueError: a class has fewer examples, or the labels are no int64 (n,).

    >>> import torch
    >>> labels = torch.tensor([0, 1, 0, 1, 1])
    >>> labels[draw(labels, 2)].tolist()
    [0, 0, 1, 1]
    """
    check_labels(labels, labels.numel(), int(labels.max()) + 1 if labels.numel() else 0)
    counts = torch.bincount(labels)
    if not 1 <= per_class <= int(counts.min()):
        raise ValueError(
            f"per_class={per_class}: the smallest class has {int(counts.min())} examples; give a "
            "number from 1 to that."
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels.cpu()[order].argsort(stable=True)]
    starts = counts.cumsum(0) - counts
    chosen = torch.cat([order[start : start + per_class] for start in starts.tolist()])
    return chosen.to(labels.device)


def anchors(features: Tensor, labels: Tensor) -> Tensor:
    """The direction of each class's mean: unit vectors (C, D) from features (n, D), labels (n,).

    Raises:
        ValueError: shapes do not agree, features are not finite, or a class has no example.

    >>> import torch
    >>> anchors(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1, 1]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    classes = _classes(features, labels)
    sums = features.new_zeros(classes, features.shape[1])
    return F.normalize(sums.index_add_(0, labels, features), dim=1)


def one_label_bound(train: Features, test: Features) -> float:
    r"""A bound on the mean error of a head from ONE label a class, over random draws of the examples.

    For every class c and every :math:`\delta`, over an independent draw of one anchor a class,

    .. math:: \Pr(\text{error} \mid c) \le \Pr\Bigl(\langle a_c, \varphi(x) \rangle \le
              \sqrt{(1 + \delta)/2}\Bigr) + \sum_{c' \ne c} \Pr(\langle a_c, a_{c'} \rangle > \delta) ,

    and the best :math:`\delta` is taken for each class. All probabilities are counts of entries of the
    Gram matrix of ``train`` and ``test``.

    Args:
        train: unit features (n, D) and labels (n,) that anchors are drawn from.
        test: features (m, D) of norm at most 1 and labels (m,) that the head is used on.

    Raises:
        ValueError: shapes do not agree, a norm is above 1, or ``train`` lacks a class.

    >>> import torch
    >>> collapsed = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 2])
    >>> one_label_bound(collapsed, collapsed)
    0.0
    """
    classes = _classes(*train)
    for features, labels in (train, test):
        _check_unit(features.new_zeros(classes, features.shape[1]), features, labels)
    shares = double(torch.bincount(test[1], minlength=classes)) / len(test[1])
    groups = [double(train[0][train[1] == c]) for c in range(classes)]
    total = 0.0
    for c in range(classes):
        own = (double(test[0][test[1] == c]) @ groups[c].T).flatten().sort().values
        others = [
            (groups[c] @ other.T).flatten().sort().values
            for d, other in enumerate(groups)
            if d != c
        ]
        total += float(shares[c]) * _best_threshold(own, others)
    return total


def _best_threshold(own: Tensor, others: Sequence[Tensor]) -> float:
    """The least over δ of: own similarities at most √((1 + δ)/2), plus others above δ (shares)."""
    if not len(own):
        return 0.0
    delta = torch.linspace(-1.0, 1.0, 401, dtype=torch.float64, device=own.device)
    threshold = ((1 + delta) / 2).sqrt()
    below = torch.searchsorted(own, threshold + _SLACK, right=True) / len(own)
    above = sum(1 - torch.searchsorted(o, delta - _SLACK, right=True) / len(o) for o in others)
    return float((below + above).min().clamp(max=1.0))


def label_efficiency(
    train: Features, test: Features, per_class: int, draws: int = 10, head: str = "anchors"
) -> list[float]:
    """Test accuracies of heads trained on few labels, one for each random draw of the labels.

    Args:
        train: features (n, D) and labels (n,) of what may be labelled.
        test: features (m, D) and labels (m,).
        per_class: labels a class.
        draws: how many times labels are drawn, with seeds 0, 1, ...
        head: "anchors", the nearest direction of a class's mean; or "logistic", the linear head of
            least cross-entropy + 0.001 · ‖W‖².

    Raises:
        ValueError: the head is unknown, a class has too few examples, or features and labels do not
            fit.

    >>> import modlib
    >>> data = modlib.data.load("digits")
    >>> train, test = (modlib.extract(torch.nn.Identity(), data, s, kernel="relu") for s in ("train", "test"))
    >>> few, many = (label_efficiency(train, test, n, draws=5) for n in (1, 50))
    >>> len(few), sum(few) < sum(many)
    (5, True)
    """
    if head not in _HEADS:
        raise ValueError(f"head={head!r} is unknown; choose from {', '.join(_HEADS)}.")
    _classes(*train)
    accuracies = []
    for seed in range(draws):
        chosen = draw(train[1], per_class, seed)
        accuracies.append(_HEADS[head]((train[0][chosen], train[1][chosen]), test))
    return accuracies


def nearest_anchor(train: Features, test: Features) -> float:
    """Accuracy on test features of the head whose class vectors are the training means' directions.

    Raises:
        ValueError: what ``anchors`` raises; the test features or labels do not fit.

    >>> import torch
    >>> train = torch.eye(2), torch.tensor([0, 1])
    >>> test = torch.tensor([[0.8, 0.6], [0.6, 0.8]]), torch.tensor([0, 0])
    >>> nearest_anchor(train, test)
    0.5
    """
    directions = anchors(*train)
    check_features("features", *test, len(directions))
    return _accuracy(test[0] @ directions.T, test[1])


def logistic_head(train: Features, test: Features, penalty: float = 1e-3) -> float:
    """Accuracy on test features of the linear head of least cross-entropy + penalty · ‖W‖².

    Raises:
        ValueError: as ``nearest_anchor``.

    >>> import torch
    >>> train = torch.eye(2), torch.tensor([0, 1])
    >>> logistic_head(train, (torch.tensor([[0.8, 0.6], [0.6, 0.8]]), torch.tensor([0, 0])))
    0.5
    """
    check_features("features", *test, _classes(*train))
    return _accuracy(logistic_scores(train, test[0], penalty), test[1].cpu())


def logistic_scores(train: Features, features: Tensor, penalty: float = 1e-3) -> Tensor:
    """Logits (m, C), in float64, that this head gives for features (m, D)."""
    head = best_head(*train, penalty=penalty, tolerance=1e-4)
    return features.cpu().double() @ head.weight.T + head.bias


_HEADS = {"anchors": nearest_anchor, "logistic": logistic_head}


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return _share(scores.argmax(1) == labels)


def _share(true: Tensor) -> float:
    return float(double(true).mean())


def _classes(features: Tensor, labels: Tensor) -> int:
    """How many classes there are, after checking that every one of them occurs."""
    classes = int(labels.max()) + 1 if labels.numel() else 0
    check_features("features", features, labels, classes)
    return count_classes(labels, classes)


def _check_unit(anchors: Tensor, features: Tensor, labels: Tensor) -> None:
    if features.dim() != 2 or anchors.dim() != 2 or features.shape[1] != anchors.shape[1]:
        raise ValueError(
            f"anchors, features: their shapes are {tuple(anchors.shape)} and {tuple(features.shape)}; "
            "give (C, D) and (n, D)."
        )
    check_labels(labels, len(features), len(anchors))
    for name, vectors in (("anchors", anchors), ("features", features)):
        if not float(vectors.norm(dim=1).max()) <= 1 + 1e-4:  # NaN is not below anything
            raise ValueError(
                f"{name}: a norm is above 1 or not finite; take unit vectors, as extract(kernel=...) gives."
            )
