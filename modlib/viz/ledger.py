"""What runs cost and what they reached, as rows for a figure or a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modlib.viz.records import group, records, values

MARKERS = {
    2: "o",
    3: "^",
    6: "h",
}  # by number of modules; others, and end-to-end training, a square


def ledger(
    names: Mapping[str, str], unit: str, profile: str = "cpu", folder: Path | str | None = None
) -> list[dict[str, Any]]:
    """One row for each recipe whose records are there.

    Args:
        names: recipes, and what their rows are called.
        unit: the recipe whose training counts as one operation.
        profile: of the records.
        folder: as in ``records``.

    Returns:
        Rows for ``points``: ``name``, ``recipe``, ``category``, ``modules``, ``marker``, ``up`` (test accuracies
        in per cent, one for each seed), ``MiB`` (the peak of bytes that autograd holds in a step) and
        ``operations`` (floating-point operations of the whole training, over those of ``unit``).

    Raises:
        FileNotFoundError: there is no record of ``unit``, or none at all.

    >>> ledger({"cifar10-e2ebp": "E2EBP"}, unit="cifar10-e2ebp")[0]["operations"]
    1.0
    """
    seeds = group(records(profile=profile, folder=folder), "recipe")
    if unit not in seeds:
        raise FileNotFoundError(f"no record of {unit!r}, the unit; `modlib run {unit}` makes one")
    one = _operations(seeds[unit][0])
    return [
        _row(name, seeds[recipe]) | {"operations": _operations(seeds[recipe][0]) / one}
        for recipe, name in names.items()
        if recipe in seeds
    ]


def _row(name: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    run = seeds[0]
    whole = run["category"] == "end-to-end"
    return {
        "name": name,
        "recipe": run["recipe"],
        "category": run["category"],
        "modules": run["modules"],
        "marker": "s" if whole else MARKERS.get(run["modules"], "s"),
        "up": [100 * value for value in values(seeds, "final.test_accuracy")],
        "MiB": run["peak_saved_bytes"] / 2**20,
    }


def _operations(run: dict[str, Any]) -> float:
    """Proportional to those of the whole training; data and batches are the same in all runs."""
    return float(run["costs"]["step_flops"] * run["settings"]["epochs"])
