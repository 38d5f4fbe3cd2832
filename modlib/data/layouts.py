"""Which images a folder tree holds, and of which class: the layouts in which people have ImageNet.

tree/train/<class>/<image>     images may lie deeper, as train/<class>/images/ of Tiny ImageNet
tree/val/<class>/<image>       or test/
tree/val/<image>               with a list of the classes, in val/ or beside it, one of

    val_annotations.txt                              Tiny ImageNet: name, class, ...
    val.txt                                          name and class
    LOC_val_solution.csv                             Kaggle's ILSVRC: name and class
    imagenet_2012_validation_synset_labels.txt       a class a line, in the order of the images' names
    ILSVRC2012_validation_ground_truth.txt           likewise, numbered as in meta.mat, which is needed

A class in a list is the name of a folder of train, or its number: 0, 1, ... in alphabetical order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_LISTS = {
    "val": (
        "val_annotations.txt",
        "val.txt",
        "LOC_val_solution.csv",
        "imagenet_2012_validation_synset_labels.txt",
        _GROUND_TRUTH,
    ),
    "test": ("test_annotations.txt", "test.txt"),
}

Files = list[tuple[Path, int]]  # an image and the number of its class


def is_tree(folder: Path) -> bool:
    """True for a folder with train/ in it."""
    return (folder / "train").is_dir()


def list_tree(
    tree: Path, classes: Sequence[str] | None = None
) -> tuple[dict[str, Files], list[str]]:
    """The images of "train" and "test" with the numbers of their classes, and the classes' names.

    Args:
        tree: in one of the layouts above.
        classes: folders of train to use, in this order; all by default.

    Raises:
        ValueError: naming the folder, file or class that is missing, empty or unknown.
    """
    folders = _folders(tree / "train")
    if not folders:
        raise ValueError(f"{tree / 'train'} holds no class folder; add one for each class.")
    names = folders if classes is None else list(classes)
    _check_chosen(names, tree / "train", folders)
    parent, table = _test_split(tree, folders)
    if table is None:
        _check_folders(parent, names, folders, chosen=classes is not None)
        test = list_images(parent, names)
    else:
        test = _listed(parent, table, names, folders, chosen=classes is not None)
    return {"train": list_images(tree / "train", names), "test": test}, names


def list_images(parent: Path, names: Sequence[str]) -> Files:
    """The images below parent/<name> with the position of each name; refuses an empty folder."""
    files: Files = []
    for label, name in enumerate(names):
        paths = _images(parent / name)
        if not paths:
            raise ValueError(f"{parent / name} holds no image; add some or leave that class out.")
        files += [(path, label) for path in paths]
    return files


def _images(folder: Path) -> list[Path]:
    found = []
    for place, _, names in os.walk(folder):  # ImageNet has 1.3 million: Path.rglob takes far longer
        # A Mac leaves ._name beside each file that it copies to a foreign disk.
        pictures = (n for n in names if n.lower().endswith(SUFFIXES) and n[0] != ".")
        found += [os.path.join(place, n) for n in pictures]
    return [Path(path) for path in sorted(found)]


def _folders(parent: Path) -> list[str]:
    return sorted(c.name for c in parent.iterdir() if c.is_dir() and c.name[0] != ".")


def _test_split(tree: Path, folders: list[str]) -> tuple[Path, Path | None]:
    """The folder of the test images, and the list of their classes if they lie flat."""
    found = [tree / split for split in _LISTS if (tree / split).is_dir()]
    for parent in found:
        if set(_folders(parent)) & set(folders):
            return parent, None
    for parent in found:
        if table := _table(tree, parent.name):
            return parent, table
    for parent in found:  # folders with other names: told so
        if set(_folders(parent)) - {"images"}:
            return parent, None
    raise ValueError(
        f"{tree} has no val or test folder with a folder a class or a list of classes in it; lay the "
        f"images out as val/<class>/<image>, or add val.txt with an image's name and class a line."
    )


def _table(tree: Path, split: str) -> Path | None:
    places = [tree / split, tree, tree / "ILSVRC2012_devkit_t12" / "data"]
    if tree.name == "CLS-LOC":  # in Kaggle's archive, ILSVRC/Data/CLS-LOC
        places.append(tree.parents[2])
    paths = [place / name for name in _LISTS[split] for place in places]
    return next((path for path in paths if path.is_file()), None)


def _check_chosen(names: list[str], parent: Path, there: list[str]) -> None:
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(
            f"classes names {missing[0]!r} but {parent} has no such folder; it has "
            f"{', '.join(there[:3])} and others, {len(there)} in all."
        )


def _check_folders(parent: Path, names: list[str], folders: list[str], chosen: bool) -> None:
    there = _folders(parent)
    if chosen:
        _check_chosen(names, parent, there)
    elif there != folders:
        odd = min(set(there) ^ set(folders))
        raise ValueError(
            f"{parent.parent / 'train'} and {parent} have different classes ({odd!r} is in one only); "
            f"give both the same folders, or pass classes=[...]."
        )


def _listed(parent: Path, table: Path, names: list[str], folders: list[str], chosen: bool) -> Files:
    """Images that lie flat, in the order of their list."""
    label = {name: number for number, name in enumerate(names)}
    name_of = _class_names(table, folders)
    files: Files = []
    for path, word in _rows(parent, table):
        name = name_of(word)
        if name in label:
            files.append((path, label[name]))
        elif not chosen:
            raise ValueError(
                f"{table} names class {word!r} but {parent.parent / 'train'} has no such folder; correct "
                f"the list, or pass classes=[...] to leave other classes out."
            )
    absent = set(range(len(names))) - {number for _, number in files}
    if absent:
        raise ValueError(
            f"{table} names no image of class {names[min(absent)]!r}; add some or leave that class out."
        )
    return files


def _rows(parent: Path, table: Path) -> list[tuple[Path, str]]:
    """Each image with what the list calls its class; refuses a list that is not of these images."""
    images = _images(parent)
    lines = [line.strip() for line in table.read_text(encoding="utf-8").splitlines()]
    rows = [_columns(line) for line in lines if line and not line.startswith("ImageId,")]
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(images):
            raise ValueError(
                f"{table} has {len(rows)} lines but {parent} has {len(images)} images; give a line for "
                f"each, in the order of the images' names."
            )
        return [(path, row[0]) for path, row in zip(images, rows, strict=True)]
    known = {key: path for path in images for key in (path.stem, path.name)}
    listed = []
    for row in rows:
        path = known.get(Path(row[0]).name)
        if path is None or len(row) == 1:
            raise ValueError(
                f"{table} has the line {' '.join(row)!r}, which names no image in {parent} with its "
                f"class; correct or remove it."
            )
        listed.append((path, row[1]))
    unlisted = sorted(set(images) - {path for path, _ in listed})
    if unlisted:
        raise ValueError(f"{table} has no line for {unlisted[0]}; add one or remove the image.")
    return listed


def _columns(line: str) -> list[str]:
    """Name and class, or the class alone: after a tab, a comma or the last space."""
    for mark in ("\t", ","):
        if mark in line:
            name, rest = line.split(mark)[:2]
            return [name.strip(), *(rest.split(maxsplit=1)[:1] if mark == "," else [rest.strip()])]
    return line.rsplit(maxsplit=1)


def _class_names(table: Path, folders: list[str]) -> Callable[[str], str | None]:
    """From a class in the list to the folder's name; None if there is none."""
    if table.name == _GROUND_TRUTH:
        return _synsets(table).get
    numbered = {str(number): name for number, name in enumerate(folders)}
    return lambda word: word if word in folders or not word.isdigit() else numbered.get(word)


def _synsets(table: Path) -> dict[str, str]:
    """Number to class, from the development kit, whose numbers are not in alphabetical order."""
    from scipy.io import loadmat  # of scikit-learn, which needs it

    kit = table.with_name("meta.mat")
    if not kit.is_file():
        raise ValueError(
            f"{table} numbers its classes as the ILSVRC development kit does; put the kit's meta.mat "
            f"beside it."
        )
    synsets = loadmat(kit, squeeze_me=True)["synsets"]
    return {str(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets.reshape(-1)}
