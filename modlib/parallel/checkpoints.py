"""Checkpoints of a group: each process writes its part, and a list names a set that is complete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from modlib.parallel.group import Group
from modlib.training.checkpoints import Checkpoint, State, save_whole

_LIST = "complete.json"


class GroupCheckpoint(Checkpoint):
    """A folder with a part of each process. Only a set whose parts have all been written is ever used.

    Args:
        path: the folder, the same for all processes; on machines without common files, each finds its own
            part there.
        settings: what must be the same for a run to go on from it.
        resume: whether a set may be gone on from.
        group: the processes.

    Raises:
        ValueError: there is a set and ``resume`` is False; nothing is changed on disk.
    """

    def __init__(
        self, path: str | Path, settings: dict[str, Any], resume: bool, group: Group
    ) -> None:
        self.path, self.settings, self.group = Path(path), settings, group
        if self.path.is_file():
            raise ValueError(
                f"checkpoint: {self.path} is a file, as a run in one process writes it; many processes need a "
                "folder: give another path."
            )
        if (self.path / _LIST).exists() and not resume:
            raise ValueError(
                f"checkpoint: {self.path} exists; give resume=True to go on from it, or another path."
            )

    def save(self, state: State) -> None:
        """Write this process's part; when all have been written, the set takes the place of the one before."""
        mine = f"process{self.group.rank}"
        name = f"stage{state['stage']}-epoch{state['epoch']}-{mine}.pt"
        save_whole({"settings": self.settings, **state}, self.path / name)
        names = self.group.gather(name)  # comes when all parts are on disk
        if self.group.rank == 0:
            self._write_list(names)
        self.group.share()
        for other in self.path.glob(f"*-{mine}.pt"):
            if other.name != name:
                other.unlink()

    def load(self) -> State | None:
        """This process's part of the complete set, or None when there is no set.

        Raises:
            ValueError: a part is missing or damaged, or the set belongs to a run with other settings.
        """
        names = self.group.share(self._read_list() if self.group.rank == 0 else None)
        if names is None:
            return None
        if len(names) != self.group.size:
            raise ValueError(
                f"checkpoint: {self.path} was written by {len(names)} processes, not {self.group.size}; "
                "start as many, or give another path."
            )
        part = self.path / names[self.group.rank]
        state = Checkpoint(part, self.settings, resume=True).load()
        if state is None:
            raise ValueError(
                f"checkpoint: {part} is missing; put it back, or give another path to start anew."
            )
        return state

    def _write_list(self, names: list[str]) -> None:
        temporary = self.path / f".{_LIST}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(names, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / _LIST)

    def _read_list(self) -> list[str] | None:
        file = self.path / _LIST
        if not file.exists():
            return None
        try:
            return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))]
        except ValueError as error:
            raise ValueError(
                f"checkpoint: {file} is damaged; move {self.path} away to start anew."
            ) from error
