"""Prepared data sets on disk: memory-mapped arrays that are there entirely or not at all.

A prepared folder holds {train,test}_{images,labels}.npy (uint8 NHWC, vectors or tokens; integers),
classes.json (a list of names) and, written on first use, statistics.json (mean and std).
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from modlib.data.dataset import Array, Dataset

PARTS = ("train_images", "train_labels", "test_images", "test_labels")
_LOCK = ".lock"
Root = str | os.PathLike[str] | None
Numbers = tuple[float, ...]


def root_folder(root: Root = None) -> Path:
    """Where prepared sets lie: ``root``, else $MODLIB_DATA, else the user's cache folder.

    >>> root_folder("/data").name
    'data'
    """
    if root is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        root = os.environ.get("MODLIB_DATA") or cache / "modlib"
    return Path(root).expanduser().absolute()


def read(folder: Path) -> Dataset:
    """A prepared folder as a memory-mapped ``Dataset``.

    Raises:
        ValueError: naming the file, if one is missing, cut short, or disagrees with another.
    """
    train_x, train_y, test_x, test_y = (_array(folder / f"{part}.npy") for part in PARTS)
    classes = _classes(folder / "classes.json")
    known = _known_statistics(folder)
    try:
        data = Dataset(folder.name, train_x, train_y, test_x, test_y, classes, *known)
        present = np.bincount(data.train_labels, minlength=len(classes))
        if not present.all():
            empty = classes[int(np.argmin(present))]
            raise ValueError(f"{folder.name}: class {empty!r} has no training image.")
    except (TypeError, ValueError) as error:
        raise damaged(folder, f"does not hold a data set ({str(error).rstrip('.')})") from error
    if data.mean and not known[0]:
        with suppress(OSError):  # a shared cache may be read-only
            content = {"mean": data.mean, "std": data.std, "of": _fingerprint(folder)}
            write_json(folder / "statistics.json", content)
    return data


def write(folder: Path, arrays: dict[str, Array], classes: Sequence[str]) -> None:
    """Write a prepared folder, at once or not at all."""
    with writing(folder) as temporary:
        for part in PARTS:
            np.save(temporary / f"{part}.npy", arrays[part])
        write_json(temporary / "classes.json", list(classes))


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when all has gone well.

    Until then it has a name that is never read (".<name>-preparing-..."); see ``scratch``.
    """
    with scratch(folder, "preparing") as temporary:
        temporary.chmod(0o755)  # mkdtemp makes it private, but caches are shared
        yield temporary
        (temporary / _LOCK).unlink(missing_ok=True)
        try:
            temporary.replace(folder)
        except OSError:
            if not (folder / "classes.json").exists():
                raise
            # Another process was faster.


@contextmanager
def scratch(folder: Path, doing: str) -> Iterator[Path]:
    """A temporary folder beside ``folder``, removed in the end whatever happens.

    Where the process is killed it stays, until this is called for the same folder again. That it is abandoned is
    told by its lock, which the system takes away from a process that ends.
    """
    prefix = f".{folder.name}-{doing}-"
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(glob.escape(prefix) + "*"):
        with _locked(left / _LOCK, "r") as abandoned:
            if abandoned:
                shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        with _locked(temporary / _LOCK, "w") as locked:
            if not locked:  # a file system without locks: never taken for abandoned
                (temporary / _LOCK).unlink(missing_ok=True)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(path: Path, mode: str) -> Iterator[bool]:
    """Hold a file's lock; False where it is held by another process, or cannot be had."""
    try:
        import fcntl

        file = path.open(mode)
    except (ImportError, OSError):
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def reserve(path: Path) -> None:
    """Take a file's room on the disk now: a full disk would end a process that writes to a memory map.

    Raises:
        OSError: if there is no room.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    size = path.stat().st_size
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                return  # a file system that cannot
            raise OSError(
                f"{path.parent.parent} has no room for {size / 1e9:.3g} GB of {path.name} ({error}); make "
                f"room there, or pass another root=."
            ) from error


def write_json(path: Path, content: object) -> None:
    """Write a small JSON file, at once or not at all."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    temporary.replace(path)


def damaged(path: Path, what: str) -> ValueError:
    """One sentence on a file or folder that is not as it should be; nothing is deleted."""
    return ValueError(
        f"{path} {what}; put that right, or move the prepared folder away and prepare it anew, which "
        f"load does for a known name or a folder tree."
    )


def _array(path: Path) -> Array:
    if not path.exists():
        raise damaged(path, "is missing")
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise damaged(path, f"cannot be read as an array ({error})") from error
    return array


def _classes(path: Path) -> tuple[str, ...]:
    if not path.exists():
        raise damaged(path, "is missing")
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, f"is not JSON ({error})") from error
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise damaged(path, "is not a list of class names")
    return tuple(names)


def _known_statistics(folder: Path) -> tuple[Numbers, Numbers]:
    """Mean and std computed before; empty if the images have changed since."""
    try:
        known = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
        if known["of"] == _fingerprint(folder):
            return tuple(known["mean"]), tuple(known["std"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # computed again
    return (), ()


def _fingerprint(folder: Path) -> list[int]:
    status = (folder / "train_images.npy").stat()
    return [status.st_size, status.st_mtime_ns]
