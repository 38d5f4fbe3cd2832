"""Where a number came from: versions, hardware, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from modlib.device import device_name


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {
        "python": platform.python_version(),
        **packages,
        "modlib": metadata.version("modlib-book"),
    }


def hardware(device: torch.device) -> str:
    """The processor that did the work, and how many threads it was given."""
    return device_name(device) or f"{_processor()}, {torch.get_num_threads()} thread(s)"


def commit() -> str | None:
    """The commit of the source tree, with "+" where files under modlib/ have changed since."""
    here = Path(__file__).parent
    revision = _git(here, "rev-parse", "HEAD")
    if revision is None:
        return None
    changed = _git(here, "status", "--porcelain", "--", str(here.parent))
    return revision + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
