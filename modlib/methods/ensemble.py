r"""The ensemble of all heads: every module's classifier votes, later modules with more weight.

.. math:: z(x) = \frac{\sum_{k=1}^{K} 2^k\, a_k(h_k)}{\sum_{k=1}^{K} 2^k}

:math:`a_k(h_k)` are the logits of module k's auxiliary classifier, and the network's own for the
last. ``modlib.fit`` drops the classifiers; ``KeepHeads`` around a method keeps them.

Source: Belilovsky et al. 2019 (arXiv 1812.11446), section 4. Training is what it was without
keeping: so is the audit's category.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from modlib.methods.method import Method, Stage
from modlib.network import ModularNetwork
from modlib.objectives import Objective


class KeepHeads(Method):
    """A method that keeps the objectives which it trained with the network.

    Args:
        method: how the network is trained; a method that gives each module an objective.

    Attributes:
        heads: after training, the objective of each module, in the network's order.

    Raises:
        TypeError: the method is none.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 10]), modules=3)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> method = KeepHeads(modlib.methods.mono_forward())
    >>> history = modlib.fit(net, method, data, epochs=1, progress=False)
    >>> modlib.evaluate(method.ensemble(net), data).n
    64
    """

    def __init__(self, method: Method) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method={method!r} is no Method; give one, such as LocalLearning().")
        super().__init__(method.optimizer)
        self.method = method
        self.heads: list[Objective] = []
        self._missing: set[int] = set()

    def check_output(self, shape: Sequence[int], classes: int) -> None:
        self.method.check_output(shape, classes)

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        stages = self.method.stages(net, x)
        self.heads = [head for stage in stages for head in stage.objectives]
        self._missing = set(range(len(self.heads)))
        for k, optimizer in enumerate(o for stage in stages for o in stage.optimizers):
            optimizer.register_step_post_hook(self._found(k))
            optimizer.register_load_state_dict_post_hook(self._found(k))
        return stages

    def ensemble(self, net: ModularNetwork) -> Ensemble:
        """The trained network's ensemble.

        Raises:
            ValueError: a module's head has not been trained. A checkpoint holds the heads of the stage
                it was written in alone, so a run in turn that was resumed has lost the earlier ones.
        """
        if self._missing or not self.heads:
            lost = ", ".join(map(str, sorted(self._missing))) or "any module"
            raise ValueError(
                f"method: the heads of {lost} have not been trained by it; train the network with "
                "this method, in one run where modules are trained in turn."
            )
        return Ensemble(net, self.heads)

    def _found(self, k: int) -> Callable[..., None]:
        """A hook on optimiser k: its head has been trained, or restored from a checkpoint."""

        def hook(*args: Any) -> None:
            self._missing.discard(k)

        return hook


class Ensemble(nn.Module):
    """A network that predicts by the weighted average of its modules' classifiers; put in eval mode.

    Args:
        net: the trained network, cut into K modules.
        heads: for each module its trained objective, which has ``logits(h)``, as every
            ``AuxiliaryClassifier`` has; the last one, if it has none, takes the network's output.
        weights: K numbers above 0, scaled to sum 1; 2, 4, 8, … if None.

    Raises:
        ValueError: there are not K of each, a head has no logits, or a weight is not above 0.

    >>> import modlib
    >>> from modlib.objectives import CrossEntropy, MonoForward
    >>> net = modlib.partition(modlib.networks.mlp([2, 2, 3]), modules=2)
    >>> heads = [MonoForward().for_module((2,), classes=3), CrossEntropy()]
    >>> Ensemble(net, heads).weights
    tensor([0.3333, 0.6667])
    """

    weights: Tensor

    def __init__(
        self,
        net: ModularNetwork,
        heads: Sequence[Objective],
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        weights = [2.0 ** (k + 1) for k in range(len(net))] if weights is None else list(weights)
        if not len(net) == len(heads) == len(weights):
            raise ValueError(
                f"heads, weights: {len(heads)} and {len(weights)} given for {len(net)} modules; give one "
                "of each for every module."
            )
        if not all(weight > 0 for weight in weights):
            raise ValueError(f"weights={weights}: give numbers above 0.")
        for k, head in enumerate(heads[:-1]):
            if not hasattr(head, "logits"):
                raise ValueError(
                    f"heads: that of module {k} is a {type(head).__name__}, which has no logits to "
                    "average; train with a classifier, such as AuxiliaryClassifier."
                )
        self.net, self.heads = net, nn.ModuleList(heads)
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))
        self.to(next(net.parameters()).device).eval()

    def forward(self, x: Tensor) -> Tensor:
        """The weighted mean (N, classes) of all logits."""
        outputs = zip(self.heads, self.net.outputs(x), strict=True)
        votes = [_logits(head, h) for head, h in outputs]
        return cast(Tensor, sum(w * z for w, z in zip(self.weights, votes, strict=True)))


def _logits(head: nn.Module, h: Tensor) -> Tensor:
    logits = getattr(head, "logits", None)
    return h if logits is None else cast(Tensor, logits(h))
