r"""Similarity matching: outputs should be as similar to each other as their labels are.

.. math:: L_\mathrm{sim} = \frac1{B^2} \lVert S(a(h)) - S(\mathrm{onehot}(y)) \rVert_F^2,
          \qquad S(x) = \bar X \bar X^\top

a is a linear map or convolution that is trained with the module, or nothing. A row of
:math:`\bar X` is one image's features, their own mean subtracted, divided by their norm. For maps
the features are the C standard deviations over space. S is thus a matrix of correlations, and two
classes of C should correlate by :math:`-1/(C - 1)`. "predsim" adds a classifier:

.. math:: L = (1 - \beta)\, L_\mathrm{pred} + \beta\, L_\mathrm{sim}, \qquad \beta = 0.99

Its two halves are ``AuxiliaryClassifier("pred")`` and ``SimilarityMatching(projection="learned")``.

Source: Nøkland & Eidnes 2019 (arXiv 1901.06656), with the normalisations of their experiments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modlib.device import full_precision
from modlib.kernels import wide
from modlib.objectives.auxiliary import AuxiliaryClassifier
from modlib.objectives.cross_entropy import check_labels
from modlib.objectives.objective import Objective, Term
from modlib.tokens import pooled, pooled_shape

_EPSILON = 1e-8  # added to a norm, so that constant features are similar to nothing


class SimilarityMatching(Objective):
    """Mean squared difference (over B × B) of the outputs' similarities and the labels'.

    Args:
        classes: of the task, at least 2; None takes what ``for_module`` is told.
        projection: "learned" compares projected outputs, as published: a 3×3 convolution C → C for maps,
            a linear layer for vectors and the mean of tokens, both without bias, made by
            ``for_module``. None compares h itself.

    Raises:
        ValueError: ``classes`` is not known when it is called, ``for_module`` has not been called for a
            projection, or the labels do not fit.

    >>> import torch
    >>> h = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]])    # of two classes
    >>> SimilarityMatching(classes=2)(h, torch.tensor([0, 0, 1]))
    tensor(0.)
    """

    def __init__(self, classes: int | None = None, projection: str | None = None) -> None:
        super().__init__()
        if classes is not None and classes < 2:
            raise ValueError(f"classes={classes}: labels can only be compared among 2 or more.")
        if projection not in (None, "learned"):
            raise ValueError(f"projection={projection!r}: choose 'learned' or None.")
        self.classes, self.projection = classes, projection
        self.network: nn.Module | None = None

    def for_module(self, shape: Sequence[int], classes: int) -> Self:
        ready = super().for_module(shape, classes)
        ready.classes = classes if self.classes is None else self.classes
        if self.projection == "learned":
            ready.network = _projection(pooled_shape(shape))
        return ready

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        if self.classes is None:
            raise ValueError(
                "This SimilarityMatching does not know the number of classes; give it, as in "
                "SimilarityMatching(classes=10), or call .for_module(shape, classes)."
            )
        check_labels(y, len(h), self.classes)
        projected = self._projected(h)
        with full_precision(h):  # values near 1 need all their digits
            ours = similarity(projected)
            target = similarity(F.one_hot(y, self.classes).to(ours))
            return (ours - target).square().mean()

    def _projected(self, h: Tensor) -> Tensor:
        if self.projection is None:
            return h
        if self.network is None:
            raise ValueError(
                "This SimilarityMatching has no projection yet; call .for_module(shape, classes) with "
                "the shape of the module's output."
            )
        return cast(Tensor, self.network(pooled(h)))

    def extra_repr(self) -> str:
        return f"classes={self.classes}, projection={self.projection!r}"


class PredSim(Objective):
    """``(1 - beta)`` times a local classifier's cross-entropy plus ``beta`` times similarity matching.

    ``for_module`` makes the classifier ("pred" of ``AuxiliaryClassifier``) and the learned projection.

    Args:
        classes: of the task; None takes what ``for_module`` is told.
        beta: weight of the similarities, in [0, 1].
        smoothing: of the labels that the classifier is told, as in ``CrossEntropy``.

    Raises:
        ValueError: ``beta`` is no such weight; ``for_module`` has not been called.

    >>> import torch
    >>> objective = PredSim().for_module((8, 16, 16), classes=10)
    >>> objective(torch.randn(4, 8, 16, 16), torch.arange(4)).shape
    torch.Size([])
    """

    def __init__(
        self, classes: int | None = None, beta: float = 0.99, smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta}: give a weight from 0 (pred alone) to 1 (sim alone).")
        self.beta = beta
        self.pred = AuxiliaryClassifier("pred", smoothing=smoothing)
        self.sim = SimilarityMatching(classes, projection="learned")

    def for_module(self, shape: Sequence[int], classes: int) -> Self:
        ready = super().for_module(shape, classes)
        ready.pred = self.pred.for_module(shape, classes)
        ready.sim = self.sim.for_module(shape, classes)
        return ready

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        classified, compared = (term(h, y, h) for term in self.terms())
        return classified + compared

    def terms(self) -> Sequence[Term]:
        return (
            lambda h, y, x: (1 - self.beta) * self.pred(h, y),
            lambda h, y, x: self.beta * self.sim(h, y),
        )

    def logits(self, h: Tensor) -> Tensor:
        """The local classifier's logits (N, classes) for a module's output h."""
        return self.pred.logits(h)

    def extra_repr(self) -> str:
        return f"beta={self.beta}"


def similarity(x: Tensor) -> Tensor:
    """Correlations (N, N) between the features of x, (N, d) or (N, C, H, W), each clamped to [-1, 1].

    Maps with more than 3 channels and more than one row are reduced to the standard deviations
    (N, C) of their channels over space, unbiased; tokens (N, T, d) to their mean; all else is
    flattened.

    >>> similarity(torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 4.0]]))
    tensor([[ 1.0000,  1.0000, -1.0000],
            [ 1.0000,  1.0000, -1.0000],
            [-1.0000, -1.0000,  1.0000]])
    """
    x = pooled(wide(x))
    maps = x.dim() == 4 and x.shape[1] > 3 and x.shape[2] > 1
    x = x.std((2, 3)) if maps else x.flatten(1)
    x = x - x.mean(1, keepdim=True)  # over an image's features, not over the batch
    x = x / (_EPSILON + torch.linalg.vector_norm(x, dim=1, keepdim=True))
    return (x @ x.T).clamp(-1, 1)


def _projection(shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 3:
        return nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)
    if len(shape) == 1:
        return nn.Linear(shape[0], shape[0], bias=False)
    raise ValueError(
        f"projection='learned' needs outputs (d,), (C, H, W) or tokens (T, d), but the module's "
        f"output has shape {shape}; use projection=None."
    )
