"""Networks broken on purpose: the fault is named, and a sound network has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

import modlib
from modlib import ModularNetwork
from modlib.data import Dataset
from modlib.methods import Method, sgd
from modlib.reuse.diagnosis import Diagnosis, LabelCheck, ModuleCheck, diagnose

SUPCON = modlib.objectives.SupCon(0.07, "relu")
GOOD = (0.1, 0.1, 0.1, 1.0)


def fitted(
    net: torch.nn.Sequential, data: Dataset, cuts: list[str], method: Method
) -> ModularNetwork:
    modules = modlib.partition(net, cuts)
    modlib.fit(modules, method, data, epochs=6, progress=False)
    return modules


def modular(rates: Sequence[float]) -> Method:
    return modlib.methods.ProxyObjective(SUPCON, optimizer=[sgd(rate) for rate in rates])


def perceptron(data: Dataset, method: Method) -> ModularNetwork:
    net = modlib.networks.mlp([64, 64, 64, 32, 10], kernel="relu", seed=0)
    return fitted(net, data, ["layer2", "layer3", "features"], method)


@pytest.fixture(scope="module")
def images() -> Dataset:
    return modlib.data.load("digits")


def test_a_sound_network_has_no_fault(images: Dataset) -> None:
    sound = perceptron(images, modular(GOOD))
    found = diagnose(sound, images, SUPCON)
    assert found.faults == () and found.note == ""
    assert found.accuracy == modlib.evaluate(sound, images).accuracy


@pytest.mark.parametrize("broken", [(1,), (2,), (3,), (1, 2)])
def test_what_did_not_learn_is_found(broken: tuple[int, ...], images: Dataset) -> None:
    rates = [1e-6 if k in broken else rate for k, rate in enumerate(GOOD)]
    faults = diagnose(perceptron(images, modular(rates)), images, SUPCON, label_epochs=2).faults
    assert [fault[:22] for fault in faults] == [f"module {k}: a fresh copy" for k in broken]


def test_what_follows_from_a_damaged_module_is_not_blamed(images: Dataset) -> None:
    """The columns of module 1 are permuted: modules 2 and 3 are sound, and get inputs that they do not know."""
    net = perceptron(images, modular(GOOD))
    with torch.no_grad():
        weight = next(net[1].parameters())
        weight.copy_(weight.flip(1))
    found = diagnose(net, images, SUPCON, label_epochs=2)
    assert found.modules[2].shortfall > found.modules[1].shortfall > 1  # so the size does not tell
    first, *others = found.faults[:3]
    assert first.startswith("module 1") and first.endswith("train it again")
    for k, fault in zip((2, 3), others, strict=True):
        assert fault.startswith(f"module {k}: a fresh copy")
        assert fault.endswith("it may follow from module 1: repair that one first and ask again")


def test_after_end_to_end_training_a_shortfall_is_explained(images: Dataset) -> None:
    net = perceptron(images, modlib.methods.E2EBP(optimizer=sgd(0.1)))
    found = diagnose(net, images, SUPCON, label_epochs=2)
    assert found.accuracy > 0.9 and found.faults[0].startswith("module 0: a fresh copy")
    assert (
        f"right on {found.accuracy:.0%}" in found.note and "after end-to-end training" in found.note
    )
    assert str(found).endswith(f"note: {found.note}")


def test_a_dead_block_is_found(images: Dataset) -> None:
    layers = modlib.networks.cnn((8, 16, 32), channels=1, size=8, stride=1, kernel="relu", seed=0)
    net = fitted(layers, images, ["conv3", "conv5", "features"], modular(GOOD))
    with torch.no_grad():
        net[1].conv4[-1].bias.fill_(-20)  # type: ignore[index, union-attr]
    faults = diagnose(net, images, SUPCON, label_epochs=6).faults
    assert faults[0] == "module 1, layer conv4: 100% of its channels are dead"
    assert not any("module 0" in fault or "module 2" in fault for fault in faults[1:])


def check(position: int, shortfall: float, **dead: float) -> ModuleCheck:
    return ModuleCheck(position, objective=1.0 + shortfall, fresh=1.0, untrained=2.0, dead=dead)


def faults(*checks: ModuleCheck) -> tuple[str, ...]:
    labels = LabelCheck(torch.arange(2), torch.arange(2), classes=2)
    return Diagnosis(checks, labels, accuracy=0.5, names=("a", "b")).faults


def test_behind_a_layer_that_is_wholly_dead_none_is_named() -> None:
    def named(*shares: float) -> tuple[str, ...]:
        layers = {f"conv{k}": share for k, share in enumerate(shares)}
        return tuple(fault[len("module 0, ") :] for fault in faults(check(0, 0.0, **layers)))

    half, most = (f"layer conv{k}: {p}% of its channels are dead" for k, p in ((0, 50), (2, 75)))
    assert named(0.5, 0.0, 0.75) == (half, most)
    assert named(0.5, 0.0, 1.0, 1.0, 1.0) == (half, most.replace("75", "100"))


@pytest.mark.parametrize("head", [0.44, 0.58])
def test_a_head_is_named_alone_and_behind_others(head: float) -> None:
    (alone,) = faults(check(0, 0.0), check(1, head))
    assert alone.startswith("module 1") and alone.endswith("train it again")
    _, behind = faults(check(0, 0.2), check(1, head))
    assert behind == alone.replace(
        "train it again", "it may follow from module 0: repair that one first and ask again"
    )


def test_a_shortfall_behind_a_half_dead_layer_may_follow_from_it() -> None:
    dead, poor = faults(check(0, 0.0, conv1=0.5), check(1, 0.2), check(2, 0.0))
    assert dead.startswith("module 0, layer conv1") and "may follow from module 0" in poor


def test_wrong_labels_are_found(images: Dataset) -> None:
    labels = images.train_labels.copy()
    threes = np.flatnonzero(labels == 3)
    wrong = np.random.default_rng(0).permutation(threes)[: int(0.4 * len(threes))]
    labels[wrong] = 5
    data = replace(images, train_labels=labels)
    found = diagnose(perceptron(data, modular(GOOD)), data, SUPCON)
    assert found.labels.pair == (5, 3)
    assert found.labels.counts[5, 3] == len(found.labels.suspects)
    assert any("labelled '5' look like '3'" in fault for fault in found.faults)
    suspects = set(found.labels.suspects.tolist())
    assert len(suspects & set(wrong.tolist())) > 0.7 * len(wrong)  # recall
    assert len(suspects & set(wrong.tolist())) > 0.7 * len(suspects)  # precision
    assert "fault: labels" in str(found)


def test_a_network_without_hidden_modules_is_refused(images: Dataset) -> None:
    net = modlib.partition(modlib.networks.mlp([64, 10]), modules=1)
    with pytest.raises(ValueError, match="no hidden one to examine"):
        diagnose(net, images, SUPCON)
    body = modlib.networks.mlp([64, 8, 10], seed=0)
    modules = modlib.partition(torch.nn.Sequential(body, torch.nn.Identity()), ["0.head"])
    with pytest.raises(ValueError, match="its last layer is not linear"):
        diagnose(modules, images, SUPCON)


def test_what_cannot_be_examined_is_refused_at_once(images: Dataset) -> None:
    layers = modlib.networks.mlp([64, 8, 8, 10], kernel="relu", seed=0)
    net = modlib.partition(layers, ["layer2", "features"])
    with pytest.raises(ValueError, match=r"200 training images .* give at least 256"):
        diagnose(net, images.subset(n_train=200), SUPCON)
    with pytest.raises(TypeError, match="objective=None is no objective on pairs"):
        diagnose(net, images, None)  # type: ignore[arg-type]
    next(net[1].parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="module 1 gives NaN or infinity"):
        diagnose(net, images, SUPCON)
