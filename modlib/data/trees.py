"""Folder trees of images, as ImageNet has them, to prepared arrays.

tree/train/<class>/*.jpg
tree/val/<class>/*.jpg      (or test/)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from modlib.data.cache import PARTS, damaged, write_json, writing
from modlib.data.pictures import decode

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_BLOCK = 1024  # images decoded ahead of the one that is written

Files = list[tuple[Path, int]]  # an image and the number of its class


def is_tree(folder: Path) -> bool:
    """True for a folder with train/ in it."""
    return (folder / "train").is_dir()


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
    """Decode a tree once into ``root``; later calls find it there.

    Args:
        tree: folder with train/ and val/ (or test/), and in each a folder a class.
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
    splits = {"train": tree / "train", "test": _test_folder(tree)}
    names = _class_names(splits, classes)
    side = size or _common_size(splits["train"] / names[0])
    chosen = f"-{len(names)}classes" if classes is not None else ""
    # Two trees may have the same name: the address tells them apart.
    mark = hashlib.sha256(json.dumps([str(tree.resolve()), names]).encode()).hexdigest()[:8]
    folder = root / f"{tree.name}-{side}px{chosen}-{mark}"
    source = {"tree": str(tree.resolve()), "changed": _changed(splits.values(), names)}
    if folder.exists():
        _check_source(folder, source)
        return folder
    files = {split: list_images(parent, names) for split, parent in splits.items()}
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
            images = np.lib.format.open_memmap(
                temporary / f"{split}_images.npy", "w+", np.uint8, (len(listed), size, size, 3)
            )
            bar = tqdm(total=len(listed), desc=f"{folder.name} {split}", unit="image")
            for start in range(0, len(listed), _BLOCK):
                paths = [path for path, _ in listed[start : start + _BLOCK]]
                decoded = pool.map(lambda path: decode(path, size, exact), paths)
                for position, image in enumerate(decoded, start):
                    images[position] = image
                    bar.update()
            bar.close()
            del images  # Windows renames no folder with a mapped file in it
            np.save(temporary / f"{split}_labels.npy", np.array([c for _, c in listed], np.int64))
        write_json(temporary / "classes.json", list(classes))
        write_json(temporary / "source.json", source)


def _test_folder(tree: Path) -> Path:
    for name in ("val", "test"):
        # The test folder of ImageNet has images without classes: pass it over.
        if (tree / name).is_dir() and any(child.is_dir() for child in (tree / name).iterdir()):
            return tree / name
    raise ValueError(
        f"{tree} has no val or test folder with a folder a class in it; lay the images out as "
        f"val/<class>/<image>."
    )


def _class_names(splits: dict[str, Path], classes: Sequence[str] | None) -> list[str]:
    found = {
        split: sorted(c.name for c in parent.iterdir() if c.is_dir() and c.name[0] != ".")
        for split, parent in splits.items()
    }
    if classes is None:
        if found["train"] != found["test"]:
            odd = min(set(found["train"]) ^ set(found["test"]), default="")
            raise ValueError(
                f"{splits['train']} and {splits['test']} have different classes ({odd!r} is in "
                f"one only); give both the same folders, or pass classes=[...]."
            )
        if not found["train"]:
            raise ValueError(f"{splits['train']} holds no class folder; add one for each class.")
        return found["train"]
    for parent, there in zip(splits.values(), found.values(), strict=True):
        missing = [name for name in classes if name not in there]
        if missing:
            raise ValueError(
                f"classes names {missing[0]!r} but {parent} has no such folder; it has "
                f"{', '.join(there[:3])} and others, {len(there)} in all."
            )
    return list(classes)


def list_images(parent: Path, names: Sequence[str]) -> Files:
    """The images below parent/<name> with the position of each name; refuses an empty folder."""
    files: Files = []
    for label, name in enumerate(names):
        # Tiny ImageNet keeps its images one folder deeper.
        paths = sorted(p for p in (parent / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise ValueError(f"{parent / name} holds no image; add some or leave that class out.")
        files += [(path, label) for path in paths]
    return files


def _common_size(folder: Path) -> int:
    """Side of the first image, which the others are then held to."""
    path, _ = list_images(folder.parent, [folder.name])[0]
    try:
        with Image.open(path) as picture:
            wide, high = picture.size
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read as an image ({error}); repair or remove it and load again."
        ) from error
    if wide != high:
        raise ValueError(
            f"size is not given but images are not square ({path} is {wide}x{high}); pass size= "
            f"to scale and crop them."
        )
    return wide


def _changed(parents: Iterable[Path], names: Sequence[str]) -> int:
    """When an image was last added to or removed from a class: cheap even for ImageNet."""
    return max((parent / name).stat().st_mtime_ns for parent in parents for name in names)


def _check_source(folder: Path, source: dict[str, object]) -> None:
    path = folder / "source.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != source:
        raise damaged(folder, f"was prepared before {source['tree']} last changed")
