"""How much faster do two processes train than one?

    python tests/bench_parallel.py [--pairs 9] [--width 32] [--replay 0]

Decoupled greedy learning of a convolutional network in two modules, on the CPU: one process with one thread,
and two processes with one thread each. Both are timed again and again in turn, on the same data, by what
``fit`` says of its epochs but the first; the median of the pairs is given, with the smallest and the largest.
No more than the sum of the modules' times over the longest of them can be reached; that is measured too. Times
mean something only on a machine with two cores or more that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from modlib import fit, partition
from modlib.data import Dataset, Loader
from modlib.methods import decoupled_greedy
from modlib.network import ModularNetwork
from modlib.parallel import ModuleParallel

BATCH, STEPS, EPOCHS = 64, 20, 3


def noise() -> Dataset:
    """Images of CIFAR-10's shape; what they show costs nothing."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH * STEPS, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(len(images)) % 10
    return Dataset("noise", images, labels, images[:BATCH], labels[:BATCH])


def network(width: int) -> ModularNetwork:
    """Equal convolutions on maps of 16 × 16: three and the images' own in one module, four in the other.

    A module's first convolution sends no gradient to its input, and the first module has a head beside it.
    """
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(8):
        given, stride = (width, 1) if number else (3, 2)
        convolution = nn.Conv2d(given, width, 3, stride, padding=1, bias=False)
        layers[f"conv{number}"] = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())
    layers["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return partition(nn.Sequential(layers), ["conv4"])


def shares(data: Dataset, width: int) -> list[float]:
    """Seconds of each module's part of a step, the median of many."""
    net = network(width)
    x, y = Loader(data, batch_size=BATCH).sample(BATCH)
    (stage,) = decoupled_greedy().stages(net, x)
    stage.train()
    taken: list[list[float]] = [[] for _ in net]
    for _ in range(12):
        h = x
        for k in range(len(net)):
            clock = time.perf_counter()
            h = stage.forward(k, h)
            stage.learn(k, h, y, x)
            taken[k].append(time.perf_counter() - clock)
    return [statistics.median(times[2:]) for times in taken]


def seconds(data: Dataset, width: int, parallel: ModuleParallel | None) -> float:
    """Of a step."""
    options = {"epochs": EPOCHS, "batch_size": BATCH, "device": "cpu", "augment": None}
    history = fit(
        network(width), decoupled_greedy(), data, progress=False, parallel=parallel, **options
    )
    return statistics.median(history.seconds[1:]) / STEPS


def main() -> None:
    """Print the ratio of one process's time to that of two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--replay", type=int, default=0)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", "2", __file__, *sys.argv[1:]]
        raise SystemExit(
            subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        )
    torch.set_num_threads(1)
    data = noise()
    with ModuleParallel(replay=options.replay) as parallel:
        apart, ones, twos = [], [], []
        for _ in range(options.pairs):
            if parallel.rank == 0:
                apart.append(shares(data, options.width))
                ones.append(seconds(data, options.width, None))
            parallel.share()  # the other process has waited, and done nothing
            twos.append(seconds(data, options.width, parallel))
        if parallel.rank:
            return
    modules = [statistics.median(times) for times in zip(*apart, strict=True)]
    ratios = [one / two for one, two in zip(ones, twos, strict=True)]
    one, two = statistics.median(ones), statistics.median(twos)
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, batch {BATCH}, width {options.width}"
    )
    print("modules: " + ", ".join(f"{1e3 * t:.1f} ms" for t in modules) + " of a step")
    print(f"one process {1e3 * one:.1f} ms a step, two {1e3 * two:.1f} ms")
    print(
        f"ratio {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f} in "
        f"{options.pairs} pairs; at most {sum(modules) / max(modules):.2f} with these modules"
    )


if __name__ == "__main__":
    main()
