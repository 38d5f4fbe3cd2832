"""The methods that recipes compare, on whatever data: functions of the optimiser and the label smoothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from modlib import methods, objectives
from modlib.methods import E2EBP, Method, ProxyObjective, sgd
from modlib.methods.method import MakeOptimizer
from modlib.objectives import CrossEntropy, Objective

OUTPUT_LR = 1.0  # of an output module alone: a convex problem on unit vectors, the same for all

# Of a kernel. The published objectives, then what mends them: pairs weighed equally, centred, per anchor.
# (Balanced weights leave the diagonal out, so balanced UTAL is balanced alignment.)
PROXIES: dict[str, Callable[[str], Objective]] = {
    "raw": objectives.Raw,
    "nmse": objectives.NMSE,
    "alignment": objectives.Alignment,
    "utal": objectives.UpperTriangleAlignment,
    "contrastive": objectives.Contrastive,
    "log-contrastive": objectives.LogContrastive,
    "raw-balanced": partial(objectives.Raw, balanced=True),
    "nmse-balanced": partial(objectives.NMSE, balanced=True),
    "alignment-balanced": partial(objectives.Alignment, balanced=True),
    "contrastive-balanced": partial(objectives.Contrastive, balanced=True),
    "log-contrastive-balanced": partial(objectives.LogContrastive, balanced=True),
    "centred-alignment": objectives.CentredAlignment,
    "supcon": partial(objectives.SupCon, 0.07),
}

# InfoPro's weights of (reconstruction, labels) of the first and the last hidden module, by number of
# modules: those published for cuts balanced by memory. (None are published for six; four have the same as
# three.)
_INFOPRO: dict[int, tuple[tuple[float, float], tuple[float, float] | None]] = {
    2: ((5.0, 0.1), None),
    3: ((5.0, 0.0), (5.0, 0.1)),
    6: ((5.0, 0.0), (5.0, 0.1)),
}

# Local objectives, of ``optimizer`` and, where there are labels to smooth, of ``smoothing``.
LOCAL: dict[str, Callable[..., Method]] = {
    "greedy-1": partial(methods.layerwise_greedy, 1),
    "greedy-2": partial(methods.layerwise_greedy, 2),
    "cascade": methods.cascade,
    "dgl": methods.decoupled_greedy,
    "dgl-cnn": partial(methods.decoupled_greedy, "cnn"),
    "pred": partial(methods.local_error_signals, "pred"),
    "sim": partial(methods.local_error_signals, "sim"),
    "predsim": partial(methods.local_error_signals, "predsim"),
    "mono-forward": methods.mono_forward,
    "random": methods.random_classifiers,
    "auglocal": methods.AugLocal,
    "infopro-softmax": partial(methods.infopro, form="softmax"),
    "infopro-contrast": partial(methods.infopro, form="contrast"),
}
# The same objectives in the other order: all modules in each step, or one after another.
OTHER_ORDER: dict[str, Callable[..., Method]] = {
    "greedy-1-together": partial(methods.decoupled_greedy, "greedy-1"),
    "predsim-in-turn": partial(methods.local_error_signals, "predsim", in_turn=True),
}
ADAM = {"pred", "sim", "predsim", "predsim-in-turn"}  # as published; all others by SGD


def local(key: str, modules: int, make: MakeOptimizer, smoothing: float = 0.0) -> Method:
    """A local objective by its key, for so many modules."""
    method = {**LOCAL, **OTHER_ORDER}[key]
    if key.startswith("infopro"):
        method = partial(method, *_INFOPRO[modules])
    smoothed = {"smoothing": smoothing} if smoothing else {}
    return method(optimizer=make, **smoothed)


def end_to_end(make: MakeOptimizer, smoothing: float = 0.0, recompute: bool = False) -> Method:
    """End-to-end backpropagation; ``recompute`` keeps the modules' outputs alone."""
    return E2EBP(CrossEntropy(smoothing), make, recompute)


def modular(
    objective: Objective, hidden: int, make: MakeOptimizer, smoothing: float = 0.0
) -> Method:
    """A proxy objective in so many hidden modules, then an output module on two cached views of the data."""
    return ProxyObjective(
        objective,
        optimizer=[*[make] * hidden, sgd(OUTPUT_LR, weight_decay=0.0)],
        output=CrossEntropy(smoothing),
        cache_features=True,
        views=2,
    )
