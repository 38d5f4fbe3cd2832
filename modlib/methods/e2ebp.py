r"""End-to-end backpropagation: the whole network is one module with one objective.

.. math:: \theta \leftarrow \theta - \eta\, \nabla_\theta\, \mathrm{CE}\bigl(f_K \circ \dots \circ f_1 (x), y\bigr)

Source: Rumelhart, Hinton & Williams 1986. Category measured by the audit: end-to-end.
"""

from __future__ import annotations

from torch import Tensor

from modlib.methods.method import Method, Optimizers, Stage, checked
from modlib.network import ModularNetwork
from modlib.objectives import CrossEntropy, Objective


class E2EBP(Method):
    """Train all modules together by the gradient of one loss on the last output.

    Args:
        objective: the loss on the network's output; cross-entropy if None.
        optimizer: makes the optimiser from the network's parameters.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> len(modlib.fit(net, E2EBP(), data, epochs=2, progress=False).rows)
    2
    """

    def __init__(
        self,
        objective: Objective | None = None,
        optimizer: Optimizers = None,
    ) -> None:
        super().__init__(optimizer)
        self.objective = checked("objective", objective or CrossEntropy())

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        (classes,) = net.shapes(x)[-1]
        objective = self.objective.for_module((classes,), classes).to(x.device)
        return [Stage([net], [objective], self.make_optimizers([[net, objective]]))]
