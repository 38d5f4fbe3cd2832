"""Data sets by name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modlib.data.dataset import Dataset
from modlib.data.embedded import EMBEDDED


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    size: int | None = None,
) -> Dataset:
    """Load by name (v1: embedded and prepared sets)."""
    if name in EMBEDDED:
        return EMBEDDED[name](size) if name == "digits" else EMBEDDED[name]()
    folder = Path(root or os.environ.get("MODLIB_DATA") or "~/.cache/modlib").expanduser() / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist.")
    arrays = [
        np.load(folder / f"{part}.npy", mmap_mode="r")
        for part in ("train_images", "train_labels", "test_images", "test_labels")
    ]
    return Dataset(name, *arrays, tuple(json.loads((folder / "classes.json").read_text())))


def names() -> tuple[str, ...]:
    """Names that ``load`` knows."""
    return tuple(EMBEDDED)


def explain(name: str) -> str:
    """What a data set is (v1)."""
    return name


def prepare(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Prepare a data set (v1)."""
    raise NotImplementedError
