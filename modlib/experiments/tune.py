"""Choose each method's learning rate on held-out training images: ``python -m modlib.experiments.tune``.

Test images take no part. What was tried is written to book/results/learning-rates.json, so that a reader
can see how hard each method was tuned, and that none was favoured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modlib.data import Dataset
from modlib.experiments.recipes import TUNED, Recipe
from modlib.experiments.run import write
from modlib.training import fit

# Learning rates to try; the search starts with some of them.
LADDER = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
START = (0.1, 0.3, 1.0)
# Objectives that hardly learn have flat curves with more than one hump, on which a climb stops too early.
FLAT = tuple(
    f"cifar10-proxy-{key}{end}"
    for key in ("raw", "contrastive", "log-contrastive")
    for end in ("", "-balanced")
)
FLAT_START = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
ADAM_LADDER = (1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1)
ADAM_START = (3e-4, 0.001, 0.003)


def held_out(data: Dataset, n_train: int, n_test: int) -> Dataset:
    """Training images split in two: the second part takes the place of the test images."""
    order = np.random.default_rng(0).permutation(len(data.train_labels))
    train, test = order[:n_train], order[n_train : n_train + n_test]
    return dataclasses.replace(
        data,
        train_images=data.train_images[np.sort(train)],
        train_labels=data.train_labels[np.sort(train)],
        test_images=data.train_images[np.sort(test)],
        test_labels=data.train_labels[np.sort(test)],
    )


def tune(recipe: Recipe, data: Dataset, epochs: int) -> float:
    """Validation accuracy (0..1) of one short run; 0 if it diverges."""
    profile = dataclasses.replace(recipe.profiles["cpu"], epochs=epochs, output_epochs=epochs)
    x = torch.zeros(profile.batch_size, *data.shape)
    net = recipe.network(profile, data, seed=0, x=x)
    try:
        history = fit(
            net,
            recipe.method(),
            data,
            epochs=recipe.epochs(profile, len(net)),
            batch_size=profile.batch_size,
            channels_last=profile.channels_last,
            precision=profile.precision,
            schedule=recipe.schedule,
            augment=recipe.augment,
            progress=False,
        )
    except FloatingPointError:
        return 0.0
    return float(history.final["test_accuracy"])


def search(
    accuracy: Callable[[float], float],
    ladder: Sequence[float] = LADDER,
    start: Sequence[float] = START,
) -> dict[float, float]:
    """Try learning rates until the best has a worse one on either side."""
    tried = {lr: accuracy(lr) for lr in start}
    while True:
        place = ladder.index(max(tried, key=lambda lr: tried[lr]))
        beside = [ladder[i] for i in (place - 1, place + 1) if 0 <= i < len(ladder)]
        untried = [lr for lr in beside if lr not in tried]
        if not untried:
            return tried
        tried[untried[0]] = accuracy(untried[0])


def rates(name: str) -> tuple[Sequence[float], Sequence[float]]:
    """The ladder of a recipe, and the rates that its search starts with."""
    if name.startswith("mnist-") or _by_adam(TUNED[name](LADDER[0])):
        return ADAM_LADDER, ADAM_START
    return LADDER, FLAT_START if name in FLAT else START


def _by_adam(recipe: Recipe) -> bool:
    given = recipe.method().optimizer
    make = given[0] if isinstance(given, Sequence) else given
    return make is not None and isinstance(
        make([nn.Parameter(torch.zeros(1))]), torch.optim.Adam | torch.optim.AdamW
    )


def standard_error(accuracy: float, images: int) -> float:
    """Of an accuracy (0..1) on so many held-out images; what other seeds would change is not in it.

    >>> round(standard_error(0.5, 5000), 4)
    0.0071
    """
    return math.sqrt(accuracy * (1 - accuracy) / images)


def _accuracy(make: Callable[[float], Recipe], data: Dataset, epochs: int, lr: float) -> float:
    return tune(make(lr), data, epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="recipes (default: all that are tuned)")
    parser.add_argument("--out", default="book/results/learning-rates.json")
    parser.add_argument("--n-train", type=int, default=10_000, help="at most")
    parser.add_argument(
        "--n-test", type=int, default=5_000, help="at most, and a fifth of all images"
    )
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(options.out)
    table = json.loads(out.read_text()) if out.exists() else {}
    settings = table.setdefault("settings", {})
    for name in options.names or TUNED:
        whole = TUNED[name](LADDER[0]).profiles["cpu"].load(None)
        n_test = min(options.n_test, len(whole.train_labels) // 5)
        n_train = min(options.n_train, len(whole.train_labels) - n_test)
        data = held_out(whole, n_train, n_test)
        budget = {
            "data": f"{whole.name}, {n_train} training and {n_test} held-out images",
            "epochs": options.epochs,
            "standard_error": round(standard_error(0.5, n_test), 4),  # at most
        }
        if any(settings.setdefault(key, value) != value for key, value in budget.items()):
            settings.setdefault("other", {})[name] = budget
        tried = search(partial(_accuracy, TUNED[name], data, options.epochs), *rates(name))
        table[name] = {str(lr): tried[lr] for lr in sorted(tried)}
        print(name, table[name], flush=True)
        write(table, out)


if __name__ == "__main__":
    main()
