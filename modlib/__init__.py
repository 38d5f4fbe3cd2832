"""Train deep networks with and without end-to-end backpropagation.

A network is cut into modules, a *method* says how they are trained, and instruments measure what
the method needs: which passes, which labels, how many bytes. The survey behind it is Duan &
Principe, "Training Deep Architectures Without End-to-End Backpropagation" (arXiv 2101.03419).

>>> import modlib
>>> data = modlib.data.load("digits").subset(n_train=200, n_test=100)
>>> net = modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2)
>>> history = modlib.fit(net, modlib.methods.LocalLearning(), data, epochs=1, progress=False)
>>> 0.0 <= history.final["test_accuracy"] <= 1.0
True
"""

from modlib import (
    certificates,
    data,
    diagnosis,
    few_labels,
    kernels,
    methods,
    networks,
    objectives,
    transfer,
    zoo,
)
from modlib.audit import Audit, audit
from modlib.extract import extract
from modlib.network import ModularNetwork, partition
from modlib.pairs import fit_pairs, same_class
from modlib.training import Evaluation, History, evaluate, fit

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "Evaluation",
    "History",
    "ModularNetwork",
    "audit",
    "certificates",
    "data",
    "diagnosis",
    "evaluate",
    "extract",
    "few_labels",
    "fit",
    "fit_pairs",
    "kernels",
    "methods",
    "networks",
    "objectives",
    "partition",
    "same_class",
    "transfer",
    "zoo",
]
