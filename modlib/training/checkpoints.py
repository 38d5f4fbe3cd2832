"""Files from which a run goes on exactly: written whole or not at all, never overwritten by mistake."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Any]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Checkpoint:
    """A run's state on disk.

    Args:
        path: the file.
        settings: what must be the same for a run to go on from it.
        resume: whether an existing file may be gone on from.

    Raises:
        ValueError: the file exists and ``resume`` is False; nothing is changed on disk.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], resume: bool) -> None:
        self.path, self.settings = Path(path), settings
        if self.path.exists() and not resume:
            raise ValueError(
                f"checkpoint: {self.path} exists; give resume=True to go on from it, or another path."
            )

    def save(self, state: State) -> None:
        """Write the state; a kill in the middle leaves the old file as it was."""
        save_whole({"settings": self.settings, **state}, self.path)

    def load(self) -> State | None:
        """The saved state, or None when there is no file.

        Raises:
            ValueError: the file is damaged, or it belongs to a run with other settings.
        """
        if not self.path.exists():
            return None
        try:
            state = read_whole(self.path)
            settings = dict(state.pop("settings"))
        except Exception as error:  # whatever a damaged file makes its reader stumble over
            raise ValueError(
                f"checkpoint: {self.path} is damaged and cannot be read; move it away to start anew "
                "(it was left as it is)."
            ) from error
        for name in self.settings | settings:  # an older version's settings have other names
            then, now = settings.get(name), self.settings.get(name)
            if then != now:
                raise ValueError(
                    f"checkpoint: {self.path} belongs to a run with {name}={then!r}, "
                    f"not {now!r}; use the same settings or another path."
                )
        return state


def save_whole(state: State, path: Path) -> None:
    """Write a state whole or not at all.

    Raises:
        ValueError: the state holds what ``read_whole`` would refuse to read; nothing is written.
    """
    check_plain(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves is overwritten
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # what an interruption has left


def read_whole(path: Path) -> State:
    """Read a state back; raises if a single bit of it has changed, which torch does not check."""
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():
            raise zipfile.BadZipFile(broken)
    state: State = torch.load(path, weights_only=True, map_location="cpu")
    return state


def fill(module: nn.Module, state: State) -> None:
    """Load a state dict, and lay its tensors in memory as they lay in the module that it came from.

    ``load_state_dict`` alone keeps the module's own layout. In another layout (channels_last, say) a
    convolution sums in another order, and the last bits of its output differ.

    Raises:
        RuntimeError: the state does not fit, as in ``load_state_dict``.

    >>> trained = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    >>> fresh = nn.Conv2d(2, 4, 3)
    >>> fill(fresh, trained.state_dict())
    >>> fresh.weight.stride() == trained.weight.stride()
    True
    """
    module.load_state_dict(state)
    for name, own in (*module.named_parameters(), *module.named_buffers()):
        if name in state and own.stride() != state[name].stride():
            laid = torch.empty_like(state[name], dtype=own.dtype, device=own.device)
            own.data = laid.copy_(own.data)


def check_plain(value: Any, where: str = "") -> None:
    """What can be read back: tensors, and Python's own numbers, strings, lists, tuples, dicts, None.

    Raises:
        ValueError: naming what is none of these.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            check_plain(key, where)
            check_plain(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            check_plain(inner, where)
    elif type(value) not in _PLAIN and not isinstance(value, Tensor):
        raise ValueError(
            f"{where} holds {value!r:.60} of type {type(value).__name__}, which a file would not give "
            "back; make it a plain Python number, string, list or dict, or a tensor."
        )
