"""Write the repository's address wherever it is needed, from `repository` in _config.yml.

    python tools/address.py

keeps up to date: the first cell of every notebook, its copy in CONTRIBUTING.md, and CITATION.cff.
(The links on the pages are made while they are built, by book/_ext/book_pages/launch.py.)
"""

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]

_FIND = """\
# Finds modlib; on Colab, installs it first.
import importlib.util
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("modlib") is None:
{install}

try:
    import modlib

    modlib.partition
except (ImportError, AttributeError) as error:
    raise ImportError(
        "This book's modlib is not installed (the package index holds another project of that "
        "name). In the book's folder run: pip uninstall modlib; pip install ."
    ) from error
"""
_UPLOAD = '''\
    from google.colab import files

    print("Choose modlib-book.zip; the link is at the top of the chapter's page.")
    package = next(iter(files.upload()))
    %pip install --quiet "./{package}"'''
_CLONE = '''\
    %pip install --quiet "modlib-book @ git+{url}@{branch}"'''


def first_cell(url: str, branch: str) -> str:
    """The code that every notebook begins with."""
    install = _CLONE.format(url=url, branch=branch) if url else _UPLOAD
    return _FIND.format(install=install).rstrip()


def derived(root: Path) -> dict[Path, str]:
    """What every file that depends on the address must hold."""
    settings = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
    url, branch = settings["url"].rstrip("/"), settings["branch"]
    cell = first_cell(url, branch)
    files = {path: _notebook(path, cell) for path in sorted((root / "book").rglob("*.ipynb"))}
    guide, citation = root / "CONTRIBUTING.md", root / "CITATION.cff"
    files[guide] = re.sub(
        r"(<!-- first cell -->\n```python\n).*?(\n```\n)",
        lambda match: match[1] + cell + match[2],
        guide.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    lines = citation.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("repository-code:")]
    files[citation] = "\n".join(lines + [f'repository-code: "{url}"'] * bool(url)) + "\n"
    return files


def _notebook(path: Path, cell: str) -> str:
    """The notebook with its first code cell set; a notebook without one is left alone."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    code = [each for each in notebook["cells"] if each["cell_type"] == "code"]
    if not code or not "".join(code[0]["source"]).startswith(cell.splitlines()[0]):
        return text
    code[0]["source"] = cell.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write what differs."""
    for path, text in derived(ROOT).items():
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(f"wrote the repository's address into {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
