"""What does ``fit`` cost beside the bare PyTorch loop?

    python tests/bench_step.py [--repeats 7] [--threads 1] [--device cpu]

Both sides train the same network end to end on the same batches, with the same optimiser. Epochs
alternate between the sides, so that both meet the same machine, and the median step of each is
compared: from one step's start to the next one's, so that loading and bookkeeping count. Processor
time is given beside wall time because it is the steadier of the two on a machine that does other
things as well (on a GPU only wall time means anything).
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise

import numpy as np
import torch
from torch.nn import functional as F

from modlib import fit, networks, partition
from modlib.data import Augment, Dataset, Loader
from modlib.methods import E2EBP, sgd
from modlib.training import pick_device

BATCH, STEPS = 128, 25
AUGMENT = Augment(pad=4)
Stamp = tuple[float, float]  # wall and processor time


def noise() -> Dataset:
    """Images of CIFAR-10's shape; what they show costs nothing."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH * STEPS, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(len(images)) % 10
    return Dataset("noise", images, labels, images[:BATCH], labels[:BATCH])


def stamp(device: torch.device) -> Stamp:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def bare(data: Dataset, device: torch.device) -> list[Stamp]:
    """The loop that everybody writes."""
    net = networks.cnn(seed=0).to(device).train()
    optimizer = sgd(0.1)(net.parameters())
    loader = Loader(data, "train", BATCH, device=device, augment=AUGMENT)
    stamps = []
    for x, y in loader.epoch(0, 0):
        stamps.append(stamp(device))
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return stamps


def fitted(data: Dataset, device: torch.device) -> list[Stamp]:
    """The same by ``fit``, whose schedule is asked once a step."""
    stamps = []

    def constant(progress: float) -> float:
        stamps.append(stamp(device))
        return 1.0

    net = partition(networks.cnn(seed=0), 3)
    options = {"epochs": 1, "batch_size": BATCH, "augment": AUGMENT, "schedule": constant}
    fit(net, E2EBP(optimizer=sgd(0.1)), data, device=device, precision="float32", **options)
    return stamps


def steps(stamps: list[Stamp]) -> list[tuple[float, float]]:
    """Wall and processor seconds of every step but the first, which warms up."""
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(stamps)][1:]


def main() -> None:
    """Print milliseconds a step and what ``fit`` adds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data, device = noise(), pick_device(options.device)
    sides = {"bare loop": bare, "fit": fitted}
    taken: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in sides}
    for run in sides.values():
        run(data, device)
    for repeat in range(options.repeats):
        order = list(sides) if repeat % 2 else list(sides)[::-1]
        for name in order:
            taken[name].append(steps(sides[name](data, device)))
    print(f"torch {torch.__version__}, {options.threads} thread(s), batch {BATCH}, {device}")
    for clock, kind in enumerate(("wall", "processor")):
        middle = {
            name: statistics.median(step[clock] for run in runs for step in run)
            for name, runs in taken.items()
        }
        text = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in middle.items())
        added = middle["fit"] / middle["bare loop"] - 1
        print(f"{kind} time of the median step: {text}; fit adds {added:+.1%}")


if __name__ == "__main__":
    main()
