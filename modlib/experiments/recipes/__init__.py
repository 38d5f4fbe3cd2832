"""Named experiments, each in three sizes: ``smoke`` (seconds), ``cpu`` (minutes), ``gpu`` (paper scale)."""

from modlib.experiments.recipes import (
    cifar10,
    imagenet,
    mnist,
    papers,
    strong,
    sweeps,
    tiny_imagenet,
)
from modlib.experiments.recipes.recipe import Profile, Recipe

__all__ = ["RATES", "RECIPES", "TUNED", "UNTUNED", "Profile", "Recipe"]

LISTED: list[Recipe] = [
    recipe
    for room in (cifar10, mnist, papers, strong, tiny_imagenet, sweeps, imagenet)
    for recipe in room.RECIPES
]
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in LISTED}
"""Every recipe by its name."""

# Recipes as functions of the learning rate, for tuning.
TUNED = {**cifar10.TUNED, **mnist.TUNED, **strong.TUNED, **tiny_imagenet.TUNED}
# The best of the rates tried on held-out training images: book/results/learning-rates.json (a test compares).
RATES = {**cifar10.RATES, **mnist.RATES, **strong.RATES, **tiny_imagenet.RATES}
# First guesses, where nothing has been tried yet.
UNTUNED = {**strong.UNTUNED, **tiny_imagenet.UNTUNED}
