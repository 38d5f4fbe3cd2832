"""End-to-end backpropagation that recomputes: the same training, fewer bytes, one more forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modlib import networks
from modlib.data import Loader, load
from modlib.measure.audit import audit
from modlib.measure.costs import costs
from modlib.methods import E2EBP
from modlib.network import ModularNetwork, partition
from modlib.training import fit

DATA = load("digits").subset(n_train=128, n_test=64)


def conv_net(boundary: str = "after") -> ModularNetwork:
    net = networks.cnn(
        (4, 8), channels=1, size=8, stride=1, kernel="relu", boundary=boundary, seed=0
    )
    return partition(net, ["conv2", "conv4"])


def noisy_net() -> ModularNetwork:
    """Dropout draws random numbers, batch norm keeps statistics: both must come out as without it."""
    torch.manual_seed(0)
    layers = [nn.Flatten()]
    for _ in range(3):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.3)]
    return partition(nn.Sequential(*layers, nn.Linear(64, 10)), 4)


@pytest.mark.parametrize("build", [conv_net, noisy_net])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputing_trains_as_without_it_bit_for_bit(build: Any, precision: str) -> None:
    nets = build(), build()
    one, two = (
        fit(net, E2EBP(recompute=again), DATA, epochs=2, precision=precision, progress=False)
        for net, again in zip(nets, (False, True), strict=True)
    )
    assert one == two
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_recomputing_holds_the_boundaries_and_one_module() -> None:
    """Counted by hand: inputs of all modules but the last; then the activations of one module at a time."""
    width, n = 32, 16
    net = partition(networks.mlp([64, width, width, width, 10], boundary="after", seed=0), 4)
    batch = torch.randn(n, 64), torch.arange(n) % 10
    plain, again = (audit(E2EBP(recompute=r), net, batch) for r in (False, True))
    assert again.category == plain.category == "end-to-end"
    assert (again.labels, again.later, again.locks) == (plain.labels, plain.later, plain.locks)
    assert again.stages[0].ways == plain.stages[0].ways == ((3, 0),)
    boundaries = 4 * n * (64 + 2 * width)  # what modules 1, 2 and 3 of 4 take in
    head = 4 * n * width + (
        4 * n * 10 + 8 * n + 4
    )  # the last module's input; softmax, labels, a weight
    assert again.peak_saved_bytes == boundaries + head


def test_recomputing_holds_less_of_a_network_with_batch_norm() -> None:
    batch = Loader(DATA).sample(32)
    plain, again = (audit(E2EBP(recompute=r), conv_net(), batch) for r in (False, True))
    assert again.peak_saved_bytes < 0.7 * plain.peak_saved_bytes


def test_recomputing_costs_one_more_forward_pass_of_all_modules_but_the_last() -> None:
    net = partition(networks.mlp([64, 32, 16, 10], boundary="after", seed=0), 3)
    batch = torch.randn(8, 64), torch.arange(8)
    plain, again = (costs(E2EBP(recompute=r), net, batch, repeats=1) for r in (False, True))
    assert again["step_flops"] - plain["step_flops"] == 2 * (64 * 32 + 32 * 16)


def test_modules_are_themselves_again_after_a_step_that_fails() -> None:
    net = conv_net()
    (stage,) = E2EBP(recompute=True).stages(net, torch.zeros(2, 1, 8, 8))

    def broken(h: Tensor, y: Tensor, x: Tensor) -> Tensor:
        raise ArithmeticError

    stage.objectives[0].local = broken  # type: ignore[method-assign]
    with pytest.raises(ArithmeticError):
        stage.step(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))
    assert all("forward" not in vars(module) for module in net)


def test_frozen_parameters_stay_and_get_no_gradient() -> None:
    net = conv_net()
    frozen = next(net[0].parameters())
    frozen.requires_grad = False
    before = frozen.clone()
    fit(net, E2EBP(recompute=True), DATA, epochs=1, progress=False)
    assert torch.equal(frozen, before) and frozen.grad is None
