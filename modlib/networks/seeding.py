"""Reproducible initial weights without touching the caller's random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
