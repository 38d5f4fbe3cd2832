"""How much memory there is, and reading ahead of what needs more."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from modlib.device import free_bytes

Part = TypeVar("Part")
Made = TypeVar("Made")

_GROUPS = Path("/sys/fs/cgroup")  # limits of containers and of jobs on a cluster


def ahead(make: Callable[[Part], Made], parts: Iterable[Part]) -> Iterator[Made]:
    """``map(make, parts)``, in order, made one ahead in a thread that ends with the iterator.

    What ``make`` raises is raised where its result would have come.

    >>> list(ahead(abs, [-2, -1]))
    [2, 1]
    """
    with ThreadPoolExecutor(1, "modlib-ahead") as reader:
        coming: Future[Made] | None = None
        for part in parts:
            ready, coming = coming, reader.submit(make, part)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free on a device, and that this process may take, as far as it is told."""
    on_device = free_bytes(device)
    if on_device is not None:
        return on_device
    return max(0, min(_free(), _free_of_process(), _free_of_groups()))


def _free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):  # not Linux: take half of what is built in as free
        if not hasattr(os, "sysconf"):
            return 4 << 30
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_of_process() -> int:
    """Up to the limits of this process (``ulimit -v`` and ``ulimit -d``)."""
    try:
        import resource

        status = Path("/proc/self/status").read_text().splitlines()
        used = {key: value for key, _, value in (line.partition(":") for line in status)}
        left = []
        for limit, what in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            if (most := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
                left.append(most - 1024 * int(used[what].split()[0]))
        return min(left, default=1 << 62)
    except (ImportError, OSError, KeyError):
        return 1 << 62


def _free_of_groups() -> int:
    """Up to the limits of the control groups (version 2) that this process is in."""
    left = 1 << 62
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        path = next(line[3:] for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return left
    group = _GROUPS / path.lstrip("/")
    for place in (group, *group.parents):
        if place == _GROUPS.parent:
            break
        try:
            most = (place / "memory.max").read_text().strip()
            used = int((place / "memory.current").read_text())
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":  # files that were read are counted as used, and given back when needed
            left = min(left, int(most) - used + int(stat.get("inactive_file", 0)))
    return left
