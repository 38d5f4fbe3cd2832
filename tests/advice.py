"""What the tests of advice share: an error's sentence is read, and what it says would do is done."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

Call = Callable[[], Any]
Case = tuple[Call, list[Call]]  # what is wrong, and what is advised
Place = tuple[Path, int]

ERRORS = (ValueError, TypeError, OSError, FloatingPointError, NotImplementedError)


def unreached(
    files: Sequence[Path],
    cases: Iterable[Case],
    on_disk: Iterable[Callable[[Path], Case]],
    folder: Path,
) -> list[str]:
    """Do all cases, those on disk in a folder of their own; the ``raise`` statements none came to."""
    reached = {place for case in cases for place in _advised(case, files)}
    for make in on_disk:
        place = folder / make.__name__
        place.mkdir()
        reached |= _advised(make(place), files)
    return [
        f"{file.name}:{node.lineno} {ast.unparse(node)}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and node.exc and node.end_lineno
        if not reached & {(file, line) for line in range(node.lineno, node.end_lineno + 1)}
    ]


def _advised(case: Case, files: Iterable[Path]) -> set[Place]:
    """Do a case; the lines of these files from which its error came."""
    wrong, right = case
    with pytest.raises(ERRORS) as error:
        wrong()
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    for call in right:
        call()
    return _places(error.value, set(files))


def _places(error: BaseException | None, files: set[Path]) -> set[Place]:
    """File and line of the last step inside the files, of an error and of those it came from."""
    if error is None:
        return set()
    trace, last = error.__traceback__, None
    while trace:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file in files:
            last = (file, trace.tb_lineno)
        trace = trace.tb_next
    return ({last} if last else set()) | _places(error.__cause__, files)
