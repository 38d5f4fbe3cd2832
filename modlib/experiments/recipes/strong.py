"""CIFAR-10 with what makes the fast recipes fast: a baseline worth beating, and each ingredient left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from modlib import networks
from modlib.data import Augment, Dataset, Loader
from modlib.experiments.recipes.recipe import Profile, Recipe
from modlib.methods import E2EBP, Method, sgd
from modlib.methods.method import MakeOptimizer
from modlib.objectives import CrossEntropy

STRONG = {
    "smoke": Profile(
        "digits", (8, 8), 1, 1, stride=1, n_train=512, n_test=256, size=16, batch_size=64
    ),
    "cpu": Profile("cifar10", (32, 64, 128), 12, 8, stride=1, batch_size=256, precision="bfloat16"),
    "gpu": Profile("cifar10", (64, 256, 256), 10, 10, stride=1, batch_size=1024),
}


@dataclass(frozen=True)
class Ingredients:
    """What the recipe is made of; ``replace`` one to leave it out.

    Attributes:
        lr: the highest learning rate.
        momentum: of SGD.
        decay: the share that a weight loses in a step at full rate.
        decoupled: decay does not grow with the rate; without it, decay is an L2 penalty of as much at full rate.
        bias_rate: factor on the rates of biases.
        smoothing: of the labels.
        flip: of the augmentation.
        pad: pixels by which images are moved.
        whiten: the first layer whitens; without it, it is an ordinary convolution of as many channels.
        norm_momentum: of the batch norms' running statistics.
    """

    lr: float = 1.0
    momentum: float = 0.85
    decay: float = 5e-4
    decoupled: bool = True
    bias_rate: float = 16.0
    smoothing: float = 0.2
    flip: Any = "alternate"
    pad: int = 2
    whiten: bool = True
    norm_momentum: float = 0.4

    def optimizer(self) -> MakeOptimizer:
        decay = self.decay if self.decoupled else self.decay / self.lr
        return sgd(
            self.lr, self.momentum, decay, decoupled=self.decoupled, bias_rate=self.bias_rate
        )

    def augment(self) -> Augment:
        return Augment(pad=self.pad, flip=self.flip)


def strong_cnn(
    ingredients: Ingredients, profile: Profile, data: Dataset, seed: int, boundary: str = "after"
) -> nn.Module:
    """The whitened network; its whitening is that of some training images."""
    images, _ = Loader(data).sample(min(2000, len(data.train_labels)))
    net = networks.whitened_cnn(
        images,
        profile.widths,
        len(data.classes),
        stride=profile.stride,
        boundary=boundary,
        momentum=ingredients.norm_momentum,
        seed=seed,
    )
    if not ingredients.whiten:
        (whitening, *rest) = net.whiten  # type: ignore[misc]
        plain = nn.Conv2d(images.shape[1], len(whitening.weight), 2, profile.stride)
        net.whiten = nn.Sequential(plain, *rest)
    return net


def _end_to_end(ingredients: Ingredients) -> Method:
    return E2EBP(CrossEntropy(ingredients.smoothing), optimizer=ingredients.optimizer())


def e2ebp(name: str, ingredients: Ingredients, **options: Any) -> Recipe:
    """End-to-end backpropagation by these ingredients."""
    return Recipe(
        name,
        3,
        partial(_end_to_end, ingredients),
        {"lr": ingredients.lr, "ingredients": repr(ingredients)},
        build=partial(strong_cnn, ingredients),
        profiles=STRONG,
        augment=ingredients.augment(),
        flip_at_test=True,
        **options,
    )


FULL = Ingredients()
# Each ingredient left out: what it gives is the difference to the whole.
WITHOUT: Mapping[str, Ingredients] = {
    "whitening": replace(FULL, whiten=False),
    "alternating-flip": replace(FULL, flip=True),
    "smoothing": replace(FULL, smoothing=0.0),
    "decoupled-decay": replace(FULL, decoupled=False),
    "bias-rate": replace(FULL, bias_rate=1.0),
    "norm-momentum": replace(FULL, norm_momentum=0.1),
}


RECIPES: list[Recipe] = [
    e2ebp("cifar10-strong-e2ebp", FULL),
    *(e2ebp(f"cifar10-strong-e2ebp-without-{name}", rest) for name, rest in WITHOUT.items()),
]
