"""Make the built book whole: MathJax and fonts from their packages, the library and book as zips."""

import importlib.util
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

from fontTools.ttLib import TTFont
from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset

from book_pages.launch import PACKAGE

BOOK = "book.zip"
MATHJAX = ("tex-mml-chtml.js", "output/chtml/fonts", "input/tex/extensions")
FONTS = {
    "font_source_serif_pro": ("SerifPro-Regular", "SerifPro-It", "SerifPro-Semibold"),
    "font_source_sans_pro": ("SansPro-Regular", "SansPro-It", "SansPro-Semibold"),
}


def connect(app: Sphinx) -> None:
    """Run once the pages are written."""
    app.connect("build-finished", _complete)


def _complete(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.name != "html":
        return
    pages, root = Path(app.outdir), Path(app.confdir)
    _copy_mathjax(pages / "_static/vendor/mathjax")
    for package, names in FONTS.items():
        _copy_fonts(pages / "_static/vendor/fonts", package, names)
    _zip(pages / PACKAGE, root, _package_files(root))
    _zip(pages / BOOK, pages, (path for path in _files(pages) if path.name != BOOK))


def _copy_mathjax(target: Path) -> None:
    """Copy what the pages load of MathJax 3, so that no copy of it is kept in the repository."""
    source = _installed("sphinx-mathjax-offline") / "static/mathjax"
    for part in MATHJAX:
        if not (target / part).exists():
            where = target / part if (source / part).is_dir() else (target / part).parent
            copy_asset(str(source / part), str(where))


def _copy_fonts(target: Path, package: str, names: Iterable[str]) -> None:
    """Copy typefaces with their licence, compressed for the web."""
    source = _installed(package) / "files"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "LICENSE.txt", target / f"{package}-LICENSE.txt")
    for name in names:
        if not (target / f"{name}.woff").exists():
            font = TTFont(source / f"Source{name}.ttf", recalcTimestamp=False)
            font.flavor = "woff"
            font.save(target / f"{name}.woff")


def _installed(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; run: pip install -e '.[book]'")
    return Path(found.origin).parent


def _package_files(root: Path) -> list[Path]:
    """What `pip install` needs: the library, how to build it, and the records notebooks read."""
    named = [
        root / name
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "LICENSE-TEXT")
    ]
    library = [path for path in _files(root / "modlib") if path.suffix in (".py", ".typed")]
    return named + library + _files(root / "book/results")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _zip(target: Path, root: Path, files: Iterable[Path]) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            # A fixed date, so that equal contents give an equal file.
            entry = zipfile.ZipInfo(f"{target.stem}/{path.relative_to(root)}")
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
