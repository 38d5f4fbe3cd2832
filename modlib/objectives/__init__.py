"""What ONE module is trained on. Each is called as ``objective(h, y)`` and returns a scalar to minimise.

Any of them works alone, in a training loop of your own: ``objective(module(x), y).backward()``.

On pairs of outputs, same class or not (proxy objectives)::

    SupCon                  each anchor must pick its positives out of the batch
    Contrastive             share of same-class pairs in the sum of exponentiated similarities
    LogContrastive          its logarithm
    Raw                     mean similarity of different-class pairs, less that of same-class pairs
    NMSE                    mean squared distance from the ideal Gram matrix
    Alignment               cosine with the ideal Gram matrix
    UpperTriangleAlignment  of the entries above the diagonal
    CentredAlignment        of the centred matrices
    SimilarityMatching      outputs as similar to each other as their labels are

On labels::

    CrossEntropy            of logits: what the last module is trained on
    AuxiliaryClassifier     cross-entropy of a small network on top of the module
    MonoForward             cross-entropy of a learned matrix's goodness
    PredSim                 a local classifier and similarity matching

On the input::

    HSIC                    forget the input and keep the labels (``nhsic``, ``hsic``: the dependence itself)
    InfoPro                 rebuild the image and keep the labels
    InfoNCE                 patches predict patches below them

``Objective`` is what they all are, ``ProxyLoss`` those on pairs: subclass one for your own.
``help(modlib.objectives.SupCon)`` says more about one of them; torch's part of it comes last.
"""

from modlib.objectives.auxiliary import AuxiliaryClassifier as AuxiliaryClassifier
from modlib.objectives.auxiliary import MonoForward as MonoForward
from modlib.objectives.cross_entropy import CrossEntropy as CrossEntropy
from modlib.objectives.hsic import HSIC as HSIC
from modlib.objectives.hsic import hsic as hsic
from modlib.objectives.hsic import nhsic as nhsic
from modlib.objectives.infonce import InfoNCE as InfoNCE
from modlib.objectives.infopro import InfoPro as InfoPro
from modlib.objectives.objective import Objective as Objective
from modlib.objectives.proxy import NMSE as NMSE
from modlib.objectives.proxy import Alignment as Alignment
from modlib.objectives.proxy import CentredAlignment as CentredAlignment
from modlib.objectives.proxy import Contrastive as Contrastive
from modlib.objectives.proxy import LogContrastive as LogContrastive
from modlib.objectives.proxy import ProxyLoss as ProxyLoss
from modlib.objectives.proxy import Raw as Raw
from modlib.objectives.proxy import SupCon as SupCon
from modlib.objectives.proxy import UpperTriangleAlignment as UpperTriangleAlignment
from modlib.objectives.similarity import PredSim as PredSim
from modlib.objectives.similarity import SimilarityMatching as SimilarityMatching

# There is no __all__: help() would print every member that each of them inherits from torch.
