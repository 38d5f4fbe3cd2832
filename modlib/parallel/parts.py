"""What each process has to do in a stage: train its module, run it for those above, or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from modlib.methods import Stage
from modlib.methods.cache import CachingStage
from modlib.methods.delayed_gradients import DelayedStage
from modlib.methods.method import Batches
from modlib.network import ModularNetwork
from modlib.objectives import Objective
from modlib.parallel.group import Group
from modlib.parallel.messages import END, Message
from modlib.parallel.replay import ReplayBuffer

Step = tuple[
    int, Tensor, Tensor, Tensor
]  # its number, the module's input, labels, the network's input


@dataclass
class Part:
    """A stage as one process sees it.

    Attributes:
        stage: the same stage with this process's module alone: trained, frozen, or left out.
        together: how many modules the stage trains.
        trains: is this process's module trained?
        feeds: does a module above take its output?
        tells_input: does one above look at the network's input?
        stored: how often the frozen modules run once for all, where their output is stored; 0 where it comes
            in every epoch.
        replays: may it train on what has come before, while nothing new comes?
        pairs: must batches hold pairs of every class?
        judges: objectives that must all accept a batch, where it enters the stage.
    """

    stage: Stage
    together: int
    trains: bool
    feeds: bool
    tells_input: bool
    stored: int
    replays: bool
    pairs: bool
    judges: Sequence[Objective]

    @classmethod
    def of(cls, stage: Stage, rank: int) -> Self:
        """What the process of this rank, which holds the network's module of this number, has to do."""
        frozen, last = len(stage.frozen), len(stage.frozen) + len(stage.modules) - 1
        trains, feeds = frozen <= rank <= last, rank < last
        stored = (stage.views or 1) if isinstance(stage, CachingStage) and frozen else 0
        alone = stage.alone(rank - frozen if trains else len(stage.modules))
        if rank < frozen:
            alone.frozen = [stage.frozen[rank]]
        elif stored and trains:
            alone.frozen = [nn.Identity()]  # they have run in other processes
        enters = rank == frozen if stored else rank == 0
        above = stage.objectives[max(rank - frozen + 1, 0) :]
        return cls(
            stage=alone,
            together=len(stage.modules),
            trains=trains,
            feeds=feeds,
            tells_input=feeds and not stored and any(map(_looks_at_input, above)),
            stored=stored,
            replays=trains and rank > frozen,
            pairs=stage.pairs and not stored,
            # without their weights, on which the answer does not depend
            judges=[copy.deepcopy(o).to("meta") for o in stage.objectives if enters],
        )

    @property
    def answers(self) -> bool:
        """Does it send an error down after each step?"""
        return isinstance(self.stage, DelayedStage) and self.stage.workers[0].sends

    @property
    def asks(self) -> bool:
        """Does it wait for an error from above?"""
        return isinstance(self.stage, DelayedStage) and self.stage.workers[0].delay > 0


def check_parts(net: ModularNetwork, stages: Sequence[Stage], size: int, replay: int) -> None:
    """Refuse what cannot be divided among so many processes.

    Raises:
        ValueError: saying what would do.
    """
    if len(net) != size:
        raise ValueError(
            f"parallel: the network has {len(net)} modules, but {size} processes were started; start "
            f"torchrun with --nproc-per-node {len(net)}, or cut the network into {size} modules."
        )
    for stage in stages:
        chain = [*stage.frozen, *stage.modules]
        shared = type(stage).step is not Stage.step or stage.auxiliary
        if shared or any(a is not b for a, b in zip(chain, net, strict=False)):
            raise ValueError(
                "method: its modules do not train apart, each on what comes from its neighbours, so they "
                "cannot be put into processes of their own; LocalLearning, InformationPropagation, "
                "ProxyObjective and FeaturesReplay can."
            )
        if replay and isinstance(stage, DelayedStage):
            raise ValueError(
                f"replay={replay}: an error from above belongs to one batch, so {type(stage).__name__} "
                "uses each batch once, in order; give replay=0."
            )


def _looks_at_input(objective: Objective) -> bool:
    return type(objective).local is not Objective.local


# --- what comes from below ------------------------------------------------------------------------


class Incoming:
    """Batches of features from the process below, as ``Batches``.

    Args:
        group: the processes.
        length: batches in an epoch.
        replay: how many of the last batches may be used again; 0 waits for each new one.

    Attributes:
        ages: of the last epoch's batches when they were used, as in ``ReplayBuffer``.
    """

    random = False

    def __init__(self, group: Group, length: int, replay: int = 0) -> None:
        self.group, self.length, self.replay = group, length, replay
        self.ages: list[int] = []

    def __len__(self) -> int:
        return self.length

    def paired(self) -> Incoming:
        return self  # the order is made where images are loaded

    def epoch(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _, h, y, _ in self._in_order():
            yield h, y

    def steps(self) -> Iterator[Step]:
        """One epoch."""
        return self._replayed() if self.replay else self._in_order()

    def _in_order(self) -> Iterator[Step]:
        below = self.group.rank - 1
        while (message := self.group.receive(below)).step != END:
            yield _step(message)

    def _replayed(self) -> Iterator[Step]:
        below, buffer, more = self.group.rank - 1, ReplayBuffer(self.replay), True
        self.ages = buffer.ages
        while more or buffer.unused:
            while more and buffer.has_room:
                message = self.group.poll(below, wait=not buffer.kept)
                if message is None:
                    break
                more = message.step != END
                if more:
                    buffer.add(message)
            if buffer.kept:
                yield _step(buffer.take())


def _step(message: Message) -> Step:
    h, y, x = message.tensors
    assert h is not None
    assert y is not None
    return message.step, h, y, h if x is None else x


def entering(part: Part, loader: Batches) -> Batches:
    """The batches that enter a stage at the network's input."""
    return loader.paired() if part.pairs else loader
