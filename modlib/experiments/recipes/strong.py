"""CIFAR-10 with what makes the fast recipes fast: a baseline worth beating, and each ingredient left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from modlib import networks
from modlib.data import Augment, Dataset, Loader
from modlib.experiments.recipes.comparison import Comparison
from modlib.experiments.recipes.recipe import Profile, Recipe
from modlib.methods import adamw, sgd
from modlib.methods.method import MakeOptimizer

STRONG = {
    "smoke": Profile(
        "digits",
        (8, 8, 16),
        1,
        1,
        stride=1,
        n_train=256,
        n_test=128,
        size=16,
        batch_size=64,
        precision="bfloat16",
    ),
    "cpu": Profile("cifar10", (32, 64, 128), 12, 8, stride=1, batch_size=256, precision="bfloat16"),
    "gpu": Profile("cifar10", (64, 256, 256), 10, 10, stride=1, batch_size=1024),
}


@dataclass(frozen=True)
class Ingredients:
    """What the recipe is made of; ``replace`` one to leave it out.

    Attributes:
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

    momentum: float = 0.85
    decay: float = 5e-4
    decoupled: bool = True
    bias_rate: float = 16.0
    smoothing: float = 0.2
    flip: Any = "alternate"
    pad: int = 2
    whiten: bool = True
    norm_momentum: float = 0.4

    def sgd(self, lr: float) -> MakeOptimizer:
        decay = self.decay if self.decoupled else self.decay / lr
        return sgd(lr, self.momentum, decay, decoupled=self.decoupled, bias_rate=self.bias_rate)

    def adam(self, lr: float) -> MakeOptimizer:
        """Without bias rates, which Adam does not need."""
        return adamw(lr, self.decay)


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


def comparison(ingredients: Ingredients) -> Comparison:
    """All methods by these ingredients; modules end where maps are halved."""
    return Comparison(
        "cifar10-strong",
        STRONG,
        partial(strong_cnn, ingredients),
        {2: ("conv3",), 3: ("conv3", "conv5")},
        ingredients.sgd,
        ingredients.adam,
        smoothing=ingredients.smoothing,
        note={"ingredients": repr(ingredients)},
        options={
            "augment": Augment(pad=ingredients.pad, flip=ingredients.flip),
            "flip_at_test": True,
        },
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
_ALL = comparison(FULL)

# Recipes as functions of the learning rate, for tuning.
TUNED: dict[str, Callable[[float], Recipe]] = {
    "cifar10-strong-e2ebp": _ALL.e2ebp,
    **{
        f"cifar10-strong-modular-{proxy}": partial(_ALL.modular, proxy)
        for proxy in ("supcon", "centred-alignment")
    },
    "cifar10-strong-greedy": partial(_ALL.local, "greedy", objective="greedy-2"),
    **{
        f"cifar10-strong-{key}": partial(_ALL.local, key)
        for key in ("dgl", "auglocal", "infopro-softmax", "infopro-contrast", "predsim")
    },
}
# First guesses, until the search has been run: then a rate moves to RATES.
UNTUNED: dict[str, float] = {
    "cifar10-strong-e2ebp": 1.0,
    "cifar10-strong-modular-supcon": 0.1,
    "cifar10-strong-modular-centred-alignment": 0.3,
    "cifar10-strong-greedy": 0.3,
    "cifar10-strong-dgl": 1.0,
    "cifar10-strong-auglocal": 1.0,
    "cifar10-strong-infopro-softmax": 0.3,
    "cifar10-strong-infopro-contrast": 0.3,
    "cifar10-strong-predsim": 0.003,
}
RATES: dict[str, float] = {}
_E2EBP_LR = {**UNTUNED, **RATES}["cifar10-strong-e2ebp"]


def longer(epochs: int) -> Recipe:
    """End-to-end backpropagation for as many operations as a dearer method takes."""
    profiles = {**STRONG, "cpu": replace(STRONG["cpu"], epochs=epochs)}
    return _ALL.e2ebp(_E2EBP_LR, f"e2ebp-{epochs}-epochs", profiles=profiles)


RECIPES: list[Recipe] = [
    *(make({**UNTUNED, **RATES}[name]) for name, make in TUNED.items()),
    _ALL.e2ebp(_E2EBP_LR, "e2ebp-recomputed", recompute=True),
    longer(14),  # as many operations as the modular recipes
    longer(18),  # … as greedy learning (17.3), AugLocal (18.5) and InfoPro (18.0)
    *(comparison(rest).e2ebp(_E2EBP_LR, f"e2ebp-without-{key}") for key, rest in WITHOUT.items()),
]
