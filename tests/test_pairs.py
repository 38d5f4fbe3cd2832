"""Training from pairs is training from labels that nobody has seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import modlib
from modlib import fit_pairs, same_class
from modlib.data import Dataset
from modlib.objectives import CrossEntropy, SupCon

PROXIES = [SupCon(kernel="relu"), modlib.objectives.CentredAlignment("relu")]


def net() -> modlib.ModularNetwork:
    return modlib.partition(
        modlib.networks.mlp([64, 24, 16, 10], kernel="relu", seed=0), ["layer2", "features"]
    )


@pytest.mark.parametrize("objective", PROXIES, ids=lambda o: type(o).__name__)
def test_pairs_teach_what_labels_teach_bit_for_bit(objective: Any, digits: Dataset) -> None:
    by_pairs, by_labels = net(), net()
    method = modlib.methods.ProxyObjective(objective)
    modlib.fit(by_labels, method, digits, epochs=2, augment=None, progress=False)
    oracle = same_class(digits.train_labels)
    history = fit_pairs(
        by_pairs[:-1],
        objective,
        digits.train_images,
        oracle,
        mean=digits.mean,
        std=digits.std,
        epochs=2,
        augment=None,
        progress=False,
    )
    for a, b in zip(by_pairs[:-1].parameters(), by_labels[:-1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["test_accuracy"] for row in history.rows] == [None] * 4


def test_names_of_classes_make_no_difference(digits: Dataset) -> None:
    renamed = (7 * digits.train_labels + 3) % 10
    nets = net(), net()
    for modules, labels in zip(nets, (digits.train_labels, renamed), strict=True):
        fit_pairs(
            modules[:-1],
            PROXIES[0],
            digits.train_images,
            same_class(labels),
            epochs=1,
            progress=False,
        )
    assert all(torch.equal(a, b) for a, b in zip(*(n.parameters() for n in nets), strict=True))


def test_a_relation_need_not_come_from_classes(digits: Dataset) -> None:
    def neighbours(i: Tensor, j: Tensor) -> Tensor:  # not transitive
        return (i - j).abs() <= 400

    history = fit_pairs(
        net()[:-1], PROXIES[0], digits.train_images, neighbours, epochs=1, progress=False
    )
    assert len(history.rows) == 2


def test_only_the_chosen_modules_are_trained(digits: Dataset) -> None:
    trained, before = net()[:-1], net()[:-1]
    oracle = same_class(digits.train_labels)
    fit_pairs(
        trained, PROXIES[0], digits.train_images, oracle, modules=[-1], epochs=1, progress=False
    )
    same = [
        all(
            torch.equal(a, b)
            for a, b in zip(t.state_dict().values(), u.state_dict().values(), strict=True)
        )
        for t, u in zip(trained, before, strict=True)
    ]
    assert same == [True, False]


@pytest.mark.parametrize(
    ("oracle", "message"),
    [
        (lambda i, j: i < j, "depend on the order"),
        (lambda i, j: i != j, "not of its own class"),
        (lambda i, j: True, "boolean tensor of that shape"),
        (lambda i, j: (i == j).float(), "boolean tensor of that shape"),
        (lambda i, j: i == i, "no different-class pair"),
        (lambda i, j: i == j, "no same-class pair"),
    ],
)
def test_bad_oracles_are_refused(oracle: Any, message: str, digits: Dataset) -> None:
    with pytest.raises(ValueError, match=message):
        fit_pairs(net()[:-1], PROXIES[0], digits.train_images, oracle, progress=False)


def test_what_cannot_be_trained_from_pairs_is_refused(digits: Dataset) -> None:
    oracle = same_class(digits.train_labels)
    with pytest.raises(TypeError, match="same=None is no function"):
        fit_pairs(net()[:-1], PROXIES[0], digits.train_images, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one label for each"):
        fit_pairs(net(), CrossEntropy(), digits.train_images, oracle, progress=False)


def test_only_refuses_modules_that_train_together_or_are_not_there(digits: Dataset) -> None:
    together = modlib.methods.LocalLearning()
    for method, modules, message in (
        (together, [0], "trains them together"),
        (modlib.methods.E2EBP(), [0], "not by themselves"),
        (modlib.methods.ProxyObjective(PROXIES[0]), [3], "no module 3 among 3"),
        (modlib.methods.ProxyObjective(PROXIES[0]), [], "at least one module"),
    ):
        with pytest.raises(ValueError, match=message):
            modlib.fit(net(), modlib.methods.Only(method, modules), digits, progress=False)


def test_a_kernel_that_does_not_fit_a_later_module_is_refused_at_once(digits: Dataset) -> None:
    net = modlib.networks.cnn((4, 8, 8), channels=1, size=8, stride=1, kernel="relu")
    hidden = modlib.partition(net, ["conv3", "conv5", "features"])[:-1]
    before = [p.clone() for p in hidden.parameters()]
    pooled = modlib.objectives.SupCon(kernel="relu-pool")
    with pytest.raises(ValueError, match=r"pools 4×4 windows"):
        fit_pairs(hidden, pooled, digits.train_images, same_class(digits.train_labels))
    assert all(torch.equal(a, b) for a, b in zip(before, hidden.parameters(), strict=True))


def test_a_new_head_on_old_modules(digits: Dataset) -> None:
    rates = [modlib.methods.sgd(rate) for rate in (0.1, 0.1, 1.0)]
    method = modlib.methods.ProxyObjective(PROXIES[0], optimizer=rates)
    whole = net()
    modlib.fit(whole, method, digits, epochs=3, progress=False)
    fresh = modlib.partition(
        modlib.networks.mlp([64, 24, 16, 10], kernel="relu", seed=1), ["layer2", "features"]
    )
    x = torch.zeros(2, 1, 8, 8)
    mixed = modlib.zoo.exchange(whole, 2, fresh[2], x)
    before = modlib.evaluate(mixed, digits).accuracy
    history = modlib.fit(mixed, modlib.methods.Only(method, [2]), digits, epochs=3, progress=False)
    assert history.final["test_accuracy"] > max(0.8, before)
    assert mixed[0] is whole[0]
