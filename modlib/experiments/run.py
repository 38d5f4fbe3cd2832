"""Run a recipe and write its record: one JSON file, the only source of numbers in the book."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from modlib.data import Loader
from modlib.device import peak_bytes, pick_device, reset_peak
from modlib.experiments import environment
from modlib.experiments.recipes import RECIPES
from modlib.experiments.recipes.recipe import Batch, Profile, Recipe
from modlib.measure.angles import KeepStages
from modlib.measure.audit import audit
from modlib.measure.costs import costs
from modlib.network import ModularNetwork
from modlib.parallel import ModuleParallel
from modlib.training import History, checkpoints, evaluate, fit

Record = dict[str, Any]


def run(
    recipe: str | Recipe,
    profile: str = "smoke",
    seed: int = 0,
    *,
    root: str | Path | None = None,
    results: str | Path = "book/results",
    runs: str | Path = "runs",
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
    parallel: ModuleParallel | None = None,
) -> Record:
    """Train one network by a recipe and write the record ``results/RECIPE/PROFILE-seedN.json``.

    While it trains, ``runs/RECIPE/PROFILE-seedN/`` holds a checkpoint to resume from and the
    network after every epoch.

    Args:
        recipe: a name in ``RECIPES``, or a recipe of your own.
        profile: "smoke" (seconds), "cpu" (minutes on a few cores) or "gpu" (paper scale).
        seed: of weights, order and augmentation.
        root: where data sets are; see ``modlib.data.load``.
        results: the folder of the record.
        runs: the folder of checkpoints.
        device: as in ``modlib.fit``.
        resume: go on from the checkpoint of an interrupted run.
        progress: show a progress bar.
        parallel: one module in each process. The first one writes the record, without what the recipe
            watches after every epoch, which would need all modules in one place; the others' is empty.

    Raises:
        ValueError: the recipe or profile is unknown, or the run exists already and ``resume`` is
            False.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> record = run("cifar10-e2ebp", results=folder / "results", runs=folder / "runs", progress=False)
    >>> record["recipe"], (folder / "results/cifar10-e2ebp/smoke-seed0.json").exists()
    ('cifar10-e2ebp', True)
    >>> "cifar10-proxy-supcon" in RECIPES    # what else there is
    True
    """
    recipe, settings = found(recipe, profile)
    target, folder = places(recipe.name, profile, seed, results, runs)
    if not resume:
        check_absent(target)
    where = pick_device(device)
    data = settings.load(root, seed)
    loader = Loader(data, batch_size=settings.batch_size, device=where)
    batch = loader.sample(settings.batch_size)
    net = recipe.network(settings, data, seed, batch[0].cpu()).to(where)
    method = recipe.method()
    first = parallel is None or parallel.rank == 0
    if first:
        measured, price = audit(method, net, batch), costs(method, net, batch)
    keeper = KeepStages(method)
    watched = replace(recipe, watch=None) if parallel else recipe
    reset_peak(where)
    history = fit(
        net,
        keeper if watched.watch else method,
        data,
        epochs=recipe.epochs(settings, len(net)),
        batch_size=settings.batch_size,
        seed=seed,
        device=where,
        channels_last=settings.channels_last,
        precision=settings.precision,
        schedule=recipe.schedule,
        augment=recipe.augment,
        checkpoint=folder / ("checkpoint.parts" if parallel else "checkpoint.pt"),
        resume=resume,
        progress=progress,
        after_epoch=_after_epoch(folder, watched, keeper, batch),
        parallel=parallel,
    )
    if not first:
        return {}
    record: Record = {
        "recipe": recipe.name,
        "data": data.name,
        "profile": profile,
        "seed": seed,
        "method": type(method).__name__,
        "category": measured.category,
        "modules": len(net),
        "commit": environment.commit(),
        "versions": environment.versions(),
        "hardware": environment.hardware(where),
        "wall_s": round(sum(history.seconds), 2),
        "peak_saved_bytes": measured.peak_saved_bytes,
        **({} if (peak := peak_bytes(where)) is None else {"peak_device_bytes": peak}),
        "history": _history(history),
        "final": _final(net, data, recipe.flip_at_test),
        "settings": {**recipe.settings(), **asdict(settings)},
        "audit": measured.summary(),
        "costs": price,
        "parameters": {"network": _count(net), "auxiliary": price["auxiliary_parameters"]},
    }
    if parallel:
        record["parallel"] = {"processes": parallel.size, "replay": parallel.replay}
    write(record, target)
    return record


def places(
    recipe: str, profile: str, seed: int, results: str | Path, runs: str | Path
) -> tuple[Path, Path]:
    """The file of a run's record, and the folder of its checkpoints."""
    name = f"{profile}-seed{seed}"
    return Path(results) / recipe / f"{name}.json", Path(runs) / recipe / name


def write(record: Record, target: Path) -> None:
    """Write a record whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, target)


def check_absent(target: Path) -> None:
    """Refuse to write over a record."""
    if target.exists():
        raise ValueError(f"{target} exists; move it away to run this again, or give another seed.")


def found(recipe: str | Recipe, profile: str) -> tuple[Recipe, Profile]:
    """A recipe by its name, and its profile.

    Raises:
        ValueError: one of them is unknown.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            near = get_close_matches(recipe, RECIPES, n=5, cutoff=0.3)
            raise ValueError(
                f"recipe={recipe!r} is unknown; the nearest are {', '.join(near) or 'none'}; "
                "'modlib run list' shows all."
            )
        recipe = RECIPES[recipe]
    if profile not in recipe.profiles:
        raise ValueError(
            f"profile={profile!r}: recipe {recipe.name!r} has {', '.join(recipe.profiles)}."
        )
    return recipe, recipe.profiles[profile]


def _after_epoch(folder: Path, recipe: Recipe, keeper: KeepStages, batch: Batch) -> Any:
    """Keep the network after every epoch, for certificates and figures; measure what the recipe watches."""

    def after_epoch(net: ModularNetwork, row: dict[str, Any]) -> None:
        if recipe.watch:
            row.update(recipe.watch(keeper.kept[row["stage"]], net, batch))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"stage{row['stage']}-epoch{row['epoch']}.pt"
        checkpoints.save_whole({k: v.cpu() for k, v in net.state_dict().items()}, path)

    return after_epoch


def _history(history: History) -> list[dict[str, Any]]:
    return [
        {**row, "seconds": round(seconds, 3)}
        for row, seconds in zip(history.rows, history.seconds, strict=True)
    ]


def _final(net: ModularNetwork, data: Any, flip: bool) -> dict[str, float]:
    test, train = evaluate(net, data), evaluate(net, data, "train")
    found = {
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "train_accuracy": train.accuracy,
        "train_loss": train.loss,
    }
    return found | ({"test_accuracy_flip": evaluate(net, data, flip=True).accuracy} if flip else {})


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
