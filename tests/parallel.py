"""Processes of one run, each with one module: what test_parallel.py starts, kills and resumes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import modlib
from modlib.methods import (
    DelayedGradients,
    FeaturesReplay,
    LocalLearning,
    Method,
    ProxyObjective,
    infopro,
    local_error_signals,
    mono_forward,
)
from modlib.network import ModularNetwork, partition
from modlib.objectives import SupCon
from modlib.parallel import ModuleParallel


def _dense(modules: int) -> ModularNetwork:
    """Batch norm keeps statistics, dropout draws, in every module but the last."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(modules - 1):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.3), nn.ReLU()]
    starts = ["5", "9", "13"][: modules - 1]
    return partition(nn.Sequential(*layers, nn.Linear(64, 10)), starts)


def _cnn(modules: int) -> ModularNetwork:
    net = modlib.networks.cnn((4, 8), 10, channels=1, size=8, stride=1, kernel="relu", seed=0)
    return partition(net, ["conv3", "features"][-(modules - 1) :])


Case = tuple[Callable[[int], ModularNetwork], Callable[[], Method], dict[str, Any]]
CASES: dict[str, Case] = {
    "greedy": (_dense, LocalLearning, {}),
    "infopro": (_cnn, infopro, {"channels_last": True}),
    "predsim": (_cnn, local_error_signals, {}),
    "mono-forward": (_dense, mono_forward, {"precision": "bfloat16"}),
    "streamed": (_cnn, lambda: ProxyObjective(SupCon(kernel="relu")), {"epochs": 1}),
    "stored": (
        _cnn,
        lambda: ProxyObjective(SupCon(kernel="relu"), cache_features=True, views=2),
        {},
    ),
    "in turn": (_dense, lambda: LocalLearning(in_turn=True), {"epochs": 1}),
    "old errors": (_dense, FeaturesReplay, {}),
    "old gradients": (_dense, DelayedGradients, {}),
}


def train(case: str, modules: int, **options: Any) -> tuple[list[dict[str, Any]], ModularNetwork]:
    """Run a case: its rows and its network."""
    make_net, make_method, own = CASES[case]
    net = make_net(modules)
    data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    settings = {"epochs": 2, "batch_size": 64, "seed": 1, "device": "cpu", "progress": False}
    history = modlib.fit(net, make_method(), data, **{**settings, **own, **options})
    return history.rows, net


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def be(rank: int, size: int, port: int, errors: Path) -> None:
    """Become a process that torchrun might have started; standard error goes to a file."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)


def all_cases(rank: int, size: int, port: int, folder: Path) -> None:
    """Every case in one group, one after another; the first process saves what came out."""
    be(rank, size, port, folder / f"errors{rank}")
    with ModuleParallel() as parallel:
        for case in CASES:
            rows, net = train(case, size, parallel=parallel)
            if rank == 0:
                torch.save({"rows": rows, "net": net.state_dict()}, folder / f"{case}.pt")


def one(
    rank: int,
    size: int,
    port: int,
    folder: Path,
    case: str = "old errors",
    replay: int = 0,
    patience: float = 20.0,
    setup: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
    **options: Any,
) -> None:
    """One case, with or without a checkpoint; ends as the ``modlib`` command would."""
    be(rank, size, port, folder / f"errors{rank}")
    if setup:
        setup(rank, *arguments)
    try:
        with ModuleParallel(replay=replay, patience=patience) as parallel:
            rows, net = train(case, size, parallel=parallel, **options)
            if rank == 0:
                torch.save({"rows": rows, "net": net.state_dict()}, folder / "out.pt")
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"modlib: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


# --- what goes wrong ------------------------------------------------------------------------------


def after_steps(count: int, do: Callable[[], None]) -> None:
    """When the optimisers of this process have taken so many steps, something happens."""
    steps = 0

    def hook(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == count:
            do()

    register_optimizer_step_post_hook(hook)


def slow(rank: int, seconds: float = 0.05) -> None:
    register_optimizer_step_post_hook(lambda *_: time.sleep(seconds))


def slow_below(rank: int) -> None:
    if rank == 0:
        slow(rank)


def die(rank: int, victim: int, steps: int) -> None:
    """As by kill -9, in the middle of a step."""
    if rank == victim:
        after_steps(steps, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hang(rank: int, victim: int, steps: int) -> None:
    """It does not end, and says nothing more."""
    if rank == victim:
        after_steps(steps, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def small_disk(rank: int, victim: int, bytes_: int) -> None:
    """No file of this process may become larger than this."""
    if rank == victim:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as an error of the write
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))


def cut_connections(rank: int, victim: int, steps: int) -> None:
    """Every connection of this process is closed, while it lives on."""

    def cut() -> None:
        for name in os.listdir("/proc/self/fd"):
            try:
                if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    sock = socket.socket(fileno=os.dup(int(name)))
                    if sock.type == socket.SOCK_STREAM and sock.family != socket.AF_UNIX:
                        sock.shutdown(socket.SHUT_RDWR)
                    sock.close()
            except OSError:
                pass  # one that listens, or is gone

    if rank == victim:
        after_steps(steps, cut)
