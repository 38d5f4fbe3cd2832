"""Heads from a few labels: the bound holds, is reached, and is counted as written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modlib.reuse.few_labels import (
    anchor_bound,
    anchors,
    draw,
    label_efficiency,
    logistic_head,
    nearest_anchor,
    one_label_bound,
)


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors, features and labels: from collapsed to shapeless, with and without a floor at 0.

    Anchors may be short, coincide, or stand for classes without an image.
    """
    g = torch.Generator().manual_seed(seed)
    classes, dims, n = (int(torch.randint(2, high, (1,), generator=g)) for high in (6, 8, 40))
    labels = torch.cat([torch.arange(classes), torch.randint(0, classes, (n,), generator=g)])
    centres = torch.randn(classes, dims, generator=g)
    noise = torch.rand(1, generator=g) * 2
    features = centres[labels] + noise * torch.randn(len(labels), dims, generator=g)
    if seed % 2:
        features, centres = features.relu(), centres.relu() + 0.01
    features = F.normalize(features, dim=1) * torch.rand(len(labels), 1, generator=g) ** (seed % 3)
    centres = F.normalize(centres, dim=1)
    if seed % 5 == 0:
        centres = centres * torch.rand(classes, 1, generator=g)
    if seed % 7 == 0:
        centres[0] = centres[1]
    if seed % 11 == 0:
        labels = labels.clamp_min(1)
    return centres, features, labels


def test_the_bounds_are_above_the_error_and_in_order() -> None:
    tight = 0
    for seed in range(3000):
        found = anchor_bound(*random_case(seed))
        assert found.error <= found.counted <= found.markov + 1e-9
        tight += found.error == found.counted > 0
    assert tight > 10  # the first bound is reached, not only true


@pytest.mark.parametrize("cosine", [-0.9, -0.2, 0.0, 0.5, 0.99])
def test_the_threshold_cannot_be_lowered(cosine: float) -> None:
    """Halfway between two anchors an example is on the edge, at √((1 + δ)/2): a little beyond, it errs."""
    two = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)
    halfway = F.normalize(two.sum(0), dim=0)
    beyond, inside = (F.normalize(halfway + 1e-2 * towards, dim=0) for towards in (two[1], two[0]))
    found = anchor_bound(two, torch.stack([beyond, inside]), torch.tensor([0, 0]))
    assert found.error == found.counted == 0.5
    assert math.isclose(float(halfway @ two[0]), math.sqrt((1 + cosine) / 2), abs_tol=1e-12)


def test_a_tie_errs_whatever_the_last_bit_says() -> None:
    """Halfway between two anchors: an error by definition, on every processor and in every direction."""
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        two = F.normalize(torch.randn(2, 7, generator=g, dtype=torch.float64), dim=1)
        halfway = F.normalize(two.sum(0, keepdim=True), dim=1)
        for own in (0, 1):
            found = anchor_bound(two, halfway, torch.tensor([own]))
            assert found.error == found.counted == 1.0


def test_anchors_that_coincide_tell_nothing() -> None:
    """Two classes collapsed into one point: every answer is wrong, and both bounds say so."""
    point = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = anchor_bound(point, point, torch.tensor([0, 1]))
    assert found.error == found.counted == found.markov == 1.0


def test_what_the_bounds_are_made_of() -> None:
    two = torch.eye(2, dtype=torch.float64)
    features = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    found = anchor_bound(two, features, torch.tensor([0, 0, 1]))
    assert found.nearest.tolist() == [0.0, 0.0]
    threshold = math.sqrt(0.5)
    expected = (2 * min(1.0, (1 - 0.7) / (1 - threshold)) + 0.0) / 3
    assert math.isclose(found.markov, expected, abs_tol=1e-5)  # its slack for rounding
    assert math.isclose(found.counted, 1 / 3)


def mean_error(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Over every choice of one anchor a class."""
    groups = [train[0][train[1] == c] for c in range(int(train[1].max()) + 1)]
    errors = [
        anchor_bound(torch.stack(chosen), *test).error for chosen in itertools.product(*groups)
    ]
    return sum(errors) / len(errors)


def test_the_mean_error_of_one_label_is_below_its_bound() -> None:
    informative = 0
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        labels = torch.arange(3).repeat_interleave(3)
        noise = 0.05 + 0.3 * torch.rand(1, generator=g)

        def sample(
            labels: Tensor = labels, noise: Tensor = noise, g: torch.Generator = g
        ) -> Tensor:
            raw = torch.eye(3)[labels] + noise * torch.randn(len(labels), 3, generator=g)
            return F.normalize(raw, dim=1)

        train, test = (sample(), labels), (sample(), labels)
        bound = one_label_bound(train, test)
        assert mean_error(train, test) <= bound
        informative += bound < 0.5
    assert informative > 20


def test_collapsed_classes_need_one_label() -> None:
    labels = torch.arange(5).repeat(20)
    features = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    train = features[labels], labels
    assert label_efficiency(train, train, 1) == [1.0] * 10
    assert label_efficiency(train, train, 1, draws=2, head="logistic") == [1.0] * 2
    assert one_label_bound(train, train) == 0.0


def test_a_draw_is_even_random_and_repeats() -> None:
    labels = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))
    chosen = draw(labels, 7, seed=3)
    assert torch.bincount(labels[chosen]).tolist() == [7] * 4 and len(set(chosen.tolist())) == 28
    assert draw(labels, 7, seed=3).tolist() == chosen.tolist() != draw(labels, 7, seed=4).tolist()


def test_anchors_are_directions_of_means() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    half = math.sqrt(0.5)
    assert torch.allclose(
        anchors(features, torch.tensor([1, 1, 0])), torch.tensor([[0.0, 1.0], [half, half]])
    )


def test_bad_input_is_refused() -> None:
    unit, labels = torch.eye(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="anchors: a norm is above 1"):
        anchor_bound(2 * unit, unit, labels)
    with pytest.raises(ValueError, match="features: a norm is above 1"):
        anchor_bound(unit, 2 * unit, labels)
    with pytest.raises(ValueError, match=r"give \(C, D\) and \(n, D\)"):
        anchor_bound(unit, torch.ones(2, 3), labels)
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        anchor_bound(unit, unit, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="per_class=2: the smallest class has 1"):
        draw(labels, 2)
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        one_label_bound((unit, labels), (unit, torch.tensor([0, 2])))
    with pytest.raises(ValueError, match=r"labels miss class 1 of 0\.\.2"):
        one_label_bound((unit, torch.tensor([0, 2])), (unit, labels))
    with pytest.raises(ValueError, match="features: a norm is above 1"):
        one_label_bound((unit, labels), (2 * unit, labels))
    with pytest.raises(ValueError, match="choose from anchors, logistic"):
        label_efficiency((unit, labels), (unit, labels), 1, head="svm")


@pytest.mark.parametrize("head", [nearest_anchor, logistic_head])
def test_features_and_labels_must_fit(head: Callable[..., float]) -> None:
    unit, labels = torch.eye(3), torch.arange(3)
    good = unit, labels
    for train, test, message in (
        (good, (unit, labels[:, None]), "one label for each of the 3"),
        (good, (unit, labels[:1]), "one label for each of the 3"),
        (good, (unit[:0], labels[:0]), "at least one"),
        (good, (unit / 0, labels), "features: they hold NaN or infinity"),
        ((unit / 0, labels), good, "features: they hold NaN or infinity"),
        ((unit, labels * 2), good, r"labels miss class 1 of 0\.\.4"),
        ((unit, labels.int()), good, "labels are int64"),
    ):
        with pytest.raises(ValueError, match=message):
            head(train, test)
    with pytest.raises(ValueError, match="one label for each of the 3"):
        label_efficiency((unit, labels[:2]), good, 1)


def test_anchors_that_are_not_numbers_prove_nothing() -> None:
    unit, labels = torch.eye(2), torch.tensor([0, 1])
    for own, features in ((unit, unit * torch.nan), (unit * torch.nan, unit)):
        with pytest.raises(ValueError, match="not finite"):
            anchor_bound(own, features, labels)
