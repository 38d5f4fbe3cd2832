r"""End-to-end backpropagation: the whole network is one module with one objective.

.. math:: \theta \leftarrow \theta - \eta\, \nabla_\theta\, \mathrm{CE}\bigl(f_K \circ \dots \circ f_1 (x), y\bigr)

With ``recompute`` (gradient checkpointing) autograd keeps what crosses the modules' boundaries, and each
module but the last runs again when its gradient is due: the same gradient, and those modules run twice.

Source: Rumelhart, Hinton & Williams 1986; Chen, Xu, Zhang & Guestrin 2016 (arXiv 1604.06174), section 4.
Category measured by the audit: end-to-end.
"""

from __future__ import annotations

from torch import Tensor

from modlib.methods.method import Method, Optimizers, Stage, checked
from modlib.network import ModularNetwork
from modlib.networks.recompute import layers_of, recomputing
from modlib.objectives import CrossEntropy, Objective


class E2EBP(Method):
    """Train all modules together by the gradient of one loss on the last output.

    Args:
        objective: the loss on the network's output; cross-entropy if None.
        optimizer: makes the optimiser from the network's parameters.
        recompute: keep the modules' inputs alone, and run a module again for its gradient. Every module
            but the last then runs twice in a step; nothing else changes.

    Raises:
        TypeError: the objective is none.
        ValueError: (when training starts) the network does not give one output for each class.

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
        recompute: bool = False,
    ) -> None:
        super().__init__(optimizer)
        self.objective = checked("objective", objective or CrossEntropy())
        self.recompute = recompute

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        (classes,) = net.shapes(x)[-1]
        objective = self.objective.for_module((classes,), classes).to(x.device)
        stage = _RecomputingStage if self.recompute else Stage
        return [stage([net], [objective], self.make_optimizers([[net, objective]]))]


class _RecomputingStage(Stage):
    """A stage whose network keeps no graph of its modules, but for the last."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        (net,) = self.modules
        modules = list(net.children())[:-1]
        with recomputing({module: [(0, len(layers_of(module)))] for module in modules}):
            return super().step(x, y)
