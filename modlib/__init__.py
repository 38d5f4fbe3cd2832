"""Train deep networks with and without end-to-end backpropagation.

A network is cut into modules, a *method* says how they are trained, and instruments measure what
the method needs: which passes, which labels, how many bytes. All of it is for classification. The
survey behind it is Duan & Principe, "Training Deep Architectures Without End-to-End Backpropagation"
(arXiv 2101.03419).

>>> import modlib
>>> data = modlib.data.load("digits").subset(n_train=200, n_test=100)
>>> net = modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2)
>>> history = modlib.fit(net, modlib.methods.LocalLearning(), data, epochs=1, progress=False)
>>> 0.0 <= history.final["test_accuracy"] <= 1.0
True

Train::

    partition(net, modules)      cut a network into modules: a ModularNetwork
    fit(net, method, data)       train it: a History
    evaluate(net, data)          accuracy and loss: an Evaluation
    parallel      one module in each of many processes

Methods, objectives, networks and data::

    methods       how a whole network is trained: E2EBP, LocalLearning, ProxyObjective, ...
    objectives    what one module is trained on; each also works in a loop of your own
    kernels       kernels of nonlinearities, and the FeatureMap that a network keeps
    networks      small networks to cut: mlp, cnn, resnet, vgg8b, vit, ...
    data          data sets, the loader, augmentation

Measure and certify::

    audit(method, net, batch)    measure what a method needs: an Audit
    measure       what else is measured: bytes, operations, angles with the gradient
    certificates  how far a network is from a provable optimum

Reuse::

    extract(module, data)        what a trained module makes of a data set
    fit_pairs(net, objective, images, same)
                                 train hidden modules from pairs alone
    same_class(labels)           the oracle that answers for pairs, made from labels
    few_labels    a read-out from a few labels
    transfer      how well a module will serve another task
    zoo           a shelf of trained modules
    diagnosis     which module, or which labels, are at fault

Draw::

    viz           figures, tables and records (loads Matplotlib when it is first used)

``help(modlib.fit)``, ``help(modlib.objectives)`` and so on say more. The book's reference has the same
groups, with the equations typeset.
"""

import importlib
from types import ModuleType

from modlib import certificates as certificates
from modlib import data as data
from modlib import kernels as kernels
from modlib import methods as methods
from modlib import networks as networks
from modlib import objectives as objectives
from modlib import parallel as parallel
from modlib.measure.audit import Audit as Audit
from modlib.measure.audit import audit as audit
from modlib.network import ModularNetwork as ModularNetwork
from modlib.network import partition as partition
from modlib.reuse import diagnosis as diagnosis
from modlib.reuse import few_labels as few_labels
from modlib.reuse import transfer as transfer
from modlib.reuse import zoo as zoo
from modlib.reuse.extract import extract as extract
from modlib.reuse.pairs import fit_pairs as fit_pairs
from modlib.reuse.pairs import same_class as same_class
from modlib.training import Evaluation as Evaluation
from modlib.training import History as History
from modlib.training import evaluate as evaluate
from modlib.training import fit as fit

__version__ = "0.1.0"

# There is no __all__: help(modlib) would print every member that a network inherits from torch.


def __getattr__(name: str) -> ModuleType:
    if name == "viz":
        return importlib.import_module("modlib.viz")
    raise AttributeError(f"module 'modlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "viz"})
