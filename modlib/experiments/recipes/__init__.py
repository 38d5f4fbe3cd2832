"""Named experiments, each in three sizes: ``smoke`` (seconds), ``cpu`` (minutes), ``gpu`` (paper scale)."""

from modlib.experiments.recipes import cifar10, mnist, papers
from modlib.experiments.recipes.recipe import Profile, Recipe

__all__ = ["RECIPES", "Profile", "Recipe"]

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for room in (cifar10, mnist, papers) for recipe in room.RECIPES
}
