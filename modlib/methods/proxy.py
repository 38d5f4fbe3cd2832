r"""Proxy objectives: strictly modular training, one module after another.

.. math:: \theta_k \leftarrow \theta_k - \eta\, \nabla_{\theta_k} L\bigl(G(h_k), K^*(y)\bigr), \qquad
          h_k = f_k(\bar f_{k-1} \circ \dots \circ \bar f_1(x))

where :math:`\bar f` is frozen, in eval mode. No later module runs while an earlier one trains; the
hidden modules use labels only to tell pairs of the same class from pairs of different classes.

Source: Duan, Yu & Principe 2022 (arXiv 2005.05541), algorithm of section IV; survey (arXiv
2101.03419), section on proxy objectives. Category measured by the audit: modular.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modlib.kernels import FeatureMap, Gaussian
from modlib.methods.local import LocalLearning
from modlib.methods.method import MakeOptimizer, Optimizers, Stage, sgd
from modlib.network import ModularNetwork
from modlib.objectives import LogContrastive, Objective, ProxyLoss


class ProxyObjective(LocalLearning):
    """Train hidden modules on a proxy objective, then the output module on the task's loss.

    The last module must begin with a ``kernels.FeatureMap``: it is the feature map of the kernel
    whose Gram matrix the proxy shapes, and it stays in the deployed network.

    Args:
        objective: for every module but the last; ``LogContrastive("relu-pool")`` if None.
        optimizer: makes one module's optimiser, or a list with one for each module; if None,
            ``sgd(0.1)`` for hidden modules and ``sgd(1.0, weight_decay=0)`` for the output module: a
            linear layer on unit vectors, a convex problem, which a tenth of that rate leaves unsolved.
        output: the last module's objective; cross-entropy if None.
        cache_features, views: as in ``LocalLearning``.

    Raises:
        ValueError: (when training starts) the last module does not begin with a feature map, or its
            kernel is not the objective's.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10], kernel="relu"), ["features"])
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> method = ProxyObjective(modlib.objectives.SupCon(kernel="relu"))
    >>> [row["stage"] for row in modlib.fit(net, method, data, epochs=1, progress=False).rows]
    [0, 1]
    """

    def __init__(
        self,
        objective: Objective | None = None,
        *,
        optimizer: Optimizers = None,
        output: Objective | None = None,
        cache_features: bool = False,
        views: int | None = None,
    ) -> None:
        super().__init__(
            objective or LogContrastive("relu-pool"),
            in_turn=True,
            optimizer=optimizer,
            output=output,
            cache_features=cache_features,
            views=views,
        )

    def default_optimizers(self, modules: int) -> Sequence[MakeOptimizer]:
        return [*[sgd(0.1)] * (modules - 1), sgd(1.0, weight_decay=0.0)]

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        _check_feature_map(net, self.objective)
        return super().stages(net, x)


def _check_feature_map(net: ModularNetwork, objective: Objective) -> None:
    first = next(iter(net[-1].children()))
    kernel = objective.kernel if isinstance(objective, ProxyLoss) else None
    if not isinstance(first, FeatureMap):
        name = "relu" if kernel is None or isinstance(kernel, Gaussian) else kernel.name
        raise ValueError(
            f"net: the output module begins with {type(first).__name__}, but modular training needs a "
            "FeatureMap there: put one before the last layer and cut before it, as in "
            f"net = nn.Sequential(*hidden, modlib.kernels.FeatureMap({name!r}), last) and "
            "modlib.partition(net, [str(len(hidden))]); modlib.networks.cnn() has one, named 'features'."
        )
    if kernel is not None and kernel != first.kernel:
        raise ValueError(
            f"objective: its kernel is {kernel.name!r}, but the output module's feature map has kernel "
            f"{first.kernel.name!r}; give the objective kernel={first.kernel.name!r} too."
        )
