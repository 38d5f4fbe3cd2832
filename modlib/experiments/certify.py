"""Add to a record what only the trained networks can tell: pair similarities and certificates.

``python -m modlib.experiments.certify RECIPE --profile cpu --seed 0`` reads the networks that the run kept
after every epoch, and writes into its record

- ``pairs``: for each epoch, the mean kernel value of pairs of test images of the same and of different
  classes, and the share of images whose feature vector is zero;
- ``certificate``: the optimality gap of the final network on the training images, and its split;
- with ``--epochs``, ``input_gap``: for each epoch, the risk of the best head of the final head's norm
  on that epoch's features, and the global bound: what the input module owes while it learns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modlib.certificates import best_head, global_bound, optimality_gap
from modlib.data import Dataset, Loader
from modlib.experiments.recipes import RECIPES
from modlib.experiments.run import Record, write
from modlib.extract import extract
from modlib.kernels import FeatureMap
from modlib.network import ModularNetwork

Epoch = tuple[dict[str, Any], ModularNetwork]


def certify(
    recipe: str,
    profile: str = "smoke",
    seed: int = 0,
    *,
    every_epoch: bool = False,
    root: str | Path | None = None,
    results: str | Path = "book/results",
    runs: str | Path = "runs",
) -> Record:
    """Complete the record of a run that is on this machine, and return it.

    Args:
        recipe, profile, seed, root, results, runs: as in ``run``.
        every_epoch: compute ``input_gap`` too.

    Raises:
        ValueError: the run or its record is not there.
    """
    name = f"{recipe}-{profile}-seed{seed}"
    target, folder = Path(results) / f"{name}.json", Path(runs) / name
    if recipe not in RECIPES or not target.exists() or not folder.exists():
        raise ValueError(
            f"{target} or {folder} is missing; run the recipe first: modlib run {recipe}."
        )
    record: Record = json.loads(target.read_text(encoding="utf-8"))
    settings = RECIPES[recipe].profiles[profile]
    data = settings.load(root)
    x, _ = Loader(data, batch_size=settings.batch_size).sample(settings.batch_size)
    net = RECIPES[recipe].network(settings, data, seed, x)
    record["pairs"] = [
        {**_place(row), **pairs(state, data)} for row, state in epochs(net, record, folder)
    ]
    gap = optimality_gap(net, data)
    record["certificate"] = {
        "achieved": gap.achieved,
        "bound": gap.bound,
        "best_head": gap.best_head,
        "duality_gap": gap.duality_gap,
        "input_share": gap.input_share,
        "output_share": gap.output_share,
        "head_norm": gap.head_norm,
        "broken": list(gap.broken),
        "notes": list(gap.notes),
    }
    if every_epoch:
        record["input_gap"] = [
            {**_place(row), **_input_gap(state, data, gap.head_norm)}
            for row, state in epochs(net, record, folder)
        ]
    write(record, target)
    return record


@torch.no_grad()
def pairs(net: ModularNetwork, data: Dataset, n: int = 2000) -> dict[str, float]:
    """Mean kernel values of pairs of test images, and the share of images with a zero feature.

    Args:
        net: ends in a feature map and a head.
        data: its first n test images are compared.
    """
    features, y = extract(body(net), data, "test", n=min(n, len(data.test_labels)))
    gram = features @ features.T
    same = y[:, None] == y[None, :]
    off = ~torch.eye(len(y), dtype=torch.bool)
    return {
        "same": float(gram[same & off].mean()),
        "different": float(gram[~same].mean()),
        "dead": float((features.norm(dim=1) < 0.5).float().mean()),
    }


def _input_gap(net: ModularNetwork, data: Dataset, head_norm: float) -> dict[str, float]:
    features, y = extract(body(net), data, "train")
    floor = next(m.floor for m in net.modules() if isinstance(m, FeatureMap))
    shares = (torch.bincount(y) / len(y)).tolist()
    head = best_head(features, y, head_norm=head_norm, tolerance=1e-5)
    bound = global_bound("cross_entropy", shares, floor, head_norm=head_norm)
    return {"best_head": head.risk, "bound": bound, "duality_gap": head.duality_gap}


def body(net: ModularNetwork) -> nn.Sequential:
    """The network without its head, up to and with its feature map."""
    layers = [layer for module in net for layer in module]
    if not isinstance(layers[-2], FeatureMap):
        raise ValueError(
            "net: no FeatureMap stands before its head, so there is nothing to certify."
        )
    return nn.Sequential(*layers[:-1])


def epochs(net: ModularNetwork, record: Record, folder: Path) -> Iterator[Epoch]:
    """The network after every epoch; after the last one it is the final network."""
    for row in record["history"]:
        path = folder / f"stage{row['stage']}-epoch{row['epoch']}.pt"
        net.load_state_dict(torch.load(path, weights_only=True))
        yield row, net.eval()


def _place(row: dict[str, Any]) -> dict[str, int]:
    return {"stage": row["stage"], "epoch": row["epoch"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", action="store_true")
    parser.add_argument("--results", default="book/results")
    parser.add_argument("--runs", default="runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = certify(
        options.recipe,
        options.profile,
        options.seed,
        every_epoch=options.epochs,
        results=options.results,
        runs=options.runs,
    )
    print(record["recipe"], record["seed"], record["pairs"][-1], record["certificate"])


if __name__ == "__main__":
    main()
