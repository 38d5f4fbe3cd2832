"""A live comparison of the three categories, in seconds: the first thing a reader runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modlib import data as datasets
from modlib import networks
from modlib.audit import audit
from modlib.data import Dataset, Loader
from modlib.methods import E2EBP, LocalLearning, Method, ProxyObjective, sgd
from modlib.network import ModularNetwork, partition
from modlib.objectives import SupCon
from modlib.training import fit, pick_device

Row = dict[str, Any]


def compare(
    data: str = "digits",
    *,
    epochs: int = 5,
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
    """
    dataset = datasets.load(data, root)
    if len(dataset.shape) != 3:
        raise ValueError(
            f"data={data!r} holds no images; choose an image data set such as 'digits'."
        )
    rows = []
    for method, cut in _entries():
        net = _network(dataset, seed, cut)
        rows.append(_row(method, net, dataset, epochs, seed, device, progress))
    return rows


def _entries() -> list[tuple[Method, Sequence[str]]]:
    hidden, output = sgd(0.1), sgd(1.0, weight_decay=0.0)
    proxy = SupCon(temperature=0.1, kernel="relu-pool")
    return [
        (E2EBP(optimizer=sgd(0.5)), ["conv3"]),
        (LocalLearning(optimizer=hidden), ["conv3"]),
        (ProxyObjective(proxy, optimizer=[hidden, output]), ["features"]),
    ]


def _network(data: Dataset, seed: int, cut: Sequence[str]) -> ModularNetwork:
    channels, size, _ = data.shape
    widths, stride = ((16, 32), 1) if size < 28 else ((24, 48, 96), 2)
    if size == 28:
        stride = 1  # 28 → 14 → 7: the last map must not be smaller than its pooling window
    net = networks.cnn(
        widths, len(data.classes), channels=channels, size=size, stride=stride, seed=seed
    )
    return partition(net, cut)


def _row(
    method: Method,
    net: ModularNetwork,
    data: Dataset,
    epochs: int,
    seed: int,
    device: str,
    progress: bool,
) -> Row:
    x, y = Loader(data, device=pick_device(device)).sample(128)
    measured = audit(method, net.to(x.device), (x, y))
    history = fit(net, method, data, epochs=epochs, seed=seed, device=device, progress=progress)
    return {
        "method": type(method).__name__,
        "category": measured.category,
        "test_accuracy": history.final["test_accuracy"],
        "wall_s": round(sum(history.seconds), 3),
        "peak_saved_bytes": measured.peak_saved_bytes,
    }
