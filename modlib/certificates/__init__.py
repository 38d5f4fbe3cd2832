"""The theorems as code: bounds, certified heads, gaps, counter-examples."""

from modlib.certificates.bounds import global_bound
from modlib.certificates.counterexamples import COUNTEREXAMPLES, CounterExample, counterexample
from modlib.certificates.gap import OptimalityGap, gap_from_features, optimality_gap
from modlib.certificates.head import BestHead, best_head
from modlib.certificates.stability import Deviations, StabilityBound, stability_bound
from modlib.certificates.unbalanced import UnbalancedBound, unbalanced_bound

__all__ = [
    "COUNTEREXAMPLES",
    "BestHead",
    "CounterExample",
    "Deviations",
    "OptimalityGap",
    "StabilityBound",
    "UnbalancedBound",
    "best_head",
    "counterexample",
    "gap_from_features",
    "global_bound",
    "optimality_gap",
    "stability_bound",
    "unbalanced_bound",
]
