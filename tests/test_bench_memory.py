"""The bytes that ``bench_memory`` prints, as exact counts: a step of its papers' networks, on no device at all."""

from __future__ import annotations

import bench_memory
import pytest
from bench_memory import MIB

CASES = {(case.name, case.modules, case.images): case for case in bench_memory.CASES}

# In one backward pass as before, with terms apart, and the fewest with layers run again.
EXACT = {
    ("E2EBP", 1, 64): (159150724, 159150724, 38535680),
    ("InfoPro", 4, 64): (75027812, 67372000, 25952640),
    ("DGL", 2, 32): (84709892, 84709892, 38567428),
}


@pytest.mark.parametrize("key", EXACT, ids=str)
def test_bytes_are_these(key: tuple[str, int, int]) -> None:
    case = CASES[key]
    held = bench_memory.bytes_held(case)
    assert (held["before"], held["now"], held["least"]) == EXACT[key]
    if case.bound is not None:
        assert held["least"] <= held["bound"] <= case.bound * MIB
