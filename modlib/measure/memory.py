"""Count the bytes that autograd holds: the memory that training a module really needs.

Process memory is a noisy witness (allocators keep what they freed). PyTorch lets us see every
tensor that a forward pass saves for its backward pass, and when it lets go of it, so the count here
is exact and the same on every machine.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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

    watching: ClassVar[list[SavedBytes]] = []  # those whose context has been entered

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self._ignored = {storage_of(p) for p in parameters}
        self._holders: Counter[int] = Counter()  # storage -> how many saved tensors use it
        self.now = 0
        self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(hold, lambda held: held.tensor)

    def __enter__(self) -> SavedBytes:
        SavedBytes.watching.append(self)
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        SavedBytes.watching.remove(self)

    def holds(self, tensor: Tensor) -> bool:
        """Does autograd hold this tensor's storage now?"""
        return self._holders[storage_of(tensor)] > 0

    def take(self, tensor: Tensor) -> None:
        """Note that one more saved tensor uses this storage."""
        storage = storage_of(tensor)
        if storage in self._ignored:
            return
        self._holders[storage] += 1
        if self._holders[storage] == 1:
            self.now += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)

    def release(self, tensor: Tensor) -> None:
        """Note that one saved tensor of this storage was let go."""
        storage = storage_of(tensor)
        if storage in self._ignored:
            return
        self._holders[storage] -= 1
        if self._holders[storage] == 0:
            self.now -= tensor.untyped_storage().nbytes()


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that counts the bytes of all tensors that are made in it and are still there.

    Activations, gradients, whatever an operation leaves behind, whoever holds it; what an operation needs
    for itself while it runs is not seen.

    Attributes:
        now: bytes alive at this moment.
        peak: the most at any moment.

    >>> import torch
    >>> with LiveBytes() as memory:
    ...     x = torch.ones(4).exp()    # the ones are gone when x is there
    >>> memory.now, memory.peak
    (16, 32)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.finalize[..., Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in given:
                self._take(tensor)
        return out

    def _take(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_of(tensor)
        if key in self._alive:
            return
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common; also on the device "meta", where none is used."""
    return int(tensor.untyped_storage()._cdata)


class Held:
    """A saved tensor, as ``hold`` gives it; dropped when the backward pass no longer needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._meters = tensor, tuple(SavedBytes.watching)
        for meter in self._meters:
            meter.take(tensor)

    def __del__(self) -> None:
        for meter in self._meters:
            meter.release(self.tensor)


def hold(tensor: Tensor) -> Held:
    """Hold a tensor for a backward pass, where every ``SavedBytes`` that is watching counts it."""
    # detach(): an operation's own output would otherwise hold the graph that holds it
    return Held(tensor.detach())
