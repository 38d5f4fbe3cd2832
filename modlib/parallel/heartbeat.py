"""A process that falls silent is noticed by all others, also where none of them waits for its messages."""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

LEFT = b"left"  # in a beat's place: it went in order


class Heartbeat(threading.Thread):
    """Counts up beside the training, and ends this process when another one's count stands still.

    A connection that is closed wakes whoever waits for it. This is for the rest: a machine that hangs, a
    cable that is cut, a launcher that was killed. The main thread may then wait for ever inside a library,
    so the process is ended from here; what is on disk is whole at any time.

    Args:
        store: where counts are written; a connection of its own.
        rank: of this process.
        size: number of processes.
        patience: seconds without a sign after which one is given up.
        every: seconds between beats.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        patience: float = 20.0,
        every: float = 1.0,
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.store, self.rank, self.patience, self.every = store, rank, patience, every
        self.others = [other for other in range(size) if other != rank]
        self.stopped = threading.Event()
        store.set_timeout(timedelta(seconds=patience))
        self._beat(b"0")

    def run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # whatever a lost connection makes of a call
            if not self.stopped.is_set():
                _end(f"the processes' meeting place was lost ({_first_line(error)})")

    def stop(self) -> None:
        """Leave in order: nobody is to miss this process from now on."""
        self.stopped.set()
        self.join(self.patience)
        self._beat(LEFT)

    def _watch(self) -> None:
        """Silence is counted in beats of our own: a machine that was asleep has missed nobody's."""
        count, seen, silent = 0, dict.fromkeys(self.others, b""), dict.fromkeys(self.others, 0)
        while not self.stopped.wait(self.every):
            count += 1
            self._beat(str(count).encode())
            for other in self.others:
                beat = self.store.get(f"beat/{other}")
                silent[other] = silent[other] + 1 if beat == seen[other] != LEFT else 0
                seen[other] = beat
                if silent[other] * self.every > self.patience:
                    _end(f"process {other} has given no sign for {self.patience:.0f} s")

    def _beat(self, value: bytes) -> None:
        self.store.set(f"beat/{self.rank}", value.decode())


def _end(what: str) -> None:
    print(
        f"modlib: {what}; this process stops, and the last epoch's checkpoint is whole.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
