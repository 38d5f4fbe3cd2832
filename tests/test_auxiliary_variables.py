"""Auxiliary variables: every block is solved, objectives fall, and what went wrong is said in one sentence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modlib
from modlib.data import Augment, Dataset, Loader
from modlib.measure.angles import angles, angles_gone
from modlib.measure.audit import audit
from modlib.methods import (
    ADMM,
    MAC,
    AlternatingMinimisation,
    BlockCoordinateDescent,
    LiftedNetwork,
    Method,
)
from modlib.methods.auxiliary_variables import CodesStage, relu_prox, solve
from modlib.methods.lifted import accelerated, fenchel
from modlib.methods.mac import minimise
from modlib.network import ModularNetwork, partition

N, CLASSES = 40, 10


def relu_net(*widths: int, seed: int = 0) -> ModularNetwork:
    net = modlib.networks.mlp([64, *(widths or (9, 8)), CLASSES], boundary="after", seed=seed)
    return partition(net, len(widths or (9, 8)) + 1)


def smooth_net(boundary: str = "before") -> ModularNetwork:
    net = modlib.networks.mlp([64, 9, 8, CLASSES], activation=nn.Tanh, boundary=boundary, seed=0)
    return partition(net, 3)


exact = {
    "BCD": (partial(BlockCoordinateDescent, alpha=0.7, gamma=0.9, rho=1.3), relu_net),
    "BCD with decay": (partial(BlockCoordinateDescent, 1.0, 2.0, 0.5, 0.01), relu_net),
    "ADMM": (partial(ADMM, warm_start=2), relu_net),
    "ADMM coupled": (partial(ADMM, warm_start=1, coupled=True), relu_net),
    "MAC": (partial(MAC, inner=2000), smooth_net),
    "MAC, nonlinear modules": (
        partial(MAC, inner=2000, weight_decay=0.01),
        partial(smooth_net, "after"),
    ),
    "lifted": (partial(LiftedNetwork, inner=3000, alpha=0.5), relu_net),
}
EXACT = pytest.mark.parametrize("name", exact)
FULL_BATCH: dict[str, tuple[Callable[[], Method], Callable[[], ModularNetwork]]] = {
    "BCD": (BlockCoordinateDescent, relu_net),
    "ADMM": (partial(ADMM, warm_start=1), relu_net),
    "MAC": (MAC, smooth_net),
    "lifted": (LiftedNetwork, relu_net),
}


@pytest.fixture
def images(digits: Dataset) -> tuple[Tensor, Tensor]:
    x, y = Loader(digits).sample(N)
    return x.double(), y


def staged(name: str, images: tuple[Tensor, Tensor]) -> CodesStage:
    make_method, make_net = exact[name]
    net = make_net().double()
    (stage,) = make_method().stages(net, images[0])
    assert isinstance(stage, CodesStage)
    return stage


# --- sub-problems ---------------------------------------------------------------------------------


def variables(stage: CodesStage, block: str) -> list[Tensor]:
    """The tensors of a block, by its name."""
    if block == "z":
        return stage.codes["z"]
    kind, number = block[0], int(block[1:])
    return stage.weights[number] if kind == "W" else [stage.codes[kind][number]]


def proximal(stage: CodesStage, block: str, images: int) -> float:
    """The weight of half the squared distance from the old value, per image."""
    kind, k = type(stage).__name__, int(block[1:] or 0)
    last = k == len(stage.modules) - 1
    held = {
        "BlocksStage": block[0] == "W"
        or (block[0] == "U" and not last)
        or (block[0] == "V" and last),
        "DirectionsStage": block[0] == "W",
        "LiftedStage": block[0] == "W",
        "CoordinatesStage": False,
    }[kind]
    alpha = float(getattr(stage, "alpha", 0.0)) if held else 0.0
    return alpha if kind == "LiftedStage" else alpha / images


@EXACT
def test_every_block_is_solved_to_stationarity(name: str, images: tuple[Tensor, Tensor]) -> None:
    """The derivative of the whole objective, by autograd, at each block's solution; with kinks and bounds."""
    stage = staged(name, images)
    x, y = images
    for _ in range(3):
        stage.step(x, y)
    before = {k: copy.deepcopy(v) for k, v in (("codes", stage.codes),)}
    old_weights = [[p.detach().clone() for p in m.parameters()] for m in stage.modules]
    met = []
    for block in stage.sweep(x, y):
        if block == "lambda":
            continue
        met.append(block)
        found = variables(stage, block)
        old = (
            old_weights[int(block[1:])]
            if block[0] == "W"
            else before["codes"]["z"]
            if block == "z"
            else [before["codes"][block[0]][int(block[1:])]]
        )
        slopes = []
        for side in (-1e-9, 1e-9):  # a kink lies between two slopes
            moved = [(t + side).clone().requires_grad_() for t in found]
            put(stage, block, moved)
            with torch.enable_grad():
                terms = torch.stack(stage.terms(x, stage.one_hot(y, x))).sum() / len(x)
                near = sum(((m - o) ** 2).sum() for m, o in zip(moved, old, strict=True)) / 2
                total = terms + proximal(stage, block, len(x)) * near
            slopes.append(torch.autograd.grad(total, moved))
        put(stage, block, found)
        for value, left, right in zip(found, *slopes, strict=True):
            if type(stage).__name__ == "LiftedStage" and block[0] == "V":  # a bound at 0
                left = torch.where(value > 0, left, left.clamp(max=0))
            bad = (left - 1e-6).relu() + (-right - 1e-6).relu()
            assert float(bad.max()) == 0.0, (block, float(bad.max()))
    assert len(met) >= 4


def put(stage: CodesStage, block: str, tensors: list[Tensor]) -> None:
    if block == "z":
        stage.codes["z"] = tensors
    elif block[0] == "W":
        stage.weights[int(block[1:])] = tensors
    else:
        stage.codes[block[0]][int(block[1:])] = tensors[0]


def test_the_prox_of_a_relu_is_the_global_minimum() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 200)) * 2
    for weight in (0.1, 1.0, 7.0):
        found = relu_prox(torch.from_numpy(a), torch.from_numpy(b), weight).numpy()

        def cost(u: Any, weight: float = weight) -> Any:
            return (np.maximum(u, 0) - a) ** 2 + weight * (u - b) ** 2

        grid = np.linspace(-8, 8, 3201)[:, None]
        assert (cost(found) <= cost(grid).min(0) + 1e-12).all()
        assert (np.abs(cost(found) - cost(grid).min(0)) < 1e-3).all()


def test_a_system_that_has_no_solution_says_whose_it_is() -> None:
    right = torch.ones(2, 1)
    assert torch.allclose(
        solve(torch.tensor([[4.0, 2.0], [2.0, 3.0]]), right, "")[:, 0], torch.tensor([0.125, 0.25])
    )
    for matrix in (torch.zeros(2, 2), torch.full((2, 2), float("nan")), -torch.eye(2)):
        with pytest.raises(
            FloatingPointError, match=r"Gram matrix of the inputs of module 1 is singular.*larger"
        ):
            solve(matrix, right, "inputs of module 1")


def test_accelerated_descent_finds_a_bounded_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator).double()
    matrix = matrix @ matrix.T + torch.eye(6).double()
    aim = torch.randn(6, generator=generator).double()
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    found = accelerated(
        torch.zeros(6).double(), lambda v: v @ matrix - aim, top, 1.0, 2000, torch.relu
    )
    slope = found @ matrix - aim
    assert bool((found >= 0).all()) and bool((slope[found > 0].abs() < 1e-9).all())
    assert bool((slope[found == 0] > -1e-9).all()) and bool((found == 0).any())


def test_minimise_never_goes_up_and_finds_the_minimum() -> None:
    def bowl(tensors: list[Tensor]) -> Tensor:
        (t,) = tensors
        return (t - 3).pow(4).sum() + t.square().sum()

    (found,) = minimise([torch.zeros(2).double()], bowl, 200, 1e-12)
    at = float(found[0])
    assert abs(4 * (at - 3) ** 3 + 2 * at) < 1e-6
    start = torch.full((2,), float("nan"))
    (same,) = minimise([start], bowl, 3, 1e-9)
    assert same is not None and bool(same.isnan().all())


# --- objectives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in exact if "ADMM" not in name])
def test_no_block_raises_the_objective(name: str, images: tuple[Tensor, Tensor]) -> None:
    """Within a level of the penalty, over sweeps, after each block."""
    stage = staged(name, images)
    x, y = images
    levels: dict[float, list[float]] = {}
    for _ in range(11):
        for _ in stage.sweep(x, y):
            level = getattr(stage, "penalty", 0.0)
            levels.setdefault(level, []).append(float(stage.objective(x, y).sum()))
        stage.step(x, y)
    assert len(levels) == (3 if "MAC" in name else 1)  # 11 steps, five a level
    for values in levels.values():
        assert all(b <= a * (1 + 1e-10) for a, b in pairwise(values))
        assert values[-1] < values[0]


def test_block_coordinate_descent_falls_by_what_the_theorem_says(
    images: tuple[Tensor, Tensor],
) -> None:
    """Each block's decrease is at least its constant times the squared way that it went."""
    gamma, rho, alpha = 0.9, 1.3, 0.7
    stage = staged("BCD", images)
    x, y = images
    stage.step(x, y)
    last = len(stage.modules) - 1
    least = {"W": alpha, "U": alpha / 2, "V": gamma / 2}
    own = {f"V{last}": (1 + gamma) / 2 + alpha, f"U{last}": (gamma + rho) / 2}
    checked = 0
    for _ in range(4):
        value = float(stage.objective(x, y).sum()) * N
        codes = {name: [t.clone() for t in kind] for name, kind in stage.codes.items()}
        weights = [[p.detach().clone() for p in m.parameters()] for m in stage.modules]
        for block in stage.sweep(x, y):
            kind, k = block[0], int(block[1:])
            old = weights[k] if kind == "W" else [codes[kind][k]]
            way = sum(
                float((a - b).square().sum())
                for a, b in zip(variables(stage, block), old, strict=True)
            )
            now = float(stage.objective(x, y).sum()) * N
            assert value - now >= own.get(block, least[kind]) * way - 1e-9 * (1 + value)
            value, checked = now, checked + (way > 1e-12)
        stage.weights = []
        stage.codes = codes
        stage.step(x, y)
    assert checked > 20


def test_fenchel_is_zero_exactly_at_the_relu() -> None:
    u = torch.linspace(-3, 3, 61).double()
    for v in torch.linspace(0, 3, 31).double():
        gaps = fenchel(v.expand_as(u), u)
        assert bool((gaps >= (v - u.relu()).square() / 2 - 1e-12).all())
        assert bool(((gaps < 1e-12) == ((v - u.relu()).abs() < 1e-6)).all())


def test_admm_forgets_the_labels_once_its_multiplier_has_moved(
    images: tuple[Tensor, Tensor],
) -> None:
    """lambda = Y - z, so that the next z is (z + beta * what the layer gives) / (1 + beta), without Y."""
    x, y = images
    net = relu_net().double()
    (stage,) = ADMM(warm_start=1, beta=0.5).stages(net, x)
    assert isinstance(stage, CodesStage)
    stage.step(x, y)
    stage.step(x, y)
    hot = torch.nn.functional.one_hot(y, CLASSES).double()
    assert torch.allclose(stage.codes["lambda"][0], hot - stage.codes["z"][-1], atol=1e-12)
    other = copy.deepcopy(stage)
    stage.step(x, y)
    other.step(x, y.roll(1))
    # what differs is the multiplier's own use of labels, which the next z takes back
    assert not torch.allclose(stage.codes["z"][-1], other.codes["z"][-1])
    z = stage.codes["z"][-1].clone()
    stage.step(x, y)
    (weight, bias) = stage.present()[-1]
    predicted = stage.codes["a"][-1] @ weight.T + bias
    assert torch.allclose(stage.codes["z"][-1], (z + 0.5 * predicted) / 1.5, atol=1e-12)


def test_every_network_is_a_fixed_point_of_admm_as_published(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    moved = {}
    for coupled in (False, True):
        net = relu_net(seed=3).double()
        (stage,) = ADMM(coupled=coupled, warm_start=0).stages(net, x)
        assert isinstance(stage, CodesStage)
        before = [p.detach().clone() for p in net.parameters()]
        stage.codes = stage.begin(x)
        hot = torch.nn.functional.one_hot(y, CLASSES).double()
        stage.codes["lambda"] = [hot - net(x).detach()]
        stage.step(x, y)
        moved[coupled] = max(
            float((p - q.detach()).abs().max())
            for p, q in zip(before, net.parameters(), strict=True)
        )
    assert moved[False] < 1e-12 and moved[True] > 1e-4


# --- through fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL_BATCH)
def test_a_sweep_sees_all_images_whatever_the_batch(name: str, digits: Dataset) -> None:
    data = digits.subset(n_train=200, n_test=50)
    outcomes = []
    for size in (200, 50):
        make_method, make_net = FULL_BATCH[name]
        net = make_net()
        history = modlib.fit(net, make_method(), data, epochs=3, batch_size=size, progress=False)
        outcomes.append([row["losses"] for row in history.rows])
        assert all(len(row["losses"]) == 3 for row in history.rows)
    assert np.allclose(*outcomes, rtol=1e-3, atol=1e-5)


def test_images_that_change_are_refused(digits: Dataset) -> None:
    for make_method, make_net in FULL_BATCH.values():
        net = make_net()
        with pytest.raises(ValueError, match="augment: codes belong to images that stay the same"):
            modlib.fit(
                net, make_method(), digits, augment=Augment(pad=1, flip=False), progress=False
            )


def test_what_is_no_perceptron_is_refused() -> None:
    x = torch.zeros(2, 1, 8, 8)
    conv = partition(modlib.networks.cnn((4, 8), channels=1, size=8, stride=1), 2)
    before = partition(modlib.networks.mlp([64, 8, 8, 10]), 3)
    two = partition(modlib.networks.mlp([64, 8, 8, 10], boundary="after"), 2)
    bare = partition(nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)), 1)
    frozen = relu_net()
    next(frozen[1].parameters()).requires_grad_(False)
    for kind in (BlockCoordinateDescent, ADMM, LiftedNetwork):
        for net in (conv, before, two, bare):
            with pytest.raises(ValueError, match=r"net: module \d is \[.*boundary='after'"):
                kind().stages(net, x)
        with pytest.raises(ValueError, match="net: module 1 has frozen parameters"):
            kind().stages(frozen, x)
    for norm in (
        modlib.networks.mlp([64, 8, 10], norm=True),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout()),
    ):
        with pytest.raises(ValueError, match="whose output changes from one call to the next"):
            MAC().stages(partition(norm, 1), x)
    with pytest.raises(ValueError, match="there is only one module"):
        AlternatingMinimisation().stages(partition(bare, 1), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BlockCoordinateDescent(gamma=0),
        lambda: BlockCoordinateDescent(weight_decay=-1),
        lambda: BlockCoordinateDescent(alpha=math.nan),
        lambda: ADMM(beta="1"),  # type: ignore[arg-type]
        lambda: ADMM(warm_start=-1),
        lambda: MAC(growth=1.0),
        lambda: MAC(every=0),
        lambda: LiftedNetwork(inner=0),
        lambda: LiftedNetwork(alpha=math.inf),
        lambda: AlternatingMinimisation(mu=0.0),
        lambda: AlternatingMinimisation(steps=0),
    ],
)
def test_numbers_that_cannot_be_are_refused(make: Callable[[], Method]) -> None:
    with pytest.raises(ValueError, match=r"^\w+=.*: give a (finite number|whole number)"):
        make()


@pytest.mark.parametrize("name", FULL_BATCH)
def test_all_learn_digits(name: str, digits: Dataset) -> None:
    make_method, _ = FULL_BATCH[name]
    activation = nn.Tanh if name == "MAC" else nn.ReLU
    boundary = "before" if name == "MAC" else "after"
    net = modlib.networks.mlp([64, 100, 10], activation=activation, boundary=boundary, seed=0)
    history = modlib.fit(partition(net, 2), make_method(), digits, epochs=12, progress=False)
    assert history.final["test_accuracy"] > 0.85


def test_alternating_minimisation_learns_digits(digits: Dataset) -> None:
    net = partition(modlib.networks.mlp([64, 50, 50, 10], seed=0), 3)
    history = modlib.fit(
        net, AlternatingMinimisation(), digits, epochs=8, batch_size=32, progress=False
    )
    assert history.final["test_accuracy"] > 0.85


def test_codes_of_a_batch_go_where_the_energy_says(images: tuple[Tensor, Tensor]) -> None:
    """Against the equations, with gradients by finite differences."""
    x, y = images
    x, y = x[:2], y[:2]
    net = smooth_net().double()
    mu, rate = 0.5, 0.05
    (stage,) = AlternatingMinimisation(mu=mu, step_size=rate, steps=1).stages(net, x)
    with torch.no_grad():
        own = net.outputs(x)

    def energy(k: int, code: Tensor, above: Tensor | None) -> Tensor:
        with torch.no_grad():
            out = net[k + 1](code)
            if above is None:
                return nn.functional.cross_entropy(out, y, reduction="sum") / mu
            return (out - above).square().sum() / 2

    expected: dict[int, Tensor] = {}
    for k in (1, 0):
        above = expected.get(k + 1)
        slope = torch.zeros_like(own[k])
        for i in range(slope.numel()):
            ahead = torch.zeros_like(slope).view(-1)
            ahead[i] = 1e-6
            ahead = ahead.view_as(slope)
            slope.view(-1)[i] = (
                energy(k, own[k] + ahead, above) - energy(k, own[k] - ahead, above)
            ) / 2e-6
        expected[k] = own[k] - rate * slope  # the pull back to its own output is 0 at first
    found = stage._codes(x, y)  # type: ignore[attr-defined]
    for k in (0, 1):
        assert torch.allclose(found[k], expected[k], atol=1e-7)
        assert not torch.allclose(found[k], own[k], atol=1e-4)


# --- what the audit finds -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "later", "locks"),
    [
        ("BCD", ("yes", "yes", "no"), {"update"}),
        ("ADMM", ("2 steps late", "1 step late", "no"), set()),
        ("MAC", ("yes", "yes", "no"), {"forward", "update"}),
        ("lifted", ("yes", "yes", "no"), {"forward", "update"}),
        ("AltMin", ("yes", "yes", "no"), {"forward", "update"}),
    ],
)
def test_the_audit(name: str, later: tuple[str, ...], locks: set[str], digits: Dataset) -> None:
    batch = Loader(digits).sample(N)
    cases = {**FULL_BATCH, "AltMin": (AlternatingMinimisation, smooth_net)}
    cases["ADMM"] = (ADMM, relu_net)
    measured = audit(cases[name][0](), cases[name][1](), batch)
    assert measured.category == "weakly modular" and measured.isolated
    assert measured.later == later and measured.labels == ("classes",) * 3
    assert {key for key, on in measured.locks.items() if on} == locks
    codes = {  # floats an image: hidden units before and behind the ReLU, the output, its multiplier
        "BCD": 2 * (9 + 8 + 10),
        "ADMM": 2 * (9 + 8) + 10 + 10,
        "MAC": 9 + 8,
        "lifted": 9 + 8,
        "AltMin": 0,
    }
    assert measured.kept_bytes == 4 * N * codes[name]


@pytest.mark.parametrize("name", FULL_BATCH)
def test_the_angle_of_a_sweep_is_that_of_the_way_its_weights_went(
    name: str, digits: Dataset
) -> None:
    make_method, make_net = FULL_BATCH[name]
    net = make_net()
    batch = Loader(digits).sample(N)
    (stage,) = make_method().stages(net, batch[0])
    stage.step(*batch)
    expected = angles(stage, net, batch)
    stage.step(*batch)
    found = angles_gone(net, batch)
    assert found == pytest.approx(expected, abs=0.1)
    assert all(a is not None and 0 < a < 180 for a in found)


# --- settings a hundred times too large -----------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "make_net"),
    [
        *(
            (partial(BlockCoordinateDescent, **{n: 100.0 * d}), relu_net)
            for n, d in (("gamma", 1), ("rho", 1), ("alpha", 5))
        ),
        *(
            (partial(ADMM, **{n: 100.0 * d}), relu_net)
            for n, d in (("gamma", 10), ("beta", 1), ("alpha", 1))
        ),
        (partial(MAC, penalty=10.0), smooth_net),
        (partial(LiftedNetwork, gamma=100.0), relu_net),
        (partial(AlternatingMinimisation, step_size=10.0), smooth_net),
        (partial(AlternatingMinimisation, mu=0.001), smooth_net),
        (
            partial(AlternatingMinimisation, optimizer=partial(torch.optim.SGD, lr=1e4)),
            partial(relu_net, 9, 8),
        ),
    ],
)
def test_far_too_large_settings_end_in_a_sentence_or_stay_finite(
    make: Callable[[], Method], make_net: Callable[[], ModularNetwork], digits: Dataset
) -> None:
    data = digits.subset(n_train=200, n_test=50)
    net = make_net()
    try:
        history = modlib.fit(
            net, make(), data, epochs=10, batch_size=50, schedule="constant", progress=False
        )
    except FloatingPointError as error:
        assert "module" in str(error) and ("lower" in str(error) or "larger" in str(error))
    else:
        assert np.isfinite([loss for row in history.rows for loss in row["losses"]]).all()
        assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_codes_that_explode_are_named(digits: Dataset) -> None:
    data = digits.subset(n_train=200, n_test=50)
    net = partition(modlib.networks.mlp([64, 9, 8, 10], seed=0), 3)
    method = AlternatingMinimisation(step_size=1e9, steps=20)
    with pytest.raises(
        FloatingPointError, match=r"Stage 0, epoch 0: module \d's distance.*; lower step_size"
    ):
        modlib.fit(net, method, data, epochs=2, batch_size=50, progress=False)
