"""How a WHOLE network is trained. A method turns a network into stages; each stage can take a step."""

from modlib.methods.auglocal import AugLocal
from modlib.methods.e2ebp import E2EBP
from modlib.methods.ensemble import Ensemble, KeepHeads
from modlib.methods.information import (
    greedy_infomax,
    hsic_bottleneck,
    infopro,
    transport,
    unformatted_accuracy,
)
from modlib.methods.information_propagation import InformationPropagation
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
from modlib.methods.only import Only
from modlib.methods.proxy import ProxyObjective
from modlib.methods.target_propagation import DifferenceTargetPropagation
from modlib.methods.transport_regularised import TransportRegularised

__all__ = [
    "E2EBP",
    "AugLocal",
    "DifferenceTargetPropagation",
    "Ensemble",
    "InformationPropagation",
    "KeepHeads",
    "LocalLearning",
    "Method",
    "Only",
    "ProxyObjective",
    "Stage",
    "TransportRegularised",
    "cascade",
    "decoupled_greedy",
    "greedy_infomax",
    "hsic_bottleneck",
    "infopro",
    "layerwise_greedy",
    "local_error_signals",
    "mono_forward",
    "random_classifiers",
    "sgd",
    "transport",
    "unformatted_accuracy",
]
