"""One step of each stage before the first one, in which nothing moves: what cannot be trained says so now."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from modlib.device import Scaler, forked
from modlib.methods import Stage
from modlib.methods.method import Batches, OneBatch, shown
from modlib.networks.seeding import buffers_kept


def rehearse(net: nn.Module, stages: Sequence[Stage], batches: Batches, seed: int) -> None:
    """Take a step of each stage on real images, forward and backward, and leave all as it was.

    Args:
        net: what the stages train, on its device.
        stages: of one run.
        batches: of the network's input.
        seed: of the run.

    Raises:
        ValueError: no batch has the pairs that an objective needs, or a step needs more images than one.
        TypeError, ValueError: whatever else a step raises.
    """
    for stage in stages:
        with _unmoved(net, stage):
            _step(_apart(net, stage), batches, seed)


def _apart(net: nn.Module, stage: Stage) -> Stage:
    """The stage with the same networks, and a copy of whatever else a step may change."""
    owners = [net, *stage.modules, *stage.objectives, *stage.frozen, *stage.auxiliary]
    shared = [
        *(part for owner in owners for part in (*owner.modules(), *owner.parameters())),
        *stage.optimizers,
        *stage.scalers,
    ]
    return copy.deepcopy(stage, {id(part): part for part in shared})


def _step(stage: Stage, batches: Batches, seed: int) -> None:
    stage.optimizers = [cast(Optimizer, _Still(optimizer)) for optimizer in stage.optimizers]
    stage.scalers = [cast(Scaler, _Prompter()) for _ in stage.optimizers]
    # Of the network's input: a stage that stores features would store those of a whole epoch here.
    inputs = Stage.batches(stage, batches, seed).epoch(seed, 0)
    batch = next((batch for batch in inputs if stage.accepts(batch[1])), None)
    if batch is None:
        names = ", ".join(dict.fromkeys(type(o).__name__ for o in stage.objectives if o.pairs))
        raise ValueError(
            f"batch_size: no batch of an epoch has the pairs of images of the same and of different "
            f"classes that {names} needs; give a larger batch_size, or data of two classes or more."
        )
    stage.train()
    x, y = next(stage.batches(OneBatch(batch), seed).epoch(seed, 0))
    try:
        stage.step(x, y)
    except ValueError as error:
        if len(batch[1]) > 1:
            raise
        raise ValueError(
            "batch_size=1: a step on a single image cannot be taken "
            f"({str(error).splitlines()[0].rstrip('.')}); give batch_size=2 or more."
        ) from error


class _Still:
    """In an optimiser's place: gradients are computed, and nothing moves."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.param_groups = optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self, *_: Any, **__: Any) -> None:
        pass


class _Prompter:
    """In a gradient scaler's place: looks at what an objective returned before it is used."""

    def scale(self, loss: Tensor) -> Tensor:
        if not isinstance(loss, Tensor) or loss.dim():
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else shown(loss)
            raise TypeError(
                f"objective: it returned {what}, but a scalar tensor is minimised; return one, such as "
                "the mean over the batch, losses.mean()."
            )
        if not loss.requires_grad:
            raise ValueError(
                "objective: it returned a value without a gradient; compute it from h by torch's "
                "functions, without .item(), .detach() or torch.no_grad()."
            )
        return loss

    def step(self, optimizer: Optimizer) -> None:
        optimizer.step()

    def update(self) -> None:
        pass

    def get_scale(self) -> float:
        return 1.0

    def is_enabled(self) -> bool:
        return False


@contextmanager
def _unmoved(net: nn.Module, stage: Stage) -> Iterator[None]:
    """What a forward and a backward pass change is put back: modes, statistics, gradients, randomness."""
    owners = (net, *stage.objectives, *stage.auxiliary)
    parts = [part for whole in owners for part in whole.modules()]
    modes = [(part, part.training) for part in parts]
    device = next(net.parameters()).device
    try:
        with forked(device), buffers_kept(*owners):
            yield
    finally:
        for part, mode in modes:
            part.training = mode
        for optimizer in stage.optimizers:
            optimizer.zero_grad(set_to_none=True)
