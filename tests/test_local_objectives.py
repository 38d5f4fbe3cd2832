"""Classifiers, similarities and their named methods, against the formulas in plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from modlib import methods, networks
from modlib.data import Dataset, Loader
from modlib.measure.audit import audit
from modlib.methods import E2EBP, AugLocal, Ensemble, KeepHeads, LocalLearning, Method, Stage, sgd
from modlib.methods.auglocal import chosen_layers
from modlib.network import ModularNetwork, partition
from modlib.networks.cnn import ConvUnit
from modlib.networks.residual import ResidualUnit
from modlib.objectives import (
    AuxiliaryClassifier,
    CrossEntropy,
    MonoForward,
    Objective,
    PredSim,
    SimilarityMatching,
    SupCon,
)
from modlib.training import evaluate, fit

Array = NDArray[np.float64]
LABELS = np.array([0, 2, 1, 1, 3, 0, 4])
CLASSES = 5
SHAPES = {"map": (5, 6, 4), "colours": (3, 6, 4), "row": (5, 1, 7), "vector": (9,)}


def outputs(shape: tuple[int, ...], n: int = len(LABELS), seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(n, *shape))


def weights(module: nn.Module) -> list[Array]:
    return [p.detach().double().numpy() for p in module.parameters()]


def value(objective: Objective, h: Array) -> float:
    return float(objective(torch.tensor(h).float(), torch.tensor(LABELS)).item())


def jittered(objective: Objective, seed: int = 0) -> Objective:
    """With weights that are nowhere zero or one, so that each counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return objective


# --- the formulas ---------------------------------------------------------------------------------


def cross_entropy(z: Array, y: Array) -> float:
    z = z - z.max(1, keepdims=True)
    return float((np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]).mean())


def similarities(x: Array) -> Array:
    if x.ndim == 4 and x.shape[1] > 3 and x.shape[2] > 1:
        x = x.reshape(*x.shape[:2], -1).std(2, ddof=1)
    x = x.reshape(len(x), -1)
    x = x - x.mean(1, keepdims=True)
    x = x / (1e-8 + np.sqrt((x**2).sum(1, keepdims=True)))
    return np.clip(x @ x.T, -1, 1)


def similarity_matching(z: Array) -> float:
    return float(((similarities(z) - similarities(np.eye(CLASSES)[LABELS])) ** 2).mean())


def convolved(h: Array, weight: Array) -> Array:
    """A 3×3 convolution of maps with zeros around them."""
    _, _, height, width = h.shape
    padded = np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1)))
    shifts = [(i, j) for i in range(3) for j in range(3)]
    return sum(
        np.einsum("ncij,oc->noij", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j])
        for i, j in shifts
    )


def normalised(u: Array, scale: Array, shift: Array) -> Array:
    """Batch norm of maps, in training."""
    variance = u.var((0, 2, 3), keepdims=True)
    u = (u - u.mean((0, 2, 3), keepdims=True)) / np.sqrt(variance + 1e-5)
    return u * scale[:, None, None] + shift[:, None, None]


def quartered(h: Array) -> Array:
    """Average over the four quadrants of maps with even sides."""
    n, c, height, width = h.shape
    return h.reshape(n, c, 2, height // 2, 2, width // 2).mean((3, 5))


def projected(h: Array, weight: Array) -> Array:
    return convolved(h, weight) if h.ndim == 4 else h @ weight.T


@pytest.mark.parametrize("shape", SHAPES)
def test_similarity_matching_is_its_formula(shape: str) -> None:
    """METHODS 1.5; few channels and single rows are flattened, the labels are centred too."""
    h = outputs(SHAPES[shape])
    expected = similarity_matching(h)
    assert value(SimilarityMatching(CLASSES), h) == pytest.approx(expected, rel=1e-5)
    ready = SimilarityMatching().for_module(SHAPES[shape], CLASSES)
    assert value(ready, h) == pytest.approx(expected, rel=1e-5)
    assert not list(ready.parameters())


def test_classes_should_correlate_by_minus_one_over_their_number_less_one() -> None:
    eye = torch.eye(CLASSES)[torch.tensor(LABELS)]
    assert value(SimilarityMatching(CLASSES), eye.numpy()) == pytest.approx(0, abs=1e-12)
    target = similarities(np.eye(CLASSES)[LABELS])
    assert target[0, 1] == pytest.approx(-1 / (CLASSES - 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_learned_projections_are_compared_instead(shape: str) -> None:
    objective = SimilarityMatching(projection="learned").for_module(SHAPES[shape], CLASSES)
    (weight,) = weights(objective)
    h = outputs(SHAPES[shape])
    expected = similarity_matching(projected(h, weight))
    assert value(objective, h) == pytest.approx(expected, rel=1e-5)
    objective(torch.tensor(h).float(), torch.tensor(LABELS)).backward()
    assert all(p.grad is not None for p in objective.parameters())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [0.99, 0.3])
def test_predsim_is_its_formula(shape: str, beta: float) -> None:
    objective = PredSim(beta=beta).for_module(SHAPES[shape], CLASSES)
    jittered(objective)
    decoder, bias = weights(objective.pred)
    (weight,) = weights(objective.sim)
    h = outputs(SHAPES[shape])
    pred = cross_entropy(h.reshape(len(h), -1) @ decoder.T + bias, LABELS)
    expected = (1 - beta) * pred + beta * similarity_matching(projected(h, weight))
    assert value(objective, h) == pytest.approx(expected, rel=1e-5)
    logits = objective.logits(torch.tensor(h).float()).detach().numpy()
    np.testing.assert_allclose(logits, h.reshape(len(h), -1) @ decoder.T + bias, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_mono_forward_is_its_formula(shape: str) -> None:
    """G = h Mᵀ, then cross-entropy: arXiv 2501.09238."""
    objective = MonoForward().for_module(SHAPES[shape], CLASSES)
    (matrix,) = weights(objective)
    h = outputs(SHAPES[shape])
    goodness = h.reshape(len(h), -1) @ matrix.T
    assert matrix.shape == (CLASSES, math.prod(SHAPES[shape]))
    assert value(objective, h) == pytest.approx(cross_entropy(goodness, LABELS), rel=1e-5)
    logits = objective.logits(torch.tensor(h).float()).detach().numpy()
    np.testing.assert_allclose(logits, goodness, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_greedy_heads_are_their_formula(k: int) -> None:
    """METHODS 1.3: k - 1 blocks, pool to 2×2, batch norm after the pool, linear."""
    objective = jittered(AuxiliaryClassifier(f"greedy-{k}").for_module((4, 6, 8), CLASSES))
    u = h = outputs((4, 6, 8))
    given = weights(objective)
    assert len(given) == 3 * (k - 1) + 4
    for block in range(k - 1):
        weight, scale, shift = given[3 * block : 3 * block + 3]
        u = np.maximum(normalised(convolved(u, weight), scale, shift), 0)
    scale, shift, linear, bias = given[-4:]
    logits = normalised(quartered(u), scale, shift).reshape(len(h), -1) @ linear.T + bias
    assert value(objective, h) == pytest.approx(cross_entropy(logits, LABELS), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((64, 16, 16), (4, 2)),  # 16384 → h: 8192 → w: 4096 → h: 2048
        ((2048, 1, 1), (1, 1)),
        ((2049, 1, 1), (1, 1)),  # the channels cannot be pooled
        ((32, 9, 8), (2, 1)),  # 9 rows make 5, the last of one row
        ((1024, 3, 3), (3, 2)),  # 5 × 3 would not fit; one row of two
        ((128, 4, 4), (1, 1)),
    ],
)
def test_pred_pools_by_turns_until_2048_are_left(
    shape: tuple[int, int, int], window: tuple[int, int]
) -> None:
    objective = jittered(AuxiliaryClassifier("pred").for_module(shape, CLASSES))
    h = outputs(shape)
    (kh, kw), (n, c, height, width) = window, h.shape
    rows, columns = range(0, height, kh), range(0, width, kw)
    pooled = np.array(
        [[h[:, :, i : i + kh, j : j + kw].mean((2, 3)) for j in columns] for i in rows]
    )
    flat = pooled.transpose(2, 3, 0, 1).reshape(n, -1)
    decoder, bias = weights(objective)
    assert decoder.shape[1] == c * len(rows) * len(columns)
    expected = cross_entropy(flat @ decoder.T + bias, LABELS)
    assert value(objective, h) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_pred_starts_from_zero(shape: str) -> None:
    for objective in (AuxiliaryClassifier("pred"), PredSim()):
        ready = objective.for_module(SHAPES[shape], CLASSES)
        pred = ready.pred if isinstance(ready, PredSim) else ready
        assert all(not p.any() for p in pred.parameters())
        assert value(pred, outputs(SHAPES[shape])) == pytest.approx(math.log(CLASSES))


def test_pred_of_wide_vectors_is_not_pooled() -> None:
    objective = AuxiliaryClassifier("pred").for_module((3000,), CLASSES)
    assert weights(objective)[0].shape == (CLASSES, 3000)


def gradient_of(objective: Objective, h: Array) -> bool:
    inputs = torch.tensor(h, requires_grad=True)
    y = torch.tensor(LABELS)
    return torch.autograd.gradcheck(lambda h: objective.double()(h, y), (inputs,))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_finite_differences(shape: str) -> None:
    h = outputs(SHAPES[shape])
    for objective in (SimilarityMatching(), PredSim(), MonoForward(), AuxiliaryClassifier("pred")):
        assert gradient_of(jittered(objective.for_module(SHAPES[shape], CLASSES)), h)


@pytest.mark.parametrize("make", [SimilarityMatching, PredSim])
def test_constant_outputs_have_finite_gradients(make: type[Objective]) -> None:
    """A standard deviation of 0 has no slope, and a norm of 0 none either."""
    for shape in SHAPES.values():
        h = torch.zeros(len(LABELS), *shape)
        h[1:] += torch.randn(len(LABELS) - 1, *shape, generator=torch.Generator().manual_seed(0))
        h.requires_grad_()
        make().for_module(shape, CLASSES)(h, torch.tensor(LABELS)).backward()
        assert h.grad is not None
        assert h.grad.isfinite().all()


@pytest.mark.parametrize("shape", ["map", "vector"])
def test_similarities_are_computed_in_single_precision(shape: str) -> None:
    h = torch.tensor(outputs(SHAPES[shape])).bfloat16()
    objective = SimilarityMatching(CLASSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(h, torch.tensor(LABELS))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(similarity_matching(h.double().numpy()), rel=1e-5)


# --- classifiers that stay as they are ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "linear", "mlp-sr", "own"])
@pytest.mark.parametrize("optimizer", [sgd(0.1), partial(torch.optim.AdamW, lr=1e-2)])
def test_fixed_classifiers_stay_and_their_modules_learn(
    kind: str, optimizer: Callable[..., torch.optim.Optimizer], digits: Dataset
) -> None:
    own = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    own(torch.zeros(1, 4, 8, 8))
    network: str | nn.Module = own if kind == "own" else kind
    net = partition(conv_net(), ["conv3"])
    method = KeepHeads(
        LocalLearning(AuxiliaryClassifier(network, trainable=False), optimizer=optimizer)
    )
    before: list[Tensor] = []

    def look(net: nn.Module, row: dict[str, object]) -> None:
        before[:] = before or [p.clone() for p in method.heads[0].parameters()]

    first = [p.clone() for p in net[0].parameters()]
    history = fit(net, method, digits, epochs=2, progress=False, after_epoch=look)
    for old, new in zip(before, method.heads[0].parameters(), strict=True):
        assert torch.equal(old, new)
    assert before
    assert all(not torch.equal(a, b) for a, b in zip(first, net[0].parameters(), strict=True))
    losses = [row["losses"][0] for row in history.rows]
    assert losses[1] < losses[0]


def test_fixed_weights_are_as_they_were_drawn() -> None:
    """From before the first step, too: the same seed draws the same weights, trained or not."""
    heads = []
    for trainable in (False, True):
        torch.manual_seed(0)
        heads.append(AuxiliaryClassifier("flat", trainable).for_module((9,), CLASSES))
    module = nn.Linear(4, 9)
    parameters = [*module.parameters(), *heads[0].parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        heads[0](module(torch.randn(7, 4)), torch.tensor(LABELS)).backward()
        optimizer.step()
    assert torch.equal(*(next(head.parameters()) for head in heads))
    assert "trainable=False" in repr(heads[0])  # a checkpoint tells the two apart


# --- named methods --------------------------------------------------------------------------------


def conv_net() -> nn.Module:
    return networks.cnn((4, 8), 10, channels=1, size=8, stride=1, kernel="relu", seed=0)


METHODS: dict[str, Callable[[], Method]] = {
    "layerwise_greedy": methods.layerwise_greedy,
    "layerwise_greedy 2": partial(methods.layerwise_greedy, 2),
    "layerwise_greedy 3": partial(methods.layerwise_greedy, 3),
    "decoupled_greedy": methods.decoupled_greedy,
    "decoupled_greedy cnn": partial(methods.decoupled_greedy, "cnn"),
    "pred": partial(methods.local_error_signals, "pred"),
    "sim": partial(methods.local_error_signals, "sim"),
    "predsim": methods.local_error_signals,
    "mono_forward": methods.mono_forward,
    "cascade": methods.cascade,
    "random_classifiers": methods.random_classifiers,
    "AugLocal": AugLocal,
}
IN_TURN = ("layerwise", "cascade")


@pytest.mark.parametrize("name", METHODS)
def test_named_methods_train_modules_apart(name: str, digits: Dataset) -> None:
    net = partition(conv_net(), ["conv3", "features"])
    history = fit(net, METHODS[name](), digits, epochs=1, progress=False)
    in_turn = name.startswith(IN_TURN)
    assert len(history.rows) == (3 if in_turn else 1)
    assert np.isfinite([row["losses"] for row in history.rows]).all()
    seen = audit(METHODS[name](), net, Loader(digits).sample(64))
    assert seen.isolated
    assert seen.category == ("modular" if in_turn else "weakly modular")


@pytest.mark.parametrize("name", ["pred", "predsim"])
def test_what_a_decoder_of_zeros_needs_is_seen(name: str, digits: Dataset) -> None:
    """It sends nothing back in its first step: the audit watches the second."""
    net = partition(conv_net(), ["conv3", "features"])
    seen = audit(METHODS[name](), net, Loader(digits).sample(64))
    assert (seen.category, seen.labels) == ("weakly modular", ("classes",) * 3)


@pytest.mark.parametrize("name", ["pred", "sim", "predsim", "mono_forward", "random_classifiers"])
def test_named_methods_train_vectors(name: str, digits: Dataset) -> None:
    net = networks.mlp([64, 24, 24, 10], activation=nn.ReLU, boundary="after", seed=0)
    history = fit(partition(net, 3), METHODS[name](), digits, epochs=3, progress=False)
    assert np.isfinite([row["losses"] for row in history.rows]).all()
    assert history.rows[-1]["losses"][1] < history.rows[0]["losses"][1]


@pytest.mark.parametrize("name", METHODS)
def test_a_resnet_of_torchvision_takes_a_step(name: str) -> None:
    resnet = torchvision.models.resnet18(num_classes=10)
    net = partition(resnet, ["layer2.0", "layer4.0"])
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 9])
    first = [next(module.parameters()).clone() for module in net]
    for stage in METHODS[name]().stages(net, x):
        stage.train()
        stage.step(x, y)
        assert stage.step(x, y).isfinite().all()  # "pred" starts from zero: two steps reach h
    assert all(not torch.equal(a, next(m.parameters())) for a, m in zip(first, net, strict=True))


def test_settings_are_the_published_ones() -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    method = methods.local_error_signals()
    assert callable(method.optimizer)
    adam = method.optimizer(parameters)
    assert isinstance(adam, torch.optim.Adam)
    assert (adam.defaults["lr"], adam.defaults["weight_decay"]) == (5e-4, 0)
    assert isinstance(method.objective, PredSim)
    assert method.objective.beta == 0.99
    assert isinstance(method.output, CrossEntropy)  # without the factor (1 - β)
    own = methods.local_error_signals("sim", optimizer=sgd(0.3))
    assert callable(own.optimizer)
    assert own.optimizer(parameters).defaults["lr"] == 0.3


# --- AugLocal -------------------------------------------------------------------------------------


def test_layers_are_chosen_as_in_the_paper() -> None:
    """METHODS 1.13: depths [3 × 7, 2 × 8] of 16 layers; the last layer is always the last chosen."""
    chosen = [chosen_layers(layer, 16, 3) for layer in range(15)]
    assert [len(c) for c in chosen] == [3] * 7 + [2] * 7 + [1]  # one layer follows layer 14
    assert all(layer < c[0] and c[-1] == 15 for layer, c in enumerate(chosen))
    assert all(len(set(c)) == len(c) for c in chosen)
    assert chosen[0] == [5, 10, 15]
    assert chosen[7] == [11, 15]
    assert [len(chosen_layers(layer, 16, 3, shrink=0.0)) for layer in range(13)] == [3] * 13
    assert chosen_layers(0, 2, 9) == [1]
    assert chosen_layers(1, 2, 9) == []


def test_a_resnet_32_has_the_published_number_of_parameters() -> None:
    """2.42 million with its classifiers, at d = 3."""
    blocks, width = [], 16
    for channels in [16] * 5 + [32] * 5 + [64] * 5:
        down = None
        if channels != width:
            down = nn.Sequential(
                nn.Conv2d(width, channels, 1, 2, bias=False), nn.BatchNorm2d(channels)
            )
        blocks.append(BasicBlock(width, channels, 1 if down is None else 2, down))
        width = channels
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    net = partition(nn.Sequential(*stem, *blocks, *end), [str(k) for k in range(3, 18)])
    heads = AugLocal(depth=3).objectives(net, torch.zeros(1, 3, 32, 32))
    count = sum(p.numel() for owner in (net, *heads) for p in owner.parameters())
    assert round(count / 1e6, 2) == 2.42


def classifier(objective: Objective) -> nn.Sequential:
    assert isinstance(objective, AuxiliaryClassifier)
    assert isinstance(objective.network, nn.Sequential)
    return objective.network


def seen_shapes(network: nn.Sequential, h: Tensor) -> list[tuple[int, ...]]:
    shapes = []
    for layer in network:
        h = layer(h)
        shapes.append(tuple(h.shape[1:]))
    return shapes


def test_copies_give_what_the_layers_give() -> None:
    net = networks.cnn((4, 6, 8), 10, channels=1, size=28, stride=1, kernel="relu", seed=0)
    parts = partition(net, ["conv2", "conv4", "features"])
    *heads, output = AugLocal(depth=3).objectives(parts, torch.zeros(2, 1, 28, 28))
    assert isinstance(output, CrossEntropy)
    networks_ = [classifier(head) for head in heads]
    # Module 0 ends with layer 0 of 6, module 1 with layer 2, module 2 with layer 5.
    assert [chosen_layers(layer, 6, 3) for layer in (0, 2, 5)] == [[2, 3, 5], [4, 5], []]
    shapes = seen_shapes(networks_[0], torch.randn(2, 4, 28, 28))
    assert shapes == [(6, 14, 14), (6, 14, 14), (8, 7, 7), (8, 7, 7), (8, 1, 1), (8,), (10,)]
    kinds = [[type(layer) for layer in network] for network in networks_]
    end = [nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert kinds == [[ConvUnit] * 3 + end, [ConvUnit] * 2 + end, end]
    strides = [m.stride for m in networks_[0].modules() if isinstance(m, nn.Conv2d)]
    assert strides == [(2, 2), (1, 1), (2, 2)]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_residual_blocks_are_rebuilt_for_what_they_get(
    block: type[BasicBlock] | type[Bottleneck],
) -> None:
    resnet = torchvision.models.ResNet(block, [2, 2, 2, 2], num_classes=10)
    net = partition(resnet, ["layer1.0", "layer2.0", "layer4.1"])
    x = torch.randn(2, 3, 64, 64)
    heads = AugLocal(depth=2).objectives(net, x)[:-1]
    e = block.expansion
    for head, h, expected in zip(
        heads,
        net.outputs(x),
        [
            [(128 * e, 8, 8), (512 * e, 2, 2)],  # after the stem: layers 4 and 8 of 9
            [(256 * e, 4, 4), (512 * e, 2, 2)],  # after layer 2: layers 5 and 8
            [(512 * e, 2, 2)],  # after layer 7: layer 8
        ],
        strict=False,
    ):
        copies = classifier(head)[: len(expected)]
        assert all(isinstance(copy, block) for copy in copies)
        assert seen_shapes(copies, h) == expected
    last = classifier(heads[2])[0]
    assert last.downsample is None  # what it gets has the shape of what it gives
    assert classifier(heads[0])[0].downsample is not None


@pytest.mark.parametrize("boundary", ["before", "after"])
def test_the_books_residual_units_are_rebuilt_too(boundary: str) -> None:
    """Block 3 in the place of blocks 1 to 3."""
    net = networks.resnet((4, 6, 8), 1, channels=1, size=28, boundary=boundary)
    head = AugLocal(depth=1).objectives(partition(net, ["block1"]), torch.zeros(1, 1, 28, 28))[0]
    copies = classifier(head)[:1]
    assert isinstance(copies[0], ResidualUnit) and copies[0].boundary == boundary
    assert seen_shapes(copies, torch.randn(2, 4, 28, 28)) == [(8, 7, 7)]


def test_copies_are_fresh_and_belong_to_their_module() -> None:
    net = partition(conv_net(), ["conv2", "features"])
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(7.0)
                assert module.running_mean is not None
                module.running_mean.fill_(7.0)
    heads = AugLocal(depth=3).objectives(net, torch.zeros(1, 1, 8, 8))[:-1]
    theirs = {id(p) for p in net.parameters()}
    drawn = [p for head in heads for p in head.parameters()]
    assert len({id(p) for p in drawn} - theirs) == len(drawn)
    norms = [m for h in heads for m in h.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all((norm.weight == 1).all() for norm in norms)
    assert not any(norm.running_mean.any() for norm in norms)
    again = AugLocal(depth=3).objectives(net, torch.zeros(1, 1, 8, 8))
    convolutions = [
        next(m for m in h.modules() if isinstance(m, nn.Conv2d)) for h in (heads[0], again[0])
    ]
    assert not torch.equal(convolutions[0].weight, convolutions[1].weight)
    originals = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    copies = [m.weight for m in classifier(heads[0]).modules() if isinstance(m, nn.Conv2d)]
    assert not any(torch.equal(a, b) for a in originals for b in copies if a.shape == b.shape)


def test_auglocal_refuses_what_it_cannot_copy(digits: Dataset) -> None:
    x = torch.zeros(1, 1, 8, 8)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten()]
    plain = partition(nn.Sequential(*layers, nn.Linear(256, 10)), ["2"])
    with pytest.raises(ValueError, match="cannot copy layer '2', a Conv2d; it can copy"):
        AugLocal().stages(plain, x)
    dense = partition(networks.mlp([64, 8, 10]), 2)
    with pytest.raises(
        ValueError, match=r"end with maps .* or tokens \(T, d\), but one ends with shape \(8,\)"
    ):
        AugLocal().stages(dense, x)
    shrunk = [
        ConvUnit(1, 4, 1, first=True),
        nn.Upsample(scale_factor=0.75),
        ConvUnit(4, 4, 1, False),
    ]
    grown = [ConvUnit(1, 4, 1, first=True), nn.Upsample(scale_factor=2), ConvUnit(4, 4, 1, False)]
    for odd, own in ((shrunk, "6×6"), (grown, "16×16")):
        net = partition(nn.Sequential(*odd, nn.AdaptiveAvgPool2d(1), nn.Flatten()), ["1"])
        with pytest.raises(
            ValueError, match=f"no stride that takes maps of 8×8 to the {own} of layer"
        ):
            AugLocal().stages(net, x)
    for options, message in (({"depth": 0}, "depth=0"), ({"shrink": 1.5}, "shrink=1.5")):
        with pytest.raises(ValueError, match=message):
            AugLocal(**options)


# --- the ensemble of heads ------------------------------------------------------------------------


def test_the_ensemble_is_the_weighted_mean_of_all_logits(digits: Dataset) -> None:
    """METHODS 1.3: weights 2^n / Σ 2^n."""
    net = partition(conv_net(), ["conv2", "conv3", "features"])
    method = KeepHeads(methods.layerwise_greedy())
    fit(net, method, digits, epochs=4, batch_size=32, progress=False)
    ensemble = method.ensemble(net)
    x = Loader(digits).sample(32)[0]
    heads = [head.eval() for head in method.heads]
    h, votes = x, []
    with torch.no_grad():
        for module, head in zip(net, heads, strict=True):
            h = module(h)
            votes.append(head.logits(h) if isinstance(head, AuxiliaryClassifier) else h)
    expected = (votes[0] + 2 * votes[1] + 4 * votes[2] + 8 * votes[3]) / 15
    torch.testing.assert_close(ensemble(x), expected)
    equal = Ensemble(net, heads, weights=[3, 3, 3, 3])
    torch.testing.assert_close(equal(x), sum(votes) / 4)
    assert evaluate(ensemble, digits).accuracy > 0.5
    assert not ensemble.training


@pytest.mark.parametrize("name", ["layerwise_greedy", "decoupled_greedy", "predsim", "AugLocal"])
def test_keeping_heads_changes_nothing(name: str, digits: Dataset) -> None:
    runs = []
    for keep in (False, True):
        net = partition(conv_net(), ["conv3", "features"])
        method = KeepHeads(METHODS[name]()) if keep else METHODS[name]()
        runs.append((fit(net, method, digits, epochs=1, progress=False), net.state_dict()))
    assert runs[0][0] == runs[1][0]
    for name_, tensor in runs[0][1].items():
        assert torch.equal(tensor, runs[1][1][name_])
    seen = [audit(m, net, Loader(digits).sample(64)) for m in (method, method.method)]
    assert seen[0].summary() == seen[1].summary()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["decoupled_greedy", "layerwise_greedy"])
def test_a_resumed_run_says_which_heads_it_lost(name: str, digits: Dataset, tmp_path: Path) -> None:
    """A checkpoint holds the heads of its own stage; a run of one stage loses none."""

    def run(interrupt: bool) -> tuple[KeepHeads, ModularNetwork]:
        def stop(net: nn.Module, row: dict[str, object]) -> None:
            if interrupt and (row["stage"], row["epoch"]) == (last, 1):
                raise Interrupted

        net = partition(conv_net(), ["conv3", "features"])
        method = KeepHeads(METHODS[name]())
        options = {"epochs": 2, "checkpoint": tmp_path / "run.pt", "resume": not interrupt}
        fit(net, method, digits, progress=False, after_epoch=stop, **options)
        return method, net

    last = 1 if name == "layerwise_greedy" else 0
    with pytest.raises(Interrupted):
        run(interrupt=True)
    method, net = run(interrupt=False)
    if last == 0:
        method, net = run(interrupt=False)  # nothing is left to train: all is restored
        assert evaluate(method.ensemble(net), digits).n == 200
        return
    with pytest.raises(ValueError, match="the heads of 0 have not been trained by it"):
        method.ensemble(net)


def test_ensembles_that_cannot_be_are_refused(digits: Dataset) -> None:
    net = partition(conv_net(), ["conv3", "features"])
    with pytest.raises(ValueError, match="the heads of any module have not been trained"):
        KeepHeads(methods.cascade()).ensemble(net)
    with pytest.raises(TypeError, match="is no Method; give one"):
        KeepHeads(LocalLearning)  # type: ignore[arg-type]
    head = MonoForward()
    for heads, message in (
        ([head, head], "2 and 3 given for 3 modules"),
        ([head, SupCon(), CrossEntropy()], "module 1 is a SupCon, which has no logits"),
    ):
        with pytest.raises(ValueError, match=message):
            Ensemble(net, heads)
    with pytest.raises(ValueError, match=r"weights=.*give numbers above 0"):
        Ensemble(net, [head, head, head], weights=[1, 0, 1])
    whole = KeepHeads(E2EBP())
    fit(net, whole, digits, epochs=1, progress=False)
    with pytest.raises(ValueError, match="1 and 3 given for 3 modules"):
        whole.ensemble(net)


# --- what is refused ------------------------------------------------------------------------------

READY: dict[str, Objective] = {
    "sim": SimilarityMatching(CLASSES),
    "sim learned": SimilarityMatching(projection="learned").for_module((9,), CLASSES),
    "predsim": PredSim().for_module((9,), CLASSES),
    "pred": AuxiliaryClassifier("pred").for_module((9,), CLASSES),
    "flat": AuxiliaryClassifier("flat", trainable=False).for_module((9,), CLASSES),
    "linear": AuxiliaryClassifier("linear").for_module((9,), CLASSES),
    "mono-forward": MonoForward().for_module((9,), CLASSES),
}


@pytest.mark.parametrize("name", READY)
def test_labels_that_do_not_fit_are_refused(name: str) -> None:
    h = torch.randn(4, 9)
    for y in (torch.zeros(5).long(), torch.zeros(3).long(), torch.zeros(4, 1).long()):
        with pytest.raises(ValueError, match="y must hold one label for each of the 4 outputs"):
            READY[name](h, y)
    for label in (CLASSES, -1):
        with pytest.raises(ValueError, match=f"y holds labels from .*there are {CLASSES} classes"):
            READY[name](h, torch.tensor([0, 1, label, 2]))
    for dtype in (torch.int32, torch.float32, torch.bool):
        with pytest.raises(ValueError, match="labels are int64"):
            READY[name](h, torch.zeros(4, dtype=dtype))
    with pytest.raises(ValueError, match=r"at least one\), but has shape \(0,\)"):
        READY[name](h[:0], torch.zeros(0).long())


def test_logits_are_vectors() -> None:
    for objective in (CrossEntropy(), AuxiliaryClassifier(nn.Identity())):
        with pytest.raises(ValueError, match=r"logits must be .* but have shape \(4, 3, 2, 2\)"):
            objective(torch.randn(4, 3, 2, 2), torch.zeros(4).long())


def test_a_network_of_ones_own_that_is_not_trained_stays_as_it_is() -> None:
    head = nn.Linear(6, 3)
    objective = AuxiliaryClassifier(head, trainable=False)
    h = torch.randn(8, 6, requires_grad=True)
    objective(h, torch.arange(8) % 3).backward()
    assert h.grad is not None and head.weight.grad is None


@pytest.mark.parametrize("kind", ["greedy-1", "greedy-2", "greedy-3", "cnn"])
def test_kinds_for_maps_refuse_vectors(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"network='{kind}' needs maps \(C, H, W\).*\(9,\)"):
        AuxiliaryClassifier(kind).for_module((9,), CLASSES)


def test_objectives_that_are_not_ready_say_what_they_need() -> None:
    h, y = torch.randn(4, 9), torch.arange(4)
    with pytest.raises(ValueError, match="does not know the number of classes"):
        SimilarityMatching()(h, y)
    with pytest.raises(ValueError, match="no projection yet"):
        SimilarityMatching(CLASSES, projection="learned")(h, y)
    for objective in (PredSim(CLASSES), MonoForward()):
        with pytest.raises(ValueError, match="no network yet; call"):
            objective(h, y)
    with pytest.raises(ValueError, match=r"has shape \(6, 7, 8, 9\); use projection=None"):
        SimilarityMatching(projection="learned").for_module((6, 7, 8, 9), CLASSES)


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="classes=1"):
        SimilarityMatching(1)
    with pytest.raises(ValueError, match="projection='fixed'"):
        SimilarityMatching(3, projection="fixed")
    for beta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="beta="):
            PredSim(beta=beta)
    with pytest.raises(ValueError, match="layers=4: choose 1, 2 or 3"):
        methods.layerwise_greedy(4)
    with pytest.raises(ValueError, match="loss='sims' is unknown; choose from pred, sim, predsim"):
        methods.local_error_signals("sims")
    with pytest.raises(ValueError, match="network='mpl' is unknown"):
        methods.decoupled_greedy("mpl")


def test_classes_may_be_given_or_learned_from_the_task() -> None:
    assert SimilarityMatching(7).for_module((9,), CLASSES).classes == 7
    assert SimilarityMatching().for_module((9,), CLASSES).classes == CLASSES
    stage = LocalLearning(SimilarityMatching()).stages(
        partition(networks.mlp([4, 6, 3]), 2), torch.zeros(2, 4)
    )[0]
    assert isinstance(stage, Stage)
    assert isinstance(stage.objectives[0], SimilarityMatching)
    assert stage.objectives[0].classes == 3
