"""What a reader sees of the library before any page of the book: ``help()``, and names that are there."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
from types import ModuleType

import pytest

import modlib


def screen(module: ModuleType) -> list[str]:
    return pydoc.render_doc(module, renderer=pydoc.plaintext).splitlines()


def public(module: ModuleType) -> set[str]:
    """Its functions and classes, wherever they are written."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value))
    } - {"ModuleType"}


@pytest.mark.parametrize(
    ("module", "lines"),
    [(modlib, 100), (modlib.objectives, 60), (modlib.networks, 60)],
    ids=["modlib", "objectives", "networks"],
)
def test_help_names_everything_public_on_its_first_screen(module: ModuleType, lines: int) -> None:
    """Not the members of torch's layers: with them these pages had 1,592, 20,582 and 4,680 lines."""
    text = screen(module)
    assert len(text) <= lines
    named = set(re.findall(r"\w+", " ".join(text[: text.index("PACKAGE CONTENTS")])))
    assert public(module) <= named


def test_help_tells_of_functions_first() -> None:
    text = screen(modlib)
    for name in ("partition", "fit", "evaluate", "audit"):
        assert (
            next(i for i, line in enumerate(text) if f"{name}(net" in line or f"{name}(m" in line)
            < 40
        )
    parts = re.findall(r"^    (\w+)  ", inspect.getdoc(modlib) or "", re.MULTILINE)
    assert len(parts) > 8 and all(isinstance(getattr(modlib, part), ModuleType) for part in parts)


def test_every_part_is_there_after_import_modlib_and_matplotlib_only_when_it_is_used() -> None:
    script = (
        "import sys, modlib; assert 'matplotlib' not in sys.modules; assert 'viz' in dir(modlib); "
        "modlib.viz.table; assert 'matplotlib' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="'modlib' has no attribute 'vis'"):
        modlib.vis  # noqa: B018
