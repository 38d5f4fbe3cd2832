"""The theorems as code: bounds, certified heads, gaps, counter-examples."""

from modlib.certificates.bounds import global_bound
from modlib.certificates.gap import OptimalityGap, gap_from_features, optimality_gap
from modlib.certificates.head import BestHead, best_head

__all__ = [
    "BestHead",
    "OptimalityGap",
    "best_head",
    "gap_from_features",
    "global_bound",
    "optimality_gap",
]
