"""Does it scale? On Tiny ImageNet one thing changes at a time: classes, modules, width, epochs."""

from __future__ import annotations

from dataclasses import replace

from modlib.experiments.recipes import tiny_imagenet
from modlib.experiments.recipes.recipe import Profile, Recipe
from modlib.experiments.recipes.tiny_imagenet import RESNET_COMPARISON

# Half the run of the comparison on a narrower network; all its 20 classes, three modules.
_CLASSES, _WIDTH, _EPOCHS = 20, 12, 8
BASE = {
    "smoke": RESNET_COMPARISON.profiles["smoke"],
    "cpu": replace(
        RESNET_COMPARISON.profiles["cpu"],
        widths=tuple(_WIDTH * 2**group for group in range(4)),
        epochs=_EPOCHS,
    ),
}
AXES: dict[str, tuple[int, ...]] = {
    "classes": (2, 5, 10),
    "modules": (2, 4, 5),
    "width": (6, 24),
    "epochs": (2, 4, 16),
}


def _profile(profile: Profile, axis: str, value: int) -> Profile:
    """With fewer classes there are fewer images, and as many more epochs: all networks take as many steps."""
    if axis == "classes":
        return replace(profile, classes=value, epochs=profile.epochs * _CLASSES // value)
    if axis == "width":
        return replace(profile, widths=tuple(w * value // _WIDTH for w in profile.widths))
    return replace(profile, epochs=value) if axis == "epochs" else profile


def sweep(method: str, axis: str = "base", value: int = 0) -> Recipe:
    """A point of a sweep: "e2ebp" or "greedy", at the rate that was found for the comparison."""
    profiles = {**BASE, "cpu": _profile(BASE["cpu"], axis, value)}
    lr = {**tiny_imagenet.UNTUNED, **tiny_imagenet.RATES}[f"{RESNET_COMPARISON.name}-{method}"]
    base = replace(RESNET_COMPARISON, name="sweep", profiles=profiles, note={"sweep": axis})
    key = method if axis == "base" else f"{axis}-{value}-{method}"
    if method == "e2ebp":
        return base.e2ebp(lr, key)
    return base.local(key, lr, value if axis == "modules" else 3, "greedy-2")


RECIPES: list[Recipe] = [
    *(sweep(method) for method in ("e2ebp", "greedy")),
    *(
        sweep(method, axis, value)
        for axis, values in AXES.items()
        for value in values
        for method in ("e2ebp", "greedy")
        if (axis, method) != ("modules", "e2ebp")  # which has one, and is the base
    ),
]
