"""One place touches devices; without a GPU its answers are tested with another one in CUDA's place."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import modlib
from modlib import device as devices
from modlib.data import Dataset, Loader

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


class PretendedCUDA:
    """What torch.cuda answers on a machine with one GPU; generators are the CPU's."""

    def __init__(self, capability: tuple[int, int] = (8, 0)) -> None:
        self.capability, self.waited, self.peaks = capability, 0, 0
        self.state = torch.get_rng_state()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        return self.capability

    def get_device_name(self, device: torch.device) -> str:
        return "Pretended"

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 5 << 30, 16 << 30

    def max_memory_allocated(self, device: torch.device) -> int:
        return 7 << 20

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peaks += 1

    def synchronize(self, device: torch.device) -> None:
        self.waited += 1

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return self.state

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.state = state

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [self.state]

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        (self.state,) = states


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCUDA:
    pretended = PretendedCUDA()
    monkeypatch.setattr(devices, "torch", _torch_with(pretended))
    return pretended


def _torch_with(cuda: PretendedCUDA) -> Any:
    """torch, with another torch.cuda; patched in that one place, so that nothing else believes it."""
    return SimpleNamespace(**{**vars(torch), "cuda": cuda})


def test_nothing_else_touches_a_device() -> None:
    """Nor asks for CUDA, streams, memory statistics, pinned memory or autocast."""
    package = Path(modlib.__file__).parent
    told = re.compile(
        r"torch\.(cuda|mps|amp|autocast|backends|is_autocast|get_autocast|Stream|Event)\b"
        r"|pin_memory|non_blocking|memory_stats|\.cuda\(|GradScaler\("
    )
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.name != "device.py"
        and path.parent.name != "parallel"  # which has streams of its own
        for line in path.read_text(encoding="utf-8").splitlines()
        if told.search(line)
    ]
    assert found == []


def test_auto_takes_cuda_where_there_is_one(cuda: PretendedCUDA) -> None:
    assert devices.pick_device("auto") == CUDA


def test_a_device_that_is_not_here_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ValueError, match="device='cuda' cannot be used here"):
        devices.pick_device("cuda")


@pytest.mark.parametrize(("capability", "named"), [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_auto_precision_is_what_the_hardware_multiplies(
    cuda: PretendedCUDA, capability: tuple[int, int], named: str
) -> None:
    cuda.capability = capability
    assert devices.precision_name("auto", CUDA) == named
    assert devices.precision_name("auto", CPU) == "float32"
    assert devices.precision_name("float32", CUDA) == "float32"
    with pytest.raises(ValueError, match="precision='half': choose from auto, float32"):
        devices.precision_name("half", CUDA)


def test_memory_and_clock_are_asked_of_the_device(cuda: PretendedCUDA) -> None:
    assert (devices.free_bytes(CUDA), devices.free_bytes(CPU)) == (5 << 30, None)
    devices.reset_peak(CUDA)
    devices.reset_peak(CPU)
    assert (devices.peak_bytes(CUDA), devices.peak_bytes(CPU), cuda.peaks) == (7 << 20, None, 1)
    devices.synchronise(CUDA)
    devices.synchronise(CPU)
    assert cuda.waited == 1
    assert (devices.device_name(CUDA), devices.device_name(CPU)) == ("Pretended", None)


def test_generators_of_both_are_put_back(cuda: PretendedCUDA) -> None:
    one, all_of_them = devices.random_state(CUDA), devices.all_random_states()
    before = torch.get_rng_state()
    torch.rand(1)
    cuda.state = torch.get_rng_state()
    devices.set_random_state(one, CUDA)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(cuda.state, before)
    torch.rand(1)
    cuda.state = torch.get_rng_state()
    devices.set_all_random_states(all_of_them)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(cuda.state, before)
    assert len(devices.random_state(CPU)) == 1


def test_a_copy_to_cuda_is_pinned_and_does_not_wait(
    cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes to the CPU is not pinned: that would cost a copy."""
    calls: list[Any] = []
    x = torch.arange(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: calls.append("pinned") or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: calls.append((a, k)) or t)
    devices.moved(x, CUDA)
    assert calls == ["pinned", ((CUDA,), {"non_blocking": True})]
    devices.moved(x, CPU)
    assert calls[2:] == [((CPU,), {})]


def test_autocast_rounds_and_full_precision_does_not() -> None:
    a = torch.ones(2, 2)
    with devices.autocast(CPU, "bfloat16")():
        assert (a @ a).dtype == torch.bfloat16
        again = devices.autocast_now(CPU)
        with devices.full_precision(a):
            assert (a @ a).dtype == torch.float32
    with again():
        assert (a @ a).dtype == torch.bfloat16
    with devices.autocast(CPU, "float32")(), devices.autocast_now(CPU)():
        assert (a @ a).dtype == torch.float32


def test_only_float16_is_scaled() -> None:
    for precision, scaled in (("float32", False), ("bfloat16", False), ("float16", True)):
        found = devices.scalers(2, precision, "cpu")
        assert [scaler.is_enabled() for scaler in found] == [scaled, scaled]


def test_the_loader_moves_batches_by_the_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that it gathers from a memory map."""
    moved: list[tuple[int, ...]] = []

    def watched(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr("modlib.data.loader.moved", watched)
    x, y = np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 2
    loader = Loader(Dataset("own", x, y, x, y), batch_size=3, memory="map")
    assert len(list(loader.epoch(0, 0))) == 2
    assert moved.count((3, 4, 4, 3)) == 2
