"""The angle between an update and the gradient: of backpropagation 0, of its opposite 180, nothing moved."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import modlib
from modlib.data import Dataset, Loader
from modlib.experiments.recipes import RECIPES
from modlib.experiments.recipes.recipe import watch_angles
from modlib.experiments.run import run
from modlib.measure.angles import angles
from modlib.methods import E2EBP, LocalLearning
from modlib.methods.method import Stage


def net_and_batch(
    digits: Dataset,
) -> tuple[modlib.ModularNetwork, tuple[torch.Tensor, torch.Tensor]]:
    net = modlib.networks.mlp([64, 32, 32, 10], activation=torch.nn.Tanh, boundary="after", seed=0)
    return modlib.partition(net, modules=3), Loader(digits).sample(64)


def test_backpropagation_goes_where_the_gradient_points_and_nothing_moves(digits: Dataset) -> None:
    net, batch = net_and_batch(digits)
    (stage,) = E2EBP().stages(net, batch[0])
    before = copy.deepcopy(net.state_dict())
    assert all(a is not None and a < 1e-3 for a in angles(stage, net, batch))
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())


class _Uphill(Stage):
    """Without optimisers: the weights move up the gradient, or at right angles to it."""

    def __init__(self, net: modlib.ModularNetwork, sideways: bool) -> None:
        super().__init__([net], [], [])
        self.sideways = sideways

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        (net,) = self.modules
        weights = list(net.parameters())
        loss = torch.nn.functional.cross_entropy(net(x), y)
        for p, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            with torch.no_grad():
                way = torch.zeros_like(g)
                if self.sideways:  # exchange two coordinates, with a change of sign
                    way.view(-1)[0], way.view(-1)[1] = g.view(-1)[1], -g.view(-1)[0]
                p.add_(way if self.sideways else g, alpha=0.01)
        return torch.zeros(1)


@pytest.mark.parametrize(("sideways", "angle"), [(False, 180.0), (True, 90.0)])
def test_without_optimisers_the_way_of_the_weights_counts(
    sideways: bool, angle: float, digits: Dataset
) -> None:
    net, batch = net_and_batch(digits)
    net.double()
    batch = batch[0].double(), batch[1]
    found = angles(_Uphill(net, sideways), net, batch)
    assert found == pytest.approx([angle] * 3, abs=1e-3)


def test_a_module_that_gets_no_gradient_has_no_angle(digits: Dataset) -> None:
    net, batch = net_and_batch(digits)
    first, *_ = LocalLearning(in_turn=True).stages(net, batch[0])
    found = angles(first, net, batch)
    assert found[0] is not None and found[1:] == [None, None]


def test_a_record_holds_the_angles_that_its_recipe_watches(tmp_path: object) -> None:
    recipe = dataclasses.replace(RECIPES["mnist-dtp"], name="watched", watch=watch_angles)
    record = run(recipe, results=f"{tmp_path}/results", runs=f"{tmp_path}/runs", progress=False)
    (found,) = [row["angles"] for row in record["history"]]
    assert len(found) == record["modules"] and all(0 <= a <= 180 for a in found)
    assert record["method"] == "DifferenceTargetPropagation"
