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

from pathlib import Path
from typing import Any

import torch

from modlib.certificates import best_head, global_bound, optimality_gap
from modlib.data import Dataset
from modlib.experiments.kept import arguments, body, kept, mean_kernels, told
from modlib.experiments.run import Record, write
from modlib.kernels import FeatureMap
from modlib.network import ModularNetwork
from modlib.reuse.extract import extract


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
    run = kept(recipe, profile, seed, root, results, runs)
    record, data = run.record, run.data
    record["pairs"] = [{**_place(row), **pairs(net, data)} for row, net in run.epochs()]
    gap = optimality_gap(run.net, data)
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
            {**_place(row), **_input_gap(net, data, gap.head_norm)} for row, net in run.epochs()
        ]
    write(record, run.target)
    return record


@torch.no_grad()
def pairs(net: ModularNetwork, data: Dataset, n: int = 2000) -> dict[str, float]:
    """Mean kernel values of pairs of test images, and the share of images with a zero feature.

    Args:
        net: ends in a feature map and a head.
        data: its first n test images are compared.
    """
    features, y = extract(body(net), data, "test", n=min(n, len(data.test_labels)))
    dead = float((features.norm(dim=1) < 0.5).float().mean())
    return {**mean_kernels(features, y), "dead": dead}


def _input_gap(net: ModularNetwork, data: Dataset, head_norm: float) -> dict[str, float]:
    features, y = extract(body(net), data, "train")
    floor = next(m.floor for m in net.modules() if isinstance(m, FeatureMap))
    shares = (torch.bincount(y) / len(y)).tolist()
    head = best_head(features, y, head_norm=head_norm, tolerance=1e-5)
    bound = global_bound("cross_entropy", shares, floor, head_norm=head_norm)
    return {"best_head": head.risk, "bound": bound, "duality_gap": head.duality_gap}


def _place(row: dict[str, Any]) -> dict[str, int]:
    return {"stage": row["stage"], "epoch": row["epoch"]}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--epochs", action="store_true")
    options = parser.parse_args()
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
    told(main)
