r"""Which trained module will serve a new task best? Scores that need one forward pass, no training.

With a module's features :math:`\varphi(x_i)` of the target task's images and their labels
:math:`y_i`:

- ``score``: minus a proxy objective on the Gram matrix of the features. A module is good for a task
  when it already does what it would be trained to do (Duan, Yu & Principe 2022, arXiv 2005.05541).
- ``centred_alignment``: the score that ``score`` gives by default, without the Gram matrix.
- ``log_evidence`` (LogME): the evidence of a Bayesian linear regression of each one-hot label on the
  features, its two precisions maximised (You et al. 2021, arXiv 2102.11005, algorithm 1).
- ``leep``: :math:`\frac1n \sum_i \log \sum_z P(y_i \mid z)\, \theta(x_i)_z` with the probabilities
  :math:`\theta` that the module's own source head gives (Nguyen et al. 2020, arXiv 2002.12462).
- ``negative_conditional_entropy`` (NCE): :math:`-H(Y \mid Z)`, Z the source head's answer (Tran,
  Nguyen & Hassner 2019, arXiv 1908.08142).

Of all, higher is better. All numbers are in nats, but for ``score``, which is in the objective's
units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modlib.data import Dataset
from modlib.data.loader import Split
from modlib.kernels import double
from modlib.objectives import Objective
from modlib.objectives.cross_entropy import check_labels
from modlib.reuse.extract import check_features, extract

__all__ = [
    "centred_alignment",
    "leep",
    "log_evidence",
    "negative_conditional_entropy",
    "score",
]

_NO_NOISE = 1e-13  # a squared residual, per example, that float32 features do not tell from 0


def score(
    module: nn.Module,
    data: Dataset,
    objective: Objective | None = None,
    *,
    split: Split = "train",
    n: int | None = 2000,
) -> float:
    """How well a trained hidden module will serve a task: minus a proxy objective, by one forward pass.

    Args:
        module: the hidden modules, ``net[:-1]``.
        data: the target task; its class names need not be those the module was trained on.
        objective: on pairs; if None the score is the ``centred_alignment`` of the kernel "relu-pool".
        split: the labels of the training images are what one has.
        n: look at the first n images (an objective forms the n² numbers of their pairs); None for all.

    Raises:
        ValueError: the images have one class only; n is below 1; there is no such split; the features
            are not finite.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10], kernel="relu", seed=0), ["features"])
    >>> task = modlib.data.load("digits", classes=["3", "8"])
    >>> aligned = modlib.objectives.CentredAlignment("relu")
    >>> before = score(net[:-1], task, aligned, n=None)
    >>> method = modlib.methods.ProxyObjective(modlib.objectives.SupCon(kernel="relu"))
    >>> history = modlib.fit(net, method, modlib.data.load("digits"), epochs=3, progress=False)
    >>> score(net[:-1], task, aligned, n=None) > before
    True
    """
    count = None if n is None else min(n, len(data.part(split)[1]))
    if objective is None:
        return centred_alignment(*extract(module, data, split, kernel="relu-pool", n=count))
    outputs, labels = extract(module, data, split, n=count)
    return -float(objective(outputs, labels))


def centred_alignment(features: Tensor, labels: Tensor) -> float:
    r"""Minus the objective ``CentredAlignment``, in time that grows with n and not with n².

    .. math:: A = \frac{\lVert \tilde\Phi^\top \tilde Z \rVert_F^2}
              {\lVert \tilde\Phi^\top \tilde\Phi \rVert_F\, \lVert \tilde Z^\top \tilde Z \rVert_F}

    :math:`\tilde\Phi` are the features and :math:`\tilde Z` the one-hot labels, both centred: their Gram
    matrices are the two that are aligned.

    Args:
        features: (n, D), such as ``modlib.extract`` gives for a kernel.
        labels: (n,).

    Returns:
        In [0, 1]; 0 if all features are equal.

    Raises:
        ValueError: shapes do not agree, or the images have one class only.

    >>> two = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    >>> centred_alignment(two, torch.tensor([0, 0, 1, 1]))
    1.0
    """
    _check("features", features, labels)
    if bool((labels == labels[0]).all()):
        raise ValueError(
            "labels: all are of one class, and one class has no task; give two or more."
        )
    phi, z = double(features), double(F.one_hot(labels))
    phi, z = phi - phi.mean(0), z - z.mean(0)
    spread = (phi.T @ phi).norm()
    if spread <= 1e-12 * len(labels):  # rounding: all features are equal
        return 0.0
    return float((phi.T @ z).square().sum() / (spread * (z.T @ z).norm()))


def log_evidence(features: Tensor, labels: Tensor, steps: int = 100) -> float:
    """LogME: mean over the classes that occur of the log evidence per example of a Bayesian linear regression.

    It is infinite where the evidence has no maximum: features of a rank below n that reproduce a class's
    labels exactly, such as collapsed ones, make them the more probable the less noise is assumed.

    Args:
        features: (n, D).
        labels: (n,).
        steps: at most so many updates of the two precisions; they stop when nothing changes.

    Raises:
        ValueError: shapes do not agree, features are not finite, or there are fewer than two examples.

    >>> labels = torch.arange(100) % 2
    >>> noise = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    >>> log_evidence(noise + labels[:, None], labels) > log_evidence(noise, labels)
    True
    """
    _check("features", features, labels)
    left, singular, _ = torch.linalg.svd(double(features), full_matrices=False)
    spanned = singular > 1e-12 * singular[0]  # directions that features have at all
    left, singular = left[:, spanned], singular[spanned]
    targets = [double(labels == c) for c in sorted(set(labels.tolist()))]  # those that occur
    return sum(_evidence(left, singular, target, steps) for target in targets) / len(targets)


def _evidence(left: Tensor, singular: Tensor, target: Tensor, steps: int) -> float:
    """Maximise over the precisions of the weights (alpha) and of the noise (beta)."""
    n, squares = len(target), singular.square()
    along = (left.T @ target).square()  # of the target, along each singular direction
    rest = (target @ target - along.sum()).clamp_min(0)
    if len(singular) < n and rest <= _NO_NOISE * n:
        return math.inf  # without noise: the evidence grows with beta for ever
    alpha, beta, value = 1.0, 1.0, -math.inf
    for _ in range(steps):
        gain = beta * squares / (alpha + beta * squares)
        weights = float((gain.square() * along / squares.clamp_min(1e-300)).sum())
        residual = float(((1 - gain).square() * along).sum() + rest)
        effective = float(gain.sum())
        new = 0.5 * (
            n * math.log(beta / (2 * math.pi))
            + float((alpha / (alpha + beta * squares)).log().sum())
            - beta * residual
            - alpha * weights
        )
        if abs(new - value) <= 1e-10 * n:
            break
        value = new
        alpha = effective / max(weights, 1e-12)
        beta = (n - effective) / max(residual, 1e-12)
    return value / n


def leep(probabilities: Tensor, labels: Tensor) -> float:
    """Mean log likelihood of labels when source answers are translated one by one.

    Args:
        probabilities: (n, Z) of the source head's classes, for the target's images.
        labels: (n,) of the target task.

    Raises:
        ValueError: shapes do not agree, or rows are no probabilities.

    >>> sure = torch.eye(2)[[0, 0, 1, 1]]
    >>> leep(sure, torch.tensor([1, 1, 0, 0]))
    0.0
    """
    _check("probabilities", probabilities, labels)
    theta = double(probabilities)
    if bool((theta < 0).any()) or float((theta.sum(1) - 1).abs().max()) > 1e-3:
        raise ValueError("probabilities: rows must be nonnegative and sum to 1; take a softmax.")
    targets = double(F.one_hot(labels))
    joint = targets.T @ theta / len(labels)  # P(y, z)
    conditional = joint / joint.sum(0).clamp_min(1e-300)
    likelihood = (theta @ conditional.T).gather(1, labels.to(theta.device)[:, None])
    return float(likelihood.clamp_min(1e-300).log().mean()) + 0.0


def negative_conditional_entropy(answers: Tensor, labels: Tensor) -> float:
    """-H(Y | Z), in nats, of target labels given the source head's answers, both (n,).

    >>> negative_conditional_entropy(torch.tensor([3, 3, 5]), torch.tensor([0, 0, 1]))
    0.0
    """
    check_labels(labels, len(answers), int(labels.max()) + 1)
    joint = double(F.one_hot(labels)).T @ double(F.one_hot(answers)) / len(labels)
    conditional = joint / joint.sum(0).clamp_min(1e-300)
    return float(torch.xlogy(joint, conditional).sum()) + 0.0


def _check(name: str, rows: Tensor, labels: Tensor) -> None:
    if rows.dim() != 2 or len(rows) < 2:
        raise ValueError(
            f"{name}: give at least two rows, as a matrix, not shape {tuple(rows.shape)}."
        )
    check_features(name, rows, labels, int(labels.max()) + 1)
