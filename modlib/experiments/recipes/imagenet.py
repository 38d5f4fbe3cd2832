"""ImageNet photographs on networks of published size, for a GPU: Imagenette and ImageNet-100."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from modlib import networks
from modlib.data import Augment, Dataset
from modlib.experiments.recipes.comparison import Comparison
from modlib.experiments.recipes.recipe import Profile, Recipe
from modlib.kernels import FeatureMap
from modlib.methods import adamw, sgd
from modlib.networks.seeding import seeded

_SMOKE = Profile(
    "digits", (8,) * 3, 1, 1, n_train=32, n_test=32, size=32, batch_size=16, blocks=(1, 1, 1, 1)
)
SETS = {
    "imagenette-128": Profile("imagenette", (), 80, 20, size=128),
    "imagenette-224": Profile("imagenette", (), 80, 20, size=224),
    "imagenet-100": Profile("imagenet-100", (), 90, 20, batch_size=256),
}


def resnet(
    block: str, profile: Profile, data: Dataset, seed: int, boundary: str = "after"
) -> nn.Module:
    """torchvision's, with a feature map of unit norm before its last layer; blocks end after their ReLU."""
    from torchvision.models import resnet  # slow to import

    with seeded(seed):
        made = resnet.ResNet(getattr(resnet, block), list(profile.blocks), len(data.classes))
    layers = OrderedDict(made.named_children())
    head = layers.pop("fc")
    layers |= {"flatten": nn.Flatten(), "features": FeatureMap("relu"), "head": head}
    return nn.Sequential(layers)


def vit(profile: Profile, data: Dataset, seed: int, boundary: str = "after") -> nn.Module:
    """A transformer of patches of 16 × 16 pixels, with a head for every 64 units, as ViT-S has."""
    channels, size, _ = data.shape
    width = profile.widths[0]
    return networks.vit(
        width,
        len(profile.widths),
        len(data.classes),
        heads=max(1, width // 64),
        patch=16,
        hidden=4 * width,
        channels=channels,
        size=size,
        kernel="relu",
        seed=seed,
    )


# The function that builds it, what a profile of published size holds, and the cut for a local objective.
_Network = tuple[Callable[..., nn.Module], dict[str, Any], tuple[str, ...] | int]
_NETWORKS: dict[str, _Network] = {
    "resnet18": (partial(resnet, "BasicBlock"), {"blocks": (2, 2, 2, 2)}, ("layer3",)),
    "resnet50": (partial(resnet, "Bottleneck"), {"blocks": (3, 4, 6, 3)}, ("layer3",)),
    "vit-s": (
        vit,
        {"widths": (384,) * 12, "channels_last": False},
        2,
    ),  # where its memory is halved
}


def _recipes(data: str, network: str) -> list[Recipe]:
    """In two modules, as InfoPro is published on ImageNet; rates as is usual for the network, not searched."""
    build, size, cut = _NETWORKS[network]
    tokens = network.startswith("vit")
    comparison = Comparison(
        f"{data}-{network}",
        {"smoke": _SMOKE, "gpu": replace(SETS[data], **size)},
        build,
        {2: cut},
        adamw if tokens else sgd,
        adamw,
        smoothing=0.1,
        options={
            "augment": Augment(pad=0, scale=(0.25, 1.0)),
            "schedule": "cosine",
            "flip_at_test": True,
        },
    )
    lr = 1e-3 if tokens else 0.1
    return [
        comparison.e2ebp(lr),
        comparison.modular("supcon", lr),
        comparison.local("greedy", lr, 2, "cascade" if tokens else "greedy-2"),
        comparison.local("infopro-softmax", lr, 2),
    ]


RECIPES: list[Recipe] = [
    recipe
    for data, network in (
        ("imagenette-128", "resnet18"),
        ("imagenette-224", "resnet18"),
        ("imagenet-100", "resnet18"),
        ("imagenet-100", "resnet50"),
        ("imagenet-100", "vit-s"),
    )
    for recipe in _recipes(data, network)
]
