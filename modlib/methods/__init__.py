"""How a WHOLE network is trained. A method turns a network into stages; each stage can take a step."""

from modlib.methods.admm import ADMM
from modlib.methods.alternating_minimisation import AlternatingMinimisation
from modlib.methods.auglocal import AugLocal
from modlib.methods.block_coordinate_descent import BlockCoordinateDescent
from modlib.methods.delayed_gradients import DelayedGradients, FeaturesReplay
from modlib.methods.e2ebp import E2EBP
from modlib.methods.ensemble import Ensemble, KeepHeads
from modlib.methods.greedy import cascade, decoupled_greedy, layerwise_greedy
from modlib.methods.greedy_infomax import greedy_infomax
from modlib.methods.hsic import hsic_bottleneck, unformatted_accuracy
from modlib.methods.infopro import InformationPropagation, infopro
from modlib.methods.lifted import LiftedNetwork
from modlib.methods.local import LocalLearning
from modlib.methods.local_error_signals import local_error_signals
from modlib.methods.mac import MAC
from modlib.methods.method import Method, Stage, adamw, sgd
from modlib.methods.mono_forward import mono_forward
from modlib.methods.only import Only
from modlib.methods.proxy import ProxyObjective
from modlib.methods.random_classifiers import random_classifiers
from modlib.methods.synthetic_gradients import ExactGradient, SyntheticGradients
from modlib.methods.target_propagation import (
    DifferenceTargetPropagation,
    TargetPropagation,
    ddtp,
    dtp_drl,
    l_drl,
)
from modlib.methods.transport import TransportRegularised, transport

__all__ = [
    "ADMM",
    "E2EBP",
    "MAC",
    "AlternatingMinimisation",
    "AugLocal",
    "BlockCoordinateDescent",
    "DelayedGradients",
    "DifferenceTargetPropagation",
    "Ensemble",
    "ExactGradient",
    "FeaturesReplay",
    "InformationPropagation",
    "KeepHeads",
    "LiftedNetwork",
    "LocalLearning",
    "Method",
    "Only",
    "ProxyObjective",
    "Stage",
    "SyntheticGradients",
    "TargetPropagation",
    "TransportRegularised",
    "adamw",
    "cascade",
    "ddtp",
    "decoupled_greedy",
    "dtp_drl",
    "greedy_infomax",
    "hsic_bottleneck",
    "infopro",
    "l_drl",
    "layerwise_greedy",
    "local_error_signals",
    "mono_forward",
    "random_classifiers",
    "sgd",
    "transport",
    "unformatted_accuracy",
]
