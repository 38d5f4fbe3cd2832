"""A network, its data and its loader, on which methods are compared: every method trains the same thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from modlib.experiments.recipes.methods import (
    ADAM,
    OUTPUT_LR,
    PROXIES,
    end_to_end,
    local,
    modular,
)
from modlib.experiments.recipes.recipe import Profile, Recipe
from modlib.methods import Method
from modlib.methods.method import MakeOptimizer


@dataclass(frozen=True)
class Comparison:
    """What all methods share; each of its functions makes a recipe of one of them.

    Attributes:
        name: with which the recipes' names begin.
        profiles: the sizes it comes in.
        build: makes the network from (profile, data, seed, boundary); its output module begins with the
            layer ``features``.
        cuts: by number of modules, as ``Recipe.cut``; for a proxy objective, which puts another cut before
            ``features``, by number of hidden modules.
        optimizer: of the rate.
        adam: likewise, for methods that were published with Adam.
        kernel: of the network's feature map.
        smoothing: of the labels.
        note: what records say of all.
        options: of the recipes, such as ``augment``.
    """

    name: str
    profiles: Mapping[str, Profile]
    build: Callable[..., nn.Module]
    cuts: Mapping[int, tuple[str, ...] | int]
    optimizer: Callable[[float], MakeOptimizer]
    adam: Callable[[float], MakeOptimizer]
    kernel: str = "relu"
    smoothing: float = 0.0
    note: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def e2ebp(
        self, lr: float, key: str = "e2ebp", recompute: bool = False, **options: Any
    ) -> Recipe:
        """End-to-end backpropagation, on a network cut in three where its memory is."""
        method = partial(end_to_end, self.optimizer(lr), self.smoothing, recompute)
        return self._recipe(key, 3, method, lr, "after", **options)

    def local(
        self, key: str, lr: float, modules: int = 3, objective: str = "", **options: Any
    ) -> Recipe:
        """A local objective, by its key in ``recipes.methods``; ``key`` names the recipe."""
        objective = objective or key
        make = (self.adam if objective in ADAM else self.optimizer)(lr)
        method = partial(local, objective, modules, make, self.smoothing)
        note = {"objective": objective}
        return self._recipe(key, self.cuts[modules], method, lr, "after", note, **options)

    def modular(self, proxy: str, lr: float, modules: int = 2) -> Recipe:
        """A proxy objective; with three modules or more the trunk is cut as well."""
        hidden = modules - 1
        trunk = self.cuts[hidden] if hidden > 1 else ()
        assert not isinstance(trunk, int)

        def method() -> Method:
            make = self.optimizer(lr)
            return modular(PROXIES[proxy](self.kernel), hidden, make, self.smoothing)

        key = f"modular-{proxy}" + (f"-k{modules}" if hidden > 1 else "")
        note = {"output_lr": OUTPUT_LR, "objective": proxy, "views": 2}
        return self._recipe(
            key, (*trunk, "features"), method, lr, "before", note, output_apart=True
        )

    def _recipe(
        self,
        key: str,
        cut: tuple[str, ...] | int,
        method: Callable[[], Method],
        lr: float,
        boundary: str,
        note: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Recipe:
        return Recipe(
            f"{self.name}-{key}",
            cut,
            method,
            {"lr": lr, **self.note, **(note or {}), "boundary": boundary},
            build=partial(self.build, boundary=boundary),
            **{"profiles": self.profiles, **self.options, **options},
        )
