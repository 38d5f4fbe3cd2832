"""How much faster than torchvision are augmented batches delivered?

    python tests/bench_loader.py [--repeats 5] [--root DIR]
    python tests/bench_loader.py --tree FOLDER [--size 64] [--images 4000]

Both sides deliver one epoch of float32 batches of 128 on the CPU, augmented and normalised. Without --tree
these are CIFAR-10's arrays: random crop of 32 after padding by 4, horizontal flip; torchvision's side is its
CIFAR10 data set (a PIL image an item). With --tree they come from a folder tree of pictures, such as an unpacked
ImageNet subset: torchvision's side is its ImageFolder, which decodes the pictures in each epoch; ours is the same
tree prepared as memory-mapped arrays, and not held in memory. torchvision's transforms run in a DataLoader with
two workers. Repeats alternate between the sides, so that both meet the same machine; a ratio compares two
neighbours. How long the tree takes to prepare, once, is said too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets, transforms

import modlib.data
from modlib.data import Augment, Dataset, Loader

BATCH, WORKERS = 128, 2
Pair = tuple[Iterable[Any], Callable[[int], Iterable[tuple[Tensor, Tensor]]]]


class Pictures(torch.utils.data.Dataset[tuple[Any, int]]):
    """The same arrays as torchvision.datasets.CIFAR10 serves them."""

    def __init__(self, data: Dataset, transform: Any) -> None:
        self.images, self.labels = np.array(data.train_images), data.train_labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def theirs(pictures: Any) -> Iterable[Any]:
    """Shuffled batches by torchvision's practice."""
    return torch.utils.data.DataLoader(
        pictures, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True
    )


def transform(data: Dataset, *steps: Any) -> Any:
    """A picture to a normalised tensor."""
    return transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    )


def cifar10(root: str | None) -> dict[str, Pair]:
    """Crop and flip of arrays."""
    data = modlib.data.load("cifar10", root)
    steps = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()
    base = theirs(Pictures(data, transform(data, *steps)))
    augment = Augment(pad=4, flip=True, mode="zeros")
    pairs = {}
    for name, last in (("contiguous", False), ("channels_last", True)):
        loader = Loader(data, "train", BATCH, augment=augment, channels_last=last)
        pairs[name] = base, lambda epoch, loader=loader: loader.epoch(0, epoch)
    return pairs


def folders(tree: Path, root: str, size: int, images: int) -> dict[str, Pair]:
    """Resized crops of a folder tree's pictures, with flips and changes of colour."""
    start = time.perf_counter()
    data = modlib.data.load(str(tree), root, size=size)
    seconds_ = time.perf_counter() - start
    count = len(data.train_labels) + len(data.test_labels)
    print(f"prepared {count} pictures of {tree.name} at {size}x{size} in {seconds_:.1f} s, once")
    crop = transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()
    settings = {
        "resized crop, flip": (crop, {}),
        "resized crop, flip, brightness, contrast, saturation": (
            (*crop, transforms.ColorJitter(0.4, 0.4, 0.4)),
            {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
        ),
        "resized crop, flip, all colours": (
            (*crop, transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)),
            {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
        ),
    }
    # The same number of pictures for both sides, from anywhere in the tree.
    few = np.random.default_rng(0).permutation(len(data.train_labels))[:images]
    pairs = {}
    for name, (steps, colours) in settings.items():
        whole = datasets.ImageFolder(str(tree / "train"), transform(data, *steps))
        base = theirs(torch.utils.data.Subset(whole, few.tolist()))
        augment = Augment(0, scale=(0.08, 1), **colours)
        loader = Loader(data, "train", BATCH, augment=augment, memory="map")

        def ours(epoch: int, loader: Loader = loader) -> Iterable[tuple[Tensor, Tensor]]:
            batches = zip(range(len(few) // BATCH), loader.epoch(0, epoch), strict=False)
            return (batch for _, batch in batches)

        pairs[name] = base, ours
    return pairs


def seconds(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Time to walk over one epoch."""
    start = time.perf_counter()
    for x, _ in batches:
        assert x.dtype == torch.float32 and x.shape[:2] == (BATCH, 3)
    return time.perf_counter() - start


def report(name: str, pair: Pair, repeats: int) -> None:
    """Print seconds an epoch and the ratios."""
    base, ours = pair
    seconds(base), seconds(ours(0))  # starts the workers
    times = [(seconds(base), seconds(ours(1 + repeat))) for repeat in range(repeats)]
    ratios = [b / m for b, m in times]
    slow, fast = (statistics.median(side) for side in zip(*times, strict=True))
    print(
        f"{name}: torchvision {slow:.2f} s an epoch, modlib {fast:.3f} s (medians); faster by "
        f"min {min(ratios):.1f}, median {statistics.median(ratios):.1f}, max {max(ratios):.1f}"
    )


def main() -> None:
    """Compare on arrays, or on a folder tree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--root", help="where cifar10 lies prepared (default: $MODLIB_DATA)")
    parser.add_argument("--tree", type=Path, help="a folder tree of pictures")
    parser.add_argument("--size", type=int, default=64, help="side in pixels (default: 64)")
    parser.add_argument("--images", type=int, default=4000, help="in an epoch (default: 4000)")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), batch {BATCH}, torchvision with "
        f"{WORKERS} workers"
    )
    with tempfile.TemporaryDirectory() as place:
        if options.tree:
            pairs = folders(options.tree, place, options.size, options.images)
        else:
            pairs = cifar10(options.root)
        for name, pair in pairs.items():
            report(name, pair, options.repeats)


if __name__ == "__main__":
    main()
