"""CIFAR-10: end-to-end backpropagation, proxy objectives, and every local objective, on one network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from modlib import methods
from modlib.experiments.recipes.methods import (
    ADAM,
    LOCAL,
    OTHER_ORDER,
    OUTPUT_LR,
    PROXIES,
    local,
    modular,
)
from modlib.experiments.recipes.recipe import (
    Recipe,
    cifar10_for,
    trunk,
    watch_angles,
    watch_synthetic,
)
from modlib.methods import E2EBP, Method, sgd
from modlib.networks import ELUSlope
from modlib.objectives import Objective


def e2ebp(name: str, lr: float, **options: Any) -> Recipe:
    """End-to-end backpropagation; options are the recipe's."""
    return Recipe(name, 3, partial(E2EBP, optimizer=sgd(lr)), {"lr": lr}, **options)


def proxy(
    name: str, objective: Callable[[], Objective], lr: float, *cut: str, **options: Any
) -> Recipe:
    """A proxy objective in modules cut at these layers and at the feature map; options are the recipe's."""

    def method() -> Method:
        return modular(objective(), len(cut) + 1, sgd(lr))

    note = {"lr": lr, "output_lr": OUTPUT_LR, "objective": repr(objective()), "views": 2}
    return Recipe(name, (*cut, "features"), method, note, output_apart=True, **options)


# First layers of the later modules, by number of modules.
_LAYERS = ("conv2", "conv3", "conv4", "conv5", "conv6", "features")
_CUTS = {
    2: ("conv3",),
    3: ("conv3", "conv5"),
    4: ("conv2", "conv3", "conv5"),
    6: _LAYERS[:-1],
    7: _LAYERS,
}


def _locally(key: str, modules: int, lr: float, boundary: str = "after") -> Recipe:
    """Modules end after their ReLU, as published, or before it."""
    make = partial(torch.optim.Adam, lr=lr) if key in ADAM else sgd(lr)
    before = "-before" if boundary == "before" else ""
    return Recipe(
        f"cifar10-{key}{before}-k{modules}",
        _CUTS[modules],
        partial(local, key, modules, make),
        {"lr": lr, "objective": key, "boundary": boundary},
        build=partial(trunk, boundary=boundary),
    )


def _recomputing(modules: int, lr: float) -> Recipe:
    """End-to-end backpropagation that keeps the modules' outputs alone."""
    name = f"cifar10-e2ebp-recomputed-k{modules}"
    method = partial(E2EBP, optimizer=sgd(lr), recompute=True)
    build = partial(trunk, boundary="after")
    return Recipe(name, _CUTS[modules], method, {"lr": lr, "boundary": "after"}, build=build)


# Delayed and replayed gradients, and the numbers of modules with which they are measured.
_DELAYED: dict[str, tuple[type[methods.DelayedGradients], tuple[int, ...]]] = {
    "fr": (methods.FeaturesReplay, (2, 3, 4)),
    "ddg": (methods.DelayedGradients, (3,)),
}


def _late(key: str, modules: int, lr: float) -> Recipe:
    """Errors that come down one module a step; how far updates point from the gradient is measured."""
    return Recipe(
        f"cifar10-{key}-k{modules}",
        _CUTS[modules],
        partial(_DELAYED[key][0], optimizer=sgd(lr)),
        {"lr": lr, "boundary": "after"},
        build=partial(trunk, boundary="after"),
        watch=watch_angles,
    )


# Target propagation wants a smooth activation, and modules that end with it: the same network with ELU, cut
# after every layer. The inverses' rates were chosen by the angles of their Jacobians, not by an accuracy. At a
# step of 1/2 the update is meant to be backpropagation's, so the modules' rate is one of its two best, the lower.
_TARGETS: dict[str, Callable[[float], Method]] = {
    "e2ebp": lambda lr: E2EBP(optimizer=sgd(lr)),
    "l-drl": lambda lr: methods.l_drl(
        0.5,
        0.1,
        sgd(lr),
        sgd(0.006, weight_decay=0.0, nesterov=False),
        from_output=False,
        input_activation=ELUSlope,
    ),
    "dtp": lambda lr: methods.DifferenceTargetPropagation(
        0.5, 0.1, sgd(lr), partial(torch.optim.Adam, lr=1e-3), activation=nn.ELU
    ),
}


def _with_elu(key: str, lr: float) -> Recipe:
    """4 epochs, since a step of target propagation costs several of backpropagation's."""
    return Recipe(
        f"cifar10-{key}-elu",
        _LAYERS,
        partial(_TARGETS[key], lr),
        {"lr": lr, "activation": "ELU", "boundary": "after"},
        cifar10_for(4),
        partial(trunk, boundary="after", activation=nn.ELU),
        watch=watch_angles,
    )


def _synthetic(modules: int, lr: float) -> Recipe:
    """Synthetic gradients (cDNI), each from one 3×3 convolution of the maps and from the label."""
    adam = partial(torch.optim.Adam, lr=lr)
    method = partial(methods.SyntheticGradients, "linear", optimizer=adam)
    return Recipe(
        f"cifar10-cdni-k{modules}",
        _CUTS[modules],
        method,
        {"lr": lr, "boundary": "after"},
        build=partial(trunk, boundary="after"),
        watch=watch_synthetic,
    )


# Those of which the other side of the ReLU is measured as well.
BEFORE = (
    "greedy-1", "greedy-2", "cascade", "dgl", "dgl-cnn", "pred", "sim", "predsim", "mono-forward",
    "random", "auglocal",
)  # fmt: skip


KERNEL = "relu-pool"
_PROXIES = {key: partial(make, KERNEL) for key, make in PROXIES.items()}


def _trunk_cut(key: str, lr: float) -> Recipe:
    """Three modules: the trunk is cut as well."""
    return proxy(f"cifar10-proxy3-{key}", _PROXIES[key], lr, "conv5")


# Recipes as functions of the learning rate, for tuning.
TUNED: dict[str, Callable[[float], Recipe]] = {
    "cifar10-e2ebp": lambda lr: e2ebp("cifar10-e2ebp", lr),
    **{
        f"cifar10-proxy-{key}": partial(proxy, f"cifar10-proxy-{key}", make)
        for key, make in _PROXIES.items()
    },
    **{
        f"cifar10-proxy3-{key}": partial(_trunk_cut, key) for key in ("centred-alignment", "supcon")
    },
    **{f"cifar10-{key}-k3": partial(_locally, key, 3) for key in (*LOCAL, *OTHER_ORDER)},
    **{
        f"cifar10-{key}-k{modules}": partial(_late, key, modules)
        for key, (_, numbers) in _DELAYED.items()
        for modules in numbers
    },
    "cifar10-cdni-k3": partial(_synthetic, 3),
    **{f"cifar10-{key}-before-k3": partial(_locally, key, 3, boundary="before") for key in BEFORE},
    **{f"cifar10-{key}-elu": partial(_with_elu, key) for key in _TARGETS},
}

# The best of those tried on held-out training images: book/results/learning-rates.json (a test compares),
# but for one whose full run diverges, which its training loss shows.
RATES: dict[str, float] = {
    "cifar10-e2ebp": 1.0,
    "cifar10-proxy-supcon": 0.1,
    "cifar10-proxy-log-contrastive-balanced": 0.03,
    "cifar10-proxy-centred-alignment": 0.3,
    "cifar10-proxy-utal": 1.0,
    "cifar10-proxy-nmse-balanced": 1.0,
    "cifar10-proxy-contrastive": 0.01,
    "cifar10-proxy-alignment-balanced": 0.3,
    "cifar10-proxy-raw": 0.0003,
    "cifar10-proxy-nmse": 1.0,
    "cifar10-proxy-alignment": 1.0,
    "cifar10-proxy-log-contrastive": 0.001,
    "cifar10-proxy-raw-balanced": 0.003,
    "cifar10-proxy-contrastive-balanced": 0.003,
    "cifar10-proxy3-centred-alignment": 1.0,
    "cifar10-proxy3-supcon": 0.1,
    "cifar10-greedy-1-k3": 0.3,
    "cifar10-dgl-k3": 1.0,
    "cifar10-pred-k3": 0.03,
    "cifar10-mono-forward-k3": 0.1,
    "cifar10-predsim-k3": 0.01,
    "cifar10-sim-k3": 0.03,
    "cifar10-random-k3": 0.3,
    "cifar10-auglocal-k3": 1.0,
    "cifar10-cascade-k3": 0.3,
    "cifar10-dgl-cnn-k3": 1.0,
    "cifar10-greedy-1-together-k3": 0.3,
    "cifar10-greedy-2-k3": 0.3,
    "cifar10-infopro-contrast-k3": 0.3,
    "cifar10-infopro-softmax-k3": 0.3,  # at 1.0, as good in the search, a full run diverges
    "cifar10-predsim-in-turn-k3": 0.01,
    "cifar10-greedy-1-before-k3": 0.3,
    "cifar10-greedy-2-before-k3": 0.3,
    "cifar10-cascade-before-k3": 0.3,
    "cifar10-dgl-before-k3": 1.0,
    "cifar10-dgl-cnn-before-k3": 0.3,
    "cifar10-pred-before-k3": 0.003,
    "cifar10-sim-before-k3": 0.01,
    "cifar10-predsim-before-k3": 0.01,
    "cifar10-mono-forward-before-k3": 0.03,
    "cifar10-random-before-k3": 1.0,
    "cifar10-auglocal-before-k3": 1.0,
    "cifar10-fr-k2": 0.3,
    "cifar10-fr-k3": 0.3,
    "cifar10-fr-k4": 0.3,
    "cifar10-ddg-k3": 0.3,
    "cifar10-cdni-k3": 0.003,
    "cifar10-e2ebp-elu": 1.0,
    "cifar10-l-drl-elu": 0.3,
    "cifar10-dtp-elu": 0.3,
}

RECIPES: list[Recipe] = [
    *(make(RATES[name]) for name, make in TUNED.items()),
    *(_locally(key, k, RATES[f"cifar10-{key}-k3"]) for key in LOCAL for k in (2, 6)),
    *(
        e2ebp(
            f"cifar10-e2ebp-{epochs}-epochs", RATES["cifar10-e2ebp"], profiles=cifar10_for(epochs)
        )
        for epochs in (12, 16, 21, 32)
    ),
    _synthetic(6, RATES["cifar10-cdni-k3"]),
    *(_recomputing(modules, RATES["cifar10-e2ebp"]) for modules in (3, 7)),
    proxy("cifar10-proxy-untrained", _PROXIES["supcon"], 0.0),  # weights stay as drawn
    proxy(
        "cifar10-proxy-supcon-32-epochs",
        _PROXIES["supcon"],
        RATES["cifar10-proxy-supcon"],
        profiles=cifar10_for(32),
    ),
]
