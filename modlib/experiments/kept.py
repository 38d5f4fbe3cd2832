"""A run that is on this machine: its record, its data, and its network after every epoch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modlib.data import Dataset, Loader
from modlib.experiments.recipes import RECIPES
from modlib.experiments.run import Record, places
from modlib.kernels import FeatureMap
from modlib.network import ModularNetwork
from modlib.training import checkpoints


@dataclass(frozen=True)
class Kept:
    """What a run has left.

    Attributes:
        record: as it was written; ``target`` is its file.
        data: what the network was trained on.
        net: built as it was trained; its weights are those of the epoch that was read last.
        folder: of the weights after every epoch.
    """

    record: Record
    target: Path
    data: Dataset
    net: ModularNetwork
    folder: Path

    def epochs(self) -> Iterator[tuple[dict[str, Any], ModularNetwork]]:
        """The record's row and the network, epoch by epoch; at last it is the final network."""
        for row in self.record["history"]:
            yield row, self.after(row)

    def after(self, row: dict[str, Any]) -> ModularNetwork:
        """The network after one epoch, named by its row in the history."""
        path = self.folder / f"stage{row['stage']}-epoch{row['epoch']}.pt"
        checkpoints.fill(self.net, checkpoints.read_whole(path))
        return self.net.eval()


def kept(
    recipe: str,
    profile: str,
    seed: int,
    root: str | Path | None,
    results: str | Path,
    runs: str | Path,
) -> Kept:
    """Find a run; the arguments are those of ``run``.

    Raises:
        ValueError: the run or its record is not there.
    """
    target, folder = places(recipe, profile, seed, results, runs)
    if recipe not in RECIPES or not target.exists() or not folder.exists():
        raise ValueError(
            f"{target} or {folder} is missing; run the recipe first: modlib run {recipe}."
        )
    settings = RECIPES[recipe].profiles[profile]
    data = settings.load(root, seed)
    x, _ = Loader(data, batch_size=settings.batch_size).sample(settings.batch_size)
    net = RECIPES[recipe].network(settings, data, seed, x)
    return Kept(json.loads(target.read_text(encoding="utf-8")), target, data, net, folder)


def body(net: ModularNetwork) -> nn.Sequential:
    """The network without its head, up to and with its feature map."""
    layers = [layer for module in net for layer in module]
    if not isinstance(layers[-2], FeatureMap):
        raise ValueError(
            "net: no FeatureMap stands before its head, so there is nothing to certify."
        )
    return nn.Sequential(*layers[:-1])


def mean_kernels(features: Tensor, y: Tensor) -> dict[str, float]:
    """Mean kernel values of pairs of the same and of different classes, no image paired with itself."""
    gram = features @ features.T
    same = y[:, None] == y[None, :]
    off = ~torch.eye(len(y), dtype=torch.bool)
    return {"same": float(gram[same & off].mean()), "different": float(gram[~same].mean())}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line that the experiments on kept runs share; one thread, as the runs had."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default="book/results")
    parser.add_argument("--runs", default="runs")
    return parser


def told(main: Callable[[], None]) -> None:
    """Run a command; what is wrong is told in one sentence, as ``modlib`` tells it."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"modlib: {error}")
