"""A live comparison of the three categories, in seconds: the first thing a reader runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from modlib import data as datasets
from modlib import networks
from modlib.data import Dataset, Loader
from modlib.measure.audit import audit
from modlib.methods import E2EBP, LocalLearning, Method, ProxyObjective, sgd
from modlib.network import partition
from modlib.objectives import AuxiliaryClassifier, SupCon
from modlib.training import fit, pick_device

Row = dict[str, Any]

_SMALLEST = 7  # pixels a side, of which the last map keeps the 4×4 that its kernel pools


def compare(
    data: str = "digits",
    *,
    epochs: int = 12,
    seed: int = 0,
    root: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
) -> list[Row]:
    """Train the same network by one method of each category.

    Args:
        data: an image data set; "digits" is embedded.
        epochs: of every module.
        seed: of weights, order and augmentation.
        root: where data sets are.
        device: as in ``modlib.fit``.
        progress: show progress bars.

    Returns:
        For each method: its name, the category that the audit measured, test accuracy (0..1),
        seconds of training, and the peak of bytes that autograd held in a step.

    Raises:
        ValueError: the data are no square images of at least 7 pixels a side.

    >>> [row["category"] for row in compare(epochs=1, progress=False)]
    ['end-to-end', 'weakly modular', 'modular']
    """
    dataset = datasets.load(data, root)
    if len(dataset.shape) != 3:
        raise ValueError(
            f"data={data!r} holds no images; choose an image data set such as 'digits'."
        )
    if min(dataset.shape[1:]) < _SMALLEST or dataset.shape[1] != dataset.shape[2]:
        raise ValueError(
            f"data={data!r} holds images of {dataset.shape[1]}×{dataset.shape[2]} pixels; give square "
            f"ones of at least {_SMALLEST}, such as 'digits'."
        )
    loader = Loader(dataset, device=pick_device(device))
    x, y = loader.sample(loader.batch_size)
    rows = []
    for method, cut in _entries():
        net = partition(_network(dataset, seed).to(x.device), cut, sample=x)
        measured = audit(method, net, (x, y))
        history = fit(
            net, method, dataset, epochs=epochs, seed=seed, device=device, progress=progress
        )
        rows.append(
            {
                "method": measured.method,
                "category": measured.category,
                "test_accuracy": history.final["test_accuracy"],
                "wall_s": round(sum(history.seconds), 3),
                "peak_saved_bytes": measured.peak_saved_bytes,
            }
        )
    return rows


def _entries() -> list[tuple[Method, int | Sequence[str]]]:
    """One method of each category, and where it cuts the network."""
    hidden, output = sgd(0.1), sgd(1.0, weight_decay=0.0)
    local = LocalLearning(AuxiliaryClassifier("linear"), optimizer=[hidden, hidden, sgd(0.5)])
    proxy = ProxyObjective(SupCon(0.1, "relu-pool"), optimizer=[hidden, output])
    return [(E2EBP(optimizer=sgd(0.5)), 3), (local, 3), (proxy, ["features"])]


def _network(data: Dataset, seed: int) -> nn.Sequential:
    channels, size, _ = data.shape
    small = size < 32  # few pixels: keep enough of them for the last map's 4×4 pooling
    return networks.cnn(
        (16, 32) if size < 16 else (24, 48, 96),
        len(data.classes),
        channels=channels,
        size=size,
        stride=1 if small else 2,
        seed=seed,
    )
