"""Sets larger than the memory that a process may take, killed and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modlib.data
from modlib.data.cache import write_json, writing
from modlib.training.checkpoints import read_whole

pytest.importorskip("resource", reason="limits are set by the resource module")
if not Path("/proc/self/status").exists():
    pytest.skip("what a process takes is told by /proc", allow_module_level=True)

SIDE, N = 128, 2600  # 128 MB


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the set "big" in it."""
    place = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    some = rng.integers(0, 256, (100, SIDE, SIDE, 3), np.uint8)
    with writing(place / "big") as folder:
        for split, n in (("train", N), ("test", 40)):
            path = folder / f"{split}_images.npy"
            images = np.lib.format.open_memmap(path, "w+", np.uint8, (n, SIDE, SIDE, 3))
            for start in range(0, n, 100):  # no two alike
                images[start : start + 100] = (some + np.uint8(start // 100))[: n - start]
            del images
            np.save(folder / f"{split}_labels.npy", np.arange(n) % 4)
        write_json(folder / "classes.json", list("abcd"))
    return place


def trained(root: Path, checkpoint: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status of tests/limited.py, and what it says."""
    script = Path(__file__).with_name("limited.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(root), str(checkpoint), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode <= 0, ended.stderr
    return ended.returncode, json.loads(ended.stdout) if ended.stdout else {}


def test_a_set_four_times_the_memory_allowed_trains_as_from_memory_killed_or_not(
    root: Path, tmp_path: Path
) -> None:
    _, expected = trained(root, tmp_path / "memory.pt")
    assert expected["fits"] and not expected["map"]
    limited = ["--share", "0.25"]
    status, said = trained(root, tmp_path / "map.pt", *limited, "--kill", str(3 * N // 8 // 2))
    assert (status, said) == (-signal.SIGKILL, {})
    assert read_whole(tmp_path / "map.pt")["epoch"] == 1  # in the middle of the second
    _, resumed = trained(root, tmp_path / "map.pt", *limited)
    assert not resumed["fits"] and resumed["map"]  # the limit is one
    assert [row["epoch"] for row in resumed["rows"]] == [0, 1]
    assert resumed["weights"] == expected["weights"] and resumed["rows"] == expected["rows"]
    data = modlib.data.load("big", root)
    assert len(data.train_labels) == N and sorted(p.name for p in root.iterdir()) == ["big"]
