r"""Greedy learning and its cousins: every module is trained on the labels, under a classifier of its own.

.. math:: L_k = \mathrm{CE}(a_k(h_k), y)

In turn (greedy, the cascade) or all modules in every step (decoupled greedy learning, DGL). None of the
functions knows the network: cut it into the modules that the paper trains.

Sources: Belilovsky et al. 2019 (arXiv 1812.11446) and 2020 (arXiv 1901.08164); Marquez, Hare & Niranjan
2018. Categories measured by the audit: modular in turn, weakly modular together.
"""

from __future__ import annotations

from modlib.methods.local import LocalLearning
from modlib.methods.method import Optimizers
from modlib.objectives import AuxiliaryClassifier, CrossEntropy


def layerwise_greedy(
    layers: int = 1, *, smoothing: float = 0.0, optimizer: Optimizers = None
) -> LocalLearning:
    """Greedy layer-wise training: one module after another, each on a k-hidden-layer problem.

    Published setting: every convolution a module; SGD with momentum 0.9, weight decay 5e-4, rate 0.1
    divided by 5 every 15 of 50 epochs a module, batches of 128. Between modules the paper reduces
    maps by an invertible reordering of pixels; here the network does what its layers do.

    Args:
        layers: k, hidden layers of each problem, the module's own included: 1, 2 or 3.
        smoothing: of the labels, as in ``objectives.CrossEntropy``.
        optimizer: as in ``LocalLearning``.

    Raises:
        ValueError: ``layers`` is none of these; or (when training starts) a module's output is no map.

    Source: Belilovsky et al. 2019 (arXiv 1812.11446), section 3.

    >>> layerwise_greedy(2).objective
    AuxiliaryClassifier('greedy-2')
    """
    if layers not in (1, 2, 3):
        raise ValueError(f"layers={layers!r}: choose 1, 2 or 3 hidden layers.")
    return _classifying(f"greedy-{layers}", smoothing, optimizer, in_turn=True)


def decoupled_greedy(
    network: str = "mlp-sr", *, smoothing: float = 0.0, optimizer: Optimizers = None
) -> LocalLearning:
    """Decoupled greedy learning (DGL): all modules in every step, each with an auxiliary classifier.

    Published setting: SGD with momentum 0.9, weight decay 5e-4, rate 0.1 divided by 5 every 15 of 50
    epochs, batches of 128.

    Args:
        network: kind of ``AuxiliaryClassifier``; the paper compares "cnn", "mlp" and "mlp-sr".
        smoothing: of the labels, as in ``objectives.CrossEntropy``.
        optimizer: as in ``LocalLearning``.

    Raises:
        ValueError: the kind is unknown.

    Source: Belilovsky et al. 2020 (arXiv 1901.08164), algorithm 1.

    >>> decoupled_greedy().objective
    AuxiliaryClassifier('mlp-sr')
    """
    return _classifying(network, smoothing, optimizer)


def cascade(*, smoothing: float = 0.0, optimizer: Optimizers = None) -> LocalLearning:
    """Deep cascade learning: one module after another, each under a small multilayer perceptron.

    Published setting: every convolution a module. The paper's perceptron, rates and epochs have not
    been checked; ours is the "mlp" of ``AuxiliaryClassifier``, and the library's SGD.

    Args:
        smoothing: of the labels, as in ``objectives.CrossEntropy``.
        optimizer: as in ``LocalLearning``.

    Source: Marquez, Hare & Niranjan 2018 (IEEE TNNLS 29(11), 5475–5485).

    >>> cascade().in_turn, cascade().objective
    (True, AuxiliaryClassifier('mlp'))
    """
    return _classifying("mlp", smoothing, optimizer, in_turn=True)


def _classifying(
    network: str, smoothing: float, optimizer: Optimizers, in_turn: bool = False
) -> LocalLearning:
    return LocalLearning(
        AuxiliaryClassifier(network, smoothing=smoothing),
        in_turn=in_turn,
        optimizer=optimizer,
        output=CrossEntropy(smoothing),
    )
