"""The one place that touches a device: which one, its memory, its clock, its generators, mixed precision.

Everything else is the same code on every device. What CUDA does otherwise is asked for here, so that a test
without a GPU can put another answer in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

Scaler = torch.amp.GradScaler
MakeContext = Callable[[], AbstractContextManager[Any]]

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


# --- which device ---------------------------------------------------------------------------------


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """A device by name; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        ValueError: PyTorch cannot use that device here.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={str(device)!r} cannot be used here ({str(error).splitlines()[0]}); use 'auto' "
            "or 'cpu'."
        ) from error


def device_name(device: torch.device) -> str | None:
    """What a GPU is called; None where there is no name to ask for."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a copy to CUDA goes on while the processor prepares the next one."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# --- its clock and its memory ---------------------------------------------------------------------


def synchronise(device: torch.device) -> None:
    """Wait for what a device still has to do, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None on the CPU, whose memory belongs to the process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def reset_peak(device: torch.device) -> None:
    """Begin to count the most memory that is held at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes that tensors have held at once since ``reset_peak``; None where nobody counts."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


# --- its generators of random numbers -------------------------------------------------------------


def random_state(device: torch.device) -> list[Tensor]:
    """Where the generators of the CPU and of this device stand, for ``set_random_state``."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def set_random_state(state: Sequence[Tensor], device: torch.device) -> None:
    """Put the generators back as ``random_state`` found them."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def all_random_states() -> dict[str, Any]:
    """Those of the CPU and of every CUDA device, for a checkpoint."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_all_random_states(state: dict[str, Any]) -> None:
    """Put the generators back as ``all_random_states`` found them."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """Run a block whose random numbers, on the CPU and on this device, are not missed afterwards.

    >>> before = torch.get_rng_state()
    >>> with forked(torch.device("cpu")):
    ...     _ = torch.rand(1)
    >>> bool((before == torch.get_rng_state()).all())
    True
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


# --- mixed precision ------------------------------------------------------------------------------


def precision_name(precision: str, device: torch.device) -> str:
    """Which precision "auto" means on a device: what its hardware multiplies fastest.

    Raises:
        ValueError: it is none of ``PRECISIONS``.

    >>> precision_name("auto", torch.device("cpu"))
    'float32'
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: choose from {', '.join(PRECISIONS)}.")
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def autocast(device: torch.device, precision: str) -> MakeContext:
    """What makes the context in which a network runs in this precision."""
    if precision == "float32":
        return nullcontext
    return partial(torch.autocast, device.type, dtype=getattr(torch, precision))


def autocast_now(device: torch.device) -> MakeContext:
    """What makes the context that is in force now, for work that is done again later."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext
    now = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    return partial(torch.autocast, device.type, *now)


def full_precision(h: Tensor) -> AbstractContextManager[Any]:
    """The context in which nothing is rounded to half precision, on the device of h."""
    return torch.autocast(h.device.type, enabled=False)


def scalers(count: int, precision: str = "float32", device: str = "cuda") -> list[Scaler]:
    """Gradient scalers for so many optimisers: float16 needs them, all else passes through."""
    return [Scaler(device, enabled=precision == "float16") for _ in range(count)]
