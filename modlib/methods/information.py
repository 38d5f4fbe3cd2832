"""Methods on information-theoretic objectives, with their authors' settings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from modlib.data import Dataset, Loader
from modlib.data.loader import Split
from modlib.methods.bottleneck import Bottleneck
from modlib.methods.information_propagation import InformationPropagation
from modlib.methods.local import LocalLearning
from modlib.methods.method import Optimizers, sgd
from modlib.methods.transport_regularised import TransportRegularised
from modlib.network import evaluating, in_precision
from modlib.objectives.dependence import HSIC
from modlib.objectives.infonce import InfoNCE


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


def greedy_infomax(
    steps: int = 5,
    negatives: int = 16,
    grid: int = 7,
    *,
    in_turn: bool = False,
    optimizer: Optimizers = None,
) -> LocalLearning:
    """Greedy InfoMax: hidden modules predict patches from patches above them, and see no label.

    The network must begin with ``networks.Patches`` and join them in its last module, as
    ``networks.patch_cnn`` does. That module learns to classify at the same time; it changes nothing in
    the others.

    Published: STL-10, grey crops of 64×64 pixels in 7×7 patches of 16×16, three modules of a ResNet-50
    without batch norm, Adam at rate 2e-4, batches of 32, 300 epochs.

    Args:
        steps, negatives, grid: as in ``InfoNCE``.
        in_turn: train one module after another.
        optimizer: Adam at rate 2e-4 if None.

    Source: Löwe, O'Connor & Veeling 2019 (arXiv 1905.11786).

    >>> greedy_infomax(steps=1, grid=3).objective.negatives
    16
    """
    adam = partial(torch.optim.Adam, lr=2e-4)
    return LocalLearning(
        InfoNCE(steps, negatives, grid), in_turn=in_turn, optimizer=optimizer or adam
    )


def infopro(
    first: tuple[float, float] = (5.0, 0.5),
    last: tuple[float, float] | None = None,
    form: str = "contrast",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    optimizer: Optimizers = None,
) -> InformationPropagation:
    """InfoPro: hidden modules also keep what rebuilds the image.

    Published: CIFAR-10, ResNet-110, batches of 1024, 160 epochs; first and last weights (5, 0.5) with two
    modules, (1, 0) and (0, 1) with four, (5, 0) and (0, 1) with eight, (5, 0) and (0.5, 1) with 16.

    Args:
        first, last, form, mean, std: as in ``InformationPropagation``.
        optimizer: the library's SGD if None.

    Source: Wang et al. 2021 (arXiv 2101.10832).

    >>> infopro(first=(1, 0), last=(0, 1)).form
    'contrast'
    """
    return InformationPropagation(first, last, form, mean, std, optimizer=optimizer)


def transport(tau: float = 1.0, *, optimizer: Optimizers = None) -> TransportRegularised:
    """Transport-regularised learning of residual modules.

    Published: SGD at rate 0.002 to 0.003, momentum 0.9, weight decay 2e-4, 300 epochs; orthogonal initial
    weights with gain 0.1 (which a method does not set); τ halved for the first half of the modules in
    one variant (not built here).

    Args:
        tau: step of the movement; the larger, the less a distance costs.
        optimizer: the published one at rate 0.003 if None.

    Source: Karkar, Ayed, de Bézenac & Gallinari 2023 (arXiv 2309.17357).

    >>> transport(tau=2.0).objective.tau
    2.0
    """
    published = sgd(lr=0.003, weight_decay=2e-4, nesterov=False)
    return TransportRegularised(tau, optimizer=optimizer or published)


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
