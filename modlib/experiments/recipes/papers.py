"""The papers' own networks and settings, for a GPU."""

from __future__ import annotations

from functools import partial

import torch

from modlib import methods
from modlib.experiments.recipes.recipe import RESNET, VGG8B, Recipe, resnet, steps, vgg8b
from modlib.methods import E2EBP, Method, sgd


def _vgg8b(name: str, method: Method, modules: int, slope: float) -> Recipe:
    """As published by Nøkland & Eidnes 2019, but for our augmentation."""
    schedule = steps(0.25, 0.5, 0.75, 0.89, 0.94)
    note = {"lr": 5e-4, "schedule": "times 0.25 at 50, 75, 89 and 94 %", "slope": slope}
    build = partial(vgg8b, slope)
    return Recipe(name, modules, lambda: method, note, VGG8B, build, schedule=schedule)


def _resnet(name: str, layers: int, cut: tuple[str, ...], method: Method) -> Recipe:
    """As published by Wang et al. 2021."""
    build, note = partial(resnet, blocks=(layers - 2) // 6), {"lr": 0.8, "schedule": "cosine"}
    return Recipe(name, cut, lambda: method, note, RESNET, build, schedule="cosine")


_ADAM = partial(torch.optim.Adam, lr=5e-4)
_SGD = sgd(0.8, weight_decay=1e-4)
_HALVES = {32: ("block8",), 110: ("block28",)}
_INFOPRO_PUBLISHED: dict[int, tuple[tuple[float, float], tuple[float, float] | None]] = {
    2: ((5.0, 0.5), None),
    4: ((1.0, 0.0), (0.0, 1.0)),
}
_QUARTERS = {32: ("block3", "block8", "block12"), 110: ("block13", "block27", "block41")}

RECIPES: list[Recipe] = [
    _vgg8b("cifar10-vgg8b-e2ebp", E2EBP(optimizer=_ADAM), 1, slope=0.0),
    *(
        _vgg8b(
            f"cifar10-vgg8b-{loss}", methods.local_error_signals(loss, optimizer=_ADAM), 8, slope
        )
        for loss, slope in (("pred", 0.0), ("sim", 0.01), ("predsim", 0.01))
    ),
    *(
        _resnet(f"cifar10-resnet{layers}-{key}-k{len(cut) + 1}", layers, cut, method)
        for layers in (32, 110)
        for cut in (_HALVES[layers], _QUARTERS[layers])
        for key, method in {
            "e2ebp": E2EBP(optimizer=_SGD),
            "dgl": methods.decoupled_greedy(optimizer=_SGD),
            "infopro": methods.infopro(
                *_INFOPRO_PUBLISHED[len(cut) + 1], form="contrast", optimizer=_SGD
            ),
        }.items()
        if key != "e2ebp" or len(cut) == 1
    ),
]
