"""Named experiments, each in three sizes: ``smoke`` (seconds), ``cpu`` (minutes), ``gpu`` (paper scale)."""

from modlib.experiments.recipes import cifar10, mnist, papers, strong
from modlib.experiments.recipes.recipe import Profile, Recipe

__all__ = ["RATES", "RECIPES", "TUNED", "Profile", "Recipe"]

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for room in (cifar10, mnist, papers, strong) for recipe in room.RECIPES
}
"""Every recipe by its name."""

# Recipes as functions of the learning rate, for tuning.
TUNED = {**cifar10.TUNED, **mnist.TUNED}
# The best of the rates tried on held-out training images: book/results/learning-rates.json (a test compares).
RATES = {**cifar10.RATES, **mnist.RATES}
