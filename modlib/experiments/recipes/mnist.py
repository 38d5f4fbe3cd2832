"""MNIST: the CIFAR-10 network on digits, the HSIC bottleneck, target propagation, and errors that come late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from modlib import methods
from modlib.experiments.recipes.cifar10 import RATES, e2ebp, proxy
from modlib.experiments.recipes.recipe import (
    MNIST,
    MNIST_CNN,
    MNIST_HSIC,
    Recipe,
    norm_mlp,
    tanh_mlp,
    watch_angles,
)
from modlib.methods import E2EBP, DifferenceTargetPropagation, Method, sgd
from modlib.objectives import SupCon


def _mnist(name: str, method: Callable[[], Method]) -> Recipe:
    """A tanh network cut after every layer, trained by RMSprop as Lee et al. 2015 did."""
    return Recipe(name, 0, method, {"lr": 1e-3}, MNIST, tanh_mlp)


def _late(name: str, method: type[methods.DelayedGradients]) -> Recipe:
    """The same, by errors that come down one layer a step."""
    make = partial(method, optimizer=partial(torch.optim.RMSprop, lr=1e-3))
    return replace(_mnist(name, make), watch=watch_angles)


def _mnist_norm(name: str, lr: float, method: Callable[[], Method]) -> Recipe:
    """A ReLU network with batch norm cut after every layer, as Ma et al. 2020 trained it."""
    return Recipe(name, 0, method, {"lr": lr}, MNIST_HSIC, norm_mlp)


RECIPES: list[Recipe] = [
    proxy(
        "mnist-cnn-supcon",
        partial(SupCon, 0.07, "relu-pool"),
        RATES["cifar10-proxy-supcon"],
        profiles=MNIST_CNN,
    ),
    e2ebp("mnist-cnn-e2ebp", RATES["cifar10-e2ebp"], profiles=MNIST_CNN),
    _mnist_norm("mnist-hsic", 0.1, methods.hsic_bottleneck),
    _mnist_norm("mnist-norm-e2ebp", 0.1, partial(E2EBP, optimizer=sgd(0.1))),
    _mnist("mnist-dtp", DifferenceTargetPropagation),
    _mnist("mnist-e2ebp", partial(E2EBP, optimizer=partial(torch.optim.RMSprop, lr=1e-3))),
    _late("mnist-ddg", methods.DelayedGradients),
    _late("mnist-fr", methods.FeaturesReplay),
]
