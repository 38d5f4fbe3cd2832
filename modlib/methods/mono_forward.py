r"""Mono-Forward: a learned matrix turns all of a module's output into the goodness of each class.

.. math:: L_k = \mathrm{CE}(M_k\, h_k, y)

Source: Gong, Li & Abdulla 2025 (arXiv 2501.09238). Category measured by the audit: weakly modular.
"""

from __future__ import annotations

from modlib.methods.local import LocalLearning
from modlib.methods.method import Optimizers
from modlib.objectives import MonoForward


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
