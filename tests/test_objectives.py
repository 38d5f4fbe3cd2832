"""Every objective against its formula, written from the papers in NumPy and double precision."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from modlib import objectives
from modlib.kernels import Gaussian, Kernel
from modlib.methods import TransportRegularised
from modlib.objectives import (
    NMSE,
    Alignment,
    AuxiliaryClassifier,
    CentredAlignment,
    Contrastive,
    CrossEntropy,
    LogContrastive,
    Objective,
    ProxyLoss,
    Raw,
    SupCon,
    UpperTriangleAlignment,
)

Matrix = NDArray[np.float64]
CLASSICAL = [Raw, NMSE, Alignment, UpperTriangleAlignment, Contrastive, LogContrastive]
KERNELS: dict[str, str | Kernel] = {
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "relu-pool": "relu-pool",
    "gaussian": Gaussian(3.0),
}
FLOOR = {
    "relu": 0.0,
    "tanh": -1.0,
    "sigmoid": 0.0,
    "relu-pool": 0.0,
    "gaussian": 0.0,
    "cosine": -1.0,
}


# --- the formulas, minimised ----------------------------------------------------------------------


def gram(h: Matrix, kernel: str) -> Matrix:
    if kernel == "gaussian":
        flat = h.reshape(len(h), -1)
        return np.exp(-((flat[:, None] - flat[None]) ** 2).sum(2) / (2 * 3.0**2))
    if kernel == "relu-pool":
        n, c, height, width = h.shape
        u = np.maximum(h, 0).reshape(n, c, height // 4, 4, width // 4, 4).mean((3, 5))
    else:
        act: dict[str, Callable[[Matrix], Matrix]] = {
            "relu": lambda u: np.maximum(u, 0),
            "tanh": np.tanh,
            "sigmoid": lambda u: 1 / (1 + np.exp(-u)),
            "cosine": lambda u: u,
        }
        u = act[kernel](h)
    u = u.reshape(len(h), -1)
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    return u @ u.T


def cosine(a: Matrix, b: Matrix) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def published(name: str, g: Matrix, k: Matrix, same: Matrix) -> float:
    """METHODS 1.2: minus what the authors maximise."""
    b = len(g)
    off = ~np.eye(b, dtype=bool)
    upper = np.triu_indices(b, 1)
    positive, negative = same & off, ~same
    share = np.exp(g)[positive].sum() / np.exp(g)[off].sum()
    return {
        "Raw": -(g[positive].sum() - g[negative].sum()) / (b * b - b),
        "NMSE": ((g - k) ** 2).mean(),
        "Alignment": -cosine(g, k),
        "UpperTriangleAlignment": -cosine(g[upper], k[upper]),
        "Contrastive": -share,
        "LogContrastive": -np.log(share),
    }[name]


def negatives_only(name: str, g: Matrix, k: Matrix, same: Matrix) -> float:
    """The same with the pairs of different classes alone: drive their similarity down."""
    negative = ~same
    return {
        "Raw": lambda: g[negative].mean(),
        "NMSE": lambda: ((g - k)[negative] ** 2).mean(),
        "Alignment": lambda: -cosine(g[negative], k[negative]),
        "UpperTriangleAlignment": lambda: -cosine(g[negative], k[negative]),
        "Contrastive": lambda: np.exp(g)[negative].mean(),
        "LogContrastive": lambda: np.log(np.exp(g)[negative].mean()),
    }[name]()


def balanced(name: str, g: Matrix, k: Matrix, same: Matrix) -> float:
    """Means over the two kinds of pairs in place of sums over all."""
    positive, negative = same & ~np.eye(len(g), dtype=bool), ~same
    e = np.exp(g)

    def mean(values: Matrix) -> float:
        return float(values[positive].mean() + values[negative].mean())

    share = e[positive].mean() / mean(e)
    alignment = -mean(g * k) / np.sqrt(mean(g * g) * mean(k * k))
    return {
        "Raw": (g[negative].mean() - g[positive].mean()) / 2,
        "NMSE": mean((g - k) ** 2) / 2,
        "Alignment": alignment,
        "UpperTriangleAlignment": alignment,
        "Contrastive": -share,
        "LogContrastive": -np.log(share),
    }[name]


FORMULAS = {
    "published": (published, {}),
    "negatives only": (negatives_only, {"negatives_only": True}),
    "balanced": (balanced, {"balanced": True}),
}


def defined(objective: type[ProxyLoss], kernel: str, form: str) -> bool:
    """The ideal entries of different classes have no direction where they are all zero."""
    cosine_of_zeros = form == "negatives only" and FLOOR[kernel] == 0
    return not (issubclass(objective, Alignment) and cosine_of_zeros)


CASES = [
    case for case in product(CLASSICAL, KERNELS, FORMULAS) if defined(*case)
]  # 6 objectives x 5 kernels x 3 forms, less 8 that are undefined


def outputs(n: int = 10, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(size=(n, 2, 4, 8))


LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 5])


@pytest.mark.parametrize(("objective", "kernel", "form"), CASES)
def test_objective_is_its_formula(objective: type[ProxyLoss], kernel: str, form: str) -> None:
    formula, options = FORMULAS[form]
    h, y = outputs(), torch.tensor(LABELS)
    same = LABELS[:, None] == LABELS[None]
    ideal = np.where(same, 1.0, FLOOR[kernel])
    expected = formula(objective.__name__, gram(h, kernel), ideal, same)
    loss = objective(KERNELS[kernel], **options)
    assert loss(torch.tensor(h), y).item() == pytest.approx(expected, rel=1e-10)
    assert loss(torch.tensor(h).float(), y).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kernel", [k for k in FLOOR if k != "gaussian"])
def test_centred_alignment_is_its_formula(kernel: str) -> None:
    h = outputs()
    centre = np.eye(10) - np.ones((10, 10)) / 10
    ideal = np.where(LABELS[:, None] == LABELS[None], 1.0, FLOOR[kernel])
    expected = -cosine(centre @ gram(h, kernel) @ centre, centre @ ideal @ centre)
    loss = CentredAlignment(kernel)
    assert loss(torch.tensor(h), torch.tensor(LABELS)).item() == pytest.approx(expected, rel=1e-10)
    single = loss(torch.tensor(h).float(), torch.tensor(LABELS)).item()
    assert single == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kernel", [k for k in FLOOR if k != "gaussian"])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_supcon_is_its_formula(kernel: str, temperature: float) -> None:
    h = outputs()
    g = gram(h, kernel) / temperature
    terms = []
    for i in range(10):
        others = [j for j in range(10) if j != i]
        positives = [j for j in others if LABELS[j] == LABELS[i]]
        total = np.log(np.exp(g[i, others]).sum())
        terms.append(-np.mean([g[i, p] - total for p in positives]) if positives else 0.0)
    loss = SupCon(temperature, kernel)
    assert loss(torch.tensor(h), torch.tensor(LABELS)).item() == pytest.approx(np.mean(terms))
    single = loss(torch.tensor(h).float(), torch.tensor(LABELS)).item()
    assert single == pytest.approx(np.mean(terms), rel=1e-5)


# --- what all of them promise ---------------------------------------------------------------------

ALL: dict[str, ProxyLoss] = {
    **{o.__name__: o("relu") for o in CLASSICAL},
    **{f"{o.__name__} balanced": o("relu", balanced=True) for o in CLASSICAL},
    **{f"{o.__name__} negatives": o("tanh", negatives_only=True) for o in CLASSICAL},
    "CentredAlignment": CentredAlignment("relu"),
    "SupCon": SupCon(0.5, "relu"),
}


@pytest.mark.parametrize("name", ALL)
def test_separated_classes_are_the_least(name: str) -> None:
    """Minimised: the ideal outputs beat random ones, and descent from these goes towards them."""
    kernel = ALL[name].kernel.name
    ideal = (
        torch.eye(3)[[0, 0, 1, 1, 2, 2]]
        if kernel == "relu"
        else torch.eye(3)[[0, 0, 1, 1, 2, 2]] * 9
    )
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    if kernel == "tanh":  # three classes cannot all be opposite: two are enough here
        y, ideal = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([[9.0]] * 3 + [[-9.0]] * 3)
    best = ALL[name](ideal, y)
    for seed in range(5):
        h = torch.randn(ideal.shape, generator=torch.Generator().manual_seed(seed))
        h.requires_grad_()
        loss = ALL[name](h + 0.1, y)
        assert loss > best
        (slope,) = torch.autograd.grad(loss, h)
        assert ALL[name](h - 1e-3 * slope + 0.1, y) <= loss


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(list(ALL)))
def test_names_of_classes_and_order_of_images_do_not_matter(seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    y = rng.permutation([0, 0, 1, 1, 2, 2, *rng.integers(0, 3, 4)])
    h = torch.tensor(rng.normal(size=(10, 6)))
    renamed = rng.permutation(7)[y]
    order = rng.permutation(10)
    value = ALL[name](h, torch.tensor(y)).item()
    assert ALL[name](h, torch.tensor(renamed)).item() == pytest.approx(value, rel=1e-12)
    assert ALL[name](h[order], torch.tensor(y[order])).item() == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    h = torch.tensor(np.random.default_rng(1).normal(size=(6, 4)), requires_grad=True)
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.autograd.gradcheck(lambda h: ALL[name](h, y), (h,))


@pytest.mark.parametrize("kernel", ["sigmoid", "relu-pool", "gaussian"])
def test_gradient_through_the_other_kernels(kernel: str) -> None:
    h = torch.tensor(np.random.default_rng(1).normal(size=(5, 1, 4, 4)), requires_grad=True)
    y = torch.tensor([0, 0, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda h: LogContrastive(KERNELS[kernel])(h, y), (h,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_finite_and_computed_in_single(name: str, dtype: torch.dtype) -> None:
    """Also under autocast, which would compute the Gram matrix in half precision."""
    h = (torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    h[0] = -h[0].abs()  # a dead output under relu
    h.requires_grad_()
    y = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ALL[name](h, y)
    loss.backward()
    assert loss.dtype == torch.float32
    assert h.grad is not None
    assert h.grad.isfinite().all()
    expected = ALL[name](h.detach().double(), y).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_log_contrastive_survives_large_similarities() -> None:
    """exp(1/τ) of float16 or of a small temperature overflows; a log-sum-exp does not."""
    h = torch.eye(4).repeat(2, 1)
    y = torch.arange(8) % 4
    assert SupCon(1e-3)(h, y).isfinite()
    assert SupCon(1e-3)(h, y).item() == pytest.approx(0.0, abs=1e-6)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_one_class_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="all 4 labels of the batch are of one class"):
        ALL[name](torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="all 1 labels of the batch are of one class"):
        ALL[name](torch.randn(1, 3), torch.zeros(1, dtype=torch.long))


NEEDS_POSITIVES = {"Raw", "UpperTriangleAlignment", "Contrastive", "LogContrastive", "SupCon"}


@pytest.mark.parametrize("name", ALL)
def test_a_batch_without_equal_labels_is_refused_where_it_must_be(name: str) -> None:
    h, y = torch.randn(4, 3), torch.arange(4)
    if name in NEEDS_POSITIVES or "balanced" in name:
        with pytest.raises(ValueError, match="labels of the batch are all different"):
            ALL[name](h, y)
    else:
        assert ALL[name](h, y).isfinite()


@pytest.mark.parametrize("y", [torch.zeros(3), torch.zeros(4, 1), torch.zeros(())])
def test_labels_of_another_shape_are_refused(y: Tensor) -> None:
    with pytest.raises(ValueError, match="y must hold one label for each of the 4 outputs"):
        Raw()(torch.randn(4, 3), y)


EVERY: dict[str, Callable[[], Objective]] = {
    "transport": lambda: TransportRegularised().objective,
    **{
        name: kind
        for name, kind in vars(objectives).items()
        if isinstance(kind, type)
        and issubclass(kind, Objective)
        and kind not in (Objective, ProxyLoss)
    },
}


@pytest.mark.parametrize("y", [torch.randn(16), torch.arange(16.0) % 4, torch.ones(16).bool()])
@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"InfoNCE"}))  # InfoNCE ignores labels
def test_labels_that_are_no_whole_numbers_are_refused(name: str, y: Tensor) -> None:
    """All float labels differ, so that pairs of them would be of different classes, silently."""
    objective = EVERY[name]()
    shape = (4, 4, 4) if name == "InfoPro" else (8,)
    ready, h, x = objective.for_module(shape, 8), torch.randn(16, *shape), torch.randn(16, 3, 8, 8)
    assert ready.local(h, torch.arange(16) % 4, x).isfinite()
    with pytest.raises(ValueError, match=rf"y holds {y.dtype}; labels are int64"):
        ready.local(h, y, x)


@pytest.mark.parametrize("objective", [Alignment, UpperTriangleAlignment])
@pytest.mark.parametrize("kernel", ["relu", "sigmoid", "relu-pool", "gaussian"])
def test_alignment_with_zeros_is_refused(objective: type[ProxyLoss], kernel: str) -> None:
    with pytest.raises(ValueError, match="undefined for kernel"):
        objective(KERNELS[kernel], negatives_only=True)


def test_contradictory_options_are_refused() -> None:
    for objective in CLASSICAL:
        with pytest.raises(ValueError, match="choose one of the two"):
            objective("tanh", negatives_only=True, balanced=True)
    for temperature in (0.0, -1.0, float("nan"), "relu"):
        with pytest.raises(ValueError, match="temperature="):
            SupCon(temperature)  # type: ignore[arg-type]


# --- supervised -----------------------------------------------------------------------------------


def test_cross_entropy_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    h, y = rng.normal(size=(7, 4)), rng.integers(0, 4, 7)
    log_share = h - np.log(np.exp(h).sum(1, keepdims=True))
    expected = -log_share[np.arange(7), y].mean()
    assert CrossEntropy()(torch.tensor(h), torch.tensor(y)).item() == pytest.approx(expected)


def layers(net: nn.Module) -> list[str]:
    return [type(m).__name__ for m in net.modules() if not list(m.children())]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", ["AdaptiveAvgPool2d", "Flatten", "Linear"]),
        ("mlp", ["AdaptiveAvgPool2d", "Flatten", *["Linear", "BatchNorm1d", "ReLU"] * 3, "Linear"]),
        (
            "mlp-sr",
            [
                *("AdaptiveAvgPool2d", *["Conv2d", "BatchNorm2d", "ReLU"] * 3),
                *("AdaptiveAvgPool2d", "Flatten", *["Linear", "BatchNorm1d", "ReLU"] * 3, "Linear"),
            ],
        ),
        (
            "cnn",
            [*["Conv2d", "BatchNorm2d", "ReLU"] * 2, "AdaptiveAvgPool2d", "Flatten", "Linear"],
        ),
    ],
)
def test_auxiliary_networks_are_those_of_the_paper(kind: str, expected: list[str]) -> None:
    """METHODS 1.4: mlp-sr pools to a quarter of the side, then 1×1 convolutions, then 4C units."""
    objective = AuxiliaryClassifier(kind).for_module((8, 10, 14), classes=5)
    assert objective.network is not None
    assert layers(objective.network) == expected
    h = torch.randn(3, 8, 10, 14)
    assert objective.logits(h).shape == (3, 5)
    linears = [m for m in objective.network.modules() if isinstance(m, nn.Linear)]
    assert linears[0].in_features == 4 * 8
    if kind == "mlp-sr":
        assert objective.network[0].output_size == (3, 4)  # ceil of 10 / 4 and of 14 / 4
    expected_loss = nn.functional.cross_entropy(objective.logits(h), torch.arange(3))
    assert objective(h, torch.arange(3)) == expected_loss


@pytest.mark.parametrize("kind", ["linear", "mlp", "mlp-sr"])
def test_auxiliary_networks_of_vectors(kind: str) -> None:
    objective = AuxiliaryClassifier(kind).for_module((6,), classes=3)
    assert objective.logits(torch.randn(4, 6)).shape == (4, 3)


def test_every_module_gets_a_head_of_its_own() -> None:
    own = AuxiliaryClassifier(nn.Linear(4, 2))
    first, second = own.for_module((4,), 2), own.for_module((4,), 2)
    tensors = {id(p) for o in (own, first, second) for p in o.parameters()}
    assert len(tensors) == 6


def test_auxiliary_networks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="network='mpl' is unknown; choose from linear, mlp"):
        AuxiliaryClassifier("mpl")
    with pytest.raises(ValueError, match="no network yet"):
        AuxiliaryClassifier()(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    for kind in ("linear", "mlp", "mlp-sr", "cnn"):
        with pytest.raises(ValueError, match=r"needs .*\(C, H, W\).*has shape \(6, 7, 8, 9\)"):
            AuxiliaryClassifier(kind).for_module((6, 7, 8, 9), 2)
    with pytest.raises(ValueError, match="network='cnn' needs maps"):
        AuxiliaryClassifier("cnn").for_module((7,), 2)


def test_an_objective_must_say_what_it_is() -> None:
    with pytest.raises(NotImplementedError, match="Objective must define forward"):
        Objective()(torch.zeros(1), torch.zeros(1))
