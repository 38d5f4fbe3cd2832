"""Networks broken on purpose: the fault is named, and a sound network has none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import modlib
from modlib.data import Dataset
from modlib.diagnosis import Diagnosis, LabelCheck, ModuleCheck, diagnose
from modlib.methods import sgd

SUPCON = modlib.objectives.SupCon(0.07, "relu-pool")


@pytest.fixture(scope="module")
def images() -> Dataset:
    return modlib.data.load("digits", size=32)


def trained(data: Dataset, rates: tuple[float, float, float, float]) -> modlib.ModularNetwork:
    net = modlib.networks.cnn((8, 16, 32), seed=0)
    modules = modlib.partition(net, ["conv3", "conv5", "features"])
    method = modlib.methods.ProxyObjective(SUPCON, optimizer=[sgd(rate) for rate in rates])
    modlib.fit(modules, method, data, epochs=6, progress=False)
    return modules


GOOD = (0.1, 0.1, 0.1, 1.0)


def test_a_sound_network_has_no_fault(images: Dataset) -> None:
    assert diagnose(trained(images, GOOD), images, SUPCON).faults == ()


def test_a_head_that_did_not_learn_is_found(images: Dataset) -> None:
    (fault,) = diagnose(trained(images, (0.1, 0.1, 0.1, 1e-6)), images, SUPCON).faults
    assert fault.startswith("module 3: a fresh copy")


def test_every_bad_module_is_named(images: Dataset) -> None:
    faults = diagnose(trained(images, (0.1, 1e-6, 1e-6, 1.0)), images, SUPCON).faults
    assert [fault[:8] for fault in faults] == ["module 1", "module 2"]


@pytest.mark.parametrize("broken", [1, 2])
def test_a_bad_learning_rate_is_found(broken: int, images: Dataset) -> None:
    rates = [*GOOD]
    rates[broken] = 1e-6
    (fault,) = diagnose(trained(images, tuple(rates)), images, SUPCON).faults  # type: ignore[arg-type]
    assert fault.startswith(f"module {broken}: a fresh copy")


def test_a_dead_block_is_found(images: Dataset) -> None:
    net = trained(images, GOOD)
    with torch.no_grad():
        net[1].conv4[-1].bias.fill_(-20)  # type: ignore[index, union-attr]
    faults = diagnose(net, images, SUPCON, label_epochs=6).faults
    assert faults[0] == "module 1, layer conv4: 100% of its channels are dead"
    assert not any("module 0" in fault or "module 2" in fault for fault in faults[1:])


def test_behind_a_layer_that_is_wholly_dead_none_is_named() -> None:
    def named(*shares: float) -> tuple[str, ...]:
        layers = {f"conv{k}": share for k, share in enumerate(shares)}
        check = ModuleCheck(0, objective=1.0, fresh=1.0, untrained=2.0, dead=layers)
        labels = LabelCheck(torch.arange(2), torch.arange(2), classes=2)
        return tuple(f[len("module 0, ") :] for f in Diagnosis((check,), labels, ("a", "b")).faults)

    half, most = (f"layer conv{k}: {p}% of its channels are dead" for k, p in ((0, 50), (2, 75)))
    assert named(0.5, 0.0, 0.75) == (half, most)
    assert named(0.5, 0.0, 1.0, 1.0, 1.0) == (half, most.replace("75", "100"))


def test_wrong_labels_are_found(images: Dataset) -> None:
    labels = images.train_labels.copy()
    threes = np.flatnonzero(labels == 3)
    wrong = np.random.default_rng(0).permutation(threes)[: int(0.4 * len(threes))]
    labels[wrong] = 5
    data = replace(images, train_labels=labels)
    found = diagnose(trained(data, GOOD), data, SUPCON)
    assert found.labels.pair == (5, 3)
    assert found.labels.counts[5, 3] == len(found.labels.suspects)
    assert any("labelled '5' look like '3'" in fault for fault in found.faults)
    suspects = set(found.labels.suspects.tolist())
    assert len(suspects & set(wrong.tolist())) > 0.7 * len(wrong)  # recall
    assert len(suspects & set(wrong.tolist())) > 0.7 * len(suspects)  # precision
    assert "fault: labels" in str(found)


def test_a_network_without_hidden_modules_is_refused(images: Dataset) -> None:
    net = modlib.partition(modlib.networks.cnn((8,), seed=0), modules=1)
    with pytest.raises(ValueError, match="no hidden one to examine"):
        diagnose(net, images, SUPCON)
    net = modlib.networks.cnn((8,), seed=0)
    modules = modlib.partition(torch.nn.Sequential(net, torch.nn.Identity()), ["0.features"])
    with pytest.raises(ValueError, match="its last layer is not linear"):
        diagnose(modules, images, SUPCON)


def test_what_cannot_be_examined_is_refused_at_once(images: Dataset) -> None:
    net = modlib.partition(modlib.networks.cnn((8, 8), seed=0), ["conv3", "features"])
    with pytest.raises(ValueError, match=r"200 training images .* give at least 256"):
        diagnose(net, images.subset(n_train=200), SUPCON)
    with pytest.raises(TypeError, match="objective=None is no objective on pairs"):
        diagnose(net, images, None)  # type: ignore[arg-type]
    next(net[1].parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="module 1 gives NaN or infinity"):
        diagnose(net, images, SUPCON)
