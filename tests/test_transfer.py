"""Transferability scores against their formulas, written out in NumPy or loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

import modlib
from modlib.data import Dataset
from modlib.reuse.transfer import (
    centred_alignment,
    leep,
    log_evidence,
    negative_conditional_entropy,
    score,
)


def case(seed: int, n: int = 60, d: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.arange(classes), torch.randint(0, classes, (n - classes,), generator=g)]
    )
    return torch.randn(n, d, generator=g) + torch.eye(d)[labels], labels


def evidence(features: np.ndarray, target: np.ndarray, alpha: float, beta: float) -> float:
    """log N(target; 0, I/β + F Fᵀ/α): the marginal likelihood as a density, not by its determinant lemma."""
    n = len(target)
    covariance = np.eye(n) / beta + features @ features.T / alpha
    sign, log_determinant = np.linalg.slogdet(covariance)
    assert sign > 0
    fit = target @ np.linalg.solve(covariance, target)
    return float(-0.5 * (n * math.log(2 * math.pi) + log_determinant + fit))


@pytest.mark.parametrize("seed", range(4))
def test_log_evidence_is_the_best_marginal_likelihood(seed: int) -> None:
    features, labels = case(seed)
    values = []
    for c in range(3):
        target = (labels == c).double().numpy()
        rows = features.double().numpy()

        def loss(logs: np.ndarray, rows: np.ndarray = rows, target: np.ndarray = target) -> float:
            return -evidence(rows, target, *np.exp(logs))

        best = optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", tol=1e-10)
        values.append(-best.fun / len(target))
    assert math.isclose(log_evidence(features, labels), float(np.mean(values)), rel_tol=1e-5)


def test_log_evidence_with_more_features_than_examples() -> None:
    features, labels = case(0, n=10, d=20)
    assert math.isfinite(log_evidence(features, labels))


def test_labels_that_few_features_reproduce_have_infinite_evidence() -> None:
    """With the noise 1/beta of a fit in fewer than n directions going to 0 the density grows for ever."""
    labels = torch.arange(60) % 3
    points = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))[labels]
    target, rows = (labels == 0).double().numpy(), points.double().numpy()
    growing = [evidence(rows, target, 1.0, beta) for beta in (1e2, 1e4, 1e6)]
    assert growing[0] + 60 < growing[1] < growing[2] - 60
    assert log_evidence(points, labels) == math.inf
    noise = 1e-3 * torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    assert math.isfinite(log_evidence(points + noise, labels))


def test_leep_and_nce_are_their_formulas() -> None:
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(50, 4, generator=g).softmax(1)
    labels = torch.randint(0, 3, (50,), generator=g)
    joint = np.zeros((3, 4))
    for y, row in zip(labels.tolist(), theta.numpy(), strict=True):
        joint[y] += row / 50
    given = joint / joint.sum(0)
    expected = np.mean(
        [math.log(given[y] @ row) for y, row in zip(labels.tolist(), theta.numpy(), strict=True)]
    )
    assert math.isclose(leep(theta, labels), expected, rel_tol=1e-5)

    answers = theta.argmax(1)
    total = 0.0
    for z in range(4):
        for y in range(3):
            both = float(((answers == z) & (labels == y)).sum()) / 50
            alone = float((answers == z).sum()) / 50
            total += both * math.log(both / alone) if both else 0.0
    assert math.isclose(negative_conditional_entropy(answers, labels), total, rel_tol=1e-9)


def test_the_evidence_does_not_depend_on_the_names_of_classes() -> None:
    features, labels = case(3)
    assert math.isclose(log_evidence(features, 2 * labels), log_evidence(features, labels))


def test_a_dead_module_has_less_evidence_than_noise() -> None:
    features, labels = case(4)
    dead = log_evidence(torch.zeros(60, 5), labels)
    assert math.isfinite(dead) and dead < log_evidence(features, labels)


def test_a_perfect_source_has_the_best_scores() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    renamed = (labels + 1) % 3
    assert leep(torch.eye(3)[renamed], labels) == 0.0
    assert negative_conditional_entropy(renamed, labels) == 0.0
    assert negative_conditional_entropy(torch.zeros(4, dtype=torch.long), labels) < -1


def test_the_score_is_minus_the_objective(digits: Dataset) -> None:
    net = modlib.partition(modlib.networks.mlp([64, 16, 10], kernel="relu", seed=0), ["features"])
    objective = modlib.objectives.SupCon(kernel="relu")
    outputs, labels = modlib.extract(net[:-1], digits, "train", n=100)
    assert score(net[:-1], digits, objective, n=100) == -float(objective(outputs, labels))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_centred_alignment_needs_no_pairs(classes: int) -> None:
    h, labels = case(classes, d=classes + 2, classes=classes)
    objective = modlib.objectives.CentredAlignment("relu")
    features = modlib.kernels.get("relu").features(h.double())
    expected = -float(objective(h.double(), labels))
    assert math.isclose(centred_alignment(features, labels), expected, rel_tol=1e-9)
    assert centred_alignment(torch.ones(60, 4) / 3, labels) == 0.0


def test_the_default_score_is_the_centred_alignment(digits: Dataset) -> None:
    net = modlib.networks.cnn((4, 8), channels=1, size=8, stride=1, seed=0)
    net = modlib.partition(net, ["features"])
    objective = modlib.objectives.CentredAlignment("relu-pool")
    expected = score(net[:-1], digits, objective, n=200)
    assert math.isclose(score(net[:-1], digits, n=200), expected, rel_tol=1e-5)


def test_extract_leaves_the_module_as_it_was_and_is_in_order(digits: Dataset) -> None:
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    features, labels = modlib.extract(module, digits, "test", batch_size=7)
    assert labels.tolist() == digits.test_labels.tolist() and len(features) == len(labels)
    assert module.training and all(
        torch.equal(before[k], v) for k, v in module.state_dict().items()
    )
    again, _ = modlib.extract(module, digits, "test")
    assert torch.allclose(features, again, atol=1e-6)


def test_bad_input_is_refused(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="rows must be nonnegative and sum to 1"):
        leep(torch.ones(3, 2), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="probabilities: give at least two rows"):
        leep(torch.ones(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match="features: give at least two rows"):
        log_evidence(torch.ones(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match="all are of one class"):
        centred_alignment(torch.eye(3), torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="one label for each of the 3"):
        leep(torch.eye(2)[[0, 1, 1]], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="give 1 to that many"):
        modlib.extract(nn.Identity(), digits, n=10_000)
    with pytest.raises(ValueError, match="features: they hold NaN"):
        log_evidence(torch.full((3, 2), math.nan), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="give 'train' or 'test'"):
        score(nn.Identity(), digits, split="val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels are int64"):
        centred_alignment(torch.eye(3), torch.tensor([0.0, 1.0, 1.0]))
