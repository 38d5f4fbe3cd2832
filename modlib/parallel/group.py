"""The processes of a run: how they meet, what they tell one another, and how they part."""

from __future__ import annotations

import contextlib
import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, cast

import torch
import torch.distributed as dist

from modlib.networks.sizes import check_whole
from modlib.parallel.heartbeat import Heartbeat
from modlib.parallel.messages import CLOSE, Message, Receiver, Sender

_EVER = timedelta(
    days=30
)  # one process may evaluate for long; who is alive is the heartbeat's to say
_PARTING = 10.0  # seconds that a process which has failed may take to end


class LostProcessError(ConnectionError):
    """Another process of the run has ended, or cannot be reached.

    >>> issubclass(LostProcessError, ConnectionError)
    True
    """


class Group:
    """The processes that ``torchrun`` started; a context in which each knows its neighbours.

    If one fails, all end: the others within seconds where its connection closes, within ``patience`` where it
    falls silent. Nothing is left to clean up, since files are written whole.

    Args:
        room: messages that may wait for a process at its neighbour's side, and as many at its own;
            a neighbour that has more to say waits.
        patience: seconds after which a process without a sign of life is given up.

    Attributes:
        rank: of this process, from 0 at the network's input.
        size: number of processes.

    Raises:
        ValueError: torchrun did not start this process, or a number is out of range.

    >>> Group()    # outside of torchrun
    Traceback (most recent call last):
    ValueError: parallel: this process has no others beside it; start it by torchrun ...
    """

    def __init__(self, *, room: int = 2, patience: float = 20.0) -> None:
        check_whole(room=room)
        missing = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
        if missing:
            raise ValueError(
                "parallel: this process has no others beside it; start it by "
                "torchrun --nproc-per-node K -m modlib run RECIPE --parallel modules."
            )
        self.room, self.patience = room, patience
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.senders: dict[int, Sender] = {}
        self.receivers: dict[int, Receiver] = {}

    def __enter__(self) -> Self:
        local, nearby = (
            int(os.environ.get(f"LOCAL_{name}", "0")) for name in ("RANK", "WORLD_SIZE")
        )
        gpus = torch.cuda.device_count()
        if gpus:
            torch.cuda.set_device(local % gpus)
        # NCCL wants a GPU for each process; where they share one, tensors go through the host's memory
        self.direct = dist.is_nccl_available() and gpus >= max(nearby, 1)
        self.store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.direct else "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.size,
            timeout=_EVER,
        )
        # a group of its own for each direction: NCCL sends and receives of one group wait for each other
        pairs = [(k, k + 1) for k in range(self.size - 1)]
        self.links = {
            way: cast(dist.ProcessGroup, dist.new_group(sorted(way), timeout=_EVER))
            for pair in pairs
            for way in (pair, pair[::-1])
        }
        dist.barrier()
        self.heartbeat = Heartbeat(self.store.clone(), self.rank, self.size, self.patience)
        dist.barrier()  # every process's first beat can be read
        self.heartbeat.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._give_up(error)
            return
        for sender in self.senders.values():
            sender.send(CLOSE)
            sender.flush()
        self.heartbeat.stop()
        dist.barrier()
        dist.destroy_process_group()

    def _give_up(self, error: BaseException) -> None:
        """Tell the others why, and see to it that this process ends, whatever its libraries wait for."""
        if not isinstance(error, LostProcessError):
            with contextlib.suppress(Exception):
                what = f"{error}".splitlines() or [type(error).__name__]
                self.heartbeat.store.set("reason", f"process {self.rank} failed: {what[0]}")
        # faulthandler's is the one clock that runs on while Python is being taken down
        faulthandler.dump_traceback_later(_PARTING, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115

    # --- neighbours -------------------------------------------------------------------------------

    def connect(self, device: torch.device) -> None:
        """Be ready for messages from both neighbours, whose tensors are wanted on this device."""
        wire = device if self.direct and device.type == "cuda" else torch.device("cpu")
        for (source, target), link in self.links.items():
            if source == self.rank and target not in self.senders:
                self.senders[target] = Sender(link, target, wire, self.room)
            if target == self.rank and source not in self.receivers:
                self.receivers[source] = Receiver(link, source, wire, self.room, device)

    def send(self, target: int, step: int, *tensors: torch.Tensor | None) -> None:
        """Send to a neighbour, if there is one: the first has none below, the last none above."""
        if target in self.senders:
            with self.reporting():
                self.senders[target].send(step, *tensors)

    def receive(self, source: int) -> Message:
        """The next message of a neighbour."""
        message = self.poll(source, wait=True)
        assert message is not None
        return message

    def poll(self, source: int, wait: bool = False) -> Message | None:
        """The next message of a neighbour, if it has come."""
        with self.reporting():
            return self.receivers[source].receive(wait)

    # --- all together -----------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """What every process says, in their order; known to the first one alone, [] elsewhere."""
        found: list[Any] = [None] * self.size
        with self.reporting():
            dist.gather_object(value, found if self.rank == 0 else None)
        return found if self.rank == 0 else []

    def share(self, value: Any = None) -> Any:
        """What the first process says."""
        found = [value]
        with self.reporting():
            dist.broadcast_object_list(found)
        return found[0]

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """A lost connection is reported as what it means.

        Raises:
            LostProcessError: in the place of a library's RuntimeError.
        """
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(
                f"{self._reason()}; every process of the run stops, and the last epoch's checkpoint is whole."
            ) from error

    def _reason(self) -> str:
        """Why a connection was lost, if who closed it has told."""
        with contextlib.suppress(Exception):
            store = self.heartbeat.store
            store.wait(["reason"], timedelta(seconds=2))
            return str(store.get("reason").decode())
        return f"process {self.rank} has lost its connection to another one, which has ended"
