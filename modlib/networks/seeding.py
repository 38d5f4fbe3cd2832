"""Reproducible initial weights without touching the caller's random state."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from modlib.device import forked, set_random_state


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run a block with PyTorch's CPU generator set to ``seed``, then put the old state back.

    With None the block uses, and advances, the global state.

    >>> with seeded(0):
    ...     a = torch.rand(1)
    >>> with seeded(0):
    ...     bool(a == torch.rand(1))
    True
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def reseed(device: torch.device, *key: int) -> None:
    """Let the random numbers from here on, on the CPU and on this device, follow from a key alone.

    >>> reseed(torch.device("cpu"), 0, 17)
    >>> once = torch.rand(2)
    >>> _ = reseed(torch.device("cpu"), 0, 18), torch.rand(5), reseed(torch.device("cpu"), 0, 17)
    >>> bool((torch.rand(2) == once).all())
    True
    """
    seed = zlib.crc32(repr(key).encode())
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.manual_seed(seed)


@contextmanager
def buffers_kept(*modules: nn.Module) -> Iterator[None]:
    """Put back, after a block, what these modules' buffers held before it: running statistics, say.

    >>> norm = nn.BatchNorm1d(2)
    >>> with buffers_kept(norm):
    ...     _ = norm(torch.ones(3, 2))
    >>> norm.running_mean
    tensor([0., 0.])
    """
    kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.data.copy_(before)


@contextmanager
def again(module: nn.Module, state: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    """Run a module a second time on the same batch: the same random numbers, no statistics counted twice.

    Args:
        module: what runs again.
        state: ``device.random_state(device)`` before it ran first; None if it draws nothing.
        device: on which it runs.

    >>> from modlib.device import random_state
    >>> layer, h = nn.Dropout(), torch.ones(8)
    >>> state = random_state(h.device)
    >>> once = layer(h)
    >>> with again(layer, state, h.device):
    ...     twice = layer(h)
    >>> bool((once == twice).all())
    True
    """
    with forked(device), buffers_kept(module):
        if state is not None:
            set_random_state(state, device)
        yield


def redraw(module: nn.Module, seed: int | None = None) -> None:
    """Draw the initial weights of all layers anew, and forget batch norm's statistics.

    >>> layer = nn.Linear(2, 2)
    >>> before = layer.weight.clone()
    >>> redraw(layer, seed=0)
    >>> bool((layer.weight == before).all())
    False
    """
    with seeded(seed):
        for name in ("reset_parameters", "_reset_parameters"):  # attention's come after its parts'
            for part in module.modules():
                reset = getattr(part, name, None)
                if callable(reset):
                    reset()
