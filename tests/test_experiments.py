"""Recipes and the records that they write: the only source of numbers in the book."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import modlib
from modlib.experiments import RECIPES, environment, run
from modlib.experiments.audits import audits
from modlib.experiments.compare import compare
from modlib.experiments.recipes import imagenet, papers, sweeps
from modlib.experiments.recipes.recipe import Recipe

RESULTS = Path(__file__).parents[1] / "book" / "results"
RECORDS = [p for p in sorted(RESULTS.glob("*/*-seed*.json")) if p.parent.name != "transfer"]
CONTRACT = {
    "recipe": str,
    "data": str,
    "profile": str,
    "seed": int,
    "method": str,
    "category": str,
    "modules": int,
    "commit": str,
    "versions": dict,
    "hardware": str,
    "wall_s": float,
    "peak_saved_bytes": int,
    "history": list,
    "final": dict,
}
CATEGORY = {"E2EBP": "end-to-end", "ProxyObjective": "modular"}


def check_record(record: dict[str, Any]) -> None:
    for name, kind in CONTRACT.items():
        assert isinstance(record[name], kind), name
    assert record["category"] in ("modular", "weakly modular", "end-to-end")
    assert record["category"] == CATEGORY.get(record["method"], record["category"])
    assert record["category"] == record["audit"]["category"]
    assert len(record["audit"]["labels"]) == record["modules"]
    assert {"python", "torch", "torchvision", "numpy", "modlib"} <= set(record["versions"])
    last = record["history"][-1]
    assert record["final"]["test_accuracy"] == last["test_accuracy"]  # final, never the best
    assert all(0 <= record["final"][f"{split}_accuracy"] <= 1 for split in ("train", "test"))
    assert record["wall_s"] == pytest.approx(sum(r["seconds"] for r in record["history"]), abs=0.1)
    stages = [row["stage"] for row in record["history"]]
    assert stages == sorted(stages)
    # blocks solved for leave nothing to autograd, but their codes are kept
    assert record["peak_saved_bytes"] + record["audit"].get("kept_bytes", 0) > 0


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_at_smoke_size_and_writes_its_record(name: str, tmp_path: Path) -> None:
    results, runs = tmp_path / "results", tmp_path / "runs"
    record = run(name, results=results, runs=runs, progress=False)
    target = results / name / "smoke-seed0.json"
    written = json.loads(target.read_text())
    assert written == json.loads(json.dumps(record))
    check_record(written)
    assert (written["recipe"], written["profile"], written["seed"]) == (name, "smoke", 0)
    kept = {path.name for path in (runs / name / "smoke-seed0").iterdir()}
    epochs = {f"stage{r['stage']}-epoch{r['epoch']}.pt" for r in written["history"]}
    assert kept == epochs | {"checkpoint.pt"}
    assert [p for p in results.rglob("*") if p.is_file()] == [target]


def test_a_record_is_not_overwritten(tmp_path: Path) -> None:
    run("cifar10-e2ebp", results=tmp_path, runs=tmp_path / "runs", progress=False)
    target = tmp_path / "cifar10-e2ebp" / "smoke-seed0.json"
    before = target.read_text()
    with pytest.raises(ValueError, match="exists; move it away to run this again"):
        run("cifar10-e2ebp", results=tmp_path, runs=tmp_path / "runs", progress=False)
    assert target.read_text() == before


def test_the_same_recipe_and_seed_give_the_same_numbers(tmp_path: Path) -> None:
    records = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        where = tmp_path / folder
        records.append(
            run("cifar10-dgl-k3", "smoke", seed, results=where, runs=where, progress=False)
        )
    finals = [record["final"] for record in records]
    assert finals[0] == finals[1] != finals[2]


def test_unknown_recipes_and_profiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe='cifar10' is unknown; the nearest are cifar10-"):
        run("cifar10", results=tmp_path, runs=tmp_path)
    with pytest.raises(ValueError, match="profile='tiny': recipe 'cifar10-e2ebp' has smoke, cpu"):
        run("cifar10-e2ebp", "tiny", results=tmp_path, runs=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "profile"),
    [(name, size) for name, r in RECIPES.items() for size in r.profiles if size != "smoke"],
)
def test_networks_of_all_sizes_can_be_built_cut_and_staged(name: str, profile: str) -> None:
    recipe: Recipe = RECIPES[name]
    settings = recipe.profiles[profile]
    data = settings.stand_in()
    x = torch.zeros(2, *data.shape)
    net = recipe.network(settings, data, 0, x)
    stages = recipe.method().stages(net, x)
    epochs = recipe.epochs(settings, len(net))
    assert isinstance(epochs, int) or len(epochs) == len(stages)
    assert net.shapes(x)[-1] == (len(data.classes),)


@pytest.mark.parametrize("before", [name for name in RECIPES if "-before-" in name])
def test_modules_that_end_before_their_relu_have_the_same_layers(before: str) -> None:
    name = before.replace("-before", "")
    profile = RECIPES[name].profiles["cpu"]
    data, x = modlib.data.load("digits", size=32), torch.zeros(profile.batch_size, 3, 32, 32)
    ours, theirs = (RECIPES[r].network(profile, data, 0, x) for r in (name, before))
    assert ours.names == theirs.names
    torch.testing.assert_close(ours.eval()(x[:2] + 1), theirs.eval()(x[:2] + 1))


def targets(*keys: str) -> list[str]:
    return [f"mnist-{key}" for key in keys]


def wide(*keys: str) -> list[str]:
    return [f"mnist-wide-{key}" for key in keys]


def test_every_recipe_is_compared_on_the_same_network_and_data() -> None:
    """Same trunk, epochs and batches for each data set, or the comparison says nothing."""
    pairs = (
        ("cifar10-proxy-supcon-32-epochs", "cifar10-e2ebp-32-epochs"),
        ("mnist-cnn-supcon", "mnist-cnn-e2ebp"),
        ("cifar10-e2ebp-elu", "cifar10-l-drl-elu", "cifar10-dtp-elu"),
        targets("e2ebp", "tp", "dtp", "dtp-drl", "ddtp", "l-drl", "ddg", "fr"),
        targets("e2ebp-shifted", "dtp-shifted"),
        ("mnist-dni-e2ebp", "mnist-cdni", "mnist-cdni-linear", "mnist-dni"),
        (*wide("e2ebp", "bcd", "bcd-decay", "admm", "admm-coupled"),),
        (*wide("tanh-e2ebp", "mac", "altmin"),),
        ("mnist-norm-e2ebp", "mnist-hsic"),
        *(
            [name for name in RECIPES if name.startswith(start) and not name.endswith("-epochs")]
            for start in ("cifar10-strong-", "tiny-imagenet-resnet-", "tiny-imagenet-vit-")
        ),
    )
    rooms = (
        *papers.RECIPES,
        *imagenet.RECIPES,
        *sweeps.RECIPES,
    )  # the last two are looked at below
    apart = {recipe.name for recipe in rooms} | {name for pair in pairs for name in pair}
    apart |= {name for name in RECIPES if name.endswith("-epochs")}  # more of them on purpose
    apart |= {*wide("lifted")}  # on fewer images, as its page says
    for names in ([name for name in RECIPES if name not in apart], *pairs):
        group = [RECIPES[name] for name in names]
        for profile in ("cpu", "gpu"):
            sizes = [recipe.profiles[profile] for recipe in group]
            if group[0].name in wide("e2ebp", "tanh-e2ebp"):  # sweeps take all images at once
                sizes = [replace(size, batch_size=0) for size in sizes]
            assert len({*map(repr, sizes)}) == 1
            data = group[0].profiles[profile].stand_in()
            x = torch.zeros(2, *data.shape)
            weights = [
                torch.cat(
                    [p.flatten() for p in r.network(r.profiles[profile], data, 3, x).parameters()]
                )
                for r in group[:5]
                if not r.name.endswith("-without-whitening")
            ]
            assert all(torch.equal(weights[0], other) for other in weights)


def test_gpu_recipes_of_one_network_share_data_and_size() -> None:
    for start in sorted({"-".join(r.name.split("-")[:3]) for r in imagenet.RECIPES}):
        sizes = {repr(r.profiles["gpu"]) for r in imagenet.RECIPES if r.name.startswith(start)}
        assert len(sizes) == 1, start


def test_a_point_of_a_sweep_differs_from_the_base_along_its_axis_alone() -> None:
    base = sweeps.BASE["cpu"]
    for recipe in sweeps.RECIPES:
        size, (axis, *rest) = recipe.profiles["cpu"], recipe.name.split("-")[1:]
        changed = {"classes": {"classes", "epochs"}, "width": {"widths"}, "epochs": {"epochs"}}
        differing = {k for k, v in vars(size).items() if v != getattr(base, k)}
        assert differing == changed.get(axis, set()), recipe.name
        modules = recipe.network(size, size.stand_in(), 0, torch.zeros(2, 3, 64, 64))
        assert len(modules) == (int(rest[0]) if axis == "modules" else 3)
        if size.classes:  # as many steps, whatever the number of classes
            assert size.classes * size.epochs == 20 * base.epochs


def test_a_seed_draws_the_classes_of_a_profile_that_takes_some_of_them() -> None:
    profile = replace(sweeps.BASE["smoke"], classes=3)
    names = [profile.load(None, seed).classes for seed in range(3)]
    assert all(len(set(chosen)) == 3 for chosen in names) and len(set(names)) > 1
    assert profile.load(None, 1).classes == names[1]


def test_recipes_of_other_lengths_differ_in_their_epochs_alone() -> None:
    for name in (name for name in RECIPES if name.endswith("-epochs")):
        short, epochs = re.fullmatch(r"(.*)-(\d+)-epochs", name).groups()  # type: ignore[union-attr]
        longer, usual = RECIPES[name], RECIPES[short]
        assert longer.profiles["cpu"] == replace(usual.profiles["cpu"], epochs=int(epochs))
        assert longer.profiles["gpu"] == usual.profiles["gpu"]
        assert (longer.cut, longer.settings()) == (usual.cut, usual.settings())


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_records_keep_the_contract(path: Path) -> None:
    record = json.loads(path.read_text())
    check_record(record)
    assert path.stem == f"{record['profile']}-seed{record['seed']}"
    assert path.parent.name == record["recipe"]
    assert record["recipe"] in RECIPES
    assert not record["commit"].endswith("+"), "made from a tree with changes that no commit has"
    recipe = RECIPES[record["recipe"]]
    settings = record["settings"]
    assert settings.get("lr") == recipe.note.get("lr")  # blocks that are solved for have none
    assert settings["epochs"] == recipe.profiles[record["profile"]].epochs


def test_audits_of_every_method() -> None:
    for modules in (3, 4):
        found = audits(modules=modules)
        assert [a.modules for a in found] == [modules] * len(found)
        assert {a.category for a in found} == {"modular", "weakly modular", "end-to-end"}
    assert audits("E2EBP", 2)[0].modules == 2
    with pytest.raises(ValueError, match="method='BP' is unknown"):
        audits("BP")


def test_compare_refuses_what_is_no_image() -> None:
    with pytest.raises(ValueError, match="data='moons' holds no images"):
        compare("moons", progress=False)


def test_environment_says_where_a_number_came_from() -> None:
    assert environment.versions()["torch"] == torch.__version__.split("+")[0]
    assert "thread" in environment.hardware(torch.device("cpu"))
    commit = environment.commit()
    assert commit is None or len(commit.removesuffix("+")) == 40
