"""CIFAR-10: end-to-end backpropagation, proxy objectives, and every local objective, on one network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from modlib import methods, objectives
from modlib.experiments.recipes.recipe import (
    Recipe,
    cifar10_for,
    trunk,
    watch_angles,
    watch_synthetic,
)
from modlib.methods import E2EBP, Method, ProxyObjective, sgd
from modlib.methods.method import MakeOptimizer
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
        optimizers = [*[sgd(lr)] * (len(cut) + 1), sgd(OUTPUT_LR, weight_decay=0.0)]
        return ProxyObjective(objective(), optimizer=optimizers, cache_features=True, views=2)

    note = {"lr": lr, "output_lr": OUTPUT_LR, "objective": repr(objective()), "views": 2}
    return Recipe(name, (*cut, "features"), method, note, output_apart=True, **options)


# InfoPro's weights of (reconstruction, labels) of the first and the last hidden module, by number of
# modules: those published for cuts balanced by memory. (None are published for six; four have the same as
# three.)
_INFOPRO: dict[int, tuple[tuple[float, float], tuple[float, float] | None]] = {
    2: ((5.0, 0.1), None),
    3: ((5.0, 0.0), (5.0, 0.1)),
    6: ((5.0, 0.0), (5.0, 0.1)),
}

# Local objectives on networks cut into 2, 3 or 6 modules, as functions of the optimiser.
LOCAL: dict[str, Callable[[MakeOptimizer, int], Method]] = {
    "greedy-1": lambda make, _: methods.layerwise_greedy(1, optimizer=make),
    "greedy-2": lambda make, _: methods.layerwise_greedy(2, optimizer=make),
    "cascade": lambda make, _: methods.cascade(optimizer=make),
    "dgl": lambda make, _: methods.decoupled_greedy(optimizer=make),
    "dgl-cnn": lambda make, _: methods.decoupled_greedy("cnn", optimizer=make),
    "pred": lambda make, _: methods.local_error_signals("pred", optimizer=make),
    "sim": lambda make, _: methods.local_error_signals("sim", optimizer=make),
    "predsim": lambda make, _: methods.local_error_signals("predsim", optimizer=make),
    "mono-forward": lambda make, _: methods.mono_forward(optimizer=make),
    "random": lambda make, _: methods.random_classifiers(optimizer=make),
    "auglocal": lambda make, _: methods.AugLocal(optimizer=make),
    "infopro-softmax": lambda make, k: methods.infopro(
        *_INFOPRO[k], form="softmax", optimizer=make
    ),
    "infopro-contrast": lambda make, k: methods.infopro(
        *_INFOPRO[k], form="contrast", optimizer=make
    ),
}
# The same objectives in the other order: all modules in each step, or one after another.
OTHER_ORDER: dict[str, Callable[[MakeOptimizer, int], Method]] = {
    "greedy-1-together": lambda make, _: methods.decoupled_greedy("greedy-1", optimizer=make),
    "predsim-in-turn": lambda make, _: methods.local_error_signals(
        "predsim", in_turn=True, optimizer=make
    ),
}
ADAM = {"pred", "sim", "predsim", "predsim-in-turn", "cdni"}  # as published; all others by SGD


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
        partial({**LOCAL, **OTHER_ORDER}[key], make, modules),
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
    "cifar10-fr-k3": 0.1,
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
