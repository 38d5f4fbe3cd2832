"""How a network does on a split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from modlib.data import Dataset, Loader
from modlib.data.loader import Split
from modlib.methods.method import check_logits
from modlib.network import evaluating, in_precision


@dataclass(frozen=True)
class Evaluation:
    """How a network does on a split: ``accuracy`` in 0..1, mean cross-entropy ``loss`` (nats), ``n``.

    >>> import modlib
    >>> data = modlib.data.load("digits")
    >>> found = modlib.evaluate(modlib.networks.mlp([64, 10]), data)
    >>> 0 <= found.accuracy <= 1, found.loss > 0, found.n
    (True, True, 360)
    """

    accuracy: float
    loss: float
    n: int


def evaluate(
    net: nn.Module,
    data: Dataset,
    split: Split = "test",
    batch_size: int = 500,
    *,
    flip: bool = False,
) -> Evaluation:
    """Accuracy and cross-entropy of a network on a split, in eval mode, on the network's device.

    Args:
        net: maps images (N, C, H, W) to logits (N, classes).
        data: what it is evaluated on.
        split: "test" or "train"; the training images are not augmented here.
        flip: average the logits of each image and its mirror image (test-time augmentation): twice the work.

    Raises:
        ValueError: the network gives no logit for each class, or there are no images to mirror.
        FloatingPointError: its loss is infinite or NaN: the network has no accuracy.

    >>> import modlib
    >>> digits = modlib.data.load("digits")
    >>> modlib.evaluate(modlib.networks.mlp([64, 10]), digits).n == len(digits.test_labels)
    True
    """
    if flip and len(data.shape) != 3:
        raise ValueError(
            f"flip=True mirrors images, but {data.name!r} has inputs of shape {data.shape}; leave it out."
        )
    reference = next(net.parameters())
    loader = Loader(
        data, split, batch_size, device=reference.device, shuffle=False, drop_last=False
    )
    correct, loss = torch.zeros(2, device=reference.device)
    with evaluating(net):
        for x, y in loader.epoch(0, 0):
            x = in_precision(x, reference)
            logits = net(x).float()
            if flip:
                logits = (logits + net(x.flip(-1)).float()) / 2
            check_logits(logits.shape[1:], len(data.classes))
            correct += (logits.argmax(1) == y).sum()
            loss += F.cross_entropy(logits, y, reduction="sum")
    if not bool(loss.isfinite()):
        raise FloatingPointError(
            f"net: its cross-entropy on the {split} images of {data.name!r} is {loss.item()}, as weights "
            "that have diverged give it; train it anew at a lower learning rate, or go back to a "
            "checkpoint."
        )
    return Evaluation(correct.item() / loader.n, loss.item() / loader.n, loader.n)
