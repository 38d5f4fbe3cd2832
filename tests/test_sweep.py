"""Every method on many shapes of data: it trains, or says in one sentence why it cannot. Nothing else.

What is crossed: channels, side, classes (and a rare one), batch, precision. For every method the suite
runs the few settings in which each value of a factor meets each value of every other;
``python tests/test_sweep.py [METHOD]`` runs the full product, which takes some minutes, and tells outcomes.
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import modlib
from modlib import methods, networks, objectives
from modlib.data import Dataset
from modlib.methods import Method
from modlib.network import ModularNetwork

PACKAGE = Path(modlib.__file__).parent


class Setting(NamedTuple):
    channels: int
    size: int
    classes: int | str
    batch: int
    precision: str


FACTORS: tuple[tuple[Any, ...], ...] = (
    (1, 3),
    (8, 28, 32),
    (2, 10, 100, "5 %"),
    (1, 2, 16),
    ("float32", "bfloat16", "float16"),
)
SETTINGS = [Setting(*values) for values in itertools.product(*FACTORS)]

# --- methods, each with a network that suits it ---------------------------------------------------

Net = Callable[[Setting], ModularNetwork]


def count(s: Setting) -> int:
    return s.classes if isinstance(s.classes, int) else 2


def conv(s: Setting, kernel: str = "relu", boundary: str = "before") -> ModularNetwork:
    """Three modules; the last begins with a feature map."""
    net = networks.cnn(
        (4, 4),
        count(s),
        channels=s.channels,
        size=s.size,
        stride=1 if s.size == 8 else 2,
        kernel=kernel,
        boundary=boundary,
        seed=0,
    )
    return modlib.partition(net, ["conv3", "features"])


def perceptron(s: Setting, norm: bool = False) -> ModularNetwork:
    sizes = [s.channels * s.size**2, 8, 8, count(s)]
    net = networks.mlp(sizes, kernel="relu", norm=norm, seed=0)
    return modlib.partition(net, ["layer2", "features"])


def tanh(s: Setting) -> ModularNetwork:
    sizes = [s.channels * s.size**2, 8, 8, count(s)]
    net = networks.mlp(sizes, activation=nn.Tanh, boundary="after", seed=0)
    return modlib.partition(net, 3)


def relus(s: Setting) -> ModularNetwork:
    sizes = [s.channels * s.size**2, 8, 8, count(s)]
    return modlib.partition(networks.mlp(sizes, boundary="after", seed=0), 3)


def residual(s: Setting) -> ModularNetwork:
    net = networks.resnet(
        (4, 4), 1, count(s), channels=s.channels, size=s.size, kernel="relu", seed=0
    )
    return modlib.partition(net, ["block1", "block2"])


def vgg(s: Setting) -> ModularNetwork:
    net = networks.vgg8b(count(s), width=2, channels=s.channels, size=s.size, seed=0)
    return modlib.partition(net, ["conv3", "hidden"])


def patches(s: Setting) -> ModularNetwork:
    net = networks.patch_cnn(
        (4, 4),
        count(s),
        channels=s.channels,
        size=s.size,
        patch=s.size // 2,
        stride=s.size // 4,
        seed=0,
    )
    return modlib.partition(net, ["conv2", "join"])


def tokens(s: Setting, kernel: str | None = None) -> ModularNetwork:
    net = networks.vit(
        8,
        2,
        count(s),
        heads=2,
        channels=s.channels,
        size=s.size,
        kernel=kernel,
        seed=0,
    )
    return modlib.partition(net, ["block2", "features" if kernel else "head"])


HEADS = ["linear", "mlp", "mlp-sr", "cnn", "greedy-2", "pred", "flat"]
PROXIES: list[objectives.Objective] = [
    objectives.Raw("relu"),
    objectives.NMSE("relu"),
    objectives.Alignment("relu"),
    objectives.UpperTriangleAlignment("relu", balanced=True),
    objectives.Contrastive("relu"),
    objectives.LogContrastive("relu"),
    objectives.LogContrastive("relu", balanced=True),
    objectives.LogContrastive("relu", negatives_only=True),
    objectives.CentredAlignment("relu"),
    objectives.SupCon(kernel="relu"),
]

CASES: dict[str, tuple[Callable[[], Method], Net]] = {
    "E2EBP": (methods.E2EBP, conv),
    "E2EBP of a perceptron": (methods.E2EBP, perceptron),
    **{
        f"LocalLearning, {head}": (
            partial(lambda h: methods.LocalLearning(objectives.AuxiliaryClassifier(h)), head),
            partial(conv, boundary="after"),
        )
        for head in HEADS
    },
    "LocalLearning of a perceptron": (methods.LocalLearning, perceptron),
    "LocalLearning in turn, cached": (
        lambda: methods.LocalLearning(in_turn=True, cache_features=True),
        conv,
    ),
    **{
        f"ProxyObjective, {proxy!r}": (partial(methods.ProxyObjective, proxy), conv)
        for proxy in PROXIES
    },
    "ProxyObjective": (methods.ProxyObjective, partial(conv, kernel="relu-pool")),
    "ProxyObjective, cached, of a perceptron": (
        lambda: methods.ProxyObjective(objectives.SupCon(kernel="relu"), cache_features=True),
        perceptron,
    ),
    "AugLocal": (methods.AugLocal, conv),
    "AugLocal of a residual network": (methods.AugLocal, residual),
    "DelayedGradients": (methods.DelayedGradients, conv),
    "FeaturesReplay": (methods.FeaturesReplay, conv),
    "FeaturesReplay of tokens": (methods.FeaturesReplay, tokens),
    "TargetPropagation": (methods.TargetPropagation, tanh),
    "DifferenceTargetPropagation": (methods.DifferenceTargetPropagation, tanh),
    "dtp_drl": (methods.dtp_drl, tanh),
    "ddtp of convolutions": (methods.ddtp, conv),
    "ddtp": (methods.ddtp, tanh),
    "l_drl": (lambda: methods.l_drl(from_output=False), partial(conv, boundary="after")),
    "SyntheticGradients": (methods.SyntheticGradients, conv),
    "SyntheticGradients of a perceptron": (
        lambda: methods.SyntheticGradients("linear", conditioned=False, synthetic_inputs=True),
        perceptron,
    ),
    "SyntheticGradients, inputs too": (
        lambda: methods.SyntheticGradients(width=4, synthetic_inputs=True),
        conv,
    ),
    "SyntheticGradients, exact": (
        lambda: methods.SyntheticGradients(methods.ExactGradient),
        conv,
    ),
    "SyntheticGradients of tokens": (methods.SyntheticGradients, tokens),
    "InformationPropagation": (methods.InformationPropagation, conv),
    "TransportRegularised": (methods.TransportRegularised, residual),
    "MAC": (methods.MAC, tanh),
    "ADMM": (methods.ADMM, relus),
    "BlockCoordinateDescent": (methods.BlockCoordinateDescent, relus),
    "AlternatingMinimisation": (methods.AlternatingMinimisation, conv),
    "LiftedNetwork": (methods.LiftedNetwork, relus),
    "Bottleneck": (lambda: methods.hsic_bottleneck(in_turn=True), conv),
    "Only": (lambda: methods.Only(methods.LocalLearning(in_turn=True), [1]), conv),
    "KeepHeads": (lambda: methods.KeepHeads(methods.LocalLearning()), conv),
    "hsic_bottleneck": (methods.hsic_bottleneck, partial(perceptron, norm=True)),
    "greedy_infomax": (lambda: methods.greedy_infomax(steps=1, negatives=4, grid=3), patches),
    "infopro": (methods.infopro, conv),
    "transport": (methods.transport, residual),
    "layerwise_greedy": (methods.layerwise_greedy, conv),
    "decoupled_greedy": (methods.decoupled_greedy, conv),
    "local_error_signals, sim": (lambda: methods.local_error_signals("sim"), vgg),
    "local_error_signals": (methods.local_error_signals, vgg),
    "mono_forward": (methods.mono_forward, partial(conv, boundary="after")),
    "cascade": (methods.cascade, conv),
    "random_classifiers": (methods.random_classifiers, conv),
    "LocalLearning of tokens": (methods.LocalLearning, tokens),
    "ProxyObjective of tokens": (
        lambda: methods.ProxyObjective(objectives.SupCon(kernel="relu")),
        partial(tokens, kernel="relu"),
    ),
    "TransportRegularised of tokens": (methods.TransportRegularised, tokens),
    "hsic_bottleneck of tokens": (methods.hsic_bottleneck, tokens),
    "infopro of tokens": (methods.infopro, tokens),
    "local_error_signals of tokens": (methods.local_error_signals, tokens),
}


@cache
def data(channels: int, size: int, classes: int | str, batch: int) -> Dataset:
    """Noise: two batches and an odd remainder of them. "5 %": that many are of one of two classes."""
    rng = np.random.default_rng(0)
    n = 2 * batch + (batch // 2 | 1 if batch > 1 else 0)
    images = rng.integers(0, 256, (n, size, size, channels), np.uint8)
    rare = isinstance(classes, str)
    labels = (np.arange(n) % 20 == 3).astype(int) if rare else np.arange(n) % int(classes)
    names = tuple(map(str, range(2 if rare else int(classes))))
    return Dataset("noise", images, labels, images[:8], labels[:8], names)


# --- what may come of it --------------------------------------------------------------------------


def outcome(name: str, s: Setting) -> str:
    """ "trained", "refused: ..." or "FAULT: ..."."""
    make_method, make_net = CASES[name]
    try:
        net = make_net(s)
    except (ValueError, TypeError) as error:
        return _refusal(error)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    given = data(s.channels, s.size, s.classes, s.batch)
    steps: list[object] = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(_))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method = make_method()
            history = modlib.fit(
                net,
                method,
                given,
                epochs=2,
                batch_size=s.batch,
                precision=s.precision,
                device="cpu",
                augment=None,
                schedule="constant",
                progress=False,
            )
    except (ValueError, TypeError) as error:
        same = all(torch.equal(before[key], value) for key, value in net.state_dict().items())
        if steps or not same:
            weights = "as before" if same else "changed"
            return f"FAULT: after {len(steps)} steps, weights {weights}: {error!r}"
        return _refusal(error)
    except Exception as error:
        return f"FAULT: after {len(steps)} steps: {error!r}"
    finally:
        hook.remove()
    values = [loss for row in history.rows for loss in row["losses"] if loss is not None]
    values += [float(value.abs().max()) for value in net.state_dict().values()]
    values += [modlib.evaluate(net, given).loss]
    return (
        "trained" if steps and np.isfinite(values).all() else f"FAULT: {len(steps)} steps, {values}"
    )


def _refusal(error: Exception) -> str:
    message = str(error)
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    if PACKAGE not in Path(last).parents:
        return f"FAULT: {type(error).__name__} raised outside modlib: {message}"
    if not re.fullmatch(r"[^\n]+\.", message) or len(message) > 400:
        return f"FAULT: no one sentence: {message}"
    if not any(re.search(rf"\b{word}[=:]", message) for word in _arguments()):
        return f"FAULT: no argument is named: {message}"
    return f"refused: {message}"


@cache
def _arguments() -> set[str]:
    """Names of what a caller gives: to fit, to a method or objective, to a network."""
    given = {*inspect.signature(modlib.fit).parameters}
    for package in (methods, networks, objectives):
        for made in vars(package).values():
            if callable(made) and not inspect.ismodule(made):
                given |= set(inspect.signature(made).parameters)
    return given - {"self", "args", "kwargs"}


# --- the suite ------------------------------------------------------------------------------------


def covering() -> list[Setting]:
    """Few settings in which each value of a factor meets each value of every other."""
    pairs = {
        ((i, a), (j, b))
        for (i, x), (j, y) in itertools.combinations(enumerate(FACTORS), 2)
        for a in x
        for b in y
    }
    chosen = []
    while pairs:
        met = {s: pairs & set(itertools.combinations(enumerate(s), 2)) for s in SETTINGS}
        best = max(SETTINGS, key=lambda s: len(met[s]))  # the first of equals
        pairs -= met[best]
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("name", CASES)
def test_a_method_trains_or_says_why_not(name: str) -> None:
    found = {s: outcome(name, s) for s in covering()}
    assert {s: what for s, what in found.items() if what.startswith("FAULT")} == {}
    assert any(what == "trained" for what in found.values())


def test_every_method_is_swept() -> None:
    """Whatever in modlib.methods is a method, or makes one."""
    trains = set()
    for name in methods.__all__:
        made = getattr(methods, name)
        kind = made if isinstance(made, type) else get_type_hints(made).get("return")
        if isinstance(kind, type) and issubclass(kind, Method) and kind is not Method:
            trains.add(name)
    swept = {case.split(",")[0].split(" ")[0] for case in CASES}
    assert len(trains) > 18 and trains - swept == set()


if __name__ == "__main__":
    chosen = [name for name in CASES if re.search(sys.argv[1] if len(sys.argv) > 1 else "", name)]
    kinds: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], Setting] = {}
    for name in chosen:
        for s in SETTINGS:
            what = outcome(name, s)
            key = name, re.sub(r"\d+", "#", what)[:300]
            kinds[key] += 1
            first.setdefault(key, s)
        for (case, what), times in kinds.items():
            if case == name:
                print(f"{case:45} {times:4} {what}   e.g. {tuple(first[case, what])}", flush=True)
