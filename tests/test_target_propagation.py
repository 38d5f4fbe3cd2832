"""Targets against Gauss and Newton, inverses' losses against NumPy, and Jacobians against autograd's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modlib import networks
from modlib.data import Dataset, Loader
from modlib.measure.angles import angles
from modlib.measure.audit import audit
from modlib.methods import (
    E2EBP,
    DifferenceTargetPropagation,
    Method,
    TargetPropagation,
    ddtp,
    dtp_drl,
    l_drl,
    sgd,
)
from modlib.methods.target_propagation import TargetStage
from modlib.network import ModularNetwork, partition
from modlib.networks import ELUSlope, ExactInverse, TanhSlope, learned_inverse
from modlib.training import fit

STILL = partial(torch.optim.SGD, lr=0.0)
VARIANTS: dict[str, Callable[..., TargetPropagation]] = {
    "TP": TargetPropagation,
    "DTP": DifferenceTargetPropagation,
    "DTP-DRL": dtp_drl,
    "DDTP": ddtp,
    "L-DRL": l_drl,
}


@pytest.fixture
def batch(digits: Dataset) -> tuple[Tensor, Tensor]:
    return Loader(digits).sample(64)


def tanh_net(*sizes: int, kind: Callable[[], nn.Module] = nn.Tanh) -> ModularNetwork:
    net = networks.mlp([64, *sizes], activation=kind, boundary="after", seed=0)
    return partition(net, len(sizes))


def conv_net() -> ModularNetwork:
    """Two maps of one size, one of half of it, then a vector, in double precision; without batch norm."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 6, 1), (6, 6, 1), (6, 8, 2)):
        unit = [nn.Conv2d(before, after, 3, stride, padding=1), nn.ELU()]
        layers.append(nn.Sequential(*unit))
    layers.append(nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 10)))
    return partition(nn.Sequential(*layers), ["1.0", "2.0", "3.0"])


def only_stage(method: Method, net: ModularNetwork, x: Tensor) -> TargetStage:
    torch.manual_seed(0)
    (stage,) = method.stages(net, x)
    assert isinstance(stage, TargetStage)
    stage.train()
    return stage


# --- exact inverses -------------------------------------------------------------------------------


def jacobians(net: ModularNetwork, start: int, h: Tensor) -> Tensor:
    """Of the output by the output of module ``start``, for each image: (N, classes, d)."""
    rest = net[start + 1 :]
    rows = [torch.autograd.functional.jacobian(lambda u: rest(u[None])[0], image) for image in h]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [TargetPropagation, DifferenceTargetPropagation])
@pytest.mark.parametrize("from_output", [False, True])
def test_exact_inverses_send_gauss_newton_targets(
    kind: Any, from_output: bool, batch: tuple[Tensor, Tensor]
) -> None:
    """A small step times the inverse Jacobian, and the update towards it, to 1e-5."""
    if kind is TargetPropagation and from_output:
        pytest.skip("targets of plain TP begin at the last hidden output")
    x, y = batch[0].double(), batch[1]
    leaky = partial(nn.LeakyReLU, 0.3) if from_output else nn.Tanh
    net = tanh_net(10, 10, 10, 10, kind=leaky).double()
    eta = 1e-7
    options = {"from_output": True} if from_output else {}
    method = kind(eta, optimizer=sgd(0.1), inverses="exact", **options)
    stage = only_stage(method, net, x)
    outputs = stage._outputs(x)
    targets = stage._targets(outputs, y)
    top = len(net) - 1 if from_output else len(net) - 2
    assert len(targets) == top + 1

    logits = [h.detach() for h in net.outputs(x)]
    last = logits[top].clone().requires_grad_()
    loss = nn.functional.cross_entropy(net[top + 1 :](last) if top < 3 else last, y)
    (gradient,) = torch.autograd.grad(loss, last)
    for k in range(top):
        whole = jacobians(net[: top + 1], k, logits[k])
        newton = torch.linalg.solve(whole, len(y) * gradient[..., None])[..., 0]
        sent = (logits[k] - targets[k]) / eta
        assert float((sent - newton).norm() / newton.norm()) < 1e-5

        out = net[k](logits[k - 1] if k else x)
        goal = logits[k] - eta * newton
        wanted = torch.autograd.grad((out - goal).square().sum(1).mean(), list(net[k].parameters()))
        out = net[k](logits[k - 1] if k else x)
        got = torch.autograd.grad(
            (out - targets[k]).square().sum(1).mean(), list(net[k].parameters())
        )
        for g, w in zip(got, wanted, strict=True):
            assert float((g - w).norm() / w.norm()) < 1e-5


def test_exact_inverses_hit_the_target(batch: tuple[Tensor, Tensor]) -> None:
    """A module that reached its target makes the next one reach its own."""
    x = batch[0].double()
    net = tanh_net(12, 12, 12, 10, kind=partial(nn.LeakyReLU, 0.3)).double()
    stage = only_stage(TargetPropagation(0.3, inverses="exact"), net, x)
    targets = stage._targets(stage._outputs(x), batch[1])
    for k in (1, 2):
        torch.testing.assert_close(net[k](targets[k - 1]), targets[k])


def test_exact_inverses_have_nothing_to_learn(digits: Dataset) -> None:
    net = tanh_net(12, 12, 12, 10)
    fit(net, TargetPropagation(0.01, inverses="exact"), digits, epochs=1, progress=False)
    stage = only_stage(TargetPropagation(inverses="exact"), net, torch.zeros(2, 1, 8, 8))
    assert len(stage.optimizers) == len(net)
    assert not [p for inverse in stage.auxiliary for p in inverse.parameters()]


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.ReLU(), nn.Conv2d(1, 1, 3)])
def test_what_has_no_inverse_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^inverses='exact': .* has no exact inverse; build"):
        ExactInverse(nn.Sequential(layer))


def test_an_exact_inverse_without_bias_and_with_leaks() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 5, bias=False), nn.LeakyReLU(0.2), nn.Linear(5, 5)).double()
    x = torch.randn(20, 5, dtype=torch.float64)
    torch.testing.assert_close(ExactInverse(module)(module(x)), x)


# --- learned inverses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "before"),
    [((5,), (7,)), ((5,), (2, 6, 4)), ((4, 5, 5), (7,)), ((4, 4, 3), (2, 8, 3)), ((1, 7, 7), (3, 14, 14)),
     ((2, 7, 7), (3, 13, 13)), ((2, 2, 2), (1, 8, 8))],
)  # fmt: skip
def test_a_learned_inverse_leads_from_any_shape_to_any(
    after: tuple[int, ...], before: tuple[int, ...]
) -> None:
    out = learned_inverse(after, before, activation=nn.Tanh)(torch.randn(3, *after))
    assert out.shape == (3, *before) and out.abs().max() <= 1
    assert out.square().sum().requires_grad


def test_maps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^net: no transposed convolution .* 8×8 pixels back to 4×4"
    ):
        learned_inverse((1, 8, 8), (1, 4, 4))


@pytest.mark.parametrize(("module", "slope"), [(nn.ELU(), ELUSlope()), (nn.Tanh(), TanhSlope())])
def test_a_slope_is_the_activations_by_its_output(module: nn.Module, slope: nn.Module) -> None:
    z = torch.linspace(-3, 3, 60, dtype=torch.float64, requires_grad=True)
    y = module(z).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(module(z).sum(), z)
    (found,) = torch.autograd.grad(slope(y).sum(), y)
    torch.testing.assert_close(found, wanted)


# --- the inverses' losses, in NumPy ---------------------------------------------------------------


def numpy_layer(layer: nn.Module, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    (linear,) = (m for m in layer.modules() if isinstance(m, nn.Linear))
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    return lambda u: function(u @ weight.T + bias)


def loss_in_numpy(
    name: str, stage: TargetStage, net: ModularNetwork, h: list[Any], k: int
) -> float:
    """The loss of inverse k, with the noise drawn as the stage draws it after ``manual_seed(3)``."""
    torch.manual_seed(3)
    sigma = stage.noise[k]
    noise = sigma * torch.randn(h[k].shape, dtype=torch.float64).numpy()
    f = [numpy_layer(m, np.tanh if j < len(net) - 1 else lambda u: u) for j, m in enumerate(net)]
    end = np.tanh if name == "DTP" else lambda u: u
    g = [numpy_layer(inverse, end) for inverse in stage.auxiliary]
    norm = lambda a: float((a**2).sum(1).mean())  # noqa: E731
    if name == "DTP":
        return norm(g[k](f[k + 1](h[k] + noise)) - (h[k] + noise))
    if name == "L-DRL":
        above = sigma * torch.randn(h[k + 1].shape, dtype=torch.float64).numpy()
        around = g[k](h[k + 1] + above) - g[k](h[k + 1])
        across = g[k](f[k + 1](h[k] + noise)) - g[k](h[k + 1])
        return (norm(around) - 2 * float((noise * across).sum(1).mean())) / sigma**2
    sent = h[k] + noise
    for function in f[k + 1 :]:
        sent = function(sent)
    if name == "DDTP":
        back = h[k] + g[k](sent) - g[k](h[-1])
    else:
        for j in reversed(range(k, len(g))):
            sent = h[j] + g[j](sent) - g[j](h[j + 1])
        back = sent
    return norm(back - (h[k] + noise)) / sigma**2


@pytest.mark.parametrize("name", ["DTP", "DTP-DRL", "DDTP", "L-DRL"])
def test_inverses_learn_on_their_equation(name: str, batch: tuple[Tensor, Tensor]) -> None:
    x = batch[0].double()
    net = tanh_net(12, 11, 9, 10).double()
    stage = only_stage(VARIANTS[name](noise=0.3), net, x)
    outputs = stage._outputs(x)
    loss_of = {"DTP": stage._reconstruction, "L-DRL": stage._local_difference}
    h = [output.numpy() for output in outputs]
    for k in range(len(stage.auxiliary)):
        torch.manual_seed(3)
        got = loss_of.get(name, stage._difference)(k, outputs).item()
        assert got == pytest.approx(loss_in_numpy(name, stage, net, h, k), rel=1e-10)


def test_direct_targets_come_from_the_output_at_once(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    stage = only_stage(ddtp(), tanh_net(12, 11, 9, 10), x)
    outputs = stage._outputs(x)
    targets = stage._targets(outputs, y)
    for k, inverse in enumerate(stage.auxiliary):
        wanted = outputs[k] + inverse(targets[-1]) - inverse(outputs[-1])
        torch.testing.assert_close(targets[k], wanted)


# --- local difference reconstruction --------------------------------------------------------------


def learn(stage: TargetStage, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        stage._learn_inverses(stage._outputs(x))


def test_the_local_difference_is_least_at_the_transposed_jacobian(
    batch: tuple[Tensor, Tensor],
) -> None:
    """Of a linear module the loss's minimum is known: B = W'."""
    net = tanh_net(6, 5, 4, kind=nn.Identity).double()
    x = batch[0].double()
    inverse_optimizer = partial(torch.optim.SGD, lr=0.02)
    method = l_drl(optimizer=STILL, inverse_optimizer=inverse_optimizer, noise=0.1)
    stage = only_stage(method, net, x)
    outputs = stage._outputs(x)
    learn(stage, x, 400)
    for k, module in enumerate(net[1:]):
        (forward,) = (m for m in module.modules() if isinstance(m, nn.Linear))
        (back,) = (m for m in stage.auxiliary[k].modules() if isinstance(m, nn.Linear))
        error = (back.weight - forward.weight.T).norm() / forward.weight.norm()
        assert error.item() < 0.1
    assert len(outputs) == 3


def test_local_difference_learning_finds_backpropagations_direction(digits: Dataset) -> None:
    """Within 15 degrees on every layer of a convolutional network; before it learned, 60 and more."""
    net = conv_net()
    load = Loader(digits, batch_size=128)
    method = l_drl(
        0.05,
        0.05,
        STILL,
        partial(torch.optim.SGD, lr=0.006, momentum=0.9),
        input_activation=ELUSlope,
    )
    stage = only_stage(method, net, load.sample(8)[0])
    batch = load.sample(256)
    assert min(a for a in angles(stage, net, batch)[:-1] if a is not None) > 45
    for step in range(1, 160):
        x, _ = next(iter(load.epoch(0, step)))
        for optimizer in stage.optimizers[len(net) :]:
            optimizer.param_groups[0]["lr"] = 0.006 * min(1.0, 40 / step)  # noise averages out
        learn(stage, x, 1)
    found = angles(stage, net, batch)
    assert all(a is not None and a < 15 for a in found), found


# --- every member of the family -------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("make_net", [conv_net, lambda: tanh_net(12, 11, 10)])
def test_each_is_weakly_modular_and_told_by_later_weights(
    name: str, make_net: Callable[[], ModularNetwork], batch: tuple[Tensor, Tensor]
) -> None:
    net = make_net()
    found = audit(VARIANTS[name](), net, batch)
    assert found.category == "weakly modular" and found.isolated
    assert found.later == ("yes",) * (len(net) - 1) + ("no",)
    assert {lock for lock, on in found.locks.items() if on} == {"forward", "update"}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_trains_convolutions(name: str, digits: Dataset) -> None:
    adam = partial(torch.optim.Adam, lr=3e-3)
    method = VARIANTS[name](optimizer=adam, inverse_optimizer=adam)
    history = fit(conv_net(), method, digits, epochs=2, batch_size=64, progress=False)
    first, last = history.rows
    assert last["losses"][-1] < first["losses"][-1]
    assert last["test_accuracy"] > 0.25


@pytest.mark.parametrize("name", VARIANTS)
def test_a_rate_a_hundred_times_too_large_stops_with_a_sentence_or_stays_finite(
    name: str, digits: Dataset, tmp_path: Path
) -> None:
    fast = partial(torch.optim.SGD, lr=100.0)
    path = tmp_path / "run.pt"
    net = partition(networks.mlp([64, 16, 16, 10], activation=nn.LeakyReLU, boundary="after"), 3)
    method = VARIANTS[name](optimizer=fast, inverse_optimizer=fast)
    if name != "L-DRL":
        method.activation = nn.Identity
    sentence = (
        r"^Stage 0, epoch \d: module \d's (distance to its target|weights|inverse) became .*; "
        "lower the learning rates of the modules and of their inverses, or step_size"
    )
    with pytest.raises(FloatingPointError, match=sentence):
        fit(net, method, digits, epochs=3, schedule="constant", checkpoint=path, progress=False)
    assert path.exists()


def test_batch_norm_counts_each_batch_once(digits: Dataset) -> None:
    net = partition(networks.cnn((4, 8), channels=1, size=8, stride=1, kernel="relu"), 3)
    stage = only_stage(l_drl(from_output=False), net, torch.zeros(4, 1, 8, 8))
    before = copy.deepcopy(net)
    x, y = Loader(digits).sample(32)
    before.train()
    before(x)
    stage.step(x, y)
    for ours, wanted in zip(net.modules(), before.modules(), strict=True):
        if isinstance(ours, nn.BatchNorm2d) and isinstance(wanted, nn.BatchNorm2d):
            assert ours.num_batches_tracked == wanted.num_batches_tracked == 1


def test_more_updates_of_the_inverses_and_noise_for_each(batch: tuple[Tensor, Tensor]) -> None:
    net = tanh_net(12, 11, 10, 10)
    method = DifferenceTargetPropagation(noise=[0.1, 0.2], inverse_steps=3)
    stage = only_stage(method, net, batch[0])
    assert stage.noise == [0.1, 0.2]
    seen: list[int] = []
    for k, optimizer in enumerate(stage.optimizers):
        optimizer.register_step_post_hook(lambda *_, k=k: seen.append(k))
    stage.step(*batch)
    assert seen == [4, 5] * 3 + [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: TargetPropagation(inverses="true"),
            "inverses='true': choose 'learned' or 'exact'",
        ),
        (lambda: TargetPropagation(0.0), "step_size=0.0: give a finite number above 0"),
        (lambda: TargetPropagation(noise=[0.1, -1]), r"noise=-1: give a finite number above 0"),
        (lambda: TargetPropagation(inverse_steps=0), "inverse_steps=0: give a whole number"),
        (lambda: DifferenceTargetPropagation(loss="l2"), "loss='l2': choose 'reconstruction', "),
        (
            lambda: DifferenceTargetPropagation(direct=True),
            "direct=True with loss='reconstruction'",
        ),
    ],
)
def test_wrong_arguments_are_named(build: Callable[[], Method], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


def test_noise_for_each_inverse_must_be_one_for_each(batch: tuple[Tensor, Tensor]) -> None:
    method = DifferenceTargetPropagation(noise=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"^noise: 3 given for 2 inverses; give one number, or"):
        method.stages(tanh_net(12, 11, 10, 10), batch[0])


def test_without_the_correction_an_inverse_that_knows_nothing_spoils_the_target(
    batch: tuple[Tensor, Tensor],
) -> None:
    """A module that is at its target stays there under DTP, whatever its inverse; under TP it moves."""
    x, _ = batch
    for kind, still in ((DifferenceTargetPropagation, True), (TargetPropagation, False)):
        stage = only_stage(kind(), tanh_net(12, 11, 10, 10), x)
        outputs = stage._outputs(x)
        back = stage._back(0, outputs[1], outputs)
        assert torch.allclose(back, outputs[0], atol=1e-6) == still


def angle_of_exact_targets(seed: int, boundary: str, batch: tuple[Tensor, Tensor]) -> list[Any]:
    sizes = [64, *[10] * 4]
    net = networks.mlp(sizes, activation=nn.Tanh, boundary=boundary, seed=seed).double()
    cut = partition(net, 4)
    method = TargetPropagation(1e-6, 0.1, STILL, inverses="exact")
    x, y = batch[0].double(), batch[1]
    return angles(only_stage(method, cut, x), cut, (x, y))[:3]


def test_the_angle_of_exact_targets_is_below_90_degrees(batch: tuple[Tensor, Tensor]) -> None:
    """Lee et al. 2015, theorem 1: modules that end with their linear layer, one image at a time."""
    x, y = batch
    before = [angle_of_exact_targets(s, "before", (x[s : s + 1], y[s : s + 1])) for s in range(12)]
    assert max(map(max, before)) < 90
    assert max(map(max, before)) > 60  # no small angle by chance
    after = [angle_of_exact_targets(s, "after", (x[s : s + 1], y[s : s + 1])) for s in range(12)]
    assert max(map(max, after)) > 90  # cut after the activation, the theorem does not hold


def test_end_to_end_is_the_reference_of_zero_degrees(batch: tuple[Tensor, Tensor]) -> None:
    net = tanh_net(12, 10)
    (stage,) = E2EBP().stages(net, batch[0])
    assert max(a or 0.0 for a in angles(stage, net, batch)) < 1e-2
