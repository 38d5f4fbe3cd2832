"""How a WHOLE network is trained. A method turns a network into stages; each stage can take a step."""

from modlib.methods.auglocal import AugLocal
from modlib.methods.e2ebp import E2EBP
from modlib.methods.ensemble import Ensemble, KeepHeads
from modlib.methods.local import LocalLearning
from modlib.methods.method import Method, Stage, sgd
from modlib.methods.named import (
    cascade,
    decoupled_greedy,
    layerwise_greedy,
    local_error_signals,
    mono_forward,
    random_classifiers,
)
from modlib.methods.proxy import ProxyObjective
from modlib.methods.target_propagation import DifferenceTargetPropagation

__all__ = [
    "E2EBP",
    "AugLocal",
    "DifferenceTargetPropagation",
    "Ensemble",
    "KeepHeads",
    "LocalLearning",
    "Method",
    "ProxyObjective",
    "Stage",
    "cascade",
    "decoupled_greedy",
    "layerwise_greedy",
    "local_error_signals",
    "mono_forward",
    "random_classifiers",
    "sgd",
]
