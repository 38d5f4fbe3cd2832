"""Count the bytes that autograd holds: the memory that training a module really needs.

Process memory is a noisy witness (allocators keep what they freed). PyTorch lets us see every
tensor that a forward pass saves for its backward pass, and when it lets go of it, so the count here
is exact and the same on every machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

__all__ = [
    "SavedBytes",
]


class SavedBytes:
    """Context manager that measures what autograd holds for backward passes.

    Each storage is counted once, however many operations saved it; parameters (and batch norm's
    running statistics) are not counted, because they exist whether or not a backward pass will come.

    Args:
        parameters: tensors whose storage is not counted.

    Attributes:
        now: bytes held at this moment.
        peak: the most bytes held at any moment since the context was entered.

    >>> import torch
    >>> layer, x = torch.nn.Linear(4, 3), torch.zeros(2, 4)
    >>> with SavedBytes(layer.parameters()) as memory:
    ...     out = layer(x)          # the backward pass of a linear layer needs its input: 2 × 4 floats
    >>> memory.peak
    32
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self._ignored = {p.untyped_storage().data_ptr() for p in parameters}
        self._holders: Counter[int] = Counter()  # storage address -> how many saved tensors use it
        self.now = 0
        self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Held:
        # detach(): an operation's own output would otherwise hold the graph that holds it
        return _Held(tensor.detach(), self)

    def holds(self, tensor: Tensor) -> bool:
        """Does autograd hold this tensor's storage now?"""
        return self._holders[tensor.untyped_storage().data_ptr()] > 0

    def take(self, tensor: Tensor) -> None:
        """Note that one more saved tensor uses this storage."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._ignored:
            return
        self._holders[storage.data_ptr()] += 1
        if self._holders[storage.data_ptr()] == 1:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def release(self, tensor: Tensor) -> None:
        """Note that one saved tensor of this storage was let go."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._ignored:
            return
        self._holders[storage.data_ptr()] -= 1
        if self._holders[storage.data_ptr()] == 0:
            self.now -= storage.nbytes()


class _Held:
    """A saved tensor; autograd drops it when the backward pass no longer needs it."""

    def __init__(self, tensor: Tensor, meter: SavedBytes) -> None:
        self.tensor, self._meter = tensor, meter
        meter.take(tensor)

    def __del__(self) -> None:
        self._meter.release(self.tensor)
