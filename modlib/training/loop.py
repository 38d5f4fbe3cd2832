"""The one training loop: every method, every network, every data set."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from modlib.data import Augment, Dataset, Loader
from modlib.device import (
    all_random_states,
    autocast,
    forked,
    pick_device,
    precision_name,
    scalers,
    set_all_random_states,
)
from modlib.measure.segments import chosen
from modlib.methods import Method, Stage
from modlib.methods.method import Batches
from modlib.network import ModularNetwork
from modlib.networks.recompute import recomputing
from modlib.networks.sizes import check_whole
from modlib.training import checkpoints
from modlib.training.arguments import (
    Schedule,
    augmentation,
    check_budget,
    check_kind,
    schedule_function,
    stage_lengths,
)
from modlib.training.evaluation import evaluate
from modlib.training.history import History, Row
from modlib.training.rehearsal import rehearse


@dataclass(frozen=True)
class Settings:
    """Everything that decides the course of a run, and must be the same when it resumes."""

    batch_size: int
    seed: int
    schedule: str
    precision: str
    augment: str
    channels_last: bool
    method: str
    objectives: str
    optimizers: str
    data: str


def fit(
    net: nn.Module,
    method: Method,
    data: Dataset,
    *,
    epochs: int | Sequence[int] = 10,
    batch_size: int = 128,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    channels_last: bool = False,
    augment: Augment | str | None = "auto",
    schedule: str | Schedule = "one-cycle",
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    after_epoch: Callable[[nn.Module, Row], None] | None = None,
    parallel: Parallel | None = None,
    recompute: int | str | None = None,
    fused: bool = False,
) -> History:
    """Train a network by a method.

    The same seed gives the same history, bit for bit, on a CPU with the same number of threads. The
    network's initial weights are its own (give a seed where you build it); ``seed`` decides the
    order of the data, the augmentation, auxiliary networks' weights, dropout and noise.

    Args:
        net: a network from ``modlib.partition``; any other module counts as one module.
        method: how it is trained.
        data: what it is trained on.
        epochs: of every stage, or a list with one number for each stage.
        batch_size: images a step, all of them if there are fewer; the remainder of an epoch is
            dropped. For an objective on pairs batches hold two of every class, where they have room
            and some would have fewer (``data.Loader``, "stratified"); a batch without the pairs that
            it needs is skipped, and counted in the history.
        device: "auto" takes CUDA, then MPS, then the CPU.
        precision: "float32", "bfloat16", "float16" (with gradient scaling); "auto" takes bfloat16
            where CUDA has it in hardware, float16 on older CUDA devices, else float32.
        channels_last: store images and weights as NHWC, faster for convolutions on most hardware.
        augment: "auto" does what is usual for the data set; None nothing; or a ``data.Augment``.
        schedule: factor on the learning rates: "one-cycle" (up for a fifth of the stage, down to
            0), "cosine", "constant", or a function of progress in [0, 1).
        checkpoint: a file that holds the run's state after every epoch.
        resume: go on from the checkpoint, if there is one. ``epochs`` may be others than before, as
            long as what has been trained would have been the same: with the constant schedule a
            finished run is extended so.
        progress: show a progress bar.
        after_epoch: called with the network, in eval mode, and the epoch's row, to which it may add
            measurements (plain Python numbers, so that a checkpoint can hold them).
        parallel: who trains where many processes do: ``modlib.parallel.ModuleParallel``. The checkpoint is
            then a folder.
        recompute: how many bytes autograd may hold for one module and its objective. Layers whose
            activations do not fit are run again for their gradient, as few as will do; "least" takes the
            fewest bytes. Training is the same, bit for bit, and slower.
        fused: let each parameter take its step as soon as its gradient is there, and let go of the
            gradient: the same steps, if the optimiser treats every parameter by itself (clipping all
            gradients together does not). Local learning and E2EBP do so, other methods and "float16" step
            as they always do.

    Returns:
        The history; the network is trained in place and left in eval mode.

    Raises:
        ValueError: an argument cannot work; nothing has been trained or written.
        TypeError: an argument is of another kind; likewise.
        FloatingPointError: an objective, a weight or the network's output became infinite or NaN: the
            sentence names the module and what to lower; the checkpoint holds the last good epoch.

    >>> import modlib
    >>> data = modlib.data.load("digits")
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10], seed=0), modules=2)
    >>> falling: modlib.training.Schedule = lambda progress: 1 - progress
    >>> method = modlib.methods.LocalLearning()
    >>> history = fit(net, method, data, epochs=5, schedule=falling, progress=False)
    >>> history.final["test_accuracy"] > 0.8
    True
    """
    check_kind("net", net, nn.Module, "modlib.networks.mlp([64, 10])")
    check_kind("method", method, Method, "modlib.methods.E2EBP()")
    check_kind("data", data, Dataset, "modlib.data.load('digits')")
    if after_epoch is not None and not callable(after_epoch):
        raise TypeError(f"after_epoch={after_epoch!r}: give a function of the network and the row.")
    device = pick_device(device)
    net = net if isinstance(net, ModularNetwork) else ModularNetwork([[("net", net)]])
    augmenting = augmentation(augment, data)
    check_whole(batch_size=batch_size)
    check_whole(least=0, seed=seed)
    if resume and checkpoint is None:
        raise ValueError("resume=True needs a checkpoint to go on from; give checkpoint=PATH.")
    factor = schedule_function(schedule)
    check_budget(recompute)
    precision = precision_name(precision, device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net.to(device, memory_format=layout)  # type: ignore[call-overload]
    loader = Loader(
        data,
        "train",
        batch_size,
        device=device,
        augment=augmenting or False,
        channels_last=channels_last,
    )
    with forked(device):
        torch.manual_seed(seed)
        sample, _ = loader.sample(min(batch_size, 8))
        method.check_output(_output_shape(net, sample, data), len(data.classes))
        stages = method.stages(net, sample)
        for objective in (o for stage in stages for o in stage.objectives):
            objective.set_normalisation(data.mean, data.std)
        lengths = stage_lengths(epochs, len(stages))
        settings = Settings(
            loader.batch_size,
            seed,
            schedule if isinstance(schedule, str) else "function",
            precision,
            repr(augmenting),
            channels_last,
            _describe_method(method, net, stages),
            _listed(f"{type(o).__name__}({o.extra_repr()})" for s in stages for o in s.objectives),
            _listed(f"{type(o).__name__} {o.defaults}" for s in stages for o in s.optimizers),
            f"{data.name} ({loader.n} images, checksum {_checksum(data)})",
        )
        for stage in stages:
            stage.check(loader)
            stage.autocast = autocast(device, precision)
            stage.scalers = scalers(len(stage.optimizers), precision, device.type)
            stage.fused = fused
        run = (parallel.run if parallel else Run)(net, stages, lengths, settings, factor)
        if checkpoint is not None:
            run.open(checkpoint, resume)
        with recomputing(_again(stages, loader, recompute)):
            rehearse(net, stages, loader, seed)
            run.train(loader, data, progress, after_epoch)
    net.eval()
    return run.history


class Parallel(Protocol):
    """What may take a run's place: something that makes one, for this process among others."""

    def run(self, *of: Any) -> Run: ...


class Run:
    """The state of one training run: where it is, and how to go on from there.

    Attributes:
        held: what this process trains of the network, and saves.
    """

    def __init__(
        self,
        net: ModularNetwork,
        stages: list[Stage],
        epochs: tuple[int, ...],
        settings: Settings,
        factor: Schedule,
    ) -> None:
        self.net, self.stages, self.epochs, self.settings = net, stages, epochs, settings
        self.factor, self.history = factor, History(batch_size=settings.batch_size)
        self.checkpoint: checkpoints.Checkpoint | None = None
        self.held: nn.Module = net

    def open(self, path: str | Path, resume: bool) -> None:
        """Save the run's state in a file, or go on from it."""
        self.checkpoint = checkpoints.Checkpoint(path, self.settings.__dict__, resume)

    def train(
        self,
        loader: Loader,
        data: Dataset,
        progress: bool,
        after_epoch: Callable[[nn.Module, Row], None] | None,
    ) -> None:
        start, first_epoch = self._restore()
        for number, stage in enumerate(self.stages[start:], start):
            begin = first_epoch if number == start else 0
            if begin == self.epochs[number]:
                continue
            batches = stage.batches(loader, self.settings.seed)
            for epoch in range(begin, self.epochs[number]):
                clock = time.perf_counter()
                losses, skipped = self._epoch(stage, batches, number, epoch, progress)
                seconds = time.perf_counter() - clock
                row = self._row(number, epoch, losses, skipped, data)
                if after_epoch is not None:
                    self.net.eval()  # what watches must not change batch norm's statistics
                    after_epoch(self.net, row)
                self.history.rows.append(row)
                self.history.seconds.append(seconds)
                if self.checkpoint is not None:
                    self.checkpoint.save(self._state(number, epoch + 1))

    def _epoch(
        self, stage: Stage, batches: Batches, number: int, epoch: int, progress: bool
    ) -> tuple[Tensor | None, int]:
        """Train for an epoch: each objective's mean, if any, and how many batches were skipped."""
        stage.train()
        steps = batches.epoch(self.settings.seed, epoch)
        total = self.epochs[number] * len(batches)
        losses, skipped = torch.zeros(()), 0
        shown = self._shown(steps, len(batches), number, epoch, progress)
        for step, (x, y) in enumerate(shown, epoch * len(batches)):
            if not stage.accepts(y):
                skipped += 1
                continue
            self._set_rate(stage, step / total)
            stage.stream = (self.settings.seed, number, step)
            losses = losses + stage.step(x, y)
        taken = len(batches) - skipped
        return losses / taken if taken else None, skipped

    def _row(
        self, number: int, epoch: int, losses: Tensor | None, skipped: int, data: Dataset
    ) -> Row:
        """What the history says of an epoch.

        Raises:
            FloatingPointError: it went wrong.
        """
        stage = self.stages[number]
        wrong = self._diverged(stage, losses)
        if wrong:
            raise FloatingPointError(f"Stage {number}, epoch {epoch}: {wrong}; {stage.remedy}.")
        means = [None] * len(stage.modules) if losses is None else losses.tolist()
        row: Row = {"stage": number, "epoch": epoch, "losses": means}
        row["test_accuracy"] = evaluate(self.net, data).accuracy if stage.complete else None
        return row | ({"skipped": skipped} if skipped else {})

    def _diverged(self, stage: Stage, losses: Tensor | None) -> str:
        """Which number of which module became infinite or NaN; "" if none did."""
        values = [] if losses is None else losses.tolist()
        # fewer values than modules are those of the last ones
        for module, loss in zip(stage.modules[-len(values) :], values, strict=False):
            if not math.isfinite(loss):
                return f"{self._name(module)}'s {stage.value} became {loss}"
        for what, owner, numbers in stage.watched():
            if not all(bool(tensor.isfinite().all()) for tensor in numbers):
                whose = what if owner is None else f"{self._name(owner)}'s {what}"
                return f"{whose} became infinite or NaN"
        return ""

    def _name(self, module: nn.Module) -> str:
        """What a report calls a module that was trained."""
        numbers = [k for k, part in enumerate(self.net) if part is module]
        return f"module {numbers[0]}" if numbers else "the network"

    def _set_rate(self, stage: Stage, progress: float) -> None:
        factor = self.factor(progress)
        for optimizer in stage.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def _shown(
        self,
        steps: Iterator[Any],
        total: int,
        stage: int,
        epoch: int,
        progress: bool,
    ) -> Iterator[Any]:
        name = f"epoch {epoch + 1}/{self.epochs[stage]}"
        if len(self.stages) > 1:
            name = f"stage {stage + 1}/{len(self.stages)}, {name}"
        return iter(tqdm(steps, name, total, leave=False, disable=not progress))

    # --- checkpoints ------------------------------------------------------------------------------

    def _state(self, stage: int, epoch: int) -> dict[str, Any]:
        return {
            "stage": stage,
            "epoch": epoch,
            "epochs": self.epochs,
            "net": self.held.state_dict(),
            "stage_state": self.stages[stage].state_dict(),
            "rows": self.history.rows,
            "seconds": self.history.seconds,
            "random": all_random_states(),
        }

    def _restore(self) -> tuple[int, int]:
        """Load the checkpoint, if there is one; where to go on: (stage, epoch)."""
        if self.checkpoint is None:
            return 0, 0
        state = self.checkpoint.load()
        if state is None:  # save, so that an interrupted first epoch leaves a file too
            self.checkpoint.save(self._state(0, 0))
            return 0, 0
        if _tensor_shapes(state["net"]) != _tensor_shapes(self.held.state_dict()):
            raise ValueError(
                f"checkpoint: {self.checkpoint.path} holds the weights of another network; build the "
                "one it was written for, or give another path."
            )
        self._check_epochs(state["stage"], state["epoch"], state["epochs"])
        checkpoints.fill(self.held, state["net"])
        self.stages[state["stage"]].load_state_dict(state["stage_state"])
        self.history = History(state["rows"], state["seconds"], self.settings.batch_size)
        set_all_random_states(state["random"])
        return state["stage"], state["epoch"]

    def _check_epochs(self, stage: int, epoch: int, before: Sequence[int]) -> None:
        """Refuse to go on where these epochs would have come to another state than those before."""
        if self.epochs[:stage] != tuple(before[:stage]) or self.epochs[stage] < epoch:
            why = (
                f"stage {stage} has been trained for {epoch} epochs, and earlier ones are finished"
            )
        elif epoch and self.epochs[stage] != before[stage] and self.settings.schedule != "constant":
            why = (
                f"schedule={self.settings.schedule!r} spreads the learning rates over the epochs, so "
                "all of them would have been others (with 'constant' a run can be extended)"
            )
        else:
            return
        assert self.checkpoint is not None
        raise ValueError(
            f"epochs={list(self.epochs)}: {self.checkpoint.path} belongs to a run with "
            f"{list(before)}, and {why}; give those epochs or another path."
        )


def _again(
    stages: Sequence[Stage], loader: Loader, recompute: int | str | None
) -> dict[nn.Module, list[tuple[int, int]]]:
    """What every module runs again in a step."""
    found: dict[nn.Module, list[tuple[int, int]]] = {}
    if recompute is not None:
        x, _ = loader.sample(loader.batch_size)
        for stage in stages:
            stage.train()
            found |= chosen(stage, x, recompute if isinstance(recompute, int) else None)
    return found


def _tensor_shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _describe_method(method: Method, net: ModularNetwork, stages: Sequence[Stage]) -> str:
    options = {k: v for k, v in vars(method).items() if isinstance(v, (int, float, str))}
    return f"{type(method).__name__} {options} of {len(net)} modules in {len(stages)} stages"


def _checksum(data: Dataset) -> str:
    """Of the training labels and a few of the images: another subset of the same size has another."""
    count = len(data.train_labels)
    few = np.ascontiguousarray(data.train_images[:: -(-count // 16)])
    return f"{zlib.crc32(few.tobytes(), zlib.crc32(np.array(data.train_labels).tobytes())):08x}"


def _listed(descriptions: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(descriptions))


def _output_shape(net: ModularNetwork, sample: Tensor, data: Dataset) -> tuple[int, ...]:
    try:
        return net.shapes(sample)[-1]
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise ValueError(
            f"net: it cannot run on images of shape {tuple(sample.shape[1:])} of {data.name!r} "
            f"({str(error).splitlines()[0]}); build it for that shape."
        ) from error
