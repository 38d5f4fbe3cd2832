"""Local learning by the names of its papers: each is ``LocalLearning`` with an objective.

The functions give the objective, the order of training and the published optimiser; batch size,
epochs and augmentation belong to ``modlib.fit``. None of them knows the network: cut it into the
modules that the paper trains. Categories measured by the audit: modular where modules are trained in
turn (``layerwise_greedy``, ``cascade``), weakly modular where all are trained in every step.
"""

from __future__ import annotations

from functools import partial

import torch

from modlib.methods.local import LocalLearning
from modlib.methods.method import Optimizers
from modlib.objectives import (
    AuxiliaryClassifier,
    MonoForward,
    Objective,
    PredSim,
    SimilarityMatching,
)


def layerwise_greedy(layers: int = 1, *, optimizer: Optimizers = None) -> LocalLearning:
    """Greedy layer-wise training: one module after another, each on a k-hidden-layer problem.

    Published setting: every convolution a module; SGD with momentum 0.9, weight decay 5e-4, rate 0.1
    divided by 5 every 15 of 50 epochs a module, batches of 128. Between modules the paper reduces
    maps by an invertible reordering of pixels; here the network does what its layers do.

    Args:
        layers: k, hidden layers of each problem, the module's own included: 1, 2 or 3.
        optimizer: as in ``LocalLearning``.

    Raises:
        ValueError: ``layers`` is none of these; or (when training starts) a module's output is no map.

    Source: Belilovsky et al. 2019 (arXiv 1812.11446), section 3.

    >>> layerwise_greedy(2).objective
    AuxiliaryClassifier('greedy-2')
    """
    if layers not in (1, 2, 3):
        raise ValueError(f"layers={layers!r}: choose 1, 2 or 3 hidden layers.")
    return LocalLearning(AuxiliaryClassifier(f"greedy-{layers}"), in_turn=True, optimizer=optimizer)


def decoupled_greedy(network: str = "mlp-sr", *, optimizer: Optimizers = None) -> LocalLearning:
    """Decoupled greedy learning (DGL): all modules in every step, each with an auxiliary classifier.

    Published setting: SGD with momentum 0.9, weight decay 5e-4, rate 0.1 divided by 5 every 15 of 50
    epochs, batches of 128.

    Args:
        network: kind of ``AuxiliaryClassifier``; the paper compares "cnn", "mlp" and "mlp-sr".
        optimizer: as in ``LocalLearning``.

    Raises:
        ValueError: the kind is unknown.

    Source: Belilovsky et al. 2020 (arXiv 1901.08164), algorithm 1.

    >>> decoupled_greedy().objective
    AuxiliaryClassifier('mlp-sr')
    """
    return LocalLearning(AuxiliaryClassifier(network), optimizer=optimizer)


def local_error_signals(
    loss: str = "predsim",
    *,
    beta: float = 0.99,
    in_turn: bool = False,
    optimizer: Optimizers = None,
) -> LocalLearning:
    """Local error signals: a local classifier, similarity matching, or both, for every module.

    Published setting: every layer a module (convolution, batch norm, leaky ReLU of slope 0.01; the
    objective sees it before its dropout); Adam at rate 5e-4, times 0.25 after 50, 75, 89 and 94 % of
    400 epochs, no weight decay, batches of 128.

    The paper multiplies the last module's cross-entropy by (1 - beta) too. Adam's steps do not depend
    on a loss's scale (but for its epsilon), so the factor is left out here; with SGD it would make
    the last module's rate a hundred times smaller than it reads.

    The classifier starts at zero and sends nothing back in its first step.

    Args:
        loss: "pred", "sim" or "predsim".
        beta: weight of the similarities in "predsim".
        in_turn: one module after another, where the paper trains all in each step.
        optimizer: as in ``LocalLearning``; Adam at rate 5e-4 if None.

    Raises:
        ValueError: the loss is unknown, or ``beta`` is outside [0, 1].

    Source: Nøkland & Eidnes 2019 (arXiv 1901.06656).

    >>> local_error_signals("sim").objective
    SimilarityMatching(classes=None, projection='learned')
    """
    objectives: dict[str, Objective] = {
        "pred": AuxiliaryClassifier("pred"),
        "sim": SimilarityMatching(projection="learned"),
        "predsim": PredSim(beta=beta),
    }
    if loss not in objectives:
        raise ValueError(f"loss={loss!r} is unknown; choose from {', '.join(objectives)}.")
    adam = partial(torch.optim.Adam, lr=5e-4)
    return LocalLearning(objectives[loss], in_turn=in_turn, optimizer=optimizer or adam)


def mono_forward(*, optimizer: Optimizers = None) -> LocalLearning:
    """Mono-Forward: the cross-entropy of a learned matrix's goodness, all modules in every step.

    Published setting: every layer a module that ends after its activation. The paper's optimiser and
    rates have not been checked; the default is the library's SGD. It predicts from the last layer or
    from the average of all: for the latter see ``Ensemble``, with equal weights.

    Source: Gong, Li & Abdulla 2025 (arXiv 2501.09238), G = a M^T.

    >>> mono_forward().objective
    MonoForward()
    """
    return LocalLearning(MonoForward(), optimizer=optimizer)


def cascade(*, optimizer: Optimizers = None) -> LocalLearning:
    """Deep cascade learning: one module after another, each under a small multilayer perceptron.

    Published setting: every convolution a module. The paper's perceptron, rates and epochs have not
    been checked; ours is the "mlp" of ``AuxiliaryClassifier``, and the library's SGD.

    Source: Marquez, Hare & Niranjan 2018 (IEEE TNNLS 29(11), 5475–5485).

    >>> cascade().in_turn, cascade().objective
    (True, AuxiliaryClassifier('mlp'))
    """
    return LocalLearning(AuxiliaryClassifier("mlp"), in_turn=True, optimizer=optimizer)


def random_classifiers(*, optimizer: Optimizers = None) -> LocalLearning:
    """Local errors from fixed random classifiers: Mono-Forward whose matrix is never trained.

    Published setting: every layer a module under a linear classifier of all its outputs, with random
    weights that stay. Here errors go back through the classifier's transpose; other feedback weights,
    which the paper also treats, are left out. Its rates have not been checked: the library's SGD.

    Source: Mostafa, Ramesh & Cauwenberghs 2018 (arXiv 1711.06756).

    >>> random_classifiers().objective
    AuxiliaryClassifier('flat', trainable=False)
    """
    objective = AuxiliaryClassifier("flat", trainable=False)
    return LocalLearning(objective, optimizer=optimizer)
