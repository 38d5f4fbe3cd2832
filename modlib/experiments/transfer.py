"""Which module serves which task? ``python -m modlib.experiments.transfer --profile cpu --seed 0``.

Every pair of some classes is a task. For each task a network is trained modularly; its hidden module is
then the source for all tasks: how good is the best head on its features (the truth), and what did each
score foresee from 2,000 labelled images and one forward pass? Writes
``book/results/transfer/PROFILE-seedN.json`` with matrices source × target. Trained modules are kept in the
runs folder, so an interrupted run goes on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modlib import data as datasets
from modlib import objectives
from modlib.data import Dataset
from modlib.experiments import environment
from modlib.experiments.kept import arguments, told
from modlib.experiments.recipes.cifar10 import KERNEL, RATES
from modlib.experiments.recipes.methods import OUTPUT_LR
from modlib.experiments.recipes.recipe import CIFAR10, Profile, trunk
from modlib.experiments.run import Record, check_absent, write
from modlib.methods import ProxyObjective, sgd
from modlib.network import ModularNetwork, partition
from modlib.objectives import ProxyLoss
from modlib.reuse import transfer, zoo
from modlib.reuse.extract import extract
from modlib.reuse.few_labels import Features, logistic_head
from modlib.training import evaluate, fit, pick_device

CLASSES = {
    "smoke": ("3", "5", "8"),
    "cpu": ("deer", "horse", "cat", "dog", "automobile", "truck"),
    "gpu": ("deer", "horse", "cat", "dog", "automobile", "truck"),
}
SEEN = 2000  # labelled images of the target that a score may look at
HELD_OUT = 400  # of those, kept by the linear probe to be judged on

PROXIES: dict[str, Callable[[], ProxyLoss]] = {
    "centred alignment": partial(objectives.CentredAlignment, KERNEL),
    "alignment": partial(objectives.Alignment, KERNEL),
    "NMSE, balanced": partial(objectives.NMSE, KERNEL, balanced=True),
    "raw, balanced": partial(objectives.Raw, KERNEL, balanced=True),
    "SupCon": partial(objectives.SupCon, 0.07, KERNEL),
}


@dataclass(frozen=True)
class Source:
    """A trained hidden module's view of all images: outputs, unit features, its own head's answers."""

    outputs: Tensor
    features: Tensor
    logits: Tensor


def run(
    profile: str = "smoke",
    seed: int = 0,
    *,
    root: str | Path | None = None,
    results: str | Path = "book/results",
    runs: str | Path = "runs",
    device: str = "auto",
) -> Record:
    """Train every task's network, score all pairs, and write the record.

    Args:
        profile, seed, root, results, runs, device: as for recipes' runs.

    Raises:
        ValueError: there is no such profile, or its record exists.
    """
    if profile not in CLASSES:
        raise ValueError(f"profile={profile!r}: the task map has {', '.join(CLASSES)}.")
    target = Path(results) / "transfer" / f"{profile}-seed{seed}.json"
    check_absent(target)
    classes, settings = CLASSES[profile], CIFAR10[profile]
    whole = datasets.load(settings.data, root, size=settings.size, classes=classes)
    tasks = list(itertools.combinations(range(len(classes)), 2))
    folder = Path(runs) / f"transfer-{profile}-seed{seed}"
    rows: list[dict[str, list[float]]] = []
    own, clock = [], _Clock()
    for task in tasks:
        net, accuracy = _network(whole, task, settings, seed, folder, device)
        own.append(accuracy)
        rows.append(_row(net, whole, tasks, seed, clock))
    names = list(rows[0])
    record = {
        "recipe": "transfer",
        "profile": profile,
        "seed": seed,
        "commit": environment.commit(),
        "versions": environment.versions(),
        "hardware": environment.hardware(pick_device(device)),
        "tasks": [[classes[a], classes[b]] for a, b in tasks],
        "source_accuracy": own,
        "matrices": {name: [row[name] for row in rows] for name in names},  # source × target
        "seconds": clock.means(),
    }
    write(record, target)
    return record


def _task(data: Dataset, pair: tuple[int, int]) -> Dataset:
    """The images of two classes, with labels 0 and 1."""
    parts: dict[str, Any] = {"classes": tuple(data.classes[c] for c in pair)}
    for split in ("train", "test"):
        images, labels = data.part(split)
        chosen = (labels == pair[0]) | (labels == pair[1])
        parts[f"{split}_images"] = images[chosen]
        parts[f"{split}_labels"] = (labels[chosen] == pair[1]).astype("int64")
    return replace(data, **parts)


def _network(
    whole: Dataset, pair: tuple[int, int], settings: Profile, seed: int, folder: Path, device: str
) -> tuple[ModularNetwork, float]:
    """The network trained for one task, from the shelf if it is there, and its test accuracy."""
    data = _task(whole, pair)
    net = partition(trunk(settings, data, seed), ["features"])
    path = folder / f"{pair[0]}-{pair[1]}.pt"
    if path.exists():
        card = zoo.load(path, net)
        return net, float(card.notes["accuracy"])
    rates = [sgd(RATES["cifar10-proxy-supcon"]), sgd(OUTPUT_LR, weight_decay=0.0)]
    method = ProxyObjective(PROXIES["SupCon"](), optimizer=rates, cache_features=True, views=2)
    fit(
        net,
        method,
        data,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
        device=device,
        channels_last=settings.channels_last,
        progress=False,
    )
    accuracy = evaluate(net, data).accuracy
    name = "-".join(data.classes)
    zoo.save(net, path, name=name, input_shape=data.shape, accuracy=accuracy, seed=seed)
    return net.cpu(), accuracy


def _row(
    net: ModularNetwork,
    whole: Dataset,
    tasks: list[tuple[int, int]],
    seed: int,
    clock: _Clock,
) -> dict[str, list[float]]:
    """What one source's hidden module gives on every task, by every measure."""
    views = {split: _view(net, whole, split) for split in ("train", "test")}
    clock.time("forward pass of 2,000 images", lambda: extract(net[:-1], whole, n=_seen(whole)))
    found: dict[str, list[float]] = {}
    for pair in tasks:
        train, test = (_pick(*views[split], pair) for split in ("train", "test"))
        for name, value in _measures(train, test, seed, clock).items():
            found.setdefault(name, []).append(value)
    return found


def _view(net: ModularNetwork, data: Dataset, split: Any) -> tuple[Source, Tensor]:
    outputs, labels = extract(net[:-1], data, split)
    with torch.no_grad():
        features = net[-1][0](outputs)
        return Source(outputs, features, net[-1](outputs)), labels


def _pick(source: Source, labels: Tensor, pair: tuple[int, int]) -> tuple[Source, Tensor]:
    chosen = (labels == pair[0]) | (labels == pair[1])
    part = Source(source.outputs[chosen], source.features[chosen], source.logits[chosen])
    return part, (labels[chosen] == pair[1]).long()


def _measures(
    train: tuple[Source, Tensor], test: tuple[Source, Tensor], seed: int, clock: _Clock
) -> dict[str, float]:
    (source, y), (other, y_test) = train, test
    full, held = (source.features, y), (other.features, y_test)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:SEEN]
    seen = Source(source.outputs[order], source.features[order], source.logits[order])
    y = y[order]
    measures: dict[str, Callable[[], float]] = {
        "accuracy": lambda: logistic_head(full, held),
        "linear probe": lambda: _probe((seen.features, y)),
        "centred alignment, no pairs": lambda: transfer.centred_alignment(seen.features, y),
        "LogME": lambda: transfer.log_evidence(seen.features, y),
        "LEEP": lambda: transfer.leep(seen.logits.softmax(1), y),
        "NCE": lambda: transfer.negative_conditional_entropy(seen.logits.argmax(1), y),
    }
    for name, make in PROXIES.items():
        measures[name] = partial(_score, make(), seen.outputs, y)
    return {name: clock.time(name, measure) for name, measure in measures.items()}


def _score(objective: ProxyLoss, outputs: Tensor, y: Tensor) -> float:
    return -float(objective(outputs, y))


def _probe(seen: Features) -> float:
    """Held-out accuracy of a head trained on most of the images that a score may look at."""
    features, y = seen
    held = min(HELD_OUT, len(y) // 5)
    return logistic_head((features[held:], y[held:]), (features[:held], y[:held]))


def _seen(data: Dataset) -> int:
    return min(SEEN, len(data.test_labels))


class _Clock:
    """Mean seconds of everything that is timed under one name."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def time(self, name: str, what: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = what()
        self.spent.setdefault(name, []).append(time.perf_counter() - start)
        return value

    def means(self) -> dict[str, float]:
        return {name: sum(spent) / len(spent) for name, spent in self.spent.items()}


def main() -> None:
    options = arguments(__doc__).parse_args()
    record = run(options.profile, options.seed, results=options.results, runs=options.runs)
    print(f"transfer, seed {options.seed}: {len(record['tasks'])} tasks")


if __name__ == "__main__":
    told(main)
