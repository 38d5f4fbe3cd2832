"""The audit against what is known of each method, and against methods that are not what they say."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from summed import summed_step
from torch import Tensor, nn

from modlib import networks
from modlib.data import Dataset, Loader
from modlib.measure.audit import Audit, audit
from modlib.methods import (
    E2EBP,
    DifferenceTargetPropagation,
    LocalLearning,
    Method,
    ProxyObjective,
    Stage,
    greedy_infomax,
)
from modlib.network import ModularNetwork, partition
from modlib.objectives import HSIC, NMSE, Objective, Raw, SupCon

WIDTH, N = 12, 32


def relu_net(modules: int) -> ModularNetwork:
    net = networks.mlp([64, *[WIDTH] * modules, 10], kernel="relu", seed=0)
    return partition(net, [f"layer{k}" for k in range(2, modules)] + ["features"])


def tanh_net(modules: int) -> ModularNetwork:
    sizes = [64, *[WIDTH] * (modules - 1), 10]
    return partition(networks.mlp(sizes, activation=nn.Tanh, boundary="after", seed=0), modules)


@pytest.fixture
def batch(digits: Dataset) -> tuple[Tensor, Tensor]:
    return Loader(digits).sample(N)


PROXY = partial(ProxyObjective, SupCon(kernel="relu"))
IN_TURN = partial(LocalLearning, in_turn=True)


@pytest.mark.parametrize("modules", [2, 3, 4])
@pytest.mark.parametrize(
    ("method", "category", "locks"),
    [
        (E2EBP, "end-to-end", {"forward", "update", "backward"}),
        (LocalLearning, "weakly modular", {"forward"}),
        (IN_TURN, "modular", {"forward"}),
        (PROXY, "modular", {"forward"}),
        (DifferenceTargetPropagation, "weakly modular", {"forward", "update"}),
    ],
)
def test_each_method_is_what_the_survey_says(
    method: Callable[[], Method],
    category: str,
    locks: set[str],
    modules: int,
    batch: tuple[Tensor, Tensor],
) -> None:
    targets = method is DifferenceTargetPropagation
    if targets and modules < 3:
        modules = 5  # target propagation needs three
    measured = audit(method(), (tanh_net if targets else relu_net)(modules), batch)
    assert measured.category == category
    assert {name for name, on in measured.locks.items() if on} == locks
    assert measured.isolated == (category != "end-to-end")
    assert measured.end_to_end_backward == (category == "end-to-end")
    assert measured.end_to_end_forward == (category != "modular")
    stages = modules if category == "modular" else 1
    assert len(measured.stages) == stages
    updated = [stage.updated for stage in measured.stages]
    assert updated == ([(k,) for k in range(modules)] if stages > 1 else [tuple(range(modules))])


def test_with_one_module_local_learning_is_end_to_end(batch: tuple[Tensor, Tensor]) -> None:
    net = partition(networks.mlp([64, WIDTH, 10]), 1)
    for method in (E2EBP(), LocalLearning(), LocalLearning(in_turn=True)):
        assert audit(method, net, batch).category == "end-to-end"


# --- labels ---------------------------------------------------------------------------------------


class Decorrelate(Objective):
    """Knows nothing of labels."""

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return (h.T @ h / len(h) - torch.eye(h.shape[1])).square().sum()


@pytest.mark.parametrize(
    ("method", "labels"),
    [
        (E2EBP, "classes classes classes"),
        (LocalLearning, "classes classes classes"),
        (PROXY, "pairs pairs classes"),
        (partial(ProxyObjective, Raw("relu")), "pairs pairs classes"),
        (partial(ProxyObjective, NMSE("relu", balanced=True)), "pairs pairs classes"),
        (partial(LocalLearning, SupCon(kernel="cosine")), "pairs pairs classes"),
        (partial(LocalLearning, Decorrelate()), "none none classes"),
    ],
)
def test_what_each_module_learns_of_the_labels(
    method: Callable[[], Method], labels: str, batch: tuple[Tensor, Tensor]
) -> None:
    assert audit(method(), relu_net(3), batch).labels == tuple(labels.split())


def test_targets_tell_hidden_modules_the_classes(batch: tuple[Tensor, Tensor]) -> None:
    measured = audit(DifferenceTargetPropagation(), tanh_net(3), batch)
    assert measured.labels == ("classes",) * 3


def test_a_module_that_is_never_updated_uses_no_labels(batch: tuple[Tensor, Tensor]) -> None:
    optimizers = [partial(torch.optim.SGD, lr=rate) for rate in (0.0, 0.1)]
    net = partition(networks.mlp([64, WIDTH, 10]), 2)
    measured = audit(LocalLearning(optimizer=optimizers), net, batch)
    assert measured.labels == ("-", "classes")
    assert measured.stages[0].updated == (1,)
    assert measured.category == "modular"  # the whole network runs, but only its last module learns


# --- bytes ----------------------------------------------------------------------------------------

ONE = N * WIDTH * 4  # one hidden output in float32


@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        (E2EBP, [(ONE, ONE)], [(ONE, ONE)]),
        (LocalLearning, [(ONE, ONE)], [(0, 0)]),
        (PROXY, [(0, 0), (ONE, 0), (ONE, ONE)], [(0, 0)] * 3),
    ],
)
def test_bytes_over_boundaries(
    method: Callable[[], Method],
    forward: list[tuple[int, int]],
    backward: list[tuple[int, int]],
    batch: tuple[Tensor, Tensor],
) -> None:
    measured = audit(method(), relu_net(3), batch)
    assert [stage.forward_bytes for stage in measured.stages] == forward
    assert [stage.backward_bytes for stage in measured.stages] == backward
    most = max(sum(f) + sum(b) for f, b in zip(forward, backward, strict=True))
    assert measured.boundary_bytes == most


# --- order of events ------------------------------------------------------------------------------


def order(measured: Audit) -> list[tuple[str, int]]:
    (stage,) = measured.stages
    return [(event.what, event.module) for event in stage.events]


def test_events_of_local_learning_come_module_by_module(batch: tuple[Tensor, Tensor]) -> None:
    expected = [(what, k) for k in range(3) for what in ("forward", "backward", "update")]
    assert order(audit(LocalLearning(), relu_net(3), batch)) == expected


def test_events_of_backpropagation_go_forth_and_back(batch: tuple[Tensor, Tensor]) -> None:
    forth = [("forward", k) for k in range(3)]
    back = [("backward", k) for k in (2, 1, 0)]
    assert order(audit(E2EBP(), relu_net(3), batch)) == [
        *forth,
        *back,
        *(("update", k) for k in range(3)),
    ]


# --- methods that are not what they say -----------------------------------------------------------


class Leaky(Objective):
    """Looks local, but is measured through a module that it was not given."""

    def __init__(self) -> None:
        super().__init__()
        self.other: list[nn.Module] = []  # a list hides it from parameters()

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return self.other[0](h).square().mean()


class Pairwise(Method):
    """Local learning whose first two modules are trained as one."""

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        first = nn.Sequential(net[0], net[1])
        learner = LocalLearning()
        objectives = learner.objectives(net, x)[1:]
        parts = [first, net[2]]
        owners = list(zip(parts, objectives, strict=True))
        return [Stage(parts, objectives, self.make_optimizers(owners))]


def test_gradients_through_an_objective_are_noticed(batch: tuple[Tensor, Tensor]) -> None:
    class Cheat(LocalLearning):
        def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
            (stage,) = super().stages(net, x)
            leaky = Leaky()
            leaky.other = [net[1]]
            stage.objectives[0] = leaky
            return [stage]

    assert audit(LocalLearning(), relu_net(3), batch).isolated
    assert not audit(Cheat(), relu_net(3), batch).isolated


class Together(Stage):
    """Proper boundaries, but one backward pass for the sum of all losses, and updates at the end."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return summed_step(self, x, y, boundary=True)


class Summed(LocalLearning):
    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        (stage,) = super().stages(net, x)
        return [Together(stage.modules, stage.objectives, stage.optimizers)]


def test_one_backward_pass_over_all_modules_is_not_end_to_end(
    batch: tuple[Tensor, Tensor],
) -> None:
    apart, summed = (audit(method, relu_net(3), batch) for method in (LocalLearning(), Summed()))
    assert summed.isolated and summed.category == "weakly modular"
    assert summed.stages[0].backward_bytes == (0, 0)
    assert summed.locks == apart.locks == {"forward": True, "update": False, "backward": False}
    assert summed.peak_saved_bytes > apart.peak_saved_bytes  # what the sum does cost


class OfStage(Method):
    """One stage of this class, on the losses of local learning, with one optimiser for all."""

    def __init__(self, stage: type[Stage], objective: Objective | None = None) -> None:
        super().__init__()
        self.stage, self.learner = stage, LocalLearning(objective)

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        objectives = self.learner.objectives(net, x)
        return [self.stage(list(net), objectives, self.make_optimizers([[*net, *objectives]]))]


class LoCo(Stage):
    """Xiong, Ren & Urtasun 2020 (arXiv 2008.01342): the error of each module also trains the one below."""

    def losses(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        below: nn.Module = nn.Identity()
        for module, objective in zip(self.modules, self.objectives, strict=True):
            yield objective(module(below(x)), y)
            x, below = below(x).detach(), module

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses = self.backward(x, y)
        for optimizer in self.optimizers:
            optimizer.step()
        return losses

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        losses = []
        for loss in self.losses(x, y):
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return torch.stack(losses)


class SummedLoCo(LoCo):
    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        losses = torch.stack(list(self.losses(x, y)))
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()


class CutLoCo(LoCo):
    """The same gradients from one graph without a detach: each is asked for two modules alone."""

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        losses: list[Tensor] = []
        window: list[nn.Module] = []
        for module, objective in zip(self.modules, self.objectives, strict=True):
            x = module(x)
            losses.append(objective(x, y))
            window = [*window, module, objective][-4:]
            asked = [p for part in window for p in part.parameters() if p.requires_grad]
            found = torch.autograd.grad(losses[-1], asked, retain_graph=True, allow_unused=True)
            for p, gradient in zip(asked, found, strict=True):
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad + gradient
        return torch.stack(losses).detach()


@pytest.mark.parametrize("stage", [LoCo, SummedLoCo, CutLoCo])
def test_overlapping_windows_are_not_end_to_end(
    stage: type[Stage], batch: tuple[Tensor, Tensor]
) -> None:
    measured = audit(OfStage(stage), relu_net(4), batch)
    (seen,) = measured.stages
    assert seen.crossed == (0, 1, 2)  # each boundary, but by three errors
    assert seen.ways == ((1, 0), (2, 1), (3, 2))
    assert measured.category == "weakly modular" and not measured.isolated
    assert measured.locks == {"forward": True, "update": True, "backward": True}
    assert measured.later == ("yes", "yes", "yes", "no")
    if stage is not SummedLoCo:
        assert seen.reached() == [{0}, {0, 1}, {1, 2}, {2, 3}]
    assert (
        audit(OfStage(stage), relu_net(2), batch).category == "end-to-end"
    )  # one window holds all


class Accumulating(LoCo):
    """One error at the end; its gradient is summed over two halves of the batch."""

    def losses(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        for half, labels in zip(x.chunk(2), y.chunk(2), strict=True):
            yield self.objectives[-1](nn.Sequential(*self.modules)(half), labels)


class AskedFor(Accumulating):
    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = next(self.losses(torch.cat([x, x]), torch.cat([y, y])))
        asked = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        for p, gradient in zip(asked, torch.autograd.grad(loss, asked), strict=True):
            p.grad = gradient
        return loss.detach()[None]


class DeeplySupervised(Stage):
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return summed_step(self, x, y, boundary=False)


@pytest.mark.parametrize("stage", [Accumulating, AskedFor, DeeplySupervised])
@pytest.mark.parametrize("frozen", [[], [0], [1], [0, 1], [2]])
def test_one_error_that_goes_back_through_all_modules_is_end_to_end(
    stage: type[Stage], frozen: list[int], batch: tuple[Tensor, Tensor]
) -> None:
    net = relu_net(3)
    for k in frozen:
        net[k].requires_grad_(False)
    measured = audit(OfStage(stage), net, batch)
    assert measured.category == "end-to-end"
    first = min({0, 1, 2}.difference(frozen))
    assert (2, first) in measured.stages[0].ways
    assert measured.isolated == (first == 2)


def test_each_local_pass_stays_in_its_module(batch: tuple[Tensor, Tensor]) -> None:
    (local,) = audit(LocalLearning(), relu_net(3), batch).stages
    assert local.ways == ((0, 0), (1, 1), (2, 2))
    assert audit(E2EBP(), relu_net(3), batch).stages[0].ways == ((2, 0),)


def test_gradients_of_what_is_not_in_the_network_cross_no_boundary(
    batch: tuple[Tensor, Tensor],
) -> None:
    class Scaled(Stage):
        def step(self, x: Tensor, y: Tensor) -> Tensor:
            scale = torch.ones((), requires_grad=True)  # no module's: it stands between them
            losses = []
            for module, objective in zip(self.modules, self.objectives, strict=True):
                x = module(scale * x.detach())
                losses.append(objective(x, y))
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            return torch.stack(losses).detach()

    assert audit(OfStage(Scaled), relu_net(3), batch).isolated


class ReadOutAfterwards(Method):
    """Hidden modules together, the output module when they are done."""

    def __init__(self, inner: Method) -> None:
        super().__init__()
        self.inner = inner

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        (stage,) = self.inner.stages(net, x)
        hidden, output = slice(-1), slice(-1, None)
        first, last = (
            Stage(stage.modules[part], stage.objectives[part], stage.optimizers[part])
            for part in (hidden, output)
        )
        last.frozen = stage.modules[hidden]
        return [first, last]


def patch_net(modules: int) -> ModularNetwork:
    net = networks.patch_cnn((8, 8, 8)[: modules - 1], size=8, patch=4, stride=2, seed=0)
    return partition(net, [f"conv{k}" for k in range(2, modules)] + ["join"])


@pytest.mark.parametrize("modules", [3, 4])
@pytest.mark.parametrize(
    ("make", "cut"),
    [
        (LocalLearning, relu_net),
        (partial(LocalLearning, HSIC(50.0)), relu_net),
        (partial(greedy_infomax, steps=1, grid=3), patch_net),
    ],
)
def test_the_category_does_not_hang_on_when_the_output_module_is_trained(
    make: Callable[[], Method],
    cut: Callable[[int], ModularNetwork],
    modules: int,
    batch: tuple[Tensor, Tensor],
) -> None:
    together, afterwards = (
        audit(method, cut(modules), batch) for method in (make(), ReadOutAfterwards(make()))
    )
    assert together.category == afterwards.category == "weakly modular"
    assert together.end_to_end_forward and afterwards.end_to_end_forward
    assert together.later == afterwards.later == ("no",) * modules
    assert together.labels == afterwards.labels


def test_what_each_update_needs_stands_beside_the_category(batch: tuple[Tensor, Tensor]) -> None:
    table = {
        name: (measured.later, measured.earlier)
        for name, measured in {
            "E2EBP": audit(E2EBP(), relu_net(3), batch),
            "local": audit(LocalLearning(), relu_net(3), batch),
            "stored": audit(PROXY(cache_features=True), relu_net(3), batch),
            "targets": audit(DifferenceTargetPropagation(), tanh_net(3), batch),
        }.items()
    }
    no, yes = "no", "yes"
    assert table == {
        "E2EBP": ((yes, yes, no), (no, yes, yes)),
        "local": ((no, no, no), (no, yes, yes)),
        "stored": ((no, no, no), (no, no, no)),
        "targets": ((yes, yes, no), (no, yes, yes)),
    }


def test_targets_are_news_from_above(batch: tuple[Tensor, Tensor]) -> None:
    (targets,) = audit(DifferenceTargetPropagation(), tanh_net(4), batch).stages
    assert targets.told == (0, 1, 2) and targets.crossed == ()
    assert targets.backward_bytes == (0, 0, ONE)  # the loss's gradient, where targets begin
    (local,) = audit(LocalLearning(), relu_net(4), batch).stages
    assert local.told == ()


def test_stored_features_open_the_forward_lock(batch: tuple[Tensor, Tensor]) -> None:
    stored = audit(PROXY(cache_features=True), relu_net(3), batch)
    assert stored.category == "modular"
    assert not any(stored.locks.values())
    assert [stage.forward_bytes for stage in stored.stages] == [(0, 0), (ONE, 0), (0, ONE)]
    assert audit(PROXY(), relu_net(3), batch).labels == stored.labels


def test_two_modules_in_one_are_noticed(batch: tuple[Tensor, Tensor]) -> None:
    measured = audit(Pairwise(), relu_net(3), batch)
    assert not measured.isolated
    assert measured.locks == {"forward": True, "update": True, "backward": True}
    assert measured.category == "weakly modular"  # no pass goes through the whole network
    assert measured.stages[0].backward_bytes == (ONE, 0)


# --- the audit disturbs nothing -------------------------------------------------------------------


@pytest.mark.parametrize("method", [E2EBP, LocalLearning, PROXY, IN_TURN])
def test_network_method_and_random_state_stay_as_they_are(
    method: Callable[[], Method], batch: tuple[Tensor, Tensor]
) -> None:
    net = partition(
        networks.cnn((4, 8), 10, channels=1, size=8, stride=1, kernel="relu", seed=0),
        ["conv3", "features"],
    )
    net[1].eval()
    learner = method()
    weights, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    options = {k: repr(v) for k, v in vars(learner).items()}
    images, labels = batch[0].clone(), batch[1].clone()
    random_state, backward = torch.get_rng_state(), torch.autograd.backward
    first, second = audit(learner, net, batch), audit(learner, net, batch)
    assert first == second
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert [m.training for m in net.modules()] == modes
    assert {k: repr(v) for k, v in vars(learner).items()} == options
    assert torch.equal(images, batch[0])
    assert torch.equal(labels, batch[1])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.autograd.backward is backward
    for module in net.modules():
        assert not module._forward_hooks


def test_a_step_that_fails_leaves_no_hooks_behind(batch: tuple[Tensor, Tensor]) -> None:
    class Fails(Objective):
        def forward(self, h: Tensor, y: Tensor) -> Tensor:
            raise RuntimeError("no")

    backward = torch.autograd.backward
    with pytest.raises(RuntimeError, match="no"):
        audit(LocalLearning(Fails()), relu_net(3), batch)
    assert torch.autograd.backward is backward


def test_an_audit_needs_modules(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(TypeError, match=r"net is a Sequential, but an audit needs modules: give"):
        audit(E2EBP(), networks.mlp([64, 10]), batch)  # type: ignore[arg-type]


def test_summary_is_plain_data_and_the_table_says_the_same(batch: tuple[Tensor, Tensor]) -> None:
    measured = audit(PROXY(), relu_net(3), batch)
    summary = json.loads(json.dumps(measured.summary()))
    assert summary["category"] == "modular"
    assert summary["labels"] == ["pairs", "pairs", "classes"]
    assert summary["peak_saved_bytes"] == measured.peak_saved_bytes > 0
    table = str(measured)
    assert "ProxyObjective, 3 modules" in table
    assert "isolated              yes" in table
    assert "labels              pairs, pairs, classes" in table
    assert "later weights       no, no, no" in table
    assert "earlier ones to run no, yes, yes" in table
    assert "end-to-end forward    no" in table
    assert f"{measured.peak_saved_bytes:,}" in table
