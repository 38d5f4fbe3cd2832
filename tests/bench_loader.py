"""How much faster than torchvision are augmented CIFAR-10 batches delivered?

    python tests/bench_loader.py [--repeats 5] [--root DIR]

Both sides deliver one epoch of float32 batches of 128 on the CPU: random crop of 32 after padding
by 4, horizontal flip, normalisation. torchvision's side is its CIFAR10 data set (a PIL image an
item) with its transforms in a DataLoader with two workers. Repeats alternate between the sides,
so that both meet the same machine; a ratio compares two neighbours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

import modlib.data
from modlib.data import Augment, Dataset, Loader

BATCH = 128


class Pictures(torch.utils.data.Dataset[tuple[Any, int]]):
    """The same arrays as torchvision.datasets.CIFAR10 serves them."""

    def __init__(self, data: Dataset) -> None:
        self.images, self.labels = np.array(data.train_images), data.train_labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def seconds(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Time to walk over one epoch."""
    start = time.perf_counter()
    for x, _ in batches:
        assert x.dtype == torch.float32 and x.shape == (BATCH, 3, 32, 32)
    return time.perf_counter() - start


def main() -> None:
    """Print seconds an epoch and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--root", help="where cifar10 lies prepared (default: $MODLIB_DATA)")
    options = parser.parse_args()
    data = modlib.data.load("cifar10", options.root)
    theirs = torch.utils.data.DataLoader(
        Pictures(data), BATCH, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True
    )
    augment = Augment(pad=4, flip=True, mode="zeros")
    ours = {
        "contiguous": Loader(data, "train", BATCH, augment=augment),
        "channels_last": Loader(data, "train", BATCH, augment=augment, channels_last=True),
    }
    seconds(theirs)  # starts the workers
    for loader in ours.values():
        seconds(loader.epoch(0, 0))
    times: dict[str, list[float]] = {name: [] for name in ours}
    base = []
    for repeat in range(options.repeats):
        base.append(seconds(theirs))
        for name, loader in ours.items():
            times[name].append(seconds(loader.epoch(seed=0, epoch=1 + repeat)))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), batch {BATCH}")
    print(f"torchvision, 2 workers: {statistics.median(base):.2f} s an epoch (median)")
    for name, mine in times.items():
        ratios = [b / m for b, m in zip(base, mine, strict=True)]
        print(
            f"modlib, {name}: {statistics.median(mine):.3f} s an epoch; faster by "
            f"min {min(ratios):.1f}, median {statistics.median(ratios):.1f}, max {max(ratios):.1f}"
        )


if __name__ == "__main__":
    main()
