"""What ONE module is trained on. Each is called as ``objective(h, y)`` and returns a scalar to minimise.

Any of them works alone, in a training loop of your own: ``objective(module(x), y).backward()``.
"""

from modlib.objectives.hsic import HSIC, nhsic
from modlib.objectives.infonce import InfoNCE
from modlib.objectives.infopro import InfoPro
from modlib.objectives.objective import Objective
from modlib.objectives.proxy import (
    NMSE,
    Alignment,
    CentredAlignment,
    Contrastive,
    LogContrastive,
    ProxyLoss,
    Raw,
    SupCon,
    UpperTriangleAlignment,
)
from modlib.objectives.similarity import PredSim, SimilarityMatching
from modlib.objectives.supervised import AuxiliaryClassifier, CrossEntropy, MonoForward

__all__ = [
    "HSIC",
    "NMSE",
    "Alignment",
    "AuxiliaryClassifier",
    "CentredAlignment",
    "Contrastive",
    "CrossEntropy",
    "InfoNCE",
    "InfoPro",
    "LogContrastive",
    "MonoForward",
    "Objective",
    "PredSim",
    "ProxyLoss",
    "Raw",
    "SimilarityMatching",
    "SupCon",
    "UpperTriangleAlignment",
    "nhsic",
]
