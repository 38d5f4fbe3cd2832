r"""The HSIC bottleneck: every layer forgets the input and keeps the labels.

.. math:: L_k = \mathrm{tr}\bigl(R_{h_k} (R_x - \lambda R_y)\bigr)

All layers of a step compare themselves with one matrix, which is computed once.

Source: Ma, Lewis & Kleijn 2020 (arXiv 1908.01580). Category measured by the audit: weakly modular;
modular with ``in_turn=True``.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from modlib.data import Dataset, Loader
from modlib.data.loader import Split
from modlib.methods.local import LocalLearning
from modlib.methods.method import Optimizers, Stage, sgd
from modlib.network import evaluating, in_precision
from modlib.objectives import HSIC


class _SharingStage(Stage):
    """A stage that computes what its layers compare themselves with once a step."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        layers = [objective for objective in self.objectives if isinstance(objective, HSIC)]
        with ExitStack() as sharing:
            if layers:
                target = layers[0].target(x, y)
                for layer in layers:
                    sharing.enter_context(layer.holding(target))
            return super().step(x, y)


class Bottleneck(LocalLearning):
    """``LocalLearning`` on ``HSIC``, with the kernels of the input and the labels made once a step.

    Arguments and updates are those of ``LocalLearning``.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 10], norm=True), modules=3)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> method = Bottleneck(HSIC(weight=50.0))
    >>> history = modlib.fit(net, method, data, epochs=1, progress=False)
    >>> len(history.rows[0]["losses"])
    3
    """

    stage_type = _SharingStage


def hsic_bottleneck(
    weight: float = 50.0,
    bandwidth: float = 5.0,
    *,
    in_turn: bool = False,
    optimizer: Optimizers = None,
) -> Bottleneck:
    """The HSIC bottleneck: hidden modules share with the labels, not with the input.

    One linear layer as last module is the paper's "formatted" read-out: it changes nothing in the others,
    and with ``in_turn=True`` it trains on frozen features as in the paper. For the other read-out see
    ``unformatted_accuracy``. Hidden modules need batch norm, best without scale and shift: the bandwidth
    takes outputs to be of size 1.

    Published: MNIST, five layers of 128 units, all of them updated in every step, weight 50, bandwidth 5,
    batches of 512, SGD at rate 1e-4 for 5 epochs; convolutional networks: weight 200 (MNIST) or 500, rate
    0.01. A new optimiser for every step makes the authors' momentum of 0.9 idle, so the default has
    none. Its larger rate lets the last module learn in the same few epochs.

    Args:
        weight: λ of the labels.
        bandwidth: σ of the kernels.
        in_turn: train one module after another.
        optimizer: SGD at rate 0.1 without momentum, weight decay 1e-3, if None.

    Source: Ma, Lewis & Kleijn 2020 (arXiv 1908.01580).

    >>> hsic_bottleneck(weight=200.0).objective
    HSIC(weight=200.0, bandwidth=5.0)
    """
    plain = sgd(lr=0.1, momentum=0.0, weight_decay=1e-3)
    return Bottleneck(HSIC(weight, bandwidth), in_turn=in_turn, optimizer=optimizer or plain)


# --- reading without a classifier ------------------------------------------------------------------


def unformatted_accuracy(net: nn.Module, data: Dataset, batch_size: int = 500) -> float:
    """Test accuracy when the largest output names the class, once outputs have been given their classes.

    HSIC does not say which output stands for which class: that is chosen on the training set, one class
    for each output, so that most images are right.

    Args:
        net: maps images (N, C, H, W) to activations (N, classes): a network that was trained on ``HSIC``,
            without a classifier, such as ``net[:-1]``.
        data: where the assignment is chosen (train) and the accuracy measured (test).
        batch_size: images at a time.

    Returns:
        A share in 0..1.

    Raises:
        ValueError: the activations are not one for each class.
        FloatingPointError: an activation is infinite or NaN.

    Source: Ma, Lewis & Kleijn 2020 (arXiv 1908.01580), "unformatted" training.

    >>> import modlib
    >>> digits = modlib.data.load("digits")
    >>> 0 < unformatted_accuracy(modlib.networks.mlp([64, 10], seed=0), digits) < 1
    True
    """
    outputs = _assigned(_counts(net, data, "train", batch_size).tolist())
    test = _counts(net, data, "test", batch_size)
    return float(test[outputs, range(len(outputs))].sum() / test.sum())


def _counts(net: nn.Module, data: Dataset, split: Split, batch_size: int) -> Tensor:
    """How often output i was the largest on class j: (classes, classes)."""
    classes = len(data.classes)
    reference = next(net.parameters())
    counts = torch.zeros(classes, classes, dtype=torch.long)
    loader = Loader(
        data, split, batch_size, device=reference.device, shuffle=False, drop_last=False
    )
    with evaluating(net):
        for x, y in loader.epoch(0, 0):
            h = net(in_precision(x, reference))
            if h.shape[1:] != (classes,):
                raise ValueError(
                    f"net: its output has shape {tuple(h.shape[1:])}, but {data.name!r} has {classes} "
                    "classes; give modules that end in one output for each."
                )
            if not bool(h.isfinite().all()):
                raise FloatingPointError(
                    "net: its output is infinite or NaN; train it anew at a lower learning rate."
                )
            counts += _table(h.argmax(1), y, classes).cpu()
    return counts


def _assigned(counts: list[list[int]]) -> list[int]:
    """For each column a row of its own, so that the counts there have the largest sum.

    Rows come one by one. Each takes a column, whose row moves on to another, and so forth along the
    path that gains most; such paths keep the assignment of the rows so far the best there is.
    """
    size = len(counts)
    owner = [-1] * size
    for row in range(size):
        gain, before = (
            list(counts[row]),
            [-1] * size,
        )  # of the best path to each column; its last stop
        queue = [column for column in range(size) if owner[column] >= 0]
        while queue:
            stop = queue.pop(0)
            moved = counts[owner[stop]]
            for column in range(size):
                if gain[stop] - moved[stop] + moved[column] > gain[column]:
                    gain[column], before[column] = gain[stop] - moved[stop] + moved[column], stop
                    if owner[column] >= 0 and column not in queue:
                        queue.append(column)
        end = max((c for c in range(size) if owner[c] < 0), key=gain.__getitem__)
        while end >= 0:
            owner[end] = row if before[end] < 0 else owner[before[end]]
            end = before[end]
    return owner


def _table(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    return torch.bincount(rows * size + columns, minlength=size**2).view(size, size)
