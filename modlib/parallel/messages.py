"""Messages from one process to the next one: in order, and only so many on their way."""

from __future__ import annotations

import queue
import threading
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
_HEADER = (
    64  # numbers before the tensors: the step, how many there are, and how each lies in memory
)
END, CLOSE = -1, -2  # in a step's place: of an epoch; of all


class Message(NamedTuple):
    """What is told of a step: its number, and tensors or None."""

    step: int
    tensors: tuple[Tensor | None, ...]


class Sender:
    """Sends messages to a neighbour; waits while the oldest of ``room`` has not been taken.

    Args:
        group: of the two processes, for this direction alone.
        peer: the neighbour's rank.
        wire: where tensors lie that are sent: the CPU, or a device whose library sends from there.
        room: how many messages may wait here.

    Attributes:
        bytes: of tensors that were sent.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, wire: torch.device, room: int) -> None:
        self.group, self.peer, self.wire, self.room = group, peer, wire, room
        self.pending: deque[list[tuple[Any, Tensor]]] = deque()
        self.bytes = 0

    def send(self, step: int, *tensors: Tensor | None) -> None:
        header, parts = [step, len(tensors)], []
        for tensor in tensors:
            header += _layout(tensor)
            if tensor is not None:
                parts.append(_flat(tensor).to(self.wire))
                self.bytes += parts[-1].nbytes
        head = torch.zeros(_HEADER, dtype=torch.int64)
        head[: len(header)] = torch.tensor(header)
        # a buffer must live until it has been sent
        self.pending.append([(self._start(part), part) for part in (head, *parts)])
        while len(self.pending) > self.room:
            self._finish()

    def flush(self) -> None:
        """Wait until everything has been taken."""
        while self.pending:
            self._finish()

    def _start(self, tensor: Tensor) -> Any:
        return dist.isend(tensor, self.peer, group=self.group)

    def _finish(self) -> None:
        for work, _ in self.pending.popleft():
            work.wait()


class Receiver:
    """Takes messages from a neighbour in the background, at most ``room`` ahead of their use.

    Args:
        group, peer, wire, room: as for ``Sender``.
        device: where tensors are wanted.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        peer: int,
        wire: torch.device,
        room: int,
        device: torch.device,
    ) -> None:
        self.group, self.peer, self.wire, self.device = group, peer, wire, device
        self.queue: queue.Queue[Message | Exception] = queue.Queue(room)
        self.thread = threading.Thread(target=self._take, name="receiver", daemon=True)
        self.thread.start()

    def receive(self, wait: bool = True) -> Message | None:
        """The next message; None if there is none yet and ``wait`` is False.

        Raises:
            RuntimeError: the connection is lost.
        """
        try:
            message = self.queue.get(wait)
        except queue.Empty:
            return None
        if isinstance(message, Exception):
            raise message
        for tensor in message.tensors:
            if tensor is not None and tensor.device.type == "cuda":
                # it was allocated for the background's stream, and must outlive its use on this one
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return message

    def _take(self) -> None:
        try:
            with _side_stream(self.device):
                while (message := self._next()).step != CLOSE:
                    self.queue.put(message)
        except Exception as error:  # it is the main thread's to raise
            self.queue.put(error)

    def _next(self) -> Message:
        header = torch.empty(_HEADER, dtype=torch.int64)
        dist.recv(header, self.peer, group=self.group)
        step, count, *numbers = header.tolist()
        tensors = tuple(self._tensor(numbers) for _ in range(count))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return Message(step, tensors)

    def _tensor(self, numbers: list[int]) -> Tensor | None:
        code = numbers.pop(0)
        if code < 0:
            return None
        dims = numbers.pop(0)
        shape, strides = numbers[:dims], numbers[dims : 2 * dims]
        del numbers[: 2 * dims]
        flat = torch.empty(torch.Size(shape).numel(), dtype=_DTYPES[code], device=self.wire)
        dist.recv(flat, self.peer, group=self.group)
        return flat.to(self.device).as_strided(shape, strides)


def _layout(tensor: Tensor | None) -> list[int]:
    """How a tensor lies in memory, in numbers: the last bits of a convolution depend on it."""
    if tensor is None:
        return [-1]
    return [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *_strides(tensor)]


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty_like(tensor, device="meta").stride()  # its own, if it has no holes


def _flat(tensor: Tensor) -> Tensor:
    """Its numbers in the order in which they lie in memory; a view, if there are no holes."""
    if tensor.stride() != _strides(tensor):
        tensor = torch.empty_like(tensor).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Waiting for a message must not hold up what is computed meanwhile."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
