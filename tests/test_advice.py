"""Every error of modlib.data says what would do, and that is done here: it has to work.

One case for each ``raise`` of the package; the last test counts them.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from advice import Call, Case, unreached
from PIL import Image
from scipy.io import savemat

import modlib.data
from modlib import cli
from modlib.data import Augment, Dataset, Loader, catalogue, explain, load, prepare, sources
from modlib.data.cache import write
from modlib.data.subsets import Subset

FILES = sorted(Path(modlib.data.__file__).parent.glob("*.py"))

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (40, 12, 12, 3), np.uint8)
LABELS = np.arange(40) % 4
VECTORS = rng.normal(size=(40, 5))
FIELDS: dict[str, Any] = {
    "train_images": IMAGES,
    "train_labels": LABELS,
    "test_images": IMAGES[:20],
    "test_labels": LABELS[:20],
}
SMALL = Dataset("small", **FIELDS)


def data(**changes: Any) -> Call:
    return lambda: Dataset("own", **{**FIELDS, **changes})


def loaded(dataset: Dataset = SMALL, **options: Any) -> Call:
    return lambda: list(Loader(dataset, **options).epoch(0, 0))


def fitted(dataset: Dataset, **options: Any) -> Call:
    layers = [torch.nn.Flatten(), torch.nn.Linear(int(np.prod(dataset.shape)), 4)]
    net = modlib.partition(torch.nn.Sequential(*layers), modules=1)
    return lambda: modlib.fit(
        net, modlib.methods.E2EBP(), dataset, epochs=1, progress=False, **options
    )


GREY = Dataset("grey", IMAGES[..., :1], LABELS, IMAGES[:20, ..., :1], LABELS[:20])
VECTOR_SET = Dataset("vectors", VECTORS, LABELS, VECTORS[:20], LABELS[:20])

PLAIN: dict[str, Case] = {
    "mode": (lambda: Augment(mode="edge"), [Augment, lambda: Augment(mode="zeros")]),  # type: ignore[arg-type]
    "pad": (lambda: Augment(pad=-1), [lambda: Augment(pad=0)]),
    "flip": (
        lambda: Augment(flip="never"),  # type: ignore[arg-type]
        [
            lambda: Augment(flip=True),
            lambda: Augment(flip=False),
            lambda: Augment(flip="alternate"),
        ],
    ),
    "scale": (
        lambda: Augment(0, scale=(0.5, 2)),
        [lambda: Augment(0, scale=(0.5, 1)), lambda: Augment(0, scale=(1, 1))],
    ),
    "pad and scale": (
        lambda: Augment(pad=4, scale=(0.5, 1)),
        [lambda: Augment(pad=0, scale=(0.5, 1)), lambda: Augment(pad=4)],
    ),
    "ratio": (lambda: Augment(ratio=(2, 1)), [lambda: Augment(ratio=(1, 2))]),
    "brightness": (lambda: Augment(brightness=-1), [lambda: Augment(brightness=0)]),
    "hue": (lambda: Augment(hue=1), [lambda: Augment(hue=0), lambda: Augment(hue=0.5)]),
    "no colours": (
        loaded(dataset=GREY, augment=Augment(hue=0.1, brightness=0.1)),
        [loaded(dataset=GREY, augment=Augment(brightness=0.1))],
    ),
    "taken": (
        lambda: prepare("digits", tree="/data"),
        [lambda: prepare("digits")],
    ),
    "range": (data(classes=("a", "b")), [data(classes=tuple("abcd"))]),
    "tensor": (data(train_images=torch.zeros(40, 5)), [data(train_images=IMAGES)]),
    "empty": (data(test_images=IMAGES[:0], test_labels=LABELS[:0]), [data()]),
    "gap": (
        data(train_labels=LABELS + 1, test_labels=LABELS[:20] + 1),
        [
            data(),
            data(**{k: v + 1 for k, v in FIELDS.items() if "labels" in k}, classes=tuple("01234")),
        ],
    ),
    "float labels": (data(train_labels=LABELS / 2), [data(train_labels=(LABELS / 2).astype(int))]),
    "flat labels": (data(train_labels=LABELS[:, None]), [data(train_labels=LABELS)]),
    "shapes": (data(test_images=IMAGES[:20, 1:]), [data(test_images=IMAGES[:20])]),
    "mean": (data(mean=(0.5,)), [data()]),
    "split": (
        lambda: SMALL.part("valid"),
        [lambda: SMALL.part("train"), lambda: SMALL.part("test")],
    ),
    "rows": (data(train_labels=LABELS[1:]), [data()]),
    "subset": (
        lambda: SMALL.subset(n_train=41),
        [partial(SMALL.subset, n) for n in (1, 40, None)],
    ),
    "finite": (
        data(train_images=VECTORS * np.inf, test_images=VECTORS[:20]),
        [data(train_images=VECTORS, test_images=VECTORS[:20])],
    ),
    "kind": (
        data(train_images=IMAGES / 255),
        [
            data(),
            data(train_images=VECTORS, test_images=VECTORS[:20]),
            data(
                train_images=IMAGES[:, 0, :, 0].astype(int),
                test_images=IMAGES[:20, 0, :, 0].astype(int),
            ),
        ],
    ),
    "tokens": (
        data(train_images=LABELS[:, None] - 1, test_images=LABELS[:20, None]),
        [data(train_images=LABELS[:, None], test_images=LABELS[:20, None])],
    ),
    "batch_size": (loaded(batch_size=0), [loaded(batch_size=n) for n in (1, 40, 10_000)]),
    "cuda": (loaded(device="cuda"), [loaded(device="cpu")]),
    "augment": (loaded(augment="auto"), [loaded(augment=a) for a in (True, False, Augment())]),
    "vectors": (loaded(dataset=VECTOR_SET, augment=Augment()), [loaded(dataset=VECTOR_SET)]),
    "vectors in fit": (fitted(VECTOR_SET, augment=Augment()), [fitted(VECTOR_SET)]),
    "memory": (
        loaded(memory="disk"),
        [loaded(memory=m) for m in ("auto", "device", "map")],
    ),
    "sample": (
        lambda: Loader(SMALL).sample(41),
        [partial(Loader(SMALL).sample, n) for n in (1, 40)],
    ),
    "sampler": (
        loaded(sampler="balanced"),
        [loaded(sampler=s) for s in ("uniform", "stratified")],
    ),
    "device": (loaded(device="gpu"), [loaded(device="cpu")]),
    "reflect": (loaded(augment=Augment(12)), [loaded(augment=Augment(11))]),
    "reflect in fit": (fitted(SMALL, augment=Augment(12)), [fitted(SMALL, augment=Augment(11))]),
    "seed": (lambda: Loader(SMALL).epoch(-1, 0), [lambda: next(Loader(SMALL).epoch(0, 0))]),
    "order": (
        loaded(sampler="stratified", shuffle=False),
        [loaded(sampler="stratified"), loaded(sampler="uniform", shuffle=False)],
    ),
    "stratified": (
        loaded(sampler="stratified", batch_size=2),
        [loaded(sampler="stratified", batch_size=n) for n in (3, 40)],
    ),
    "resize": (lambda: load("moons", size=8), [lambda: load("moons")]),
    "name": (lambda: load("digit"), [lambda: load("digits")]),
    "nothing known": (
        lambda: catalogue.stand_in("photographs"),
        [partial(catalogue.counts, name) for name in catalogue.names()],
    ),
    "explained name": (lambda: explain("digit"), [lambda: explain("digits")]),
    "list": (lambda: load("digits", classes="12"), [lambda: load("digits", classes=["1", "2"])]),
    "twice": (
        lambda: load("digits", classes=["1", "1"]),
        [lambda: load("digits", classes=["1"])],
    ),
    "size": (lambda: load("digits", size=0), [lambda: load("digits", size=1)]),
    "class": (
        lambda: load("digits", classes=["ten"]),
        [lambda: load("digits", classes=["0", "9"])],
    ),
}


def save(path: Path, image: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def grow(tree: Path) -> Path:
    """A tree with two classes, two images in each."""
    for split in ("train", "val"):
        for i, name in enumerate(("ant", "ant", "bee", "bee")):
            save(tree / split / name / f"{i}.png", IMAGES[i, :8, :8])
    return tree


def flatten(tree: Path, lines: str) -> Path:
    grow(tree)
    for i, name in enumerate(("ant", "ant", "bee", "bee")):
        (tree / "val" / name / f"{i}.png").rename(tree / "val" / f"{i}.png")
    for name in ("ant", "bee"):
        (tree / "val" / name).rmdir()
    (tree / "val.txt").write_text(lines)
    return tree


GOOD = "0.png ant\n1.png ant\n2.png bee\n3.png bee\n"


def no_folder(place: Path) -> Case:
    return lambda: load(str(place / "not-yet")), [lambda: load(str(grow(place / "not-yet")), place)]


def no_class_folder(place: Path) -> Case:
    tree = place / "tree"
    (tree / "train").mkdir(parents=True)
    return lambda: load(str(tree), place), [lambda: load(str(grow(tree)), place)]


def no_val(place: Path) -> Case:
    tree = flatten(place / "tree", GOOD)
    (tree / "val.txt").unlink()

    def listed() -> None:
        (tree / "val.txt").write_text(GOOD)
        load(str(tree), place / "a")

    return lambda: load(str(tree), place), [listed, lambda: load(str(grow(place / "other")), place)]


def unknown_class(place: Path) -> Case:
    tree = grow(place / "tree")
    return (
        lambda: load(str(tree), place, classes=["wasp"]),
        [lambda: load(str(tree), place, classes=["bee", "ant"])],
    )


def unlisted_class(place: Path) -> Case:
    tree = flatten(place / "tree", GOOD.replace("bee", "ant"))

    def more() -> None:
        (tree / "val.txt").write_text(GOOD)
        load(str(tree), place)

    return lambda: load(str(tree), place), [lambda: load(str(tree), place, classes=["ant"]), more]


def unlisted_image(place: Path) -> Case:
    tree = flatten(place / "tree", GOOD.replace("3.png bee\n", ""))

    def add() -> None:
        (tree / "val.txt").write_text(GOOD)
        load(str(tree), place / "a")

    def remove() -> None:
        (tree / "val.txt").write_text(GOOD.replace("3.png bee\n", ""))
        (tree / "val" / "3.png").unlink()
        load(str(tree), place / "b")

    return lambda: load(str(tree), place), [add, remove]


def no_kit(place: Path) -> Case:
    tree = flatten(place / "tree", GOOD)
    (tree / "val.txt").unlink()
    (tree / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n2\n1\n1\n")

    def kit() -> None:
        kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O")]
        savemat(tree / "meta.mat", {"synsets": np.array([(1, "bee"), (2, "ant")], kinds)})
        assert load(str(tree), place).test_labels.tolist() == [0, 0, 1, 1]

    return lambda: load(str(tree), place), [kit]


def empty_folder(place: Path) -> Case:
    tree = grow(place / "tree")
    for path in (tree / "val" / "bee").iterdir():
        path.unlink()

    def add() -> None:
        save(tree / "val" / "bee" / "2.png", IMAGES[2, :8, :8])
        load(str(tree), place)

    return lambda: load(str(tree), place), [lambda: load(str(tree), place, classes=["ant"]), add]


def other_folders(place: Path) -> Case:
    tree = grow(place / "tree")
    (tree / "val" / "bee").rename(tree / "val" / "wasp")

    def same() -> None:
        (tree / "val" / "wasp").rename(tree / "val" / "bee")
        load(str(tree), place)

    return lambda: load(str(tree), place), [lambda: load(str(tree), place, classes=["ant"]), same]


def short_list(place: Path) -> Case:
    tree = flatten(place / "tree", "ant\nant\nbee\n")

    def longer() -> None:
        (tree / "val.txt").write_text("ant\nant\nbee\nbee\n")
        load(str(tree), place)

    return lambda: load(str(tree), place), [longer]


def odd_line(place: Path) -> Case:
    tree = flatten(place / "tree", GOOD + "9.png bee\n")

    def without() -> None:
        (tree / "val.txt").write_text(GOOD)
        load(str(tree), place)

    return lambda: load(str(tree), place), [without]


def odd_class(place: Path) -> Case:
    tree = flatten(place / "tree", GOOD.replace("1.png ant", "1.png wasp"))

    def corrected() -> None:
        (tree / "val.txt").write_text(GOOD)
        load(str(tree), place)

    return (
        lambda: load(str(tree), place),
        [lambda: load(str(tree), place, classes=["ant", "bee"]), corrected],
    )


def broken(place: Path, first: bool) -> Case:
    tree = grow(place / "tree")
    path = tree / "train" / ("ant/0.png" if first else "bee/3.png")
    path.write_text("<html>")

    def repair() -> None:
        save(path, IMAGES[0, :8, :8])
        load(str(tree), place / "a")

    def remove() -> None:
        path.unlink()
        load(str(tree), place / "b")

    return lambda: load(str(tree), place), [repair, remove]


def broken_first(place: Path) -> Case:
    return broken(place, True)


def broken_later(place: Path) -> Case:
    return broken(place, False)


def other_size(place: Path) -> Case:
    tree = grow(place / "tree")
    save(tree / "train" / "bee" / "3.png", IMAGES[0])
    return lambda: load(str(tree), place), [lambda: load(str(tree), place, size=6)]


def not_square(place: Path) -> Case:
    tree = grow(place / "tree")
    save(tree / "train" / "ant" / "0.png", IMAGES[0, :6])
    return lambda: load(str(tree), place), [lambda: load(str(tree), place, size=6)]


def one_split(place: Path) -> Case:
    tree = grow(place / "tree")
    return lambda: load(str(tree / "train"), place), [lambda: load(str(tree), place)]


def no_tree(place: Path) -> Case:
    (place / "tree" / "ant").mkdir(parents=True)
    return lambda: load(str(place / "tree"), place), [
        lambda: load(str(grow(place / "tree")), place)
    ]


def moved_away(place: Path, change: Callable[[Path, Path], object]) -> Case:
    tree = grow(place / "tree")
    folder = modlib.data.prepare(str(tree), place)
    assert folder
    change(tree, folder)

    def anew() -> None:
        folder.rename(place / "away")
        load(str(tree), place)

    return lambda: load(str(tree), place), [anew]


def overwritten(place: Path) -> Case:
    return moved_away(place, lambda t, f: save(t / "val" / "bee" / "2.png", IMAGES[9, :8, :8]))


def prepared_before(place: Path) -> Case:
    return moved_away(place, lambda t, f: (f / "source.json").write_text('{"changed": 1}'))


def part_missing(place: Path) -> Case:
    return moved_away(place, lambda t, f: (f / "test_labels.npy").unlink())


def part_cut_short(place: Path) -> Case:
    return moved_away(place, lambda t, f: (f / "test_labels.npy").write_bytes(b""))


def classes_missing(place: Path) -> Case:
    return moved_away(place, lambda t, f: (f / "classes.json").unlink())


def classes_half(place: Path) -> Case:
    return moved_away(place, lambda t, f: (f / "classes.json").write_text("["))


def classes_wrong(place: Path) -> Case:
    return moved_away(place, lambda t, f: (f / "classes.json").write_text("{}"))


def class_without_image(place: Path) -> Case:
    return moved_away(place, lambda t, f: (f / "classes.json").write_text('["a", "b", "c"]'))


def root_is_a_file(place: Path) -> Case:
    (place / "file").write_text("")

    def by_variable() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MODLIB_DATA", str(place / "variable"))
            load("fetched")

    return lambda: load("fetched", place / "file"), [
        lambda: load("fetched", place / "b"),
        by_variable,
    ]


def by_hand(place: Path) -> Case:
    tree = grow(place / "imagewoof2")

    def told() -> None:
        with pytest.raises(FileNotFoundError) as error:
            load("photos", place)
        found = re.search(
            r"run `modlib (.*?) FOLDER`, where FOLDER holds its train", str(error.value)
        )
        assert found
        assert cli.main([*shlex.split(found[1]), str(tree)]) == 0
        assert load("photos", place).classes == ("an ant", "a bee")

    return lambda: load("photos", place), [told]


def not_its_tree(place: Path) -> Case:
    tree = grow(place / "photos2")
    return lambda: prepare("photos", place, tree=place), [
        lambda: prepare("photos", place, tree=tree)
    ]


def another_set(place: Path) -> Case:
    tree, more = grow(place / "photos2"), grow(place / "more")
    save(more / "train" / "bee" / "9.png", IMAGES[9, :8, :8])
    return lambda: prepare("photos", place, tree=more), [
        lambda: prepare("photos", place, tree=tree),
        lambda: load(str(more), place, classes=["ant", "bee"]),
    ]


def full_disk(place: Path) -> Case:
    tree = grow(place / "tree")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def wrong() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full, raising=False)
            load(str(tree), place / "full")

    return wrong, [lambda: load(str(tree), place / "full"), lambda: load(str(tree), place / "b")]


def dead_link(place: Path) -> Case:
    tree = grow(place / "tree")
    path = tree / "train" / "bee" / "9.png"
    path.symlink_to(place / "nowhere.png")

    def repair() -> None:
        save(place / "nowhere.png", IMAGES[9, :8, :8])
        load(str(tree), place / "a")

    def remove() -> None:
        path.unlink()
        load(str(tree), place / "b")

    return lambda: load(str(tree), place), [repair, remove]


def no_white(place: Path) -> Case:
    tree = grow(place / "tree")
    path = tree / "train" / "bee" / "3.tif"
    Image.fromarray(IMAGES[0, :8, :8, 0].astype(np.float32)).save(path)

    def repair() -> None:
        Image.fromarray(IMAGES[0, :8, :8, 0]).save(path)
        load(str(tree), place / "a")

    def remove() -> None:
        path.unlink()
        load(str(tree), place / "b")

    return lambda: load(str(tree), place), [repair, remove]


def unreachable(place: Path, size: int | None, command: str) -> Case:
    """Offline; then the command is run where there is a network, or the files are put there."""

    def offline() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sources.SOURCES, "fetched", replace(FETCHED, prepare=no_network))
            load("fetched", place, size=size)

    def told() -> re.Match[str]:
        with pytest.raises(ConnectionError) as error:
            offline()
        found = re.search(r"`modlib (.*?)` where .* classes.json in (.*)\.$", str(error.value))
        assert found and found[1] == f"{command} --root {place}"
        return found

    def there() -> None:
        folder = Path(told()[2])
        write(folder, FIELDS, list("abcd"))
        offline()
        folder.rename(place / "away")

    def fetched() -> None:
        assert cli.main(shlex.split(told()[1])) == 0
        offline()

    return offline, [lambda: load("digits"), there, fetched]


def offline(place: Path) -> Case:
    return unreachable(place, None, "data fetched")


def offline_in_a_size(place: Path) -> Case:
    return unreachable(place, 16, "data fetched --size 16")


def no_network(*_: object) -> None:
    def fetch(mirror: str | None) -> None:
        raise URLError("Name or service not known")

    sources.try_mirrors(fetch, ["http://nowhere/set.zip"])


FETCHED = sources.Source("", "", lambda f, d, s: write(f, FIELDS, list("abcd")), size=12)
PHOTOS = sources.Source(
    "", "", size=8, subset=Subset("the archive", 4, 4, {"ant": "an ant", "bee": "a bee"})
)
ON_DISK = [
    no_folder,
    no_class_folder,
    no_val,
    unknown_class,
    unlisted_class,
    unlisted_image,
    no_kit,
    empty_folder,
    other_folders,
    short_list,
    odd_line,
    odd_class,
    broken_first,
    broken_later,
    other_size,
    not_square,
    one_split,
    no_tree,
    overwritten,
    prepared_before,
    part_missing,
    part_cut_short,
    classes_missing,
    classes_half,
    classes_wrong,
    class_without_image,
    root_is_a_file,
    by_hand,
    not_its_tree,
    another_set,
    full_disk,
    dead_link,
    no_white,
    offline,
    offline_in_a_size,
]


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sources.SOURCES, "fetched", FETCHED)
    monkeypatch.setitem(sources.SOURCES, "photos", PHOTOS)
    yield


def test_every_piece_of_advice_works(tmp_path: Path) -> None:
    assert unreached(FILES, PLAIN.values(), ON_DISK, tmp_path) == []
