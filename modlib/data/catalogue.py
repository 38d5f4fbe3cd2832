"""Data sets by name: find a prepared one, or prepare it, or say what to do."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modlib.data.cache import PARTS, Root, read, root_folder, scratch
from modlib.data.dataset import Array, Dataset, take
from modlib.data.embedded import EMBEDDED
from modlib.data.layouts import is_tree
from modlib.data.pictures import resized
from modlib.data.sources import SOURCES, Source, Unreachable
from modlib.data.trees import check_prepared, prepare_files, prepare_tree


def load(
    name: str,
    root: Root = None,
    *,
    classes: Sequence[str] | None = None,
    size: int | None = None,
) -> Dataset:
    """A data set by its name, or a folder of images.

    Prepared sets are memory-mapped from ``<root>/<name>``. One that is missing there is
    downloaded, prepared once and kept; a folder of images is decoded once and kept likewise.

    Args:
        name: one of ``names()``; or a folder in ``root``; or the path of a prepared folder, or of a
            folder tree: ``train/<class>/*.jpg``, and val/ or test/ likewise or flat with a list of the
            classes, as ILSVRC and Tiny ImageNet are unpacked (``modlib.data.layouts``).
        root: where prepared sets lie; by default ``$MODLIB_DATA``, else the user's cache folder.
        classes: names of the classes to keep, numbered 0, 1, ... in this order; all by default.
        size: side in pixels of square RGB images. Trees: what images are scaled and cropped to.
            Otherwise the images are resized in memory.

    Returns:
        A ``Dataset``.

    Raises:
        ValueError: if the name, a class or the size is unknown or impossible, or a prepared
            folder is damaged: the message names the file and says what to do.
        FileNotFoundError: if the set has to be fetched by hand.
        ConnectionError: if it could not be downloaded; the message names the folder, the command
            to prepare it by hand and a set that works offline.

    >>> load("digits")
    Dataset('digits', shape=(1, 8, 8), train=1437, test=360, classes=10)
    >>> load("digits", size=32, classes=["3", "8"])
    Dataset('digits-2classes-32px', shape=(3, 32, 32), train=285, test=72, classes=2)
    """
    _check_wishes(classes, size)
    if name in EMBEDDED:
        return _derived(EMBEDDED[name](), classes, size)
    folder, made_to_wish = _ensure(name, root_folder(root), classes, size)
    dataset = read(folder)
    return dataset if made_to_wish else _derived(dataset, classes, size)


def names() -> tuple[str, ...]:
    """Names that ``load`` knows: embedded sets, those that it can download, those to fetch by hand.

    >>> names()[:5]
    ('digits', 'spirals', 'moons', 'rings', 'cifar10')
    >>> names()[-2:]
    ('imagenet-100', 'imagenet')
    """
    return (*EMBEDDED, *sorted(SOURCES, key=lambda name: SOURCES[name].prepare is None))


def prepare(
    name: str,
    root: Root = None,
    *,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    tree: str | os.PathLike[str] | None = None,
) -> Path | None:
    """Make sure that a data set lies prepared on disk, and say where.

    Args:
        name: as for ``load``.
        root: as for ``load``.
        classes: as for ``load``.
        size: as for ``load``.
        tree: folder tree that a set of ImageNet photographs is taken from, where it is not prepared yet: such
            as ILSVRC 2012 for "imagenet-100", in a layout of ``modlib.data.layouts``.

    Returns:
        The prepared folder, which has been read and found whole; None for an embedded set.

    Raises:
        ValueError: as ``load``.
        FileNotFoundError: as ``load``.
        ConnectionError: as ``load``.

    >>> prepare("digits") is None
    True
    """
    _check_wishes(classes, size)
    if tree is not None:
        _check_taken(name)
    if name in EMBEDDED:
        return None
    folder, _ = _ensure(name, root_folder(root), classes, size, tree)
    read(folder)
    return folder


def explain(name: str, root: Root = None, *, size: int | None = None) -> str:
    """What a data set is, where it would lie, and how to get it there; reads and writes nothing.

    Args:
        name: as for ``load``.
        root: as for ``load``.
        size: as for ``load``.

    Raises:
        ValueError: if the name is unknown, or of a folder that is neither prepared nor a tree.

    >>> print(explain("spirals"))
    spirals: embedded, works offline: modlib.data.load('spirals')
    >>> print(explain("imagewoof", root="/data"))  # doctest: +NORMALIZE_WHITESPACE
    imagewoof: 12,954 ImageNet photos of 10 dog breeds (9,025 train, 3,929 test; 640 MB prepared at 128x128)
    https://github.com/fastai/imagenette
    This library does not download imagewoof: get imagewoof2.tgz (or its 320 px or 160 px version) from
    https://github.com/fastai/imagenette, unpack it, and run `modlib data imagewoof --root /data --from FOLDER`,
    where FOLDER holds its train and val.
    """
    if name in EMBEDDED:
        return f"{name}: embedded, works offline: modlib.data.load({name!r})"
    place = root_folder(root)
    folder, source = _folder(name, place, size), SOURCES.get(name)
    about = f"{name}: {source.about}\n{source.page}\n" if source else f"{name}: "
    if folder.is_dir():
        if is_tree(folder):
            return f"{about}a folder tree, prepared in {place}"
        check_prepared(folder)
        return f"{about}prepared in {folder}"
    if source is None:
        raise _unknown(name, place)
    if source.prepare is None:
        return about + _by_hand(name, folder, size)
    taken = ""
    if source.subset:
        taken = (
            f" If you have {source.subset.unpack} unpacked, add --from FOLDER to that command, where FOLDER "
            f"holds its train and val."
        )
    return f"{about}not prepared in {folder} yet: {_how(name, folder, size)}{taken}"


def stand_in(name: str, images: int = 64, *, size: int | None = None) -> Dataset:
    """Images of noise in the shape of a data set, with its classes: what is built for the one fits the other.

    Args:
        name: one of ``names()``.
        images: how many of each split; labels run through the classes.
        size: as for ``load``.

    Raises:
        ValueError: the name is unknown.

    >>> stand_in("imagenet-100", 8)
    Dataset('imagenet-100', shape=(3, 224, 224), train=8, test=8, classes=100)
    """
    if name in EMBEDDED:
        whole = _derived(EMBEDDED[name](), None, size)
        return whole.subset(n_train=images, n_test=min(images, len(whole.test_labels)))
    source = _source(name)
    channels, *sides = source.shape if size is None else (3, size, size)
    noise = np.random.default_rng(0).integers(0, 256, (images, *sides, channels), np.uint8)
    labels = np.arange(images) % source.classes
    numbers = tuple(map(str, range(source.classes)))
    return Dataset(name, noise, labels, noise, labels, numbers)


def counts(name: str) -> tuple[int, int]:
    """How many training and test images a data set has, whether it is on this machine or not.

    Raises:
        ValueError: the name is unknown.

    >>> counts("tiny-imagenet-20")
    (10000, 1000)
    """
    if name in EMBEDDED:
        whole = EMBEDDED[name]()
        return len(whole.train_labels), len(whole.test_labels)
    return _source(name).train, _source(name).test


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(
            f"name is {name!r}, of which nothing is known before it is read; known are {', '.join(names())}."
        )
    return SOURCES[name]


def _ensure(
    name: str,
    root: Path,
    classes: Sequence[str] | None,
    size: int | None,
    tree: str | os.PathLike[str] | None = None,
) -> tuple[Path, bool]:
    """The prepared folder, and whether it holds those classes in that size already."""
    source, folder = SOURCES.get(name), _folder(name, root, size)
    if folder.is_dir():
        if is_tree(folder):
            return prepare_tree(folder, root, classes, size), True
        check_prepared(folder)
        return folder, False
    if source is None:
        raise _unknown(name, root)
    if tree is None or source.subset is None:
        _fetch(name, source, folder, size)
        return folder, False
    place = Path(tree).expanduser().absolute()
    files, named = source.subset.take(name, place)
    side = source.subset.side or size or source.size
    prepare_files(folder, files, named, side, source={"tree": str(place)})
    return folder, False


def _folder(name: str, root: Path, size: int | None) -> Path:
    """Where a name points: into root, unless it is a path."""
    if os.sep not in name and "/" not in name and not name.startswith(("~", ".")):
        source = SOURCES.get(name)
        sized = source and source.size and size not in (None, source.size)
        return root / (f"{name}-{size}px" if sized else name)
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise ValueError(f"name is {name!r} but there is no such folder; check the path.")
    return folder


def _fetch(name: str, source: Source, folder: Path, size: int | None) -> None:
    if source.prepare is None:
        raise FileNotFoundError(f"{folder} does not exist. {_by_hand(name, folder, size)}")
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise ValueError(
            f"root is {root}, where nothing can be written ({error}); pass another root=, or leave it "
            f"out and set MODLIB_DATA."
        ) from error
    print(f"{name}: downloading and preparing {folder} (once)")
    # A folder of this call's own: what an earlier one left half unpacked is never trusted.
    with scratch(root / name, "downloading") as downloads:
        try:
            source.prepare(folder, downloads, size or source.size)
        except Unreachable as error:
            raise ConnectionError(
                f"{name} is not in {folder} and could not be downloaded ({error}); "
                f"modlib.data.load('digits') works offline; to have {name}, {_how(name, folder, size)}"
            ) from error
    print(f"{name}: prepared in {folder}")


def _how(name: str, folder: Path, size: int | None) -> str:
    files = ", ".join(f"{part}.npy" for part in PARTS)
    return (
        f"run `{_command(name, folder, size)}` where there is a network, or put {files} and classes.json in "
        f"{folder}."
    )


def _command(name: str, folder: Path, size: int | None) -> str:
    sized = "" if folder.name == name else f" --size {size}"
    return f"modlib data {name}{sized} --root {folder.parent}"


def _by_hand(name: str, folder: Path, size: int | None) -> str:
    source = SOURCES[name]
    assert source.subset is not None
    return (
        f"This library does not download {name}: get {source.subset.unpack} from {source.page}, unpack it, and "
        f"run `{_command(name, folder, size)} --from FOLDER`, where FOLDER holds its train and val."
    )


def _check_taken(name: str) -> None:
    """Refuse a tree for a set that is not taken out of one."""
    taken = [known for known, source in SOURCES.items() if source.subset]
    if name not in taken:
        raise ValueError(
            f"tree is given but {name} is not taken out of a folder tree, as {', '.join(taken)} are; leave it "
            f"out, or give the tree's path in place of the name."
        )


def _unknown(name: str, root: Path) -> ValueError:
    known = [*EMBEDDED, *SOURCES]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ValueError(
        f"name is {name!r}, which is neither a known data set nor a folder in {root}; {hint}known "
        f"are {', '.join(known)}, and the path of a folder (with a / in it) is taken too."
    )


def _check_wishes(classes: Sequence[str] | None, size: int | None) -> None:
    if isinstance(classes, str) or (
        classes is not None and not all(isinstance(c, str) for c in classes)
    ):
        raise TypeError(f"classes is {classes!r}; give a list of names.")
    if classes is not None and (len(classes) == 0 or len(set(classes)) < len(classes)):
        raise ValueError(f"classes is {list(classes)!r}; name each class once, at least one.")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"size is {size!r}; give a number of pixels.")


def _derived(dataset: Dataset, classes: Sequence[str] | None, size: int | None) -> Dataset:
    if classes is not None:
        dataset = selected(dataset, classes)
    if size is not None and dataset.shape != (3, size, size):
        dataset = resized(dataset, size)
    return dataset


def selected(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """Only some classes, held in memory."""
    unknown = [name for name in classes if name not in dataset.classes]
    if unknown:
        raise ValueError(
            f"classes names {unknown[0]!r} but {dataset.name} has {', '.join(dataset.classes)}."
        )
    number = np.full(len(dataset.classes), -1)
    number[[dataset.classes.index(name) for name in classes]] = np.arange(len(classes))

    def kept(images: Array, labels: Array) -> tuple[Array, Array]:
        index = np.flatnonzero(number[labels] >= 0)
        return take(images, index), number[labels[index]]

    train_x, train_y = kept(dataset.train_images, dataset.train_labels)
    test_x, test_y = kept(dataset.test_images, dataset.test_labels)
    name = f"{dataset.name}-{len(classes)}classes"
    return Dataset(name, train_x, train_y, test_x, test_y, tuple(classes))
