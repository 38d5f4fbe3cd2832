"""Every method under the audit, on a small network and embedded data."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from modlib import networks
from modlib.data import Loader, load
from modlib.measure.audit import Audit, audit
from modlib.methods import (
    ADMM,
    E2EBP,
    MAC,
    AlternatingMinimisation,
    AugLocal,
    BlockCoordinateDescent,
    DelayedGradients,
    DifferenceTargetPropagation,
    FeaturesReplay,
    InformationPropagation,
    LiftedNetwork,
    LocalLearning,
    Method,
    ProxyObjective,
    SyntheticGradients,
    TargetPropagation,
    TransportRegularised,
)
from modlib.network import ModularNetwork, partition
from modlib.objectives import SupCon


def audits(method: str | None = None, modules: int = 3) -> list[Audit]:
    """Audit one method by name, or all.

    Args:
        method: a class of ``modlib.methods``, by its name; None for all.
        modules: K, at least 3 for target propagation.

    Raises:
        ValueError: the method is unknown.
    """
    if method is not None and method not in _CASES:
        raise ValueError(f"method={method!r} is unknown; choose from {', '.join(_CASES)}.")
    batch = Loader(load("digits")).sample(64)
    chosen = [method] if method else list(_CASES)
    found = []
    for name in chosen:
        make_method, make_net = _CASES[name]
        found.append(audit(make_method(), make_net(modules), batch))
    return found


def _relu(modules: int) -> ModularNetwork:
    net = networks.mlp([64, *[64] * modules, 10], kernel="relu", seed=0)
    return partition(net, [f"layer{k}" for k in range(2, modules)] + ["features"])


def _tanh(modules: int) -> ModularNetwork:
    sizes = [64, *[64] * (modules - 1), 10]
    return partition(networks.mlp(sizes, activation=nn.Tanh, boundary="after", seed=0), modules)


def _before(modules: int) -> ModularNetwork:
    sizes = [64, *[64] * (modules - 1), 10]
    return partition(networks.mlp(sizes, activation=nn.Tanh, seed=0), modules)


def _after(modules: int) -> ModularNetwork:
    sizes = [64, *[64] * (modules - 1), 10]
    return partition(networks.mlp(sizes, boundary="after", seed=0), modules)


def _conv(modules: int) -> ModularNetwork:
    net = networks.cnn((8, 8, 16), channels=1, size=8, stride=1, kernel="relu", seed=0)
    return partition(net, modules)


def _residual(modules: int) -> ModularNetwork:
    net = networks.resnet((8, 8, 16), 2, channels=1, size=8, kernel="relu", seed=0)
    return partition(net, modules)


_CASES: dict[str, tuple[Callable[[], Method], Callable[[int], ModularNetwork]]] = {
    "E2EBP": (E2EBP, _relu),
    "LocalLearning": (LocalLearning, _relu),
    "ProxyObjective": (lambda: ProxyObjective(SupCon(kernel="relu")), _relu),
    "DifferenceTargetPropagation": (DifferenceTargetPropagation, _tanh),
    "DelayedGradients": (DelayedGradients, _relu),
    "FeaturesReplay": (FeaturesReplay, _relu),
    "TargetPropagation": (TargetPropagation, _tanh),
    "SyntheticGradients": (SyntheticGradients, _relu),
    "AugLocal": (AugLocal, _conv),
    "MAC": (MAC, _before),
    "ADMM": (ADMM, _after),
    "BlockCoordinateDescent": (BlockCoordinateDescent, _after),
    "AlternatingMinimisation": (AlternatingMinimisation, _before),
    "LiftedNetwork": (LiftedNetwork, _after),
    "InformationPropagation": (InformationPropagation, _conv),
    "TransportRegularised": (TransportRegularised, _residual),
}
