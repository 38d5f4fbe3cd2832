"""How a WHOLE network is trained. A method turns a network into stages; each stage can take a step."""

from modlib.methods.e2ebp import E2EBP
from modlib.methods.local import LocalLearning
from modlib.methods.method import Method, Stage, sgd
from modlib.methods.proxy import ProxyObjective
from modlib.methods.target_propagation import DifferenceTargetPropagation

__all__ = [
    "E2EBP",
    "DifferenceTargetPropagation",
    "LocalLearning",
    "Method",
    "ProxyObjective",
    "Stage",
    "sgd",
]
