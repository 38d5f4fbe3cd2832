"""Trains on a prepared set in a process that may take little memory, and may be killed; run by test_large_sets.py.

    python tests/limited.py ROOT CHECKPOINT [--share 0.25] [--kill N]

The limit is what is taken already plus a share of the training images' bytes. With --kill the process ends as by
kill -9 when it is about to read the Nth batch. Prints what came out, as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

import modlib
from modlib.data import Augment, Dataset, Loader
from modlib.data import loader as loader_file

AUGMENT = Augment(0, scale=(0.2, 1), brightness=0.4, contrast=0.4, saturation=0.4)


def fit(data: Dataset, **options: Any) -> tuple[torch.nn.Module, modlib.training.History]:
    """Two epochs of a network that needs little itself."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 16, 16),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(32, len(data.classes)),
    )
    options = {"epochs": 2, "batch_size": 8, "augment": AUGMENT, "progress": False} | options
    method = modlib.methods.E2EBP(optimizer=modlib.methods.sgd(0.001))
    history = modlib.fit(net, method, data, device="cpu", **options)
    return net, history


def taken() -> int:
    """Bytes that count towards the limit."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmData:")[2].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--share", type=float)
    parser.add_argument("--kill", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = np.zeros((64, 32, 32, 3), np.uint8)
    labels = np.arange(64) % 2
    fit(Dataset("warm", small, labels, small, labels), epochs=1)  # libraries take what they need
    out: dict[str, Any] = {}
    size = (options.root / "big" / "train_images.npy").stat().st_size
    if options.share:
        import resource

        most = taken() + int(options.share * size)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    data = modlib.data.load("big", options.root)
    try:
        held = np.array(data.train_images)
        out["fits"] = held.nbytes == size - 128
        del held
    except MemoryError:
        out["fits"] = False
    out["map"] = Loader(data, augment=AUGMENT)._windows is None
    if options.kill:
        read, count = loader_file.take, iter(range(10**9))

        def take(*arguments: Any) -> Any:
            if next(count) == options.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(*arguments)

        loader_file.take = take
    net, history = fit(data, checkpoint=options.checkpoint, resume=True)
    state = b"".join(value.numpy().tobytes() for value in net.state_dict().values())
    out |= {"weights": hashlib.sha256(state).hexdigest(), "rows": history.rows}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
