"""Folder trees of images, as ImageNet has them, to prepared arrays; ``layouts`` says how they may lie."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from modlib.data.cache import PARTS, damaged, reserve, write_json, writing
from modlib.data.dataset import Array
from modlib.data.layouts import Files, is_tree, list_tree
from modlib.data.pictures import BROKEN, decode, unreadable

_BLOCK = 1024  # images that wait for a thread at a time

Record = list[int]  # of a file: class, size in bytes, time of the last change in nanoseconds


def check_prepared(folder: Path) -> None:
    """Refuse a folder that is neither a tree nor prepared, such as one split of a tree."""
    if any((folder / f"{part}.npy").exists() for part in PARTS):
        return
    if is_tree(folder.parent):
        raise ValueError(
            f"{folder} is a part of the folder tree {folder.parent}; load that, with train and test "
            f"images in it: modlib.data.load({str(folder.parent)!r})."
        )
    raise ValueError(
        f"{folder} is neither a prepared data set (no {PARTS[0]}.npy) nor a folder tree (no train); "
        f"lay the images out as train/<class>/<image> and val/<class>/<image> in it."
    )


def prepare_tree(
    tree: Path, root: Path, classes: Sequence[str] | None = None, size: int | None = None
) -> Path:
    """Decode a tree once into ``root``; later calls find it there, if no file has changed since.

    A file has changed if its size or the time of its last change has. To look at ImageNet's 1.3 million
    files takes about twenty seconds; the prepared folder's name, given to ``load``, spares them.

    Args:
        tree: in one of the layouts of ``modlib.data.layouts``.
        root: where prepared sets lie.
        classes: class folders to use, in this order; all by default.
        size: side in pixels that images are scaled and cropped to; may be left out where all
            images are square and of one size.

    Returns:
        The prepared folder, named after the tree, the size and the classes.

    Raises:
        ValueError: naming the folder or file that is missing, empty or not an image, or if the
            tree has changed since it was prepared.
    """
    files, names = list_tree(tree, classes)
    side = size or _common_size(files["train"][0][0])
    chosen = f"-{len(names)}classes" if classes is not None else ""
    # Two trees may have the same name: the address tells them apart.
    mark = hashlib.sha256(json.dumps([str(tree.resolve()), names]).encode()).hexdigest()[:8]
    folder = root / f"{tree.name}-{side}px{chosen}-{mark}"
    records = _records(tree, files)
    if folder.exists():
        _check_source(folder, tree, records)
        return folder
    source = {"tree": str(tree.resolve()), "files": records}
    prepare_files(folder, files, names, side, exact=size is None, source=source)
    return folder


def prepare_files(
    folder: Path,
    files: dict[str, Files],
    classes: Sequence[str],
    size: int,
    *,
    exact: bool = False,
    source: object = None,
) -> None:
    """Decode image files straight into memory-mapped arrays, with a progress bar."""
    with writing(folder) as temporary, ThreadPoolExecutor() as pool:
        for split, listed in files.items():
            path = temporary / f"{split}_images.npy"
            shape = (len(listed), size, size, 3)
            images: Array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
            reserve(path)
            bar = tqdm(total=len(listed), desc=f"{folder.name} {split}", unit="image")
            # Filled by the threads themselves, so that none waits in memory to be written.
            fill = partial(_decode_into, images, listed, size, exact)
            for start in range(0, len(listed), _BLOCK):
                for _ in pool.map(fill, range(start, min(start + _BLOCK, len(listed)))):
                    bar.update()
            bar.close()
            del images, fill  # Windows renames no folder with a mapped file in it
            np.save(temporary / f"{split}_labels.npy", np.array([c for _, c in listed], np.int64))
        write_json(temporary / "classes.json", list(classes))
        write_json(temporary / "source.json", source)


def _decode_into(images: Array, listed: Files, size: int, exact: bool, position: int) -> None:
    images[position] = decode(listed[position][0], size, exact)


def _common_size(path: Path) -> int:
    """Side of the first image, which the others are then held to."""
    try:
        with Image.open(path) as picture:
            wide, high = picture.size
    except BROKEN as error:
        raise unreadable(path, error) from error
    if wide != high:
        raise ValueError(
            f"size is not given but images are not square ({path} is {wide}x{high}); pass size= "
            f"to scale and crop them."
        )
    return wide


def _records(tree: Path, files: dict[str, Files]) -> dict[str, Record]:
    """What is known of each file without reading it."""
    records = {}
    start = len(str(tree / "_")) - 1
    for path, label in (entry for listed in files.values() for entry in listed):
        try:
            status = os.stat(path)
        except OSError as error:  # such as a link to nothing
            raise unreadable(path, error) from error
        name = str(path)[start:].replace(os.sep, "/")
        records[name] = [label, status.st_size, status.st_mtime_ns]
    return records


def _check_source(folder: Path, tree: Path, now: dict[str, Record]) -> None:
    path = folder / "source.json"
    if not path.exists():
        return
    then = json.loads(path.read_text(encoding="utf-8")).get("files")
    if then is None:
        raise damaged(
            folder, "was prepared by an older modlib, which did not note the files' times"
        )
    odd = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if odd:
        state = "new" if odd[0] not in then else "gone" if odd[0] not in now else "another file"
        all_ = f", {len(odd)} changes in all" if len(odd) > 1 else ""
        raise damaged(
            folder, f"was prepared before {tree} last changed ({odd[0]} is {state}{all_})"
        )
