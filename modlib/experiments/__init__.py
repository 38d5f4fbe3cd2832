"""Named recipes, and the records that running them writes."""

from modlib.experiments.compare import compare
from modlib.experiments.recipes import RECIPES, Profile, Recipe
from modlib.experiments.run import run

__all__ = ["RECIPES", "Profile", "Recipe", "compare", "run"]
