"""What a run leaves behind: its course, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass
class History:
    """What happened in training, epoch by epoch.

    Attributes:
        rows: one for each epoch: ``stage``, ``epoch`` (within the stage), ``losses`` (the mean of
            each trained module's objective) and ``test_accuracy`` (None until the last module is
            trained); and ``skipped``, if there were any, the number of batches without the pairs of
            images that an objective needs (if those were all, the epoch's losses are None).
        seconds: training time of each row; apart, because it is the one thing that never repeats.
        batch_size: images in each step: what was asked for, or all training images if they are fewer.

    >>> import modlib
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2)
    >>> history = modlib.fit(net, modlib.methods.E2EBP(), data, epochs=2, progress=False)
    >>> [row["epoch"] for row in history.rows], sorted(history.final)
    ([0, 1], ['epoch', 'losses', 'stage', 'test_accuracy'])
    """

    rows: list[Row] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list, compare=False)
    batch_size: int = 0

    @property
    def final(self) -> Row:
        """The last epoch's row: results are quoted at the end, not at their best."""
        if not self.rows:
            raise ValueError("The history is empty: train at least one epoch.")
        return self.rows[-1]
