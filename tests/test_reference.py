"""The reference: every public name once, with an example that runs, and the chapter that derives it."""

from __future__ import annotations

import doctest
import inspect
import json
import pkgutil
import re
import runpy
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from torch import nn

import modlib

ROOT = Path(__file__).parents[1]
reference = runpy.run_path(str(ROOT / "book/_ext/book_pages/reference.py"))
public, value = reference["public"], reference["value"]
FOLDER = ROOT / "book/reference"
CONTENTS = yaml.safe_load((ROOT / "_toc.yml").read_text())
LISTED = [page for part in CONTENTS["parts"] for page in part["chapters"]]
PAGES = next(p["sections"] for p in LISTED if p["file"] == "book/reference/index")
GROUPS = [ROOT / f"{page['file']}.md" for page in PAGES]


def examples(found: object) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(found) or "")


def described(path: str) -> bool:
    return inspect.isclass(value(path)) or inspect.isfunction(value(path))


def test_every_public_name_has_one_entry() -> None:
    listed = [
        path
        for page in GROUPS
        for file in reference["files"](page)
        for path in reference["entries"](file)
    ]
    assert Counter(listed) == Counter(list(public()))


def test_every_exported_name_is_public() -> None:
    """Whatever stands in an ``__all__`` of the library, but for what recipes keep to themselves."""
    known = {id(value(path)) for path in public()}
    for found in pkgutil.walk_packages(modlib.__path__, "modlib."):
        if found.name != "modlib.__main__" and not found.name.startswith(
            "modlib.experiments.recipes"
        ):
            module = import_module(found.name)
            for name in getattr(module, "__all__", []):
                assert id(getattr(module, name)) in known, f"{found.name}.{name} is in no room"


@pytest.mark.parametrize("path", public())
def test_every_public_name_has_an_example(path: str) -> None:
    """That it runs, the doctests see. A constant is used in an example beside it."""
    if described(path):
        assert examples(value(path)), f"{path} has no example"
    else:
        room, _, name = path.rpartition(".")
        files = public().items()
        others = [value(p) for p, f in files if f.startswith(f"{room}.") and described(p)]
        used = [e.source for other in others for e in examples(other)]
        assert any(re.search(rf"\b{name}\b", source) for source in used), f"{path} has no example"


@pytest.mark.parametrize("path", public())
def test_every_public_name_says_what_it_is_in_one_line(path: str) -> None:
    line = reference["_first_line"](path)
    assert 10 < len(line) < 125 and line[-1] in ".:,`?", f"{path}: {line}"


@cache
def words(page: str) -> str:
    """The text and the code of a page."""
    notebook = ROOT / f"book/{page}.ipynb"
    if notebook.exists():
        cells = json.loads(notebook.read_text())["cells"]
        return "\n".join("".join(cell["source"]) for cell in cells)
    return (ROOT / f"book/{page}.md").read_text()


@pytest.mark.parametrize("file", sorted(set(public().values())))
def test_the_chapter_that_derives_a_file_speaks_of_it(file: str) -> None:
    page = reference["chapter"](file)
    assert f"book/{page}" in {listed["file"] for listed in LISTED}
    names = [path.rpartition(".")[2] for path, where in public().items() if where == file]
    found = [name for name in [*names, file.rpartition(".")[2]] if spoken(name, words(page))]
    assert found, f"{page} names none of {names}"


def spoken(name: str, text: str) -> bool:
    """As code, or as words: CrossEntropy is spoken of as cross-entropy."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return re.search(r"\b" + r"[\s_-]?".join(parts) + r"s?\b", text, re.IGNORECASE) is not None


def test_no_row_of_the_table_is_idle() -> None:
    files = set(public().values())
    for row in reference["DERIVED"]:
        assert any(file == row or file.startswith(f"{row}.") for file in files), row


def test_an_entry_shows_nothing_of_torch_and_no_member_twice() -> None:
    torch = set(dir(nn.Module))
    for path in public():
        if inspect.isclass(value(path)) and issubclass(value(path), nn.Module):
            assert not torch & set(reference["members"](value(path))), path
    members = reference["members"]
    assert "for_module" in members(modlib.objectives.Objective)
    assert "for_module" not in members(modlib.objectives.AuxiliaryClassifier)


def test_help_and_the_reference_have_the_same_groups() -> None:
    text = (inspect.getdoc(modlib) or "").lower()
    titles = [page.read_text().splitlines()[0].removeprefix("# ").lower() for page in GROUPS]
    headings = re.sub(r"[^a-z]+", " ", " ".join(re.findall(r"^(\w.*)::$", text, re.MULTILINE)))
    assert [word for word in headings.split() if word != "and"] == titles
    overview = re.search(r"overview:: (.*)", (FOLDER / "index.md").read_text())
    assert overview and overview[1].split() == [page.stem for page in GROUPS]
