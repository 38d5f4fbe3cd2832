"""Runs that are killed or interrupted, in processes of their own: what other tests resume."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import modlib.cli
import modlib.experiments
from modlib.methods import (
    ADMM,
    E2EBP,
    MAC,
    BlockCoordinateDescent,
    DelayedGradients,
    DifferenceTargetPropagation,
    FeaturesReplay,
    LocalLearning,
    Method,
    ProxyObjective,
    SyntheticGradients,
    l_drl,
)
from modlib.network import ModularNetwork, partition
from modlib.objectives import SupCon


def _cnn() -> ModularNetwork:
    net = modlib.networks.cnn((4, 8), 10, channels=1, size=8, stride=1, kernel="relu", seed=0)
    return partition(net, ["conv3", "features"])


def _tanh() -> ModularNetwork:
    net = modlib.networks.mlp([64, 16, 16, 10], activation=nn.Tanh, boundary="after", seed=0)
    return partition(net, 3)


def _dropout_between() -> ModularNetwork:
    """Dropout and batch norm in modules that wait for their errors."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(2):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.3), nn.ReLU()]
    return partition(nn.Sequential(*layers, nn.Linear(64, 10)), ["5", "9"])


def _relus() -> ModularNetwork:
    net = modlib.networks.mlp([64, 16, 16, 16, 10], boundary="after", seed=0)
    return partition(net, 4)


def _dropout() -> ModularNetwork:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.Dropout(), nn.ReLU(), nn.Linear(32, 10)]
    return partition(nn.Sequential(*layers), ["3"])


CASES: dict[str, tuple[Callable[[], ModularNetwork], Callable[[], Method], dict[str, Any]]] = {
    "end to end": (_cnn, E2EBP, {"epochs": 3}),
    "channels last": (_cnn, E2EBP, {"epochs": 2, "channels_last": True}),
    "half precision": (_cnn, E2EBP, {"epochs": 2, "precision": "float16"}),
    "in turn": (_cnn, lambda: LocalLearning(in_turn=True), {"epochs": [1, 2, 1]}),
    "cached views": (
        _cnn,
        lambda: ProxyObjective(SupCon(kernel="relu"), cache_features=True, views=2),
        {"epochs": [1, 1, 2]},
    ),
    "noise": (_tanh, DifferenceTargetPropagation, {"epochs": 2, "schedule": "constant"}),
    "old gradients": (_dropout_between, DelayedGradients, {"epochs": 2}),
    "old errors": (_dropout_between, FeaturesReplay, {"epochs": 2, "precision": "float16"}),
    "learned inverses": (_cnn, lambda: l_drl(from_output=False, inverse_steps=2), {"epochs": 2}),
    "synthetic": (_tanh, lambda: SyntheticGradients(synthetic_inputs=True), {"epochs": 2}),
    "codes": (_relus, lambda: BlockCoordinateDescent(alpha=1.0), {"epochs": 3}),
    "multiplier": (_relus, lambda: ADMM(warm_start=1), {"epochs": 3}),
    "growing penalty": (_relus, lambda: MAC(every=1, inner=2), {"epochs": 3}),
    "dropout": (_dropout, LocalLearning, {"epochs": 2}),
}


def train(case: str, checkpoint: Path | None = None) -> tuple[list[dict[str, Any]], nn.Module]:
    """Run a case, or go on with it; its rows and the trained network."""
    torch.set_num_threads(1)
    make_net, make_method, options = CASES[case]
    data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    net = make_net()
    history = modlib.fit(
        net,
        make_method(),
        data,
        batch_size=64,
        seed=1,
        checkpoint=checkpoint,
        resume=checkpoint is not None,
        progress=False,
        **options,
    )
    return history.rows, net


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at(count: int, before: Callable[..., Any], after: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does ``before`` until its call number ``count``, when it does ``after``."""
    calls = 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (after if calls == count else before)(*args, **kwargs)

    return patched


def train_and_die(case: str, checkpoint: Path, event: str, count: int) -> None:
    """Go on with a case until the given event comes for the time number ``count``."""
    save, replace = torch.save, os.replace

    def half(state: Any, file: Any) -> None:
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        _die()

    def replaced(*args: Any) -> None:
        replace(*args)
        _die()

    if event == "step":  # in the middle of an epoch
        kill = _at(count, lambda *_: None, _die)

        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if not isinstance(optimizer, torch.optim.LBFGS):  # a solver within a step is no step
                kill()

        register_optimizer_step_post_hook(hook)
    elif event == "half":  # half of a checkpoint is written
        torch.save = _at(count, save, half)
    elif event == "written":  # all of it, but not yet in its place
        os.replace = _at(count, replace, _die)
    elif event == "replaced":  # between two epochs
        os.replace = _at(count, replace, replaced)
    train(case, checkpoint)


def long_recipe() -> Any:
    """A recipe whose smoke run has epochs enough to be interrupted between them."""
    recipe = modlib.experiments.RECIPES["cifar10-e2ebp"]
    smoke = dataclasses.replace(recipe.profiles["smoke"], epochs=5)
    return dataclasses.replace(recipe, name="long", profiles={"smoke": smoke})


def command(arguments: list[str], errors: Path) -> None:
    """The ``modlib`` command with that recipe and slow steps; standard error goes to a file."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit it ignored
    modlib.experiments.RECIPES["long"] = long_recipe()
    register_optimizer_step_post_hook(lambda *_: time.sleep(0.05))
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(modlib.cli.main(arguments))
