"""Tiny ImageNet: 20 of its classes on a few cores, all 200 on a GPU; a residual network and a transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from modlib import networks
from modlib.data import Augment, Dataset
from modlib.experiments.recipes.comparison import Comparison
from modlib.experiments.recipes.recipe import Profile, Recipe, resnet
from modlib.methods import adamw, sgd

_SMOKE = Profile("digits", (4, 4, 8, 8), 1, 1, n_train=64, n_test=32, size=64, batch_size=32)
RESNET = {
    "smoke": replace(_SMOKE, blocks=(1, 1, 1, 1)),
    "cpu": Profile(
        "tiny-imagenet-20",
        (24, 48, 96, 192),
        16,
        16,
        precision="bfloat16",
        blocks=(1, 1, 1, 1),
    ),
    "gpu": Profile(
        "tiny-imagenet", (64, 128, 256, 512), 60, 20, batch_size=256, blocks=(2, 2, 2, 2)
    ),
}
VIT = {  # one width for each block; in bfloat16 attention is slower on a processor
    "smoke": replace(_SMOKE, widths=(8,) * 4, channels_last=False),
    "cpu": Profile("tiny-imagenet-20", (64,) * 4, 20, 20, channels_last=False, precision="float32"),
    "gpu": Profile("tiny-imagenet", (192,) * 9, 120, 20, batch_size=256, channels_last=False),
}


def vit(profile: Profile, data: Dataset, seed: int, boundary: str = "after") -> nn.Module:
    """A transformer of patches of 8 × 8 pixels; between its blocks there is but one place to cut."""
    channels, size, _ = data.shape
    (width,) = set(profile.widths)
    return networks.vit(
        width,
        len(profile.widths),
        len(data.classes),
        patch=8,
        channels=channels,
        size=size,
        kernel="relu",
        seed=seed,
    )


_SHARED = {"augment": Augment(pad=0, scale=(0.25, 1.0)), "flip_at_test": True}
RESNET_COMPARISON = Comparison(
    "tiny-imagenet-resnet",
    RESNET,
    resnet,
    {
        2: ("block3",),
        3: ("block2", "block3"),
        4: ("block2", "block3", "block4"),
        5: ("block1", "block2", "block3", "block4"),
    },
    sgd,
    adamw,
    "relu-pool",
    smoothing=0.1,
    options=_SHARED,
)
_VIT = Comparison(
    "tiny-imagenet-vit",
    VIT,
    vit,
    {2: ("block3",)},
    adamw,
    adamw,
    smoothing=0.1,
    options=_SHARED,
)

# Recipes as functions of the learning rate, for tuning.
TUNED: dict[str, Callable[[float], Recipe]] = {
    "tiny-imagenet-resnet-e2ebp": RESNET_COMPARISON.e2ebp,
    "tiny-imagenet-resnet-modular-supcon": partial(RESNET_COMPARISON.modular, "supcon"),
    "tiny-imagenet-resnet-modular-supcon-k3": partial(
        RESNET_COMPARISON.modular, "supcon", modules=3
    ),
    "tiny-imagenet-resnet-greedy": partial(RESNET_COMPARISON.local, "greedy", objective="greedy-2"),
    **{
        f"tiny-imagenet-resnet-{key}": partial(RESNET_COMPARISON.local, key)
        for key in ("dgl", "predsim", "auglocal", "infopro-softmax", "infopro-contrast")
    },
    "tiny-imagenet-vit-e2ebp": _VIT.e2ebp,
    "tiny-imagenet-vit-modular-supcon": partial(_VIT.modular, "supcon"),
    # the classifier of greedy learning is convolutional; tokens have the perceptron of the cascade
    "tiny-imagenet-vit-greedy": partial(_VIT.local, "greedy", modules=2, objective="cascade"),
    # each decoder works on 64 × 64 pixels and takes more operations than the whole transformer: one is enough
    "tiny-imagenet-vit-infopro-softmax": partial(_VIT.local, "infopro-softmax", modules=2),
}
# First guesses, until the search has been run: then a rate moves to RATES.
UNTUNED: dict[str, float] = {
    "tiny-imagenet-resnet-e2ebp": 0.3,
    "tiny-imagenet-resnet-modular-supcon": 0.1,
    "tiny-imagenet-resnet-modular-supcon-k3": 0.1,
    "tiny-imagenet-resnet-greedy": 0.3,
    "tiny-imagenet-resnet-dgl": 0.3,
    "tiny-imagenet-resnet-predsim": 0.003,
    "tiny-imagenet-resnet-auglocal": 0.3,
    "tiny-imagenet-resnet-infopro-softmax": 0.1,
    "tiny-imagenet-resnet-infopro-contrast": 0.1,
    "tiny-imagenet-vit-e2ebp": 0.001,
    "tiny-imagenet-vit-modular-supcon": 0.001,
    "tiny-imagenet-vit-greedy": 0.001,
    "tiny-imagenet-vit-infopro-softmax": 0.001,
}
RATES: dict[str, float] = {}

RECIPES: list[Recipe] = [make({**UNTUNED, **RATES}[name]) for name, make in TUNED.items()]
