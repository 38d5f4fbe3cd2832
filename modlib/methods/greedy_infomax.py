r"""Greedy InfoMax: hidden modules learn to tell which patch lies above, and see no label.

.. math:: L_k = -\mathrm{mean} \log \frac{\exp(z^\top W_s c)}{\sum_j \exp(z_j^\top W_s c)}

z is the patch's own feature, :math:`z_j` it and patches drawn from the batch, c the feature some rows above.

Source: Löwe, O'Connor & Veeling 2019 (arXiv 1905.11786). Category measured by the audit: weakly modular;
modular with ``in_turn=True``.
"""

from __future__ import annotations

from functools import partial

import torch

from modlib.methods.local import LocalLearning
from modlib.methods.method import Optimizers
from modlib.objectives import InfoNCE


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
