r"""Mono-Forward, and local errors from random classifiers: a linear classifier of all of a module's output.

.. math:: L_k = \mathrm{CE}(M_k\, h_k, y)

Mono-Forward trains the matrices M_k with the modules; random classifiers stay as they were drawn.

Sources: Gong, Li & Abdulla 2025 (arXiv 2501.09238); Mostafa, Ramesh & Cauwenberghs 2018 (arXiv 1711.06756).
Category measured by the audit: weakly modular.
"""

from __future__ import annotations

from modlib.methods.local import LocalLearning
from modlib.methods.method import Optimizers
from modlib.objectives import AuxiliaryClassifier, MonoForward


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
