"""What the book's numbers rest on: learning rates that a search chose, and records completed later."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import modlib
from modlib import zoo
from modlib.data.cache import write
from modlib.experiments import run, transfer
from modlib.experiments.certify import certify
from modlib.experiments.few_labels import few_labels
from modlib.experiments.kept import kept
from modlib.experiments.recipes import LISTED, RATES, RECIPES, TUNED, UNTUNED
from modlib.experiments.shelve import shelve
from modlib.experiments.tune import FLAT, FLAT_START, LADDER, rates, search

RESULTS = Path(__file__).parents[1] / "book" / "results"


def tuning() -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = json.loads((RESULTS / "learning-rates.json").read_text())
    return {name: tried for name, tried in table.items() if name != "settings"}


def stable() -> dict[str, dict[str, float]]:
    """What was found, by the longer search where there is one, and 0 at a rate at which a full run diverged."""
    settings = json.loads((RESULTS / "learning-rates.json").read_text())["settings"]
    return {
        name: {
            lr: 0.0 if lr in settings["diverged"].get(name, {}) else a
            for lr, a in settings["longer search"].get(name, tried).items()
        }
        for name, tried in tuning().items()
    }


def test_every_tuned_recipe_uses_the_rate_that_the_search_found_best() -> None:
    best = {name: float(max(tried, key=lambda lr: tried[lr])) for name, tried in stable().items()}
    assert best == RATES
    assert {*RATES, *UNTUNED} == set(TUNED)
    assert not {*RATES} & {*UNTUNED}  # what has been searched is no first guess any more


def test_a_tuned_recipe_is_listed_once_and_at_its_rate() -> None:
    assert len(RECIPES) == len(LISTED)
    rates = {**RATES, **UNTUNED}
    assert {name: RECIPES[name].note["lr"] for name in rates} == rates


@pytest.mark.parametrize("name", sorted(RATES))
def test_the_best_rate_has_a_worse_one_on_either_side(name: str) -> None:
    tried = {float(lr): accuracy for lr, accuracy in stable()[name].items()}
    ladder, _ = rates(name)
    assert min(ladder) < RATES[name] < max(ladder)  # the winner is no end of the ladder
    place = ladder.index(RATES[name])
    beside = [ladder[i] for i in (place - 1, place + 1) if 0 <= i < len(ladder)]
    assert all(tried[lr] <= tried[RATES[name]] for lr in beside)


def test_the_search_climbs_to_the_best_rate_wherever_it_is() -> None:
    for best in LADDER:
        tried = search(lambda lr, best=best: -abs(LADDER.index(lr) - LADDER.index(best)))  # type: ignore[misc]
        assert max(tried, key=lambda lr: tried[lr]) == best


def test_the_search_tries_the_whole_ladder_where_the_curve_is_flat() -> None:
    for name in FLAT:
        assert {float(rate) for rate in tuning()[name]} >= set(FLAT_START), name


def test_committed_records_were_run_with_the_recipes_rates() -> None:
    for path in RESULTS.glob("cifar10-*/*.json"):
        record = json.loads(path.read_text())
        assert record["settings"]["lr"] == RECIPES[record["recipe"]].settings()["lr"], path


def test_a_record_is_completed_from_the_networks_that_the_run_kept(tmp_path: Path) -> None:
    where = {"results": tmp_path / "results", "runs": tmp_path / "runs"}
    plain = run("cifar10-proxy-supcon", progress=False, **where)
    full = certify("cifar10-proxy-supcon", every_epoch=True, **where)
    assert {key: full[key] for key in plain} == json.loads(json.dumps(plain))
    assert len(full["pairs"]) == len(full["input_gap"]) == len(plain["history"])
    certificate = full["certificate"]
    assert certificate["achieved"] == pytest.approx(plain["final"]["train_loss"], rel=1e-4)
    assert certificate["bound"] <= certificate["best_head"] <= certificate["achieved"] + 1e-6


def test_a_certificate_of_twenty_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the networks of the recipes on Tiny ImageNet, on images of noise: which assumptions hold is told."""
    images = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), np.uint8)
    labels = np.arange(200) % 20
    parts = {
        f"{split}_{what}": part
        for split in ("train", "test")
        for what, part in (("images", images), ("labels", labels))
    }
    write(tmp_path / "twenty", parts, [f"class {k}" for k in range(20)])
    where = {"results": tmp_path / "results", "runs": tmp_path / "runs", "root": tmp_path}
    for kind in ("resnet", "vit"):
        recipe = RECIPES[f"tiny-imagenet-{kind}-e2ebp"]
        smoke = replace(recipe.profiles["smoke"], data="twenty", n_train=None, n_test=None)
        monkeypatch.setitem(RECIPES, recipe.name, replace(recipe, profiles={"smoke": smoke}))
        plain = run(recipe.name, progress=False, **where)
        certificate = certify(recipe.name, **where)["certificate"]
        assert certificate["achieved"] == pytest.approx(plain["final"]["train_loss"], rel=1e-4)
        assert certificate["bound"] <= certificate["best_head"] <= certificate["achieved"] + 1e-6


def test_networks_read_back_measure_what_they_measured_in_memory(tmp_path: Path) -> None:
    """Bit for bit: they lie in the same layout, so that convolutions sum in the same order."""
    where = {"results": tmp_path / "results", "runs": tmp_path / "runs"}
    final = run("cifar10-proxy-supcon", progress=False, **where)["final"]
    one = kept("cifar10-proxy-supcon", "smoke", 0, None, **where)
    net = one.after(one.record["history"][-1])
    for split in ("train", "test"):
        found = modlib.evaluate(net, one.data, split)
        assert [found.loss, found.accuracy] == [final[f"{split}_loss"], final[f"{split}_accuracy"]]
    weight = net.state_dict()["0.conv2.1.weight"]
    assert one.record["settings"]["channels_last"]
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_record_without_its_run_cannot_be_completed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run the recipe first"):
        certify("cifar10-e2ebp", results=tmp_path, runs=tmp_path)


def test_few_labels_are_measured_on_the_networks_that_a_run_kept(tmp_path: Path) -> None:
    where = {"results": tmp_path / "results", "runs": tmp_path / "runs"}
    run("mnist-cnn-supcon", progress=False, **where)
    record = few_labels("mnist-cnn-supcon", **where)
    (checkpoint,) = record["checkpoints"]
    assert checkpoint["epoch"] == 1 and record["sizes"] == [1, 2, 5, 10]
    ones = checkpoint["anchors"]["1"]
    assert len(set(ones)) > 10 and len(checkpoint["logistic"]["1"]) == 10
    assert len(ones) == len(checkpoint["counted"]) == len(checkpoint["misplaced"]) == 100
    for accuracy, bound in zip(ones, checkpoint["counted"], strict=True):
        assert 1 - accuracy <= bound + 1e-9  # the same draws
    saved = tmp_path / "results" / "few-labels" / "mnist-cnn-supcon" / "smoke-seed0.json"
    assert json.loads(saved.read_text()) == json.loads(json.dumps(record))
    with pytest.raises(ValueError, match="exists; move it away"):
        few_labels("mnist-cnn-supcon", **where)


def test_the_modules_of_a_run_go_on_the_shelf(tmp_path: Path) -> None:
    where = {"results": tmp_path / "results", "runs": tmp_path / "runs"}
    done = run("mnist-cnn-supcon", progress=False, **where)
    cards = shelve("mnist-cnn-supcon", **where)
    settings = RECIPES["mnist-cnn-supcon"].profiles["smoke"]
    data = settings.load(None)
    x, _ = modlib.data.Loader(data, batch_size=64).sample(64)
    net = RECIPES["mnist-cnn-supcon"].network(settings, data, 1, x)
    assert zoo.take(net, tmp_path / "results" / "zoo", "mnist-cnn-supcon-smoke-seed0") == cards
    assert modlib.evaluate(net, data).accuracy == done["final"]["test_accuracy"]


def test_few_labels_need_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first: modlib run mnist-cnn-supcon"):
        few_labels("mnist-cnn-supcon", results=tmp_path, runs=tmp_path)


def test_transfer_goes_on_from_the_modules_it_kept(tmp_path: Path) -> None:
    where = {"results": tmp_path / "results", "runs": tmp_path / "runs"}
    first = transfer.run(**where)
    files = sorted((tmp_path / "runs").rglob("*.pt"))
    times = [path.stat().st_mtime_ns for path in files]
    with pytest.raises(ValueError, match=r"smoke-seed0\.json exists"):
        transfer.run(**where)
    (tmp_path / "results" / "transfer" / "smoke-seed0.json").unlink()
    again = transfer.run(**where)
    assert len(files) == len(first["tasks"]) == 3
    assert [path.stat().st_mtime_ns for path in files] == times
    assert first["matrices"] == again["matrices"]
    for name, matrix in first["matrices"].items():
        assert len(matrix) == 3 and all(len(row) == 3 for row in matrix), name


@pytest.mark.parametrize("experiment", ["certify", "few_labels", "shelve"])
def test_a_command_says_in_one_sentence_what_is_missing(experiment: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"modlib.experiments.{experiment}", "cifar10-e2ebp"]
    where = ["--results", str(tmp_path), "--runs", str(tmp_path)]
    done = subprocess.run([*command, *where], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("modlib: ")
    assert "run the recipe first" in done.stderr and len(done.stderr.splitlines()) == 1
