"""Measure how long each chapter takes to read, and write it into the chapter's head.

    python tools/reading.py

prints for every chapter its words, its proofs and displayed formulas, and its minutes: 200 words a minute, and a
minute for each displayed formula. For these only what is open counts: code, outputs, folded boxes and solutions
do not. The budget is for *all* words of a chapter's text, folded or not, formulas and markup included: a chapter
over it is named, and the command fails. What does not fit moves to the appendix of proofs.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BUDGET, BUDGET_STARRED = 5000, 6000  # words in all
LINE = re.compile(r"^\*Reading time: .*$", re.MULTILINE)
_FENCE = re.compile(r"^\s*(:{3,}|`{3,})(.*)$")
_FORMULA = re.compile(r"\$\$.*?\$\$", re.DOTALL)
_INLINE = re.compile(r"\$[^$\n]+(\n[^$\n]+)?\$")


@dataclass(frozen=True)
class Reading:
    """What a chapter asks of its reader.

    Attributes:
        words: of open text; an inline formula counts as one.
        folded: words in boxes that a reader has to open.
        formulas: displayed, in open text.
        proofs: open.
        total: words in all, as `str.split` finds them.
    """

    words: int
    folded: int
    formulas: int
    proofs: int
    total: int

    @property
    def minutes(self) -> int:
        """At 200 words and one displayed formula a minute."""
        return round(self.words / 200 + self.formulas)

    @property
    def line(self) -> str:
        """What the chapter's head says."""
        formulas = f"{self.formulas} displayed formulas" if self.formulas != 1 else "one formula"
        return f"*Reading time: {self.minutes} minutes ({self.words:,} words and {formulas}).*"


def chapters(root: Path) -> dict[Path, bool]:
    """The notebooks of numbered chapters in the book's order, and whether each is starred."""
    contents = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    parts = [part for part in contents["parts"] if "numbered" in part]
    files = [root / f"{chapter['file']}.ipynb" for part in parts for chapter in part["chapters"]]
    return {path: "★" in _title(path) for path in files}


def _title(path: Path) -> str:
    return "".join(_cells(path)[0]["source"]).splitlines()[0]


def _cells(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells


def reading(path: Path) -> Reading:
    """Measure a chapter."""
    text = "\n\n".join("".join(c["source"]) for c in _cells(path) if c["cell_type"] == "markdown")
    shown, folded = split(LINE.sub("", text))
    return Reading(
        words=_count(shown),
        folded=_count(folded),
        formulas=len(_FORMULA.findall(shown)),
        proofs=shown.count("{prf:proof}"),
        total=len(text.split()),
    )


def budget(starred: bool) -> int:
    """The most words that a chapter may have."""
    return BUDGET_STARRED if starred else BUDGET


def split(text: str) -> tuple[str, str]:
    """Open and folded text: what stands in a block of class dropdown, or in a solution, is folded.

    >>> split("a\\n:::{note} b\\n:class: dropdown\\nc\\n:::\\nd")
    ('a\\nd', ':::{note} b\\n:class: dropdown\\nc\\n:::')
    """
    lines = text.splitlines()
    open_lines: list[str] = []
    folded_lines: list[str] = []
    closing, solution = "", False  # the fence that ends a folded block; inside a solution?
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        starts = fence is not None and not closing and _folds(lines[number + 1 :])
        if fence and "{solution-start}" in line:
            solution = True
        elif fence and starts:
            closing = fence[1]
        (folded_lines if closing or solution else open_lines).append(line)
        if fence and "{solution-end}" in line:
            solution = False
        elif fence and not starts and closing and fence[1] == closing and not fence[2].strip():
            closing = ""
    return "\n".join(open_lines), "\n".join(folded_lines)


def _folds(lines: list[str]) -> bool:
    """Do the options with which a block begins make it a dropdown?"""
    for line in lines:
        if not line.startswith(":") or line.startswith(":::"):
            return False
        if line.strip() == ":class: dropdown":
            return True
    return False


def _count(text: str) -> int:
    text = _INLINE.sub("x", _FORMULA.sub("", text))
    text = re.sub(r"^\s*(:{3,}.*|`{3,}.*|:\w+:.*)$", "", text, flags=re.MULTILINE)
    return len(re.findall(r"\w[\w'’\-.,/]*", text))


def main() -> None:
    """Write each chapter's line, print the table, and fail if a chapter is too long."""
    too_long = []
    for path, starred in chapters(ROOT).items():
        found = reading(path)
        text = path.read_text(encoding="utf-8")
        notebook = json.loads(text)
        head = notebook["cells"][0]
        head["source"] = LINE.sub(found.line, "".join(head["source"])).splitlines(keepends=True)
        written = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        if written != text:
            path.write_text(written, encoding="utf-8")
        name = f"{path.relative_to(ROOT / 'book').with_suffix('')}{' *' * starred}"
        print(
            f"{name:<40}{found.words:>6} words{found.folded:>6} folded{found.proofs:>3} proofs"
            f"{found.formulas:>3} formulas{found.minutes:>4} min{found.total:>6} in all"
        )
        if found.total > budget(starred):
            too_long.append(f"{name} has {found.total} words; {budget(starred)} are its budget")
    if too_long:
        raise SystemExit("\n".join(too_long))


if __name__ == "__main__":
    main()
