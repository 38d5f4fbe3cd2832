"""Make the built book whole: MathJax from its package, the library and the book as zips."""

import importlib.util
import zipfile
from collections.abc import Iterable
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset

from book_pages.launch import PACKAGE

BOOK = "book.zip"
MATHJAX = ("tex-mml-chtml.js", "output/chtml/fonts", "input/tex/extensions")


def connect(app: Sphinx) -> None:
    """Run once the pages are written."""
    app.connect("build-finished", _complete)


def _complete(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.name != "html":
        return
    pages, root = Path(app.outdir), Path(app.confdir)
    _copy_mathjax(pages / "_static/vendor/mathjax")
    _zip(pages / PACKAGE, root, _package_files(root))
    _zip(pages / BOOK, pages, (path for path in _files(pages) if path.name != BOOK))


def _copy_mathjax(target: Path) -> None:
    """Copy what the pages load of MathJax 3, so that no copy of it is kept in the repository."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    assert package is not None and package.origin is not None
    source = Path(package.origin).parent / "static/mathjax"
    for part in MATHJAX:
        if not (target / part).exists():
            where = target / part if (source / part).is_dir() else (target / part).parent
            copy_asset(str(source / part), str(where))


def _package_files(root: Path) -> list[Path]:
    """What `pip install` needs: the library, how to build it, and the records notebooks read."""
    named = [root / name for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT")]
    library = [path for path in _files(root / "modlib") if path.suffix in (".py", ".typed")]
    return named + library + sorted((root / "book/results").glob("*.json"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _zip(target: Path, root: Path, files: Iterable[Path]) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            # A fixed date, so that equal contents give an equal file.
            entry = zipfile.ZipInfo(f"{target.stem}/{path.relative_to(root)}")
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
