"""What a trained module makes of a data set: one forward pass, and the outputs are kept."""

from __future__ import annotations

import math
from itertools import islice

import torch
from torch import Tensor, nn

from modlib import kernels
from modlib.data import Dataset, Loader
from modlib.data.loader import Split
from modlib.kernels import Kernel
from modlib.network import evaluating, in_precision
from modlib.objectives.cross_entropy import check_labels


def extract(
    module: nn.Module,
    data: Dataset,
    split: Split = "test",
    *,
    kernel: str | Kernel | None = None,
    n: int | None = None,
    batch_size: int = 500,
) -> tuple[Tensor, Tensor]:
    """A module's outputs for a split, in eval mode, without augmentation, on the module's device.

    Args:
        module: takes images (N, C, H, W) or vectors (N, d): hidden modules ``net[:-1]``, say.
        data: what to run it on.
        split: "test" or "train".
        kernel: give the unit vectors (n, D) of this kernel's feature map in place of the outputs.
        n: the first n images only (``data.subset`` draws them evenly); all of them if None.
        batch_size: images a forward pass.

    Returns:
        Outputs (n, ...), or features (n, D), in float32 at least; and labels (n,).

    Raises:
        ValueError: n is below 1 or above what there is.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10], kernel="relu"), ["features"])
    >>> features, labels = extract(net[:-1], modlib.data.load("digits"), kernel="relu", n=100)
    >>> features.shape, labels.shape, bool(features.norm(dim=1).max() < 1.001)
    (torch.Size([100, 32]), torch.Size([100]), True)
    """
    reference = next(module.parameters(), torch.empty(0))
    loader = Loader(
        data, split, batch_size, device=reference.device, shuffle=False, drop_last=False
    )
    if n is not None and not 1 <= n <= loader.n:
        raise ValueError(
            f"n={n}: {data.name!r} has {loader.n} {split} images; give 1 to that many."
        )
    batches = islice(loader.epoch(0, 0), None if n is None else math.ceil(n / batch_size))
    with evaluating(module):
        found = [
            (_features(module(in_precision(x, reference)), kernel), y.clone()) for x, y in batches
        ]
    features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return features[:n], labels[:n]


def check_features(name: str, rows: Tensor, labels: Tensor, classes: int) -> None:
    """Refuse what is no matrix (n, D) of finite numbers with one label below ``classes`` a row.

    Raises:
        ValueError: naming what does not fit.
    """
    if rows.dim() != 2:
        raise ValueError(f"{name}: give a matrix (n, D), not shape {tuple(rows.shape)}.")
    check_labels(labels, len(rows), classes)
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{name}: they hold NaN or infinity; is the module trained and alive?")


def _features(h: Tensor, kernel: str | Kernel | None) -> Tensor:
    return kernels.wide(h) if kernel is None else kernels.get(kernel).features(h)
