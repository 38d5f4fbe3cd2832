"""Objectives on information, against their formulas in NumPy and double precision; their methods."""

from __future__ import annotations

import importlib
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from modlib import networks
from modlib.data import Dataset, Loader
from modlib.measure.audit import audit
from modlib.measure.memory import SavedBytes
from modlib.methods import (
    InformationPropagation,
    LocalLearning,
    Method,
    TransportRegularised,
    greedy_infomax,
    hsic_bottleneck,
    infopro,
    transport,
    unformatted_accuracy,
)
from modlib.methods.hsic import _assigned
from modlib.methods.transport import residual_branches
from modlib.network import ModularNetwork, partition
from modlib.networks.patches import JoinPatches, Patches, patch_cnn
from modlib.networks.residual import ResidualUnit, resnet
from modlib.objectives import HSIC, CrossEntropy, InfoNCE, InfoPro, hsic, nhsic
from modlib.objectives.infopro import infopro_weights
from modlib.training import fit

Array = NDArray[np.float64]

# --- HSIC -----------------------------------------------------------------------------------------


def gaussian(a: Array, bandwidth: float) -> Array:
    squares = ((a[:, None] - a[None]) ** 2).sum(2)
    return np.exp(-squares / (2 * bandwidth**2 * a.shape[1]))


def numpy_nhsic(a: Array, b: Array, bandwidth: float) -> float:
    """METHODS 1.8: K H, not H K H, and an explicit inverse."""
    m = len(a)
    centre = np.eye(m) - np.ones((m, m)) / m

    def ratio(vectors: Array) -> Array:
        k = gaussian(vectors, bandwidth) @ centre
        return k @ np.linalg.inv(k + 1e-5 * m * np.eye(m))

    return float((ratio(a) * ratio(b).T).sum())


def numpy_hsic(a: Array, b: Array, bandwidth: float) -> float:
    m = len(a)
    centre = np.eye(m) - np.ones((m, m)) / m
    product = gaussian(a, bandwidth) @ centre @ gaussian(b, bandwidth) @ centre
    return float(np.trace(product) / (m - 1) ** 2)


def vectors(seed: int, m: int = 64, d: int = 30) -> tuple[Array, Array, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, d))
    y = rng.integers(0, 10, m)
    return x, np.tanh(x @ rng.normal(size=(d, 12))) + y[:, None], y


@pytest.mark.parametrize("bandwidth", [0.5, 5.0, 20.0])
@pytest.mark.parametrize(("ours", "formula"), [(nhsic, numpy_nhsic), (hsic, numpy_hsic)])
def test_hsic_is_its_formula(
    ours: Callable[..., Tensor], formula: Callable[..., float], bandwidth: float
) -> None:
    for seed in range(3):
        x, h, _ = vectors(seed)
        expected = formula(h, x, bandwidth)
        double = ours(torch.tensor(h), torch.tensor(x), bandwidth)
        single = ours(torch.tensor(h).float(), torch.tensor(x).float(), bandwidth)
        assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
        assert double.item() == pytest.approx(expected, rel=1e-6)
        assert single.item() == pytest.approx(expected, rel=1e-6)


def test_nhsic_of_small_outputs_keeps_its_digits() -> None:
    """Entries of K that differ in the sixth digit: in float32 throughout, one part in 100 is lost."""
    x, _, _ = vectors(0, m=256)
    h = np.tanh(0.05 * x[:, :12])
    y = np.eye(10)[np.arange(256) % 10]
    single = nhsic(torch.tensor(h).float(), torch.tensor(y).float(), 20.0)
    assert single.item() == pytest.approx(numpy_nhsic(h, y, 20.0), rel=1e-6)


def test_hsic_objective_is_its_formula() -> None:
    x, h, y = vectors(0)
    expected = numpy_nhsic(h, x, 5.0) - 50 * numpy_nhsic(h, np.eye(10)[y], 5.0)
    objective = HSIC(weight=50.0).for_module((3, 4), classes=10)
    maps, images = torch.tensor(h).view(-1, 3, 2, 2), torch.tensor(x).view(-1, 3, 2, 5)
    labels = torch.tensor(y)
    assert objective.local(maps, labels, images).item() == pytest.approx(expected, rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = objective.local(maps.float(), labels, images.float())
    assert single.item() == pytest.approx(expected, rel=1e-3)


def test_layers_share_the_kernels_of_the_input_and_the_labels(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One matrix for each layer and two for all of them, not four for each; the updates are the same."""
    fits = []
    dependence = importlib.import_module("modlib.objectives.hsic")
    ridge_fit = dependence._ridge_fit
    monkeypatch.setattr(
        dependence, "_ridge_fit", lambda a, bandwidth: fits.append(1) or ridge_fit(a, bandwidth)
    )
    x, y = Loader(digits).sample(32)
    plain = partial(torch.optim.SGD, lr=0.1)
    trained, counts = [], []
    for method in (
        hsic_bottleneck(optimizer=plain),
        LocalLearning(HSIC(), optimizer=plain),
        hsic_bottleneck(in_turn=True, optimizer=plain),
    ):
        net = hsic_network((64, 16, 16, 16))
        stages = method.stages(net, x)
        for stage in stages:
            fits.clear()
            stage.step(x, y)
            stage.step(x, y)
            counts.append(len(fits) / 2)
        assert all(o._held is None for s in stages for o in s.objectives if isinstance(o, HSIC))
        trained.append([p.detach() for p in net.parameters()])
    assert counts == [3 + 2, 3 * (1 + 2), 3, 3, 3, 0]
    torch.testing.assert_close(trained[0], trained[1])


def test_nhsic_counts_the_directions_that_are_shared() -> None:
    x, h, _ = vectors(0)
    constant = torch.zeros(64, 1)
    assert nhsic(torch.tensor(x), constant).item() == 0.0
    assert 0 < nhsic(torch.tensor(h), torch.tensor(x)).item() < 63
    classes = torch.eye(4).repeat(16, 1)  # four equally distant points: three directions
    assert nhsic(classes, classes, 1.0).item() == pytest.approx(3.0, rel=1e-3)


def test_gradient_of_hsic_is_that_of_finite_differences() -> None:
    x, h, y = vectors(1, m=8)
    objective = HSIC(weight=3.0, bandwidth=1.0, classes=10)
    out, labels, images = torch.tensor(h, requires_grad=True), torch.tensor(y), torch.tensor(x)
    assert torch.autograd.gradcheck(lambda h: objective.local(h, labels, images), (out,))


def test_hsic_refuses_what_it_cannot_use() -> None:
    h, y = torch.randn(4, 3), torch.arange(4)
    for bandwidth in (0.0, -1.0, float("nan"), float("inf")):
        for call in (
            lambda b: HSIC(bandwidth=b),
            lambda b: nhsic(h, h, b),
            lambda b: hsic(h, h, b),
        ):
            with pytest.raises(ValueError, match=r"bandwidth=.*above 0"):
                call(bandwidth)
    with pytest.raises(ValueError, match=r"weight=0\.0.*above 0"):
        HSIC(weight=0.0)
    with pytest.raises(ValueError, match=r"objective\.local\(h, y, x\)"):
        HSIC(classes=4)(h, y)
    with pytest.raises(ValueError, match="classes=None"):
        HSIC().local(h, y, h)
    for wrong in (y + 1, y.int(), y[:3]):
        with pytest.raises(ValueError, match="y "):
            HSIC(classes=4).local(h, wrong, h)
    for a, b in ((h, h[:3]), (h[:1], h[:1]), (h, h[None])):
        with pytest.raises(ValueError, match="two batches of vectors"):
            nhsic(a, b)


# --- InfoNCE and patches --------------------------------------------------------------------------


def with_known_draws(objective: InfoNCE, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Make the objective's random draws known, in the order in which it asks for them."""
    draws: list[NDArray[np.int64]] = []

    def draw(scores: Tensor) -> Tensor:
        draws.append(rng.integers(0, len(scores), (len(scores), objective.negatives)))
        return torch.tensor(draws[-1])

    objective.draw = draw  # type: ignore[method-assign]
    return draws


def numpy_infonce(objective: InfoNCE, z: Array, draws: list[NDArray[np.int64]]) -> float:
    """METHODS 1.6, patch by patch; z is (N, G, G, C)."""
    n, grid, _, _ = z.shape
    means = []
    for step in range(1, objective.steps + 1):
        distance = step + objective.gap
        w = objective.predictors[step - 1].weight.detach().double().numpy()[:, :, 0, 0]
        places = [(i, r, c) for i in range(n) for r in range(grid - distance) for c in range(grid)]
        pool = [z[i, r + distance, c] for i, r, c in places]
        terms = []
        for number, (i, r, c) in enumerate(places):
            predicted = w @ z[i, r, c]
            others = [pool[k] @ predicted for k in draws[step - 1][number]]
            scores = np.array([z[i, r + distance, c] @ predicted, *others])
            terms.append(np.log(np.exp(scores - scores[0]).sum()))
        means.append(np.mean(terms))
    return float(np.mean(means))


@pytest.mark.parametrize(("steps", "grid", "gap"), [(1, 3, 1), (2, 4, 1), (2, 3, 0)])
@pytest.mark.parametrize("shape", [(5,), (5, 2, 3)])
def test_infonce_is_its_formula(steps: int, grid: int, gap: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    objective = InfoNCE(steps, negatives=6, grid=grid, gap=gap).for_module(shape, classes=10)
    draws = with_known_draws(objective, rng)
    h = rng.normal(size=(3 * grid**2, *shape))
    z = h.mean((2, 3)) if len(shape) == 3 else h
    loss = objective(torch.tensor(h).float(), torch.zeros(3))
    expected = numpy_infonce(objective, z.reshape(3, grid, grid, 5), draws)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    draws.clear()
    loss = objective.double()(torch.tensor(h), torch.zeros(3))
    expected = numpy_infonce(objective, z.reshape(3, grid, grid, 5), draws)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def symbols(rng: np.random.Generator, noise: float, kinds: int, images: int) -> Tensor:
    """One-hot patches on a 3×3 grid: the last row repeats the first, but for a share of noise."""
    z = rng.integers(0, kinds, (images, 3, 3))
    replaced = rng.random((images, 3)) < noise
    z[:, 2] = np.where(replaced, z[:, 2], z[:, 0])
    return torch.eye(kinds)[torch.tensor(z).flatten()]


@pytest.mark.parametrize(("kinds", "negatives"), [(4, 16), (4, 128), (40, 16), (40, 128)])
def test_infonce_never_exceeds_the_information(kinds: int, negatives: int) -> None:
    """log(n + 1) - L bounds the mutual information, here known, and comes near it."""
    noise = 0.2
    same, other = 1 - noise + noise / kinds, noise / kinds
    information = same * math.log(kinds * same) + (kinds - 1) * other * math.log(kinds * other)
    best = torch.full((kinds, kinds), math.log(other)).fill_diagonal_(math.log(same))
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    objective = InfoNCE(1, negatives, grid=3).for_module((kinds,), classes=10)
    for weight, near in ((best, True), (torch.randn(kinds, kinds), False), (5 * best, False)):
        objective.predictors[0].weight.data = weight[:, :, None, None]
        bounds = []
        for _ in range(40):
            loss = objective(symbols(rng, noise, kinds, images=64), torch.zeros(64)).item()
            bounds.append(math.log(negatives + 1) - loss)
            assert bounds[-1] <= math.log(negatives + 1)
        error = np.std(bounds) / math.sqrt(len(bounds))
        assert np.mean(bounds) <= information + 3 * error
        if near and negatives == 128:
            assert np.mean(bounds) >= 0.85 * information


def test_infonce_refuses_what_it_cannot_use() -> None:
    for grid, steps in ((2, 1), (1, 1), (6, 5)):
        with pytest.raises(ValueError, match=rf"grid={grid}: no row lies"):
            InfoNCE(steps, grid=grid)
    for options in ({"steps": 0}, {"negatives": 0}, {"gap": -1}):
        with pytest.raises(ValueError, match="give at least 1, 1 and 0"):
            InfoNCE(**options)
    ready = InfoNCE(1, grid=3).for_module((4,), 10)
    with pytest.raises(ValueError, match="h holds 17 patches, no multiple of grid² = 9"):
        ready(torch.zeros(17, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="h holds 0 patches"):
        ready(torch.zeros(0, 4), torch.zeros(0))
    with pytest.raises(ValueError, match="no predictors yet"):
        InfoNCE(1, grid=3)(torch.zeros(18, 4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"needs outputs \(C,\) or \(C, H, W\)"):
        InfoNCE().for_module((4, 5), 10)


def test_patches_are_cut_and_joined_row_by_row() -> None:
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    patches = Patches(4, stride=2)(x)
    corners = [(i, 2 * r, 2 * c) for i in range(2) for r in range(3) for c in range(3)]
    expected = torch.stack([x[i, :, r : r + 4, c : c + 4] for i, r, c in corners])
    assert torch.equal(patches, expected)
    joined = JoinPatches(3)(patches)
    torch.testing.assert_close(joined[1], expected[9:].mean((0, 2, 3)))
    torch.testing.assert_close(JoinPatches(3)(patches.mean((2, 3))), joined)


def test_patches_refuse_what_they_cannot_cut() -> None:
    with pytest.raises(ValueError, match="do not cover 9 pixels"):
        Patches(4, 2)(torch.zeros(1, 1, 9, 9))
    with pytest.raises(ValueError, match="do not cover 3 pixels"):
        patch_cnn(size=3, patch=4, stride=2)
    with pytest.raises(ValueError, match="images of 8×6 pixels"):
        Patches(4, 2)(torch.zeros(1, 1, 8, 6))
    with pytest.raises(ValueError, match="size=0: give a whole number"):
        Patches(0, 1)
    with pytest.raises(ValueError, match="h holds 10 patches, no multiple of grid² = 9"):
        JoinPatches(3)(torch.zeros(10, 4))


# --- InfoPro --------------------------------------------------------------------------------------


def weights(layer: nn.Module) -> list[Array]:
    return [p.detach().double().numpy() for p in layer.parameters()]


def convolved(x: Array, layer: nn.Module, stride: int = 1) -> Array:
    kernel, *bias = weights(layer)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::stride, ::stride]
    out = np.einsum("nchwij,ocij->nohw", windows, kernel)
    return out + bias[0][:, None, None] if bias else out


def normalised(x: Array) -> Array:
    """Batch norm as it begins, with scale 1 and shift 0."""
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5)


def stretched(x: Array, side: int) -> Array:
    """Bilinear, corner to corner."""
    old = x.shape[-1]
    place = np.arange(side) * (old - 1) / (side - 1)
    low = np.minimum(place.astype(int), old - 2)
    share = place - low
    matrix = np.zeros((side, old))
    matrix[np.arange(side), low] = 1 - share
    matrix[np.arange(side), low + 1] = share
    return np.einsum("ph,qw,nchw->ncpq", matrix, matrix, x)


def numpy_reconstruction(objective: InfoPro, h: Array, x: Array, pixels: bool) -> float:
    first, _, _, last = objective.decoder  # type: ignore[misc]
    rows = np.maximum(normalised(convolved(stretched(h, x.shape[-1]), first)), 0)
    image = convolved(rows, last)
    p, target = 1 / (1 + np.exp(-image)), x * 0.25 + 0.5 if pixels else 1 / (1 + np.exp(-x))
    return float(-(target * np.log(p) + (1 - target) * np.log(1 - p)).mean())


def numpy_label(objective: InfoPro, h: Array, y: NDArray[np.int64], stride: int) -> float:
    layers = list(objective.head)  # type: ignore[arg-type]
    pooled = np.maximum(normalised(convolved(h, layers[0], stride)), 0).mean((2, 3))
    w1, b1 = weights(layers[5])
    w2, b2 = weights(layers[7])
    out = np.maximum(pooled @ w1.T + b1, 0) @ w2.T + b2
    if objective.form == "softmax":
        logs = out - np.log(np.exp(out).sum(1, keepdims=True))
        return float(-logs[np.arange(len(y)), y].mean())
    out = out / np.linalg.norm(out, axis=1, keepdims=True)
    scores = out @ out.T / 0.07
    terms = []
    for i in range(len(y)):
        others = [j for j in range(len(y)) if j != i]
        total = np.log(np.exp(scores[i, others]).sum())
        positives = [j for j in others if y[j] == y[i]]
        terms.append(-np.mean([scores[i, p] - total for p in positives]) if positives else 0.0)
    return float(np.mean(terms))


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("form", ["softmax", "contrast"])
@pytest.mark.parametrize("side", [8, 10])
def test_infopro_is_its_formula(form: str, pixels: bool, side: int) -> None:
    rng = np.random.default_rng(0)
    h, x = rng.normal(size=(6, 5, side, side)), rng.uniform(-2, 2, size=(6, 2, 16, 16))
    y = np.array([0, 0, 1, 1, 1, 2])
    scale = {"mean": [0.5, 0.5], "std": [0.25, 0.25]} if pixels else {}
    made = InfoPro(3.0, 0.7, form, channels=2, **scale).for_module((5, side, side), classes=4)
    arguments = torch.tensor(h), torch.tensor(y), torch.tensor(x)
    stride = 1 if side == 8 else 2  # METHODS 1.7: the head of 8×8 maps keeps its size
    label = numpy_label(made, h, y, stride)
    expected = 3.0 * numpy_reconstruction(made, h, x, pixels) + 0.7 * label
    single = made.local(arguments[0].float(), arguments[1], arguments[2].float())
    assert single.item() == pytest.approx(expected, rel=1e-5)
    assert made.double().local(*arguments).item() == pytest.approx(expected, rel=1e-10)
    width = 5 * stride
    assert next(p.shape[0] for p in made.head.parameters()) == width  # type: ignore[union-attr]


def test_infopro_rebuilds_the_pixels(digits: Dataset) -> None:
    """The target of binary cross-entropy is the image in 0..1 before it was normalised."""
    objective = InfoPro(1.0, 0.0, mean=digits.mean, std=digits.std, channels=1)
    loader = Loader(digits, shuffle=False)
    x, _ = loader.sample(9)
    pixels = torch.tensor(digits.train_images[:9]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(x * objective.std + objective.mean, pixels, atol=1e-6, rtol=0)


def noise(channels: int, size: int) -> Dataset:
    """Images that nothing can rebuild, in four classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (128, size, size, channels), dtype=np.uint8)
    labels = rng.integers(0, 4, 128)
    return Dataset("noise", images, labels, images[:8], labels[:8])


def noise_losses(method: Method, data: Dataset, seed: int) -> list[float]:
    channels, size, _ = data.shape
    net = networks.cnn((8, 16), 4, channels=channels, size=size, stride=1, kernel="relu", seed=seed)
    options = {"epochs": 2, "batch_size": 32, "seed": seed, "progress": False}
    history = fit(partition(net, 3), method, data, **options)
    return list(history.final["losses"])


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_infopro_trains_on_noise_with_its_defaults(
    channels: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No seed diverges: with a squared error all of these did on one channel."""
    if not told:  # as in a loop of one's own
        monkeypatch.setattr(InfoPro, "set_normalisation", lambda *_: None)
    data = noise(channels, 8)
    guessing = 5 * math.log(2) + 0.5 * math.log(31)  # decoder and similarities that know nothing
    for seed in range(6 if told else 2):
        assert max(noise_losses(infopro(), data, seed)[:2]) < 1.05 * guessing


def test_infopro_is_told_the_normalisation_by_fit(digits: Dataset) -> None:
    data = digits.subset(n_train=128, n_test=8)
    histories = [
        fit(partition(small_cnn(), 3), method, data, epochs=1, batch_size=64, progress=False)
        for method in (
            infopro(),
            infopro(mean=data.mean, std=data.std),
            LocalLearning(InfoPro(form="contrast", channels=1), output=CrossEntropy()),
            infopro(mean=[0.5], std=[0.25]),
        )
    ]
    told, given, as_objective, other = histories
    assert told == given == as_objective
    assert told != other
    objective = InfoPro(channels=1)
    objective.set_normalisation([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])  # of other inputs
    assert objective.extra_repr().endswith("σ(x)")


def test_infopro_computes_no_term_of_weight_zero() -> None:
    h, x, y = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 8, 8), torch.tensor([0, 0, 1, 1])
    for options, idle in (((1.0, 0.0), "head"), ((0.0, 1.0), "decoder")):
        objective = InfoPro(*options).for_module((3, 4, 4), 2)
        setattr(objective, idle, None)
        assert objective.local(h, y, x) > 0


def test_infopro_weights_are_linear_in_the_module() -> None:
    """METHODS 1.7: ratio i / (K - 2) for i = 0 .. K - 2."""
    assert infopro_weights(1, (5, 0), (0, 1)) == []
    assert infopro_weights(2, (5, 0.5), (0, 1)) == [(5, 0.5)]
    pairs = infopro_weights(8, (5, 0), (0.5, 1))
    expected = [(5 + (0.5 - 5) * i / 6, i / 6) for i in range(7)]
    assert np.allclose(pairs, expected)
    with pytest.raises(ValueError, match="modules=0"):
        infopro_weights(0, (1, 1), (1, 1))


def test_every_module_gets_its_weights(digits: Dataset) -> None:
    net = networks.cnn((4, 8), channels=1, size=8, stride=1, kernel="relu")
    method = InformationPropagation((1, 0), (0, 1), "contrast", digits.mean, digits.std)
    objectives = method.objectives(partition(net, 4), Loader(digits).sample(4)[0])
    seen = [(o.reconstruction, o.label) for o in objectives if isinstance(o, InfoPro)]
    assert seen == infopro_weights(4, (1, 0), (0, 1))
    assert objectives[0].channels == 1


def test_infopro_refuses_what_it_cannot_use() -> None:
    h, x, y = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 8, 8), torch.tensor([0, 0, 1, 1])
    ready = InfoPro(form="contrast").for_module((3, 4, 4), 2)
    with pytest.raises(ValueError, match=r"objective\.local\(h, y, x\)"):
        ready(h, y)
    with pytest.raises(ValueError, match="no same-class pair"):
        ready.local(h, torch.arange(4), x)
    for wrong in (x[:, :1], x.flatten(1)):
        with pytest.raises(ValueError, match=r"x has shape .*not stored features"):
            ready.local(h, y, wrong)
    with pytest.raises(ValueError, match="no networks yet"):
        InfoPro().local(h, y, x)
    with pytest.raises(ValueError, match=r"output \(C, H, W\) or the tokens .*, not \(7,\)"):
        InfoPro().for_module((7,), 2)
    with pytest.raises(ValueError, match="form='triplet'"):
        InfoPro(form="triplet")
    for pair in ((0.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="reconstruction="):
            InfoPro(*pair)
    for scale in ({"mean": [0.5]}, {"mean": [0.5], "std": [1.0]}):
        with pytest.raises(ValueError, match="one number for each of the 3 channels"):
            InfoPro(**scale)
    with pytest.raises(ValueError, match="reconstruction=-1"):
        infopro((1, 1), (-1, 1))
    with pytest.raises(ValueError, match="InfoPro needs images"):
        infopro().stages(partition(networks.mlp([4, 3, 2]), 2), torch.zeros(2, 4))


# --- transport ------------------------------------------------------------------------------------


class Residual(nn.Module):
    """The least residual block: u + A u."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(4, 4, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.branch(u)


def smoothed(logits: Array, y: NDArray[np.int64]) -> float:
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = 0.9 * np.eye(logits.shape[1])[y] + 0.1 / logits.shape[1]
    return float(-(target * logs).sum(1).mean())


@pytest.mark.parametrize("in_turn", [False, True])
def test_transport_is_its_formula(in_turn: bool) -> None:
    torch.manual_seed(0)
    layers = Residual(), Residual(), nn.Tanh(), Residual(), nn.Linear(4, 3, bias=False)
    net = partition(nn.Sequential(*layers), ["2"]).double()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)), rng.integers(0, 3, 7)
    method = TransportRegularised(tau=0.3, network="linear", in_turn=in_turn)
    stages = method.stages(net, torch.tensor(x))
    a, b, c, out = (p.detach().numpy().copy() for p in net.parameters())
    objective = stages[0].objectives[0].double()
    w, bias = (p.detach().numpy().copy() for p in objective.parameters())

    r1, h1 = x @ a.T, x + x @ a.T
    r2, h2 = h1 @ b.T, h1 + h1 @ b.T
    first = smoothed(h2 @ w.T + bias, y) + ((r1**2).mean() + (r2**2).mean()) / (2 * 0.3)
    losses = stages[0].step(torch.tensor(x), torch.tensor(y))
    assert losses[0].item() == pytest.approx(first, rel=1e-10)
    if in_turn:  # the second stage begins from what the first has made
        a, b = (p.detach().numpy() for p in net[0].parameters())
        h2 = (x + x @ a.T) + (x + x @ a.T) @ b.T
        losses = stages[1].step(torch.tensor(x), torch.tensor(y))
    r3 = np.tanh(h2) @ c.T
    last = smoothed((np.tanh(h2) + r3) @ out.T, y) + (r3**2).mean() / (2 * 0.3)
    assert losses[-1].item() == pytest.approx(last, rel=1e-10)


def test_gradient_of_the_movement_reaches_the_branch_alone() -> None:
    """One step of gradient descent against the derivative by hand, without a classifier's part."""
    net = partition(nn.Sequential(Residual(), nn.Linear(4, 2)), 2)
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1])
    before = net[0][0].branch.weight.detach().clone()
    silent = nn.Linear(4, 2)
    nn.init.zeros_(silent.weight)  # its logits do not depend on h
    method = TransportRegularised(0.5, silent, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    method.stages(net, x)[0].step(x, y)
    by_hand = before - 0.1 * (x @ before.T).T @ x * (2 / x.numel()) / (2 * 0.5)
    torch.testing.assert_close(net[0][0].branch.weight.detach(), by_hand)


def test_torchvision_blocks_are_watched_at_their_last_norm() -> None:
    for name, norm in (("resnet18", "bn2"), ("resnet50", "bn3")):
        net = getattr(torchvision.models, name)(num_classes=4)
        groups = net.layer1, net.layer2, net.layer3, net.layer4
        expected = [getattr(block, norm) for group in groups for block in group]
        assert residual_branches(net) == expected


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in net.modules())


def test_hooks_and_graphs_are_gone_after_a_step() -> None:
    net = partition(resnet((4, 8), 1, channels=1, size=8, kernel="relu"), 3)
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    (stage,) = transport().stages(net, x)
    assert hooks(net) == 0
    with SavedBytes() as memory:
        stage.step(x, y)
        assert memory.now == 0
        with pytest.raises(ValueError, match="y holds labels from 100"):
            stage.step(x, y + 100)
    assert hooks(net) == 0
    assert all(not o.movements for o in stage.objectives)  # type: ignore[union-attr]
    with SavedBytes() as memory:
        net.train()(x)  # runs outside a step are not watched
        assert memory.now == 0
    assert all(not o.movements for o in stage.objectives)  # type: ignore[union-attr]


def test_a_failed_forward_pass_leaves_no_movement_behind() -> None:
    net = partition(nn.Sequential(Residual(), nn.Linear(4, 2)), 2)
    x, y = torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    (stage,) = TransportRegularised(network="linear").stages(net, x)
    broken = nn.Sequential(net[0], nn.Linear(3, 4))
    stage.modules[0] = broken
    with pytest.raises(RuntimeError):
        stage.step(x, y)
    assert (hooks(net), stage.objectives[0].movements) == (0, [])


def test_transport_refuses_what_it_cannot_use() -> None:
    for tau in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="tau="):
            transport(tau)
    with pytest.raises(ValueError, match=r"smoothing=1\.0"):
        TransportRegularised(smoothing=1.0)
    with pytest.raises(ValueError, match="no module has a residual block"):
        transport().stages(partition(networks.mlp([4, 3, 2]), 2), torch.zeros(2, 4))


# --- the residual network -------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 3])
def test_resnet_has_the_published_depth_and_blocks(blocks: int) -> None:
    net = resnet(blocks=blocks, seed=0).eval()
    counted = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(counted) == 6 * blocks + 2
    assert list(dict(net.named_children())) == [
        "stem",
        *(f"block{k}" for k in range(1, 3 * blocks + 1)),
        "features",
        "head",
    ]
    x = torch.randn(2, 3, 32, 32)
    units = [m for m in net if isinstance(m, ResidualUnit)]
    published = net.stem(x).relu()  # as He et al. write it: y = ReLU(shortcut + branch)
    for unit in units:
        shortcut = published[:, :, :: unit.stride, :: unit.stride]
        empty = torch.zeros(2, unit.more, *shortcut.shape[2:])
        published = (torch.cat([shortcut, empty], 1) + unit.branch(published)).relu()
    ours = net[: len(units) + 1](x)
    assert ours.shape == (2, 64, 8, 8)
    torch.testing.assert_close(ours.relu(), published)
    assert (ours < 0).any()  # a module that is cut off here ends before the nonlinearity
    after = resnet(blocks=blocks, boundary="after", seed=0).eval()
    torch.testing.assert_close(after[: len(units) + 1](x), published)
    torch.testing.assert_close(after(x), net(x))


def test_resnet_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="blocks=0"):
        resnet(blocks=0)
    with pytest.raises(ValueError, match="channels=8: give at least the 16"):
        resnet(widths=(16, 8))
    with pytest.raises(ValueError, match="choose 'before' or 'after'"):
        resnet(boundary="inside")


# --- methods --------------------------------------------------------------------------------------


def small_cnn() -> nn.Sequential:
    return networks.cnn((4, 8), channels=1, size=8, stride=1, kernel="relu", seed=0)


NAMED: dict[str, tuple[Callable[[Dataset], Method], Callable[[], nn.Module], str]] = {
    "hsic_bottleneck": (lambda data: hsic_bottleneck(), small_cnn, "pairs"),
    "greedy_infomax": (
        lambda data: greedy_infomax(steps=1, grid=3),
        lambda: patch_cnn((8, 8), size=8, patch=4, stride=2, seed=0),
        "none",
    ),
    "infopro": (lambda d: infopro(mean=d.mean, std=d.std), small_cnn, "pairs"),
    "infopro softmax": (lambda data: infopro((1, 0), (0, 1), "softmax"), small_cnn, "classes"),
    "transport": (
        lambda data: transport(),
        lambda: resnet((4, 8), 1, channels=1, size=8, kernel="relu", seed=0),
        "classes",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_methods_train_in_isolation(name: str, digits: Dataset) -> None:
    make, network, labels = NAMED[name]
    net = partition(network(), 3)
    report = audit(make(digits), net, Loader(digits).sample(32))
    assert (report.category, report.isolated) == ("weakly modular", True)
    assert report.labels[1:] == (labels, "classes")
    history = fit(net, make(digits), digits, epochs=1, batch_size=64, progress=False)
    losses = history.final["losses"]
    assert len(losses) == 3
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("name", [name for name in NAMED if name != "infopro softmax"])
def test_named_methods_in_turn_are_modular(name: str, digits: Dataset) -> None:
    make, network, _ = NAMED[name]
    method = make(digits)
    assert isinstance(method, LocalLearning)
    method.in_turn = True
    net = partition(network(), 3)
    assert audit(method, net, Loader(digits).sample(32)).category == "modular"


def test_an_audit_sees_a_boundary_that_leaks(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Loader(digits).sample(32)
    monkeypatch.setattr(Tensor, "detach", lambda t: t)
    for name in ("hsic_bottleneck", "infopro"):
        make, network, _ = NAMED[name]
        with pytest.raises(
            RuntimeError
        ):  # the second backward pass runs into the first one's graph
            method, net = make(digits), partition(network(), 3)
            (stage,) = method.stages(net, batch[0])
            stage.step(*batch)


def test_contrast_needs_pairs_of_a_class(digits: Dataset) -> None:
    x, y = Loader(digits).sample(200)
    one_each = [int((y == c).nonzero()[0]) for c in range(10)]
    net = partition(small_cnn(), 3)
    (stage,) = infopro(mean=digits.mean, std=digits.std).stages(net, x)
    with pytest.raises(ValueError, match="no same-class pair"):
        stage.step(x[one_each], y[one_each])


class Unit(nn.Sequential):
    """A layer that stays whole when a network is cut."""


def hsic_network(sizes: tuple[int, ...]) -> ModularNetwork:
    """Linear, batch norm without scale and shift, ReLU, as Ma et al. have it; then a linear layer."""
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (before, after) in enumerate(pairwise(sizes), start=1):
        norm = nn.BatchNorm1d(after, affine=False)
        layers[f"layer{number}"] = Unit(nn.Flatten(), nn.Linear(before, after), norm, nn.ReLU())
    layers["head"] = nn.Linear(sizes[-1], 10)
    return partition(nn.Sequential(layers), len(sizes))


def test_hsic_reads_out_formatted_and_unformatted(digits: Dataset) -> None:
    """Trained without a classifier, outputs name the classes up to a permutation (Ma et al. 2020)."""
    net = hsic_network((64, 128, 128, 10))
    options = {"epochs": 12, "batch_size": 64, "augment": None, "progress": False}
    history = fit(net, hsic_bottleneck(), digits, **options)
    assert history.final["test_accuracy"] > 0.8
    x, y = Loader(digits, "test", shuffle=False).sample(200)
    unformatted = unformatted_accuracy(net[:-1], digits)
    assert unformatted > 0.7
    assert unformatted > (net[:-1](x).argmax(1) == y).float().mean() + 0.3


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 12), seed=st.integers(0, 10**6), largest=st.sampled_from([1, 3, 100]))
def test_assignment_is_the_best_there_is(size: int, seed: int, largest: int) -> None:
    counts = np.random.default_rng(seed).integers(0, largest + 1, (size, size))
    rows = _assigned(counts.tolist())
    assert sorted(rows) == list(range(size))
    best = counts[linear_sum_assignment(counts, maximize=True)].sum()
    assert counts[rows, range(size)].sum() == best


def test_unformatted_accuracy_finds_the_permutation(digits: Dataset) -> None:
    """The logits of a classifier, shuffled, read out as well as the classifier in its own order."""
    net = networks.mlp([64, 64, 10], seed=0)
    fit(net, LocalLearning(), digits, epochs=5, progress=False)
    x, y = Loader(digits, "test", shuffle=False).sample(200)
    expected = (net(x).argmax(1) == y).float().mean().item()
    assert expected > 0.5
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    head = net.head[-1]
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    assert (net(x).argmax(1) == y).float().mean() < 0.4
    assert unformatted_accuracy(net, digits) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"output has shape \(64,\)"):
        unformatted_accuracy(net[:-1], digits)


@pytest.mark.parametrize(
    "method",
    [infopro(), infopro(form="softmax"), transport(), hsic_bottleneck()],
    ids=["InfoPro", "InfoPro softmax", "TRK", "HSIC"],
)
def test_a_torchvision_network_trains_in_a_few_lines(method: Method) -> None:
    net = partition(torchvision.models.resnet18(num_classes=4), ["layer2.0", "layer4.0"])
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 0, 1, 2])
    before = [p.detach().clone() for p in net.parameters()]
    for stage in method.stages(net, x):
        stage.train()
        assert stage.step(x, y).isfinite().all()
    assert all(not torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))
