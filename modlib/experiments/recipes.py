"""Named experiments, each in three sizes: ``smoke`` (seconds), ``cpu`` (minutes), ``gpu`` (paper scale)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modlib import data as datasets
from modlib import networks, objectives
from modlib.data import Dataset
from modlib.methods import (
    E2EBP,
    DifferenceTargetPropagation,
    LocalLearning,
    Method,
    ProxyObjective,
    sgd,
)
from modlib.network import ModularNetwork, partition
from modlib.objectives import Objective


@dataclass(frozen=True)
class Profile:
    """The size of a run.

    Attributes:
        data: name of the data set.
        widths: of the network.
        epochs: of every module but an output module that is trained alone.
        output_epochs: of an output module that is trained alone, on stored features.
        stride: of the network's first convolution.
        n_train, n_test: class-balanced subsets; None takes all.
        size: resize images to this side; None leaves them.
        batch_size: images a step.
        channels_last: memory layout.
    """

    data: str
    widths: tuple[int, ...]
    epochs: int
    output_epochs: int = 1
    stride: int = 2
    n_train: int | None = None
    n_test: int | None = None
    size: int | None = None
    batch_size: int = 128
    channels_last: bool = True

    def load(self, root: str | Path | None) -> Dataset:
        """The data set, or its subset."""
        data = datasets.load(self.data, root, size=self.size)
        if self.n_train is None and self.n_test is None:
            return data
        return data.subset(n_train=self.n_train, n_test=self.n_test)


_SMOKE = Profile("digits", (8, 8, 16), 1, 1, n_train=512, n_test=256, size=32, batch_size=64)
CIFAR10 = {
    "smoke": _SMOKE,
    "cpu": Profile("cifar10", (24, 48, 96), 8, 8),
    "gpu": Profile("cifar10", (64, 128, 256), 60, 20, stride=1),
}
MNIST = {
    "smoke": Profile("digits", (32, 32, 32), 1, n_train=512, n_test=256, channels_last=False),
    "cpu": Profile("mnist", (240,) * 5, 10, channels_last=False),
    "gpu": Profile("mnist", (240,) * 7, 100, channels_last=False),
}


@dataclass(frozen=True)
class Recipe:
    """A network, where it is cut, and how it is trained.

    Attributes:
        name: of the recipe and of its records.
        cut: first layers of the later modules; or a number of modules, balanced by activation
            memory; 0 makes every layer a module.
        method: makes the training method.
        note: the choices that matter (learning rates and the like), for the record.
        profiles: the sizes it comes in.
        build: makes the network from (profile, data, seed).
        output_apart: the output module is a stage of its own, on stored features.
    """

    name: str
    cut: tuple[str, ...] | int
    method: Callable[[], Method]
    note: Mapping[str, Any]
    profiles: Mapping[str, Profile] = field(default_factory=lambda: CIFAR10)
    build: Callable[[Profile, Dataset, int], nn.Module] = field(default_factory=lambda: _cnn)
    output_apart: bool = False

    def network(self, profile: Profile, data: Dataset, seed: int, x: Tensor) -> ModularNetwork:
        """The network, cut; x is a batch to balance the cut on."""
        net = self.build(profile, data, seed)
        if isinstance(self.cut, tuple):
            return partition(net, self.cut)
        return partition(net, self.cut or len(list(net.children())), sample=x)

    def epochs(self, profile: Profile, modules: int) -> int | tuple[int, ...]:
        """Epochs of every stage."""
        if self.output_apart:
            return (*[profile.epochs] * (modules - 1), profile.output_epochs)
        return profile.epochs

    def settings(self) -> dict[str, Any]:
        """What the record says of the recipe."""
        return {"cut": self.cut, **self.note}


def _cnn(profile: Profile, data: Dataset, seed: int) -> nn.Module:
    channels, size, _ = data.shape
    return networks.cnn(
        profile.widths,
        len(data.classes),
        channels=channels,
        size=size,
        stride=profile.stride,
        seed=seed,
    )


def _tanh_mlp(profile: Profile, data: Dataset, seed: int) -> nn.Module:
    pixels = torch.Size(data.shape).numel()
    sizes = [pixels, *profile.widths, len(data.classes)]
    return networks.mlp(sizes, activation=nn.Tanh, boundary="after", seed=seed)


# --- the recipes ----------------------------------------------------------------------------------


def _e2ebp(name: str, lr: float, **options: Any) -> Recipe:
    return Recipe(name, 3, partial(E2EBP, optimizer=sgd(lr)), {"lr": lr}, **options)


def _local(name: str, lr: float, in_turn: bool) -> Recipe:
    method = partial(LocalLearning, in_turn=in_turn, optimizer=sgd(lr))
    return Recipe(name, 3, method, {"lr": lr, "auxiliary": "mlp-sr"})


def _mnist(name: str, method: Callable[[], Method]) -> Recipe:
    """A tanh network cut after every layer, trained by RMSprop as Lee et al. 2015 did."""
    return Recipe(name, 0, method, {"lr": 1e-3}, MNIST, _tanh_mlp)


def _proxy(name: str, objective: Callable[[], Objective], lr: float, *cut: str) -> Recipe:
    def method() -> Method:
        optimizers = [*[sgd(lr)] * (len(cut) + 1), sgd(OUTPUT_LR, weight_decay=0.0)]
        return ProxyObjective(objective(), optimizer=optimizers, cache_features=True, views=2)

    note = {"lr": lr, "output_lr": OUTPUT_LR, "objective": repr(objective()), "views": 2}
    return Recipe(name, (*cut, "features"), method, note, output_apart=True)


OUTPUT_LR = 1.0  # of an output module alone: a convex problem on unit vectors, the same for all
KERNEL = "relu-pool"

# The published objectives, then what mends them: pairs weighed equally, centred, per anchor.
# (Balanced weights leave the diagonal out, so balanced UTAL is balanced alignment.)
_PROXIES: dict[str, Callable[[], Objective]] = {
    "raw": partial(objectives.Raw, KERNEL),
    "nmse": partial(objectives.NMSE, KERNEL),
    "alignment": partial(objectives.Alignment, KERNEL),
    "utal": partial(objectives.UpperTriangleAlignment, KERNEL),
    "contrastive": partial(objectives.Contrastive, KERNEL),
    "log-contrastive": partial(objectives.LogContrastive, KERNEL),
    "raw-balanced": partial(objectives.Raw, KERNEL, balanced=True),
    "nmse-balanced": partial(objectives.NMSE, KERNEL, balanced=True),
    "alignment-balanced": partial(objectives.Alignment, KERNEL, balanced=True),
    "contrastive-balanced": partial(objectives.Contrastive, KERNEL, balanced=True),
    "log-contrastive-balanced": partial(objectives.LogContrastive, KERNEL, balanced=True),
    "centred-alignment": partial(objectives.CentredAlignment, KERNEL),
    "supcon": partial(objectives.SupCon, 0.07, KERNEL),
}

# Recipes as functions of the learning rate, for tuning.
TUNED: dict[str, Callable[[float], Recipe]] = {
    "cifar10-e2ebp": lambda lr: _e2ebp("cifar10-e2ebp", lr),
    "cifar10-dgl": lambda lr: _local("cifar10-dgl", lr, in_turn=False),
    **{
        f"cifar10-proxy-{key}": partial(_proxy, f"cifar10-proxy-{key}", make)
        for key, make in _PROXIES.items()
    },
}

# The best of those tried on held-out training images: book/results/tuning/cifar10.json (a test compares).
RATES: dict[str, float] = {
    "cifar10-e2ebp": 1.0,
    "cifar10-dgl": 1.0,
    "cifar10-proxy-supcon": 0.1,
    "cifar10-proxy-log-contrastive-balanced": 0.03,
    "cifar10-proxy-centred-alignment": 0.3,
    "cifar10-proxy-utal": 1.0,
    "cifar10-proxy-nmse-balanced": 1.0,
    "cifar10-proxy-contrastive": 0.1,
    "cifar10-proxy-alignment-balanced": 0.3,
    "cifar10-proxy-raw": 0.01,
    "cifar10-proxy-nmse": 1.0,
    "cifar10-proxy-alignment": 1.0,
    "cifar10-proxy-log-contrastive": 1.0,
    "cifar10-proxy-raw-balanced": 0.01,
    "cifar10-proxy-contrastive-balanced": 0.03,
}

_SUPCON = RATES["cifar10-proxy-supcon"]

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *(make(RATES[name]) for name, make in TUNED.items()),
        _local("cifar10-greedy", RATES["cifar10-dgl"], in_turn=True),
        _proxy("cifar10-proxy3-supcon", _PROXIES["supcon"], _SUPCON, "conv5"),
        _mnist("mnist-dtp", DifferenceTargetPropagation),
        _mnist("mnist-e2ebp", partial(E2EBP, optimizer=partial(torch.optim.RMSprop, lr=1e-3))),
    )
}
