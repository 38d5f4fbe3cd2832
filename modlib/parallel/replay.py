"""Train on without waiting: a few of the last batches from below are kept, and used again.

Source: asynchronous decoupled greedy learning with a replay buffer, Belilovsky et al. 2020 (arXiv 1901.08164,
section 4). As there, a batch that was used less comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

from modlib.parallel.messages import Message


@dataclass
class _Kept:
    message: Message
    number: int
    uses: int = 0


class ReplayBuffer:
    """The last batches from below, of which each update takes the one that was used least.

    Each batch is used at least once: a batch that was not is never dropped for a new one.

    Args:
        room: how many are kept.

    Attributes:
        ages: for every batch that was taken, how many newer ones had come from below by then: by how
            many updates the module below had moved on.

    >>> buffer = ReplayBuffer(2)
    >>> buffer.add(Message(0, ())), buffer.take().step, buffer.take().step    # nothing newer has come
    (None, 0, 0)
    >>> buffer.add(Message(1, ())), buffer.has_room, buffer.take().step
    (None, True, 1)
    >>> buffer.add(Message(2, ())), buffer.add(Message(3, ())), buffer.has_room    # 0 and 1 had to go
    (None, None, False)
    >>> buffer.take().step, buffer.take().step, buffer.ages
    (2, 3, [0, 0, 0, 1, 0])
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.kept: list[_Kept] = []
        self.arrived = 0
        self.ages: list[int] = []

    @property
    def has_room(self) -> bool:
        """May another batch come?"""
        return len(self.kept) < self.room or any(kept.uses for kept in self.kept)

    @property
    def unused(self) -> bool:
        return any(not kept.uses for kept in self.kept)

    def add(self, message: Message) -> None:
        """Keep a batch; if there are too many, the most used goes, the oldest of those first."""
        if len(self.kept) == self.room:
            self.kept.remove(max(self.kept, key=lambda kept: (kept.uses, -kept.number)))
        self.kept.append(_Kept(message, self.arrived))
        self.arrived += 1

    def take(self) -> Message:
        """The batch used least, the oldest of those first."""
        kept = min(self.kept, key=lambda kept: (kept.uses, kept.number))
        kept.uses += 1
        self.ages.append(self.arrived - 1 - kept.number)
        return kept.message
