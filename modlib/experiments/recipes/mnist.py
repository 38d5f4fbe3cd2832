"""MNIST: the CIFAR-10 network on digits, the HSIC bottleneck, target propagation, and errors that come late."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from modlib import methods
from modlib.experiments.recipes.cifar10 import RATES as CIFAR10_RATES
from modlib.experiments.recipes.cifar10 import e2ebp, proxy
from modlib.experiments.recipes.recipe import (
    MNIST,
    MNIST_CNN,
    MNIST_DNI,
    MNIST_HSIC,
    MNIST_WIDE,
    Recipe,
    norm_mlp,
    tanh_mlp,
    watch_angles,
    watch_sweep,
    watch_synthetic,
    wide_before,
    wide_mlp,
    wide_tanh,
)
from modlib.methods import E2EBP, DifferenceTargetPropagation, Method, SyntheticGradients, sgd
from modlib.networks import TanhSlope
from modlib.objectives import SupCon


def _tanh(
    name: str, lr: float, method: Callable[..., Method], augment: str | None = None
) -> Recipe:
    """A tanh network cut after every layer, trained by RMSprop as Lee et al. 2015 did; images are not shifted."""
    rmsprop = partial(torch.optim.RMSprop, lr=lr)
    names = {"optimizer", "inverse_optimizer"} & {*inspect.signature(method).parameters}
    make = partial(method, **dict.fromkeys(names, rmsprop))
    note = {"lr": lr, **({} if augment else {"augment": "none"})}
    return Recipe(name, 0, make, note, MNIST, tanh_mlp, watch=watch_angles, augment=augment)


# Targets, and errors that come down one layer a step; one rate for modules and inverses.
_TANH: dict[str, Callable[..., Method]] = {
    "e2ebp": E2EBP,
    "tp": methods.TargetPropagation,
    "dtp": DifferenceTargetPropagation,
    "dtp-drl": methods.dtp_drl,
    "ddtp": methods.ddtp,
    "l-drl": partial(methods.l_drl, input_activation=TanhSlope),
    "ddg": methods.DelayedGradients,
    "fr": methods.FeaturesReplay,
}


def _mnist_norm(name: str, lr: float, method: Callable[[], Method]) -> Recipe:
    """A ReLU network with batch norm cut after every layer, as Ma et al. 2020 trained it."""
    return Recipe(name, 0, method, {"lr": lr}, MNIST_HSIC, norm_mlp)


def _mnist_synthetic(kind: str, name: str, lr: float) -> Recipe:
    """Synthetic gradients of every layer's output; one rate of Adam for modules and synthesisers."""
    adam = partial(torch.optim.Adam, lr=lr)
    method = partial(
        SyntheticGradients,
        kind,
        conditioned="cdni" in name,
        optimizer=adam,
        synthesiser_optimizer=adam,
    )
    return Recipe(name, 0, method, {"lr": lr}, MNIST_DNI, norm_mlp, watch=watch_synthetic)


def _mnist_end_to_end(lr: float) -> Recipe:
    """The same network and optimiser, end to end."""
    method = partial(E2EBP, optimizer=partial(torch.optim.Adam, lr=lr))
    return Recipe("mnist-dni-e2ebp", 0, method, {"lr": lr}, MNIST_DNI, norm_mlp)


# Recipes as functions of the learning rate, for tuning; and the best of those tried.
TUNED: dict[str, Callable[[float], Recipe]] = {
    "mnist-dni-e2ebp": _mnist_end_to_end,
    "mnist-cdni": partial(_mnist_synthetic, "mlp", "mnist-cdni"),
    "mnist-cdni-linear": partial(_mnist_synthetic, "linear", "mnist-cdni-linear"),
    "mnist-dni": partial(_mnist_synthetic, "mlp", "mnist-dni"),
    **{
        f"mnist-{key}": partial(_tanh, f"mnist-{key}", method=method)
        for key, method in _TANH.items()
    },
}
RATES: dict[str, float] = {
    "mnist-dni-e2ebp": 3e-3,
    "mnist-cdni": 1e-3,
    "mnist-cdni-linear": 3e-3,
    "mnist-dni": 3e-4,
    "mnist-e2ebp": 3e-3,
    "mnist-tp": 1e-3,
    "mnist-dtp": 1e-3,
    "mnist-dtp-drl": 3e-3,
    "mnist-ddtp": 0.01,
    "mnist-l-drl": 3e-3,
    "mnist-ddg": 1e-3,
    "mnist-fr": 1e-3,
}


def _swept(
    name: str, method: Callable[[], Method], epochs: int = 10, n_train: int | None = None
) -> Recipe:
    """A perceptron of one wide hidden layer, trained by sweeps over all images."""
    sizes = {**MNIST_WIDE, "cpu": replace(MNIST_WIDE["cpu"], epochs=epochs, n_train=n_train)}
    return Recipe(
        f"mnist-wide-{name}", 0, method, {}, sizes, wide_mlp, watch=watch_sweep, augment=None
    )


def _in_batches(
    name: str, method: Callable[[], Method], build: Callable[..., nn.Module] = wide_mlp
) -> Recipe:
    """The same network, trained on batches of 128 that are not augmented either."""
    sizes = {name: replace(size, batch_size=128) for name, size in MNIST_WIDE.items()}
    return Recipe(
        f"mnist-wide-{name}", 0, method, {}, sizes, build, watch=watch_angles, augment=None
    )


RECIPES: list[Recipe] = [
    *(make(RATES[name]) for name, make in TUNED.items()),
    proxy(
        "mnist-cnn-supcon",
        partial(SupCon, 0.07, "relu-pool"),
        CIFAR10_RATES["cifar10-proxy-supcon"],
        profiles=MNIST_CNN,
    ),
    e2ebp("mnist-cnn-e2ebp", CIFAR10_RATES["cifar10-e2ebp"], profiles=MNIST_CNN),
    _mnist_norm("mnist-hsic", 0.1, methods.hsic_bottleneck),
    _mnist_norm("mnist-norm-e2ebp", 0.1, partial(E2EBP, optimizer=sgd(0.1))),
    _tanh("mnist-e2ebp-shifted", 1e-3, E2EBP, "auto"),
    _tanh("mnist-dtp-shifted", 1e-3, DifferenceTargetPropagation, "auto"),
    _swept("bcd", partial(methods.BlockCoordinateDescent, alpha=0.1)),
    _swept("bcd-decay", partial(methods.BlockCoordinateDescent, alpha=0.1, weight_decay=1e-3)),
    _swept("admm", partial(methods.ADMM, warm_start=5)),
    _swept("admm-coupled", partial(methods.ADMM, warm_start=5, coupled=True)),
    replace(_swept("mac", partial(methods.MAC, every=2)), build=wide_tanh),
    _swept("lifted", partial(methods.LiftedNetwork, inner=10), epochs=10, n_train=10_000),
    _in_batches("altmin", methods.AlternatingMinimisation, wide_before),
    _in_batches("e2ebp", partial(E2EBP, optimizer=sgd(0.1))),
    replace(_in_batches("tanh-e2ebp", partial(E2EBP, optimizer=sgd(0.1))), build=wide_tanh),
]
