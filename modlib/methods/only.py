r"""Train some modules of a network and leave the others as they are.

.. math:: \theta_k \leftarrow \theta_k - \eta\, \nabla_{\theta_k} L_k(h_k, y) \quad (k \in S), \qquad
          \theta_k \leftarrow \theta_k \quad (k \notin S)

A method that trains modules in turn does so in stages of its own; this keeps the stages of the modules
in S. It is how a new head, or a new middle, is put into a network whose other modules are reused.

Source: the reuse of modules is a claim of the survey (arXiv 2101.03419). The category is that of the
method inside.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modlib.methods.method import Method, Stage
from modlib.network import ModularNetwork


class Only(Method):
    """Only these modules are trained; the others are frozen.

    Args:
        method: trains modules in turn: ``ProxyObjective``, or ``LocalLearning(in_turn=True)``.
        modules: their positions in the network, counted from 0; negative ones from the end.

    Raises:
        ValueError: (when training starts) there is no such module, or the method trains one of them
            together with others.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2)
    >>> before = next(net[0].parameters()).clone()
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> new_head = Only(modlib.methods.LocalLearning(in_turn=True), [-1])
    >>> history = modlib.fit(net, new_head, data, epochs=1, progress=False)
    >>> bool((next(net[0].parameters()) == before).all())
    True
    """

    def __init__(self, method: Method, modules: Sequence[int]) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method={method!r} is no Method; give one, such as ProxyObjective().")
        super().__init__(method.optimizer)
        self.method, self.modules = method, tuple(modules)

    def check_output(self, shape: Sequence[int], classes: int) -> None:
        self.method.check_output(shape, classes)

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        chosen = {id(net[k]) for k in self._positions(len(net))}
        stages, kept = self.method.stages(net, x), []
        whole = any(stage.complete for stage in stages)  # is there an output module to evaluate?
        for stage in stages:
            ours = [id(module) in chosen for module in stage.modules]
            if any(ours) and not all(ours):
                raise ValueError(
                    f"modules={list(self.modules)}: {type(self.method).__name__} trains them together "
                    "with others in each step; give it in_turn=True."
                )
            if any(ours):
                stage.complete = whole
                kept.append(stage)
        trained = {id(module) for stage in kept for module in stage.modules}
        if missed := chosen - trained:
            raise ValueError(
                f"modules={list(self.modules)}: {type(self.method).__name__} trains {len(missed)} of them "
                "not by themselves; give it a method that trains modules in turn."
            )
        return kept

    def _positions(self, count: int) -> list[int]:
        for k in self.modules:
            if not -count <= k < count:
                raise ValueError(f"modules: there is no module {k} among {count}.")
        if not self.modules:
            raise ValueError("modules=[]: give at least one module to train.")
        return [k % count for k in self.modules]
