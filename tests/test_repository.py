"""What holds the project together: one list of dependencies, one address, tidy notebooks."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "book").rglob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
address = runpy.run_path(str(ROOT / "tools/address.py"))
reading = runpy.run_path(str(ROOT / "tools/reading.py"))
CHAPTERS: dict[Path, bool] = reading["chapters"](ROOT)
TEXTS = [
    *NOTEBOOKS,
    *sorted((ROOT / "book").rglob("*.md")),
    *sorted((ROOT / "modlib").rglob("*.py")),
]
tidy = runpy.run_path(str(ROOT / "tools/tidy.py"))["tidy"]


def tracked() -> list[Path]:
    """The files of the project: as git knows them, or in an unpacked archive as they lie there."""
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode == 0 and run.stdout:
        return [ROOT / name for name in run.stdout.splitlines() if (ROOT / name).is_file()]
    made = {".venv", ".data", "_build"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not made & set(path.relative_to(ROOT).parts)
    ]


def cells(notebook: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


# --- dependencies ----------------------------------------------------------------------------


def test_dependencies_have_no_upper_pins() -> None:
    for text in PROJECT["dependencies"]:
        operators = {specifier.operator for specifier in Requirement(text).specifier}
        assert operators <= {">=", "!="}, f"{text}: an upper pin ages faster than the code"


def test_library_imports_only_its_dependencies() -> None:
    declared = {Requirement(text).name for text in PROJECT["dependencies"]}
    names = {"scikit-learn": "sklearn", "pillow": "PIL"}
    allowed = {names.get(name, name) for name in declared} | set(sys.stdlib_module_names)
    allowed |= {"modlib", "cycler"}  # cycler is Matplotlib's, and part of its interface
    for path in (ROOT / "modlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            for module in modules:
                assert module.split(".")[0] in allowed, f"{path} imports {module}: not a dependency"


def test_conda_environment_refers_to_the_one_list() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"] == ["python>=3.11", "pip", {"pip": ["-e .[book,test]"]}]
    assert PROJECT["requires-python"] == ">=3.11"


def test_nothing_sends_a_reader_to_the_other_modlib() -> None:
    assert PROJECT["name"] == "modlib-book"
    for path in tracked():
        if (
            path.suffix in {".md", ".py", ".ipynb", ".yml", ".toml", ".cff"}
            or path.name == "Makefile"
        ):
            found = re.search(r"pip install [^\n`;|]*\bmodlib(?![\w.-])", path.read_text())
            assert found is None, f"{path} says {found and found[0]!r}"


def test_version_is_the_same_everywhere() -> None:
    import modlib

    version = PROJECT["version"]
    assert modlib.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"Version {version}" in (ROOT / "book/how-to-use.md").read_text()
    config = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]
    assert version.startswith(config["version"])


def functions(source: str) -> Iterator[tuple[str, str | None]]:
    """Each function's code and its docstring, if it has one, without their indentation."""
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node)
            node.body = node.body[docstring is not None :] or [ast.Pass()]
            yield ast.unparse(node), docstring


def shown(notebook: Path) -> list[str]:
    """The pieces of code that the notebook's stored outputs print."""
    data = [o["data"] for cell in cells(notebook) for o in cell["outputs"] if "data" in o]
    texts = ["".join(d.get("text/markdown", "")) for d in data]
    blocks = [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.S)]
    # What IPython's Code shows is plain text as well.
    return blocks + ["".join(d["text/plain"]) for d in data if "text/latex" in d]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_pages_show_the_library_as_it_is(notebook: Path) -> None:
    files = (ROOT / "modlib").rglob("*.py")
    library = {function for path in files for function in functions(path.read_text())}
    library |= {(code, None) for code, _ in library}  # a page may leave docstrings out
    for block in shown(notebook):
        for function in functions(block):
            assert function in library, f"{notebook.name} shows what has changed; run it again"


@pytest.mark.parametrize("page", ["README.md", "book/how-to-use.md"])
def test_lines_that_a_page_tells_its_readers_to_type_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        for name, shade in (("dark", 20), ("light", 220)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(8):
                picture = Image.new("RGB", (64, 64), (shade + number,) * 3)
                picture.save(tmp_path / split / name / f"{number}.jpg")
    monkeypatch.setenv("MODLIB_DATA", str(tmp_path / "prepared"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    typed: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("/path/to/folder", str(tmp_path)), typed)
    told = capsys.readouterr().out
    assert "Evaluation(accuracy=" in told
    if "recomputed" in told:  # what the page says of its three ways
        whole, recomputed, local = (int(n) for n in re.findall(r"(\d+) MiB", told))
        assert local < recomputed < whole


def test_no_large_file_is_tracked() -> None:
    for path in tracked():
        assert path.stat().st_size < 3_000_000, f"{path} is too large for a repository"


# --- the address -----------------------------------------------------------------------------


def test_address_is_written_where_it_is_needed() -> None:
    for path, text in address["derived"](ROOT).items():
        assert path.read_text() == text, f"{path} is out of date; run: python tools/address.py"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that carry the address, with an address set."""
    for path in [
        *NOTEBOOKS,
        *(ROOT / name for name in ("_config.yml", "CITATION.cff", "CONTRIBUTING.md")),
    ]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    config = tmp_path / "_config.yml"
    text = re.sub(
        r'  url: ".*"', '  url: "https://github.com/someone/something"', config.read_text()
    )
    config.write_text(re.sub(r"  branch: .*", "  branch: trunk", text))
    return tmp_path


def test_one_setting_reaches_every_place(copy: Path) -> None:
    files = address["derived"](copy)
    assert len(files) == len(NOTEBOOKS) + 2
    for path, text in files.items():
        assert "https://github.com/someone/something" in text, (
            f"{path.name} does not get the address"
        )
        if path.suffix == ".ipynb":
            path.write_text(text)
            install = "git+https://github.com/someone/something@trunk"
            assert install in "".join(cells(path)[0]["source"])


def test_address_can_be_unset_again(copy: Path) -> None:
    for path, text in address["derived"](copy).items():
        path.write_text(text)
    shutil.copy(ROOT / "_config.yml", copy)
    for path, text in address["derived"](copy).items():
        assert text == (ROOT / path.relative_to(copy)).read_text()


# --- the first cell --------------------------------------------------------------------------


class Halt(Exception):
    """Raised by the fake pip, so that a test sees what would have been installed."""


def run_first_cell(
    monkeypatch: pytest.MonkeyPatch, *, colab: bool, modlib: object, url: str = ""
) -> str:
    """Run the cell with a fake Colab, a fake pip and a fake modlib; return what pip was asked for."""
    asked: list[str] = []
    code = re.sub(r"%pip install (.*)", r"pip(f'\1')", address["first_cell"](url, "main"))
    if colab:
        google = types.ModuleType("google.colab")
        google.files = types.SimpleNamespace(upload=lambda: {"modlib-book (1).zip": b""})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "google.colab", google)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: modlib)
    monkeypatch.setitem(sys.modules, "modlib", modlib)  # type: ignore[arg-type]

    def pip(words: str) -> None:
        asked.append(words)
        monkeypatch.setitem(sys.modules, "modlib", types.SimpleNamespace(partition=None))  # type: ignore[arg-type]

    exec(compile(code, "first cell", "exec"), {"pip": pip, "print": lambda *words: None})
    return asked[0] if asked else ""


OURS = types.SimpleNamespace(partition=None)
ANOTHER = types.SimpleNamespace(something_else=None)


@pytest.mark.parametrize(
    ("colab", "modlib", "url", "asked"),
    [
        (True, None, "", '--quiet "./modlib-book (1).zip"'),
        (True, None, "https://x/y", '--quiet "modlib-book @ git+https://x/y@main"'),
        (True, OURS, "", ""),
        (False, OURS, "", ""),
    ],
)
def test_first_cell_installs_only_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, colab: bool, modlib: object, url: str, asked: str
) -> None:
    assert run_first_cell(monkeypatch, colab=colab, modlib=modlib, url=url) == asked


@pytest.mark.parametrize("modlib", [None, ANOTHER])
def test_first_cell_explains_a_missing_or_another_modlib(
    monkeypatch: pytest.MonkeyPatch, modlib: object
) -> None:
    with pytest.raises(ImportError, match="holds another project of that name"):
        run_first_cell(monkeypatch, colab=False, modlib=modlib)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_begins_with_the_first_cell(notebook: Path) -> None:
    settings = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    first = cells(notebook)[0]
    assert "".join(first["source"]) == address["first_cell"](settings["url"], settings["branch"])
    assert {"hide-input", "remove-cell"} & set(first["metadata"].get("tags", []))


# --- notebooks -------------------------------------------------------------------------------


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_tidy_and_complete(notebook: Path) -> None:
    text = notebook.read_text()
    assert tidy(text) == text, f"run: python tools/tidy.py {notebook.relative_to(ROOT)}"
    counts = [
        cell["execution_count"] for cell in cells(notebook) if "".join(cell["source"]).strip()
    ]
    assert counts == list(range(1, len(counts) + 1)), (
        "run it from top to bottom and store the outputs"
    )
    for cell in cells(notebook):
        failed = any(output["output_type"] == "error" for output in cell["outputs"])
        assert not failed or "raises-exception" in cell["metadata"].get("tags", [])
        printed = {output.get("name") for output in cell["outputs"]}
        assert "stderr" not in printed, "a warning, or a path of the machine that ran it"
    widgets = json.loads(text)["metadata"].get("widgets", {})
    assert all("state" in value for value in widgets.values()), "GitHub cannot show this notebook"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_uses_the_public_face_only(notebook: Path) -> None:
    for cell in cells(notebook):
        source = re.sub(r"^\s*[%!].*$", "pass", "".join(cell["source"]), flags=re.MULTILINE)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modlib"):
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private and "._" not in str(node.module), ast.unparse(node)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_picture_in_a_notebook_is_described(notebook: Path) -> None:
    for cell in cells(notebook):
        data = [output.get("data", {}) for output in cell["outputs"]]
        if any("image/png" in each and "text/html" not in each for each in data):
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) > 20, f"a figure without alt text: {''.join(cell['source'])[:80]!r}"


def test_tidy_makes_two_runs_equal() -> None:
    def run(first: str, second: str, stamp: str, *printed: str) -> str:
        state = {
            f"{second}": {"model_name": "Slider"},
            f"{first}": {"children": [f"IPY_MODEL_{second}"]},
        }
        cell = {
            "cell_type": "code",
            "metadata": {"execution": {"iopub.execute_input": stamp}},
            "outputs": [
                {"data": {"view": {"model_id": first}}},
                *({"output_type": "stream", "name": "stdout", "text": text} for text in printed),
            ],
        }
        widgets = {
            "application/vnd.jupyter.widget-state+json": {"state": state, "version_major": 2}
        }
        info = {"name": "python", "version": stamp}
        return json.dumps(
            {"cells": [cell], "metadata": {"language_info": info, "widgets": widgets}}
        )

    one = run("a" * 32, "b" * 32, "3.11", "a\nb\n")
    two = run("f" * 32, "0" * 31 + "c", "3.12", "a\n", "b\n")
    assert tidy(one) == tidy(two) == tidy(tidy(one))
    assert "3.11" not in tidy(one) and "Slider" in tidy(one)


# --- the table of contents -------------------------------------------------------------------


def test_contents_list_every_page_once() -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [contents["root"]]
    for part in contents["parts"]:
        for page in part["chapters"]:
            listed += [page["file"], *(section["file"] for section in page.get("sections", []))]
    pages = {
        str(path.relative_to(ROOT).with_suffix(""))
        for path in (ROOT / "book").rglob("*")
        if path.suffix in {".md", ".ipynb"}
    }
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_numbers_come_from_the_table_of_contents_alone(path: Path) -> None:
    """A chapter that is put in renames nothing: no text, label or file carries a chapter's number."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
        assert re.match(r"# (?!Chapter|\d)", text), "a title carries no number"
        assert r"\tag" not in text, "an equation has a name: $$ (eq-name)"
    assert not re.search(r"\bch\d\d\b|\b[Cc]hapters? \d", text)
    assert path.suffix == ".py" or not re.search(r"\d", path.stem)


# --- how long a chapter is ------------------------------------------------------------------------


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_keeps_to_its_budget_and_says_how_long_it_is(path: Path) -> None:
    found = reading["reading"](path)
    most = reading["budget"](CHAPTERS[path])
    assert found.total <= most, f"{found.total} words, {most} at most: move some to the appendix"
    assert found.proofs <= 4
    head = "".join(cells(path, "markdown")[0]["source"])
    assert found.line in head.splitlines(), "out of date; run: python tools/reading.py"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_opens_with_its_question_and_its_answer(path: Path) -> None:
    head = "".join(cells(path, "markdown")[0]["source"]).split("\n\n")
    question = next(i for i, paragraph in enumerate(head) if "?**" in paragraph)
    assert head[question + 1].startswith("**The answer.**")


def test_what_has_to_be_unfolded_does_not_count() -> None:
    text = "\n".join(
        [
            "one two $a + b$ {prf:ref}`thm`",
            "$$", "x = 1", "$$ (eq-x)",
            ":::{prf:proof}", "three", ":::",
            "::::{admonition} Proof: an idea", ":class: dropdown", "",
            ":::{prf:proof}", "four", "$$", "y", "$$", ":::", "::::",
            ":::{note}", ":name: n", "five", ":::",
            ":::{solution-start} ex", ":class: dropdown", ":::", "six seven", ":::{solution-end}", ":::",
            "eight",
        ]
    )  # fmt: skip
    shown, folded = reading["split"](text)
    assert all(word in shown for word in ("one", "three", "five", "eight", "x = 1"))
    assert all(word in folded for word in ("four", "six", "$$")) and "eight" not in folded
    assert shown.count("{prf:proof}") == folded.count("{prf:proof}") == 1


def test_the_budget_counts_every_word_of_the_text(tmp_path: Path) -> None:
    folded = ":::{admonition} Algebra\n:class: dropdown\nthree $a + b$\n:::"
    text = ["# Title\n*Reading time: 1 minutes (1 words and one formula).*", folded, "not counted"]
    kinds = ["markdown", "markdown", "code"]
    written = [
        {"cell_type": kind, "source": [part]} for kind, part in zip(kinds, text, strict=True)
    ]
    path = tmp_path / "chapter.ipynb"
    path.write_text(json.dumps({"cells": written}))
    assert reading["reading"](path).total == 11 + 9
    assert reading["budget"](False) == 5000 and reading["budget"](True) == 6000


def test_citation_keys_exist() -> None:
    known = set(
        re.findall(r"^@\w+\{(\w+),", (ROOT / "book/references.bib").read_text(), re.MULTILINE)
    )
    assert len(known) > 20
    texts = [path.read_text() for path in (ROOT / "book").rglob("*.md")]
    texts += ["".join("".join(c["source"]) for c in cells(path, "markdown")) for path in NOTEBOOKS]
    for text in texts:
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text):
            assert set(re.split(r",\s*", keys)) <= known


def test_makefile_sets_up_only_when_the_dependencies_change() -> None:
    rules = (ROOT / "Makefile").read_text().splitlines()
    assert "$(STAMP): pyproject.toml" in rules
    for target in ("compare", "pages", "check", "notebooks"):
        assert f"{target}: $(STAMP)" in rules
