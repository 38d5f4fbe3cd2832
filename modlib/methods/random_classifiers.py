r"""Local errors from fixed random classifiers: the modules learn, what judges them does not.

.. math:: L_k = \mathrm{CE}(M_k\, h_k, y), \qquad M_k \text{ stays as it was drawn}

Source: Mostafa, Ramesh & Cauwenberghs 2018 (arXiv 1711.06756). Category measured by the audit: weakly
modular.
"""

from __future__ import annotations

from modlib.methods.local import LocalLearning
from modlib.methods.method import Optimizers
from modlib.objectives import AuxiliaryClassifier


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
