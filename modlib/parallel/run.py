"""One process's share of a run: it trains its own module, and the first one keeps the books."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modlib.data import Dataset, Loader
from modlib.methods.delayed_gradients import DelayedStage
from modlib.methods.method import Batches
from modlib.networks.sizes import check_whole
from modlib.parallel.checkpoints import GroupCheckpoint
from modlib.parallel.group import Group
from modlib.parallel.messages import END
from modlib.parallel.parts import Incoming, Part, Step, check_parts, entering
from modlib.training.history import Row
from modlib.training.loop import Run


class ModuleParallel(Group):
    """One module in each process, for ``modlib.fit``: process k trains module k of the network.

    Without ``replay`` each batch goes through all processes, and every module ends with the very weights, to
    the last bit, that it would have after training in one process. With it no module waits for the one below:
    it goes on with one of the last ``replay`` batches that have come, the one used least; the history's rows
    then tell each module's ``updates``, and how ``stale`` its batches were: the mean and the largest number
    of newer ones that the module below had sent by then, as far as they had arrived. (Up to ``2 * room + 1``
    more may have been on their way.)

    Each process builds the whole network and takes one step of it, to see that it can be trained; then it gives
    all modules but its own up. The first process has the whole trained network in the end.

    Args:
        replay: batches to keep; 0 for none.
        room, patience: as for ``Group``.

    Raises:
        ValueError: as ``Group``; or (when training starts) there is not one process for each module.

    >>> ModuleParallel(replay=-1)
    Traceback (most recent call last):
    ValueError: replay...
    """

    def __init__(self, *, replay: int = 0, room: int = 2, patience: float = 20.0) -> None:
        check_whole(least=0, replay=replay)
        super().__init__(room=room, patience=patience)
        self.replay = replay

    def run(self, *of: Any) -> ModuleRun:
        """What ``modlib.fit`` runs in the place of a run in one process."""
        return ModuleRun(self, *of)


@dataclass
class _Report:
    """What a process tells of an epoch: its share of the history, and its module's weights."""

    means: Tensor | None
    skipped: int
    wrong: str
    seconds: float
    ages: list[int] = field(default_factory=list)
    updates: int = 0
    weights: dict[str, Tensor] | None = None


class ModuleRun(Run):
    """A run whose modules are trained by processes of their own; this is one of them.

    Args:
        group: the processes.
        of: as for ``Run``.

    Raises:
        ValueError: the network or the method cannot be divided so.
    """

    def __init__(self, group: ModuleParallel, *of: Any) -> None:
        super().__init__(*of)
        self.group, self.wrong = group, ""
        check_parts(self.net, self.stages, group.size, group.replay)

    def open(self, path: str | Path, resume: bool) -> None:
        settings = {**self.settings.__dict__, "replay": self.group.replay}
        self.checkpoint = GroupCheckpoint(path, settings, resume, self.group)

    def train(
        self,
        loader: Loader,
        data: Dataset,
        progress: bool,
        after_epoch: Callable[[nn.Module, Row], None] | None,
    ) -> None:
        rank = self.group.rank
        self.parts = [Part.of(stage, rank) for stage in self.stages]
        self.held, self.stages = self.net[rank], [part.stage for part in self.parts]
        if rank:
            for module in self.net:
                if module is not self.held:
                    module.to("meta")  # somebody else's
        self.group.connect(loader.device)
        start, first_epoch = self._restore()
        if (start, first_epoch) != (0, 0):
            self._fill(self.group.gather(_on_cpu(self.held)))
        for number in range(start, len(self.parts)):
            begin = first_epoch if number == start else 0
            if begin == self.epochs[number]:
                continue
            source = self._source(number, loader)
            for epoch in range(begin, self.epochs[number]):
                report = self._report(number, source, epoch, progress and rank == 0)
                self._meet(number, epoch, report, data, after_epoch)
                if self.checkpoint is not None:
                    self.checkpoint.save(self._state(number, epoch + 1))

    # --- an epoch of one process ------------------------------------------------------------------

    def _source(self, number: int, loader: Loader) -> Batches:
        """Where this process's batches come from in a stage."""
        part, rank = self.parts[number], self.group.rank
        source: Batches = entering(part, loader)
        if rank:
            source = Incoming(self.group, len(loader), part.replays * self.group.replay)
        if part.stored and part.trains:
            return part.stage.batches(source, self.settings.seed)
        for view in range(part.stored if part.feeds else 0):
            self._pass(number, source, view, False)
        return source

    def _report(self, number: int, source: Batches, epoch: int, progress: bool) -> _Report:
        part, clock = self.parts[number], time.perf_counter()
        if not part.trains and (part.stored or not part.feeds):
            return _Report(None, 0, "", 0.0)
        losses, updates, skipped = self._pass(number, source, epoch, progress)
        report = _Report(losses, skipped, "", time.perf_counter() - clock, updates=updates)
        if part.trains:
            report.wrong = super()._diverged(part.stage, losses)
            report.weights = _on_cpu(self.held)
        if isinstance(source, Incoming):
            report.ages = source.ages
        return report

    def _pass(
        self, number: int, source: Batches, epoch: int, progress: bool
    ) -> tuple[Tensor | None, int, int]:
        """Take part in one epoch: the objective's mean, the number of updates, and that of skipped batches."""
        part, total = self.parts[number], self.epochs[number] * len(source)
        part.stage.train()
        self.skipped, self.owed, losses, updates = 0, False, torch.zeros(()), 0
        steps = self._shown(self._steps(part, source, epoch), len(source), number, epoch, progress)
        for step, h, y, x in steps:
            if not part.trains:
                with part.stage.autocast():
                    self._pass_on(part, step, part.stage.features(h), y, x)
                continue
            self._set_rate(part.stage, step / total)
            part.stage.stream = (self.settings.seed, number, step)
            loss = self._step(part, step, h, y, x)
            losses, updates = losses if loss is None else losses + loss[None], updates + 1
        if part.feeds:
            self.group.send(self.group.rank + 1, END)
        self._take_error(part)
        return losses / updates if losses.dim() else None, updates, self.skipped

    def _step(self, part: Part, step: int, h: Tensor, y: Tensor, x: Tensor) -> Tensor | None:
        """The same step as in one process, but for who is told of it."""
        part.stage.draw(0, h.device)
        out = part.stage.forward(0, h)
        self._pass_on(part, step, out.detach(), y, x)
        self._take_error(part)  # of the step before: it may come while this one's output goes up
        loss = part.stage.learn(0, out, y, x)
        self.owed = part.asks
        if part.answers and isinstance(part.stage, DelayedStage):
            self.group.send(self.group.rank - 1, step, part.stage.errors[0])
        return loss

    def _steps(self, part: Part, source: Batches, epoch: int) -> Iterator[Step]:
        if isinstance(source, Incoming):
            yield from source.steps()
            return
        batches = source.epoch(self.settings.seed, epoch)
        for step, (h, y) in enumerate(batches, epoch * len(source)):
            if all(objective.accepts(y) for objective in part.judges):
                yield step, h, y, h
            else:
                self.skipped += 1

    def _pass_on(self, part: Part, step: int, h: Tensor, y: Tensor, x: Tensor) -> None:
        if part.feeds:
            self.group.send(self.group.rank + 1, step, h, y, x if part.tells_input else None)

    def _take_error(self, part: Part) -> None:
        if self.owed and isinstance(part.stage, DelayedStage):
            (part.stage.errors[1],) = self.group.receive(self.group.rank + 1).tensors
            self.owed = False

    # --- between two epochs -----------------------------------------------------------------------

    def _meet(
        self,
        number: int,
        epoch: int,
        report: _Report,
        data: Dataset,
        after_epoch: Callable[[nn.Module, Row], None] | None,
    ) -> None:
        """All processes report to the first one, which writes the epoch's row."""
        reports: list[_Report] = self.group.gather(report)
        row: Row = {}
        seconds = 0.0
        if reports:
            self._fill([report.weights for report in reports])
            row, seconds = self._summary(number, epoch, reports, data)
            if after_epoch is not None:
                self.net.eval()
                after_epoch(self.net, row)
        row, seconds = self.group.share((row, seconds))
        self.history.rows.append(row)
        self.history.seconds.append(seconds)

    def _summary(
        self, number: int, epoch: int, reports: list[_Report], data: Dataset
    ) -> tuple[Row, float]:
        means = [report.means.cpu() for report in reports if report.means is not None]
        self.wrong = next((report.wrong for report in reports if report.wrong), "")
        skipped = sum(report.skipped for report in reports)
        row = self._row(number, epoch, torch.cat(means) if means else None, skipped, data)
        if not means:
            row["losses"] = [None] * self.parts[number].together
        if self.group.replay:
            row["updates"] = [report.updates for report in reports]
            row["stale"] = [_staleness(report.ages) for report in reports]
        return row, max(report.seconds for report in reports)

    def _diverged(self, stage: Any, losses: Tensor | None) -> str:
        return self.wrong  # each process has looked at its own module

    def _fill(self, weights: list[dict[str, Tensor] | None]) -> None:
        """Put the others' weights into the first process's network."""
        for module, state in zip(self.net, weights, strict=False):
            if state is not None and module is not self.held:
                module.load_state_dict(state)


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


def _staleness(ages: list[int]) -> dict[str, float]:
    return {"mean": round(sum(ages) / max(len(ages), 1), 4), "max": max(ages, default=0)}
