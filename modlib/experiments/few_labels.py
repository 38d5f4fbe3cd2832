"""How few labels does a head need? ``python -m modlib.experiments.few_labels RECIPE --profile cpu --seed 0``.

Reads the networks that a run kept after its epochs, and for the features of each (all layers but the
head, trained with all pairs or, by E2EBP, with all labels) writes to
``book/results/few-labels/RECIPE/PROFILE-seedN.json``:

- ``checkpoints``: for each epoch, test accuracies of heads from 1, 2, 5, 10 and 100 labels a class (nearest
  anchors in 100 random draws, linear heads in ten) and from all; for one label a class the bounds of
  ``modlib.few_labels``, and how many of the drawn images are misplaced: nearer to another class's mean;
- ``scratch``, with ``--scratch``: test accuracies of the same network trained end to end from its initial
  weights on those labels alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modlib.data import Dataset
from modlib.experiments import environment
from modlib.experiments.kept import arguments, body, kept, mean_kernels, told
from modlib.experiments.recipes import RECIPES
from modlib.experiments.recipes.recipe import Profile, Recipe
from modlib.experiments.run import Record, check_absent, write
from modlib.kernels import double
from modlib.methods import E2EBP, sgd
from modlib.reuse.extract import extract
from modlib.reuse.few_labels import (
    Features,
    anchor_bound,
    anchors,
    draw,
    label_efficiency,
    logistic_head,
    nearest_anchor,
    one_label_bound,
)
from modlib.training import evaluate, fit

SIZES = (1, 2, 5, 10, 100)
DRAWS = 100  # of nearest anchors
TRAINED = 10  # of those, on which heads or whole networks are trained
_BOUNDED = 2000  # images whose Gram matrix gives the bound on all draws
_STEPS = 400  # of training from scratch on a few images


def few_labels(
    recipe: str,
    profile: str = "smoke",
    seed: int = 0,
    *,
    at: Iterable[int] = (0, 1, 3, 7),
    scratch: bool = False,
    root: str | Path | None = None,
    results: str | Path = "book/results",
    runs: str | Path = "runs",
) -> Record:
    """Measure a run that is on this machine, and write what was found.

    Args:
        recipe, profile, seed, root, results, runs: as in ``run``.
        at: epochs of the first stage after which to measure; the last one always.
        scratch: train from scratch on the drawn labels too.

    Raises:
        ValueError: the run or its record is not there, or it has been measured already.
    """
    run = kept(recipe, profile, seed, root, results, runs)
    target = Path(results) / "few-labels" / recipe / run.target.name
    check_absent(target)
    done, data, settings = run.record, run.data, RECIPES[recipe].profiles[profile]
    sizes = [n for n in SIZES if n <= _smallest_class(data)]
    first = [row for row in done["history"] if row["stage"] == 0]
    wanted = {*at, first[-1]["epoch"]}
    record = {
        "recipe": recipe,
        "data": data.name,
        "profile": profile,
        "seed": seed,
        "method": done["method"],
        "commit": environment.commit(),
        "versions": environment.versions(),
        "sizes": sizes,
        "final_accuracy": done["final"]["test_accuracy"],
        "checkpoints": [
            {"epoch": row["epoch"] + 1, **measure(body(run.after(row)), data, sizes)}
            for row in first
            if row["epoch"] in wanted
        ],
    }
    if scratch:
        record["scratch"] = {
            str(n): [_from_scratch(RECIPES[recipe], settings, data, n, d) for d in range(TRAINED)]
            for n in sizes
        }
    write(record, target)
    return record


def measure(features: nn.Module, data: Dataset, sizes: Iterable[int]) -> dict[str, Any]:
    """Accuracies of heads from few labels on a module's unit features, and the bounds for one label."""
    train, test = extract(features, data, "train"), extract(features, data, "test")
    drawn = [draw(train[1], 1, seed) for seed in range(DRAWS)]
    bounds = [anchor_bound(train[0][chosen], *test) for chosen in drawn]  # draws are class by class
    misplaced = (train[0] @ anchors(*train).T).argmax(1) != train[1]
    part = tuple(_first(split, _BOUNDED) for split in (train, test))
    return {
        "anchors": {str(n): label_efficiency(train, test, n, DRAWS) for n in sizes},
        "logistic": {str(n): label_efficiency(train, test, n, TRAINED, "logistic") for n in sizes},
        "all_anchors": nearest_anchor(train, test),
        "all_logistic": logistic_head(train, test),
        "misplaced": [int(misplaced[chosen].sum()) for chosen in drawn],
        "misplaced_share": float(double(misplaced).mean()),
        "counted": [bound.counted for bound in bounds],
        "markov": [bound.markov for bound in bounds],
        "expected_bound": one_label_bound(*part),
        **mean_kernels(*part[1]),
    }


def _smallest_class(data: Dataset) -> int:
    return int(np.bincount(data.train_labels).min())


def _first(split: Features, n: int) -> Features:
    return split[0][:n], split[1][:n]


def _from_scratch(recipe: Recipe, settings: Profile, data: Dataset, n: int, seed: int) -> float:
    """Accuracy of end-to-end training on n labels a class alone, augmented as ever."""
    chosen = draw(torch.tensor(data.train_labels), n, seed).numpy()
    few = replace(
        data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen]
    )
    net = recipe.build(settings, data, seed)
    batch = min(settings.batch_size, len(chosen))
    fit(
        net,
        E2EBP(optimizer=sgd(0.1)),
        replace(few, test_images=data.test_images[:1], test_labels=data.test_labels[:1]),
        epochs=max(1, _STEPS // (len(chosen) // batch)),
        batch_size=batch,
        seed=seed,
        progress=False,
    )
    return evaluate(net, data).accuracy


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--at", type=int, nargs="*", default=[0, 1, 3, 7])
    parser.add_argument("--scratch", action="store_true")
    options = parser.parse_args()
    record = few_labels(
        options.recipe,
        options.profile,
        options.seed,
        at=options.at,
        scratch=options.scratch,
        results=options.results,
        runs=options.runs,
    )
    for row in record["checkpoints"]:
        ones = row["anchors"]["1"]
        print(
            f"epoch {row['epoch']}: one label {sum(ones) / len(ones):.4f}, all {row['all_logistic']:.4f}"
        )


if __name__ == "__main__":
    told(main)
