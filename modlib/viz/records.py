"""Read the records of runs: the only source of numbers in the book."""

import json
import site
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Record = dict[str, Any]


def records_folder() -> Path:
    """The records of the checkout this package lies in, else those installed with the package.

    >>> records_folder().name
    'results'
    """
    root = Path(__file__).parents[2]
    shares = [root, Path(sys.prefix), Path(site.getuserbase())]
    places = [root / "book/results", *(share / "share/modlib/results" for share in shares)]
    return next((place for place in places if place.is_dir()), places[0])


def records(*, folder: Path | str | None = None, **wanted: Any) -> list[Record]:
    """The run records whose fields have the wanted values, ordered by method and seed.

    Args:
        folder: where the folders of recipes are, by default ``book/results``.
        wanted: fields and their values, for example ``recipe="cifar10", profile="cpu"``.

    Raises:
        FileNotFoundError: no record matches.
        ValueError: a file is not a record.

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "demo").mkdir()
    >>> for seed in (1, 0):
    ...     record = {"recipe": "demo", "method": "E2EBP", "seed": seed}
    ...     _ = (folder / "demo" / f"{seed}.json").write_text(json.dumps(record))
    >>> [record["seed"] for record in records(folder=folder, recipe="demo")]
    [0, 1]
    """
    where = records_folder() if folder is None else Path(folder)
    found = [_read(path) for path in sorted(where.glob("*/*.json"))]
    matching = [record for record in found if all(record.get(key) == wanted[key] for key in wanted)]
    if not matching:
        what = ", ".join(f"{key}={value!r}" for key, value in wanted.items()) or "any kind"
        raise FileNotFoundError(f"no record with {what} in {where}; `modlib run --help` makes one")
    return sorted(matching, key=lambda record: (str(record.get("method")), record.get("seed", 0)))


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); run its recipe again") from error
    if not isinstance(record, dict) or "recipe" not in record:
        raise ValueError(f"{path} is not a run record: it names no recipe")
    return record


def group(
    items: Iterable[Record], key: str | Callable[[Record], Any] = "method"
) -> dict[Any, list[Record]]:
    """Records that agree in one field, or in what a function makes of a record, as first seen.

    >>> runs = [{"method": "a", "seed": 0}, {"method": "b", "seed": 0}, {"method": "a", "seed": 1}]
    >>> [record["seed"] for record in group(runs)["a"]]
    [0, 1]
    """
    name = key if callable(key) else lambda record: record[key]
    groups: dict[Any, list[Record]] = {}
    for record in items:
        groups.setdefault(name(record), []).append(record)
    return groups


def values(items: Iterable[Record], path: str) -> list[float]:
    """One number of each record, named by its path: ``"final.test_accuracy"``.

    >>> values([{"final": {"test_accuracy": 0.5}}], "final.test_accuracy")
    [0.5]
    """
    numbers = []
    for record in items:
        value: Any = record
        for name in path.split("."):
            value = value[name]
        numbers.append(float(value))
    return numbers


def mean_and_spread(numbers: Sequence[float], *, scale: float = 1.0, digits: int = 1) -> str:
    """Mean ± sample standard deviation of a few seeds as text; of one run its number, marked so.

    Args:
        numbers: one for each seed.
        scale: multiplies every number: 100 turns a fraction into per cent.
        digits: digits after the point.

    Raises:
        ValueError: there are no numbers.

    >>> mean_and_spread([0.61, 0.63, 0.65], scale=100)
    '63.0 ± 2.0'
    >>> mean_and_spread([0.61], scale=100)
    '61.0 (one seed)'
    """
    if not numbers:
        raise ValueError("numbers: none were given; give one for each seed")
    mean = scale * fmean(numbers)
    if len(numbers) == 1:
        return f"{mean:.{digits}f} (one seed)"
    spread = scale * stdev(numbers)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"
