r"""Local learning: every module minimises an objective of its own; no gradient crosses a boundary.

.. math:: h_k = f_k(\mathrm{stop}(h_{k-1})), \qquad
          \theta_k \leftarrow \theta_k - \eta\, \nabla_{\theta_k} L_k(h_k, y), \quad k = 1, \dots, K

All modules in every step is decoupled greedy learning (Belilovsky et al. 2020, arXiv 1901.08164,
algorithm 1), weakly modular by the audit. One module after another, the earlier ones frozen, is
greedy layer-wise training (Belilovsky et al. 2019, arXiv 1812.11446). With one module both ARE
end-to-end backpropagation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from modlib.methods.cache import CachingStage
from modlib.methods.method import Method, Optimizers, Stage, checked
from modlib.network import ModularNetwork
from modlib.objectives import AuxiliaryClassifier, CrossEntropy, Objective


class LocalLearning(Method):
    """Train every module on an objective of its own, the last one on the task's loss.

    Args:
        objective: for every module but the last; an ``AuxiliaryClassifier`` if None. Each module
            gets its own copy.
        in_turn: False trains all modules in each step (decoupled greedy learning); True trains one
            module after another and freezes it, in eval mode (greedy learning).
        optimizer: makes one module's optimiser (its objective's parameters included), or one for
            each.
        output: the last module's objective; cross-entropy if None.
        cache_features: with ``in_turn``, compute the frozen modules' output once and train on that.
        views: with ``cache_features`` and random augmentation, how many augmented views of the data
            to cache; epochs take them in turn.

    Raises:
        TypeError: an objective is none.
        ValueError: ``cache_features`` without ``in_turn``, or ``views`` without ``cache_features``; (when training
            starts) the optimisers are not one for each module, or a module has nothing to train.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 10]), modules=3)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> history = modlib.fit(net, LocalLearning(), data, epochs=1, progress=False)
    >>> len(history.rows[0]["losses"])
    3
    """

    stage_type: type[Stage] = Stage  # a subclass may step in its own way

    def __init__(
        self,
        objective: Objective | None = None,
        *,
        in_turn: bool = False,
        optimizer: Optimizers = None,
        output: Objective | None = None,
        cache_features: bool = False,
        views: int | None = None,
    ) -> None:
        super().__init__(optimizer)
        if cache_features and not in_turn:
            raise ValueError(
                "cache_features=True needs in_turn=True: modules trained together have no frozen "
                "features to cache."
            )
        if views is not None and (views < 1 or not cache_features):
            raise ValueError(
                f"views={views}: give at least 1, and only together with cache_features=True."
            )
        self.objective = checked("objective", objective or AuxiliaryClassifier())
        self.output = checked("output", output or CrossEntropy())
        self.in_turn, self.cache_features, self.views = in_turn, cache_features, views

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        objectives = self.objectives(net, x)
        optimizers = self.make_optimizers(list(zip(net, objectives, strict=True)))
        if not self.in_turn:
            return [self.stage_type(list(net), objectives, optimizers)]
        modules: list[nn.Module] = list(net)
        return [
            self._stage(modules, k, objective, optimizer)
            for k, (objective, optimizer) in enumerate(zip(objectives, optimizers, strict=True))
        ]

    def objectives(self, net: ModularNetwork, x: Tensor) -> list[Objective]:
        """The K objectives, on the device of x and with parameters to fit each module's output."""
        *hidden, (classes,) = net.shapes(x)
        local = self.hidden_objectives(net, x, hidden, classes)
        output = self.output.for_module((classes,), classes)
        return [objective.to(x.device) for objective in (*local, output)]

    def hidden_objectives(
        self, net: ModularNetwork, x: Tensor, shapes: Sequence[tuple[int, ...]], classes: int
    ) -> list[Objective]:
        """Those of the modules but the last, whose outputs have these shapes (without N)."""
        return [self.objective.for_module(shape, classes) for shape in shapes]

    def _stage(
        self, modules: list[nn.Module], k: int, objective: Objective, optimizer: Optimizer
    ) -> Stage:
        """Train module k alone, on the output of the frozen ones before it."""
        parts = [modules[k]], [objective], [optimizer], modules[:k], k == len(modules) - 1
        if self.cache_features:
            return CachingStage(*parts, views=self.views)
        return self.stage_type(*parts)
