r"""Cross-entropy, the task's own objective, and the check of labels that all objectives share.

.. math:: L = -\log \frac{\exp h_y}{\sum_c \exp h_c}
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modlib.objectives.objective import Objective


class CrossEntropy(Objective):
    """Softmax cross-entropy (nats) of logits h (N, C) and labels y (N,): E2EBP's objective.

    Args:
        smoothing: share of the target that goes to all classes alike (label smoothing; Szegedy et al. 2016,
            arXiv 1512.00567, section 7).

    Raises:
        ValueError: the labels do not fit the logits.

    >>> import torch
    >>> round(CrossEntropy()(torch.zeros(3, 4), torch.tensor([0, 1, 3])).exp().item(), 4)
    4.0
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = checked_share("smoothing", smoothing)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(h, y, self.smoothing)

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}" if self.smoothing else ""


def cross_entropy(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy (nats) of logits (N, classes) and labels (N,), after checking that they fit.

    Raises:
        ValueError: they do not.
    """
    if logits.dim() != 2:
        raise ValueError(
            f"logits must be (N, classes), but have shape {tuple(logits.shape)}; flatten or pool a "
            "module's output before a linear layer."
        )
    check_labels(y, *logits.shape)
    return F.cross_entropy(logits, y, label_smoothing=smoothing)


def checked_share(name: str, share: float) -> float:
    """A number that must lie in [0, 1).

    Raises:
        ValueError: it does not.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"{name}={share}: give a share from 0 to below 1.")
    return share


def check_labels(y: Tensor, n: int, classes: int | None = None) -> None:
    """Refuse labels that are not int64 (n,), n > 0, or not below ``classes``, where that is known.

    On a GPU the values are not looked at: that would wait for it in every step.

    Raises:
        ValueError: they do not fit.

    >>> import torch
    >>> check_labels(torch.tensor([0, 3]), n=2, classes=3)
    Traceback (most recent call last):
    ValueError: y holds labels from 0 to 3, but there are 3 classes, which are counted from 0.
    """
    if y.dim() != 1 or len(y) != n or not n:
        raise ValueError(
            f"y must hold one label for each of the {n} outputs (at least one), but has shape "
            f"{tuple(y.shape)}."
        )
    if y.dtype != torch.int64:
        raise ValueError(f"y holds {y.dtype}; labels are int64, as labels.long() gives.")
    if classes is None or y.device.type != "cpu":
        return
    if not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(
            f"y holds labels from {int(y.min())} to {int(y.max())}, but there are {classes} classes, "
            "which are counted from 0."
        )
