"""Methods against loops written by hand, and the isolation that gives them their names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from summed import summed_step
from torch import Tensor, nn
from torch.nn import functional as F

from modlib import networks
from modlib.data import Augment, Dataset, Loader, load
from modlib.kernels import FeatureMap
from modlib.measure.audit import audit
from modlib.methods import (
    E2EBP,
    DifferenceTargetPropagation,
    LocalLearning,
    Method,
    ProxyObjective,
    Stage,
    SyntheticGradients,
    local,
    method,
    sgd,
    synthetic_gradients,
    target_propagation,
)
from modlib.methods.cache import CachedFeatures, CachingStage
from modlib.methods.synthetic_gradients import SyntheticStage
from modlib.methods.target_propagation import TargetStage
from modlib.network import ModularNetwork, partition
from modlib.objectives import AuxiliaryClassifier, CrossEntropy, Objective, SupCon
from modlib.training import fit, loop


def relu_net(modules: int = 3) -> ModularNetwork:
    net = networks.mlp([64, *[12] * modules, 10], kernel="relu", seed=0)
    return partition(net, [f"layer{k}" for k in range(2, modules)] + ["features"])


def conv_net() -> ModularNetwork:
    """With batch norm, three modules, the last one behind a feature map."""
    net = networks.cnn((4, 8), 10, channels=1, size=8, stride=1, kernel="relu", seed=0)
    return partition(net, ["conv3", "features"])


def tanh_net(modules: int = 3) -> ModularNetwork:
    sizes = [64, *[12] * (modules - 1), 10]
    return partition(networks.mlp(sizes, activation=nn.Tanh, boundary="after", seed=0), modules)


METHODS: dict[str, tuple[Callable[[], Method], Callable[[], ModularNetwork]]] = {
    "E2EBP": (E2EBP, conv_net),
    "LocalLearning": (LocalLearning, conv_net),
    "LocalLearning in turn": (lambda: LocalLearning(in_turn=True), conv_net),
    "ProxyObjective": (lambda: ProxyObjective(SupCon(kernel="relu")), conv_net),
    "DifferenceTargetPropagation": (DifferenceTargetPropagation, tanh_net),
    "SyntheticGradients": (SyntheticGradients, conv_net),
}
ISOLATED = [name for name in METHODS if name != "E2EBP"]
STRICTLY_MODULAR = ["LocalLearning in turn", "ProxyObjective"]


@pytest.fixture
def batch(digits: Dataset) -> tuple[Tensor, Tensor]:
    return Loader(digits).sample(64)


def ready(name: str, batch: tuple[Tensor, Tensor]) -> tuple[ModularNetwork, list[Stage]]:
    make_method, make_net = METHODS[name]
    net = make_net()
    torch.manual_seed(0)
    return net, make_method().stages(net, batch[0])


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- against plain PyTorch ------------------------------------------------------------------------


SHIFT = Augment(pad=1, flip=False)


def bare_loop(
    net: nn.Module, data: Dataset, epochs: int, rate: Callable[[float], float]
) -> list[float]:
    """End-to-end backpropagation as anybody would write it; the mean loss of each epoch."""
    optimizer = torch.optim.SGD(
        net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    loader = Loader(data, batch_size=64, augment=SHIFT)
    means = []
    for epoch in range(epochs):
        net.train()
        total = torch.zeros(())
        for step, (x, y) in enumerate(loader.epoch(seed=3, epoch=epoch)):
            progress = (epoch * len(loader) + step) / (epochs * len(loader))
            optimizer.param_groups[0]["lr"] = 0.1 * rate(progress)
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = total + loss.detach()
        means.append((total / len(loader)).item())
    return means


@pytest.mark.parametrize("method_and_modules", [(E2EBP, 3), (E2EBP, 1), (LocalLearning, 1)])
@pytest.mark.parametrize(
    ("schedule", "rate"),
    [
        ("constant", lambda p: 1.0),
        ("one-cycle", lambda p: p / 0.2 if p < 0.2 else (1 - p) / 0.8),
    ],
)
def test_end_to_end_is_plain_pytorch_bit_for_bit(
    method_and_modules: tuple[Callable[[], Method], int],
    schedule: str,
    rate: Callable[[float], float],
    digits: Dataset,
) -> None:
    make, modules = method_and_modules
    plain = networks.cnn((4, 8), 10, channels=1, size=8, stride=1, kernel="relu", seed=0)
    net = partition(copy.deepcopy(plain), modules)
    expected = bare_loop(plain, digits, epochs=2, rate=rate)
    history = fit(
        net,
        make(),
        digits,
        epochs=2,
        batch_size=64,
        seed=3,
        schedule=schedule,
        augment=SHIFT,
        progress=False,
    )
    assert [row["losses"] for row in history.rows] == [[mean] for mean in expected]
    for ours, theirs in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def heads_of(net: ModularNetwork, x: Tensor) -> list[AuxiliaryClassifier]:
    return [AuxiliaryClassifier("linear").for_module(shape, 10) for shape in net.shapes(x)[:-1]]


def hand_written(
    net: ModularNetwork, heads: list[Any], steps: list[tuple[Tensor, Tensor]], pass_on_new: bool
) -> list[list[float]]:
    """Decoupled greedy learning; optionally the wrong way, handing on the output after the update."""
    objectives = [*heads, CrossEntropy()]
    parameters = [[*m.parameters(), *o.parameters()] for m, o in zip(net, objectives, strict=True)]
    optimizers = [torch.optim.SGD(p, 0.1, momentum=0.9) for p in parameters]
    values = []
    for x, y in steps:
        row = []
        for module, objective, optimizer in zip(net, objectives, optimizers, strict=True):
            out = module(x)
            loss = objective(out, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            row.append(loss.item())
            x = module(x).detach() if pass_on_new else out.detach()
        values.append(row)
    return values


def test_local_learning_is_the_loop_written_by_hand(digits: Dataset) -> None:
    steps = list(Loader(digits, batch_size=64).epoch(0, 0))
    net = relu_net()
    heads = heads_of(net, steps[0][0])
    by_hand, their_heads = copy.deepcopy(net), copy.deepcopy(heads)
    wrong, wrong_heads = copy.deepcopy(net), copy.deepcopy(heads)
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    objectives = [*heads, CrossEntropy()]
    optimizers = [
        make([*m.parameters(), *o.parameters()]) for m, o in zip(net, objectives, strict=True)
    ]
    stage = Stage(list(net), objectives, optimizers)
    losses = [stage.step(x, y).tolist() for x, y in steps]
    assert losses == hand_written(by_hand, their_heads, steps, pass_on_new=False)
    assert same_state(state(net), state(by_hand))
    for ours, theirs in zip(heads, their_heads, strict=True):
        assert same_state(state(ours), state(theirs))
    hand_written(wrong, wrong_heads, steps, pass_on_new=True)
    assert not same_state(state(wrong), state(by_hand))


def test_in_turn_is_the_loop_written_by_hand(digits: Dataset) -> None:
    """Greedy learning: module by module, the earlier ones in eval mode."""
    steps = list(Loader(digits, batch_size=64).epoch(0, 0))
    net = conv_net()
    learner = LocalLearning(
        AuxiliaryClassifier("linear"), in_turn=True, optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    torch.manual_seed(0)
    by_hand = copy.deepcopy(net)
    stages = learner.stages(net, steps[0][0])
    torch.manual_seed(0)
    objectives = [*heads_of(by_hand, steps[0][0]), CrossEntropy()]
    for k, stage in enumerate(stages):
        stage.train()
        optimizer = torch.optim.SGD([*by_hand[k].parameters(), *objectives[k].parameters()], 0.1)
        for x, y in steps:
            loss = stage.step(x, y)
            with torch.no_grad():
                for frozen in by_hand[:k]:
                    x = frozen.eval()(x)
            expected = objectives[k](by_hand[k].train()(x), y)
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
            assert loss.tolist() == [expected.item()]
    assert same_state(state(net), state(by_hand))


# --- isolation ------------------------------------------------------------------------------------


@pytest.fixture
def reached(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[list[set[int]], list[ModularNetwork]]]:
    """For each backward pass of an update, the modules with a gradient: counted without the audit."""
    seen: list[set[int]] = []
    watched: list[ModularNetwork] = []

    @contextmanager
    def descending(
        optimizer: torch.optim.Optimizer, scaler: Any, fused: bool = False
    ) -> Iterator[None]:
        for parameter in watched[0].parameters():
            parameter.grad = None
        optimizer.zero_grad(set_to_none=True)
        yield
        seen.append(
            {k for k, m in enumerate(watched[0]) if any(p.grad is not None for p in m.parameters())}
        )
        optimizer.step()

    def update(loss: Tensor, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        with descending(optimizer, scaler):
            loss.backward()

    monkeypatch.setattr(method, "descending", descending)
    monkeypatch.setattr(target_propagation, "update", update)
    monkeypatch.setattr(synthetic_gradients, "update", update)
    yield seen, watched


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_reaches_another_module(
    name: str, batch: tuple[Tensor, Tensor], reached: tuple[list[set[int]], list[ModularNetwork]]
) -> None:
    seen, watched = reached
    net, stages = ready(name, batch)
    watched.append(net)
    for stage in stages:
        stage.train()
        stage.step(*batch)
    if name == "E2EBP":
        assert seen == [{0, 1, 2}]
        return
    assert all(len(modules) <= 1 for modules in seen)
    assert [modules for modules in seen if modules] == [{0}, {1}, {2}]


@pytest.mark.parametrize("name", METHODS)
def test_a_module_learns_the_same_whatever_the_later_ones_are(
    name: str, batch: tuple[Tensor, Tensor]
) -> None:
    """The first module's update, with other weights in all later modules; only gradients and
    targets could tell it about them."""
    updates = []
    for scale in (1.0, 2.0):
        net, stages = ready(name, batch)
        with torch.no_grad():
            for module in list(net)[1:]:
                for parameter in module.parameters():
                    parameter.mul_(scale)
        stages[0].train()
        stages[0].step(*batch)
        updates.append(state(net[0]))
    sees_later_modules = name in ("E2EBP", "DifferenceTargetPropagation")
    assert same_state(*updates) != sees_later_modules


def without_boundary(self: Stage, x: Tensor, y: Tensor) -> Tensor:
    """Stage.step with its detach removed: one backward pass of the summed losses."""
    for module in self.frozen:
        x = module(x)
    return summed_step(self, x, y, boundary=False)


def outputs_with_graph(self: TargetStage, x: Tensor) -> list[Tensor]:
    """TargetStage._outputs without its no_grad."""
    outputs = []
    for module in self.modules[:-1]:
        x = module(x)
        outputs.append(x)
    return outputs


def input_with_graph(
    self: SyntheticStage, k: int, x: Tensor, h: Tensor
) -> tuple[Tensor, Tensor | None]:
    """SyntheticStage._input without its detach."""
    if k:
        h.retain_grad()
    return h, None


@pytest.mark.parametrize("name", ISOLATED)
def test_the_audit_notices_a_removed_boundary(
    name: str, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_method, make_net = METHODS[name]
    assert audit(make_method(), make_net(), batch).isolated
    if name == "DifferenceTargetPropagation":
        monkeypatch.setattr(TargetStage, "_outputs", outputs_with_graph)
        monkeypatch.setattr(TargetStage, "_targets", lambda self, outputs, y: outputs)
        monkeypatch.setattr(target_propagation, "_distance", lambda a, b: a.square().sum())
        monkeypatch.setattr(
            target_propagation, "update", lambda loss, *rest: loss.backward(retain_graph=True)
        )
    elif name == "SyntheticGradients":
        monkeypatch.setattr(SyntheticStage, "_input", input_with_graph)
        monkeypatch.setattr(
            synthetic_gradients, "update", lambda loss, *rest: loss.backward(retain_graph=True)
        )
    else:
        monkeypatch.setattr(Stage, "step", without_boundary)
    measured = audit(make_method(), make_net(), batch)
    assert not measured.isolated
    assert measured.locks["backward"]


def test_the_boundary_alone_keeps_gradients_apart(batch: tuple[Tensor, Tensor]) -> None:
    """Without the detach the second backward pass runs into the first one's freed graph."""

    class Attached(Tensor):
        def detach(self) -> Tensor:
            return self

    net = relu_net()
    heads = heads_of(net, batch[0])
    objectives = [*heads, CrossEntropy()]
    optimizers = [
        torch.optim.SGD([*m.parameters(), *o.parameters()], 0.1)
        for m, o in zip(net, objectives, strict=True)
    ]
    stage = Stage(list(net), objectives, optimizers)
    stage.step(*batch)
    with pytest.raises(RuntimeError, match="second time"):
        stage.step(batch[0].as_subclass(Attached), batch[1])


@pytest.mark.parametrize("name", STRICTLY_MODULAR)
@pytest.mark.parametrize("cached", [False, True])
def test_strictly_modular_training_never_runs_a_later_module(
    name: str, cached: bool, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = conv_net()
    objective = SupCon(kernel="relu") if name == "ProxyObjective" else AuxiliaryClassifier("linear")
    learner: LocalLearning = (
        ProxyObjective(objective, cache_features=cached)
        if name == "ProxyObjective"
        else LocalLearning(objective, in_turn=True, cache_features=cached)
    )
    ran: list[int] = []
    frozen: dict[int, dict[str, Tensor]] = {}
    for k, module in enumerate(net):
        module.register_forward_hook(lambda *_, k=k: ran.append(k))
    rehearse = loop.rehearse

    def rehearsed(*run: Any) -> None:
        """The last thing before training: until here stages took steps that changed nothing."""
        rehearse(*run)
        ran.clear()

    monkeypatch.setattr(loop, "rehearse", rehearsed)
    ran_in: dict[tuple[int, int], set[int]] = {}

    def after_epoch(_: nn.Module, row: dict[str, Any]) -> None:
        stage = row["stage"]
        ran_in[stage, row["epoch"]] = set(ran)
        ran.clear()
        for k in range(stage):
            assert same_state(frozen[k], state(net[k])), "a frozen module changed"
        frozen[stage] = state(net[stage])

    fit(net, learner, digits, epochs=2, augment=None, progress=False, after_epoch=after_epoch)
    assert ran_in[0, 0] == ran_in[0, 1] == {0}
    assert ran_in[1, 0] == {0, 1}
    assert ran_in[1, 1] == ({1} if cached else {0, 1})


@pytest.mark.parametrize("name", STRICTLY_MODULAR)
def test_frozen_modules_are_in_eval_mode_and_stay_as_they_are(
    name: str, batch: tuple[Tensor, Tensor]
) -> None:
    """Batch norm's running statistics included: they would change in training mode."""
    net, stages = ready(name, batch)
    net.train()
    for k, stage in enumerate(stages):
        before = [state(module) for module in net]
        for _ in range(2):
            stage.train()
            stage.step(*batch)
        assert [module.training for module in net[: k + 1]] == [False] * k + [True]
        changed = [not same_state(b, state(m)) for b, m in zip(before, net, strict=True)]
        assert changed == [i == k for i in range(len(net))]


def test_frozen_parameters_get_no_gradient(batch: tuple[Tensor, Tensor]) -> None:
    net, stages = ready("ProxyObjective", batch)
    stages[2].train()
    stages[2].step(*batch)
    assert all(p.grad is None for k in (0, 1) for p in net[k].parameters())
    assert all(p.grad is not None for p in net[2].parameters())


# --- features computed once -----------------------------------------------------------------------


def caching(net: ModularNetwork, views: int | None) -> CachingStage:
    optimizer = torch.optim.SGD(net[2].parameters(), 0.1)
    return CachingStage([net[2]], [CrossEntropy()], [optimizer], [net[0], net[1]], views=views)


def test_cached_features_are_the_frozen_modules_output(digits: Dataset) -> None:
    net = conv_net()
    loader = Loader(digits, batch_size=100)
    cached = caching(net, None).batches(loader, seed=0)
    with torch.no_grad():
        expected = {
            tuple(row.flatten().tolist()): int(label)
            for x, y in loader.epoch(0, 0)
            for row, label in zip(net[1](net[0](x)), y, strict=True)
        }
    assert (len(cached), cached.random) == (5, False)
    for epoch in range(2):
        got = [
            (tuple(row.flatten().tolist()), int(label))
            for x, y in cached.epoch(7, epoch)
            for row, label in zip(x, y, strict=True)
        ]
        assert len(got) == 500
        assert dict(got) == expected
    orders = [torch.cat([y for _, y in cached.epoch(7, epoch)]) for epoch in (0, 1, 0)]
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    assert [len(y) for _, y in cached.epoch(7, 0)] == [100] * 5


def test_epochs_take_the_cached_views_in_turn(digits: Dataset) -> None:
    loader = Loader(digits, batch_size=64, augment=SHIFT)
    cached = caching(conv_net(), views=2).batches(loader, seed=0)
    assert isinstance(cached, CachedFeatures)
    sets = [
        {tuple(row.tolist()) for x, _ in cached.epoch(0, epoch) for row in x.flatten(1)}
        for epoch in range(3)
    ]
    assert sets[0] == sets[2]
    assert sets[0] != sets[1]


@pytest.mark.parametrize("learner", [ProxyObjective, partial(LocalLearning, in_turn=True)])
def test_caching_refuses_to_freeze_the_augmentation(
    learner: Callable[..., Method], digits: Dataset, tmp_path: Path
) -> None:
    """Before anything is trained or written."""
    net = conv_net()
    before = state(net)
    objective = SupCon(kernel="relu")
    with pytest.raises(ValueError, match="views=V"):
        fit(
            net,
            learner(objective, cache_features=True),
            digits,
            augment=SHIFT,
            checkpoint=tmp_path / "run.pt",
            progress=False,
        )
    assert same_state(before, state(net))
    assert not list(tmp_path.iterdir())
    for options in ({"augment": None}, {}):
        views = None if options else 2
        method_ = learner(objective, cache_features=True, views=views)
        history = fit(conv_net(), method_, digits, epochs=1, progress=False, **options)
        assert len(history.rows) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_features": True}, "needs in_turn=True"),
        ({"views": 2}, "only together with cache_features=True"),
        ({"in_turn": True, "cache_features": True, "views": 0}, "views=0: give at least 1"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalLearning(**options)


# --- steps on a single image ----------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("norm", [False, True])
def test_a_batch_of_one_image_trains_or_is_refused_before_work(
    name: str, norm: bool, digits: Dataset, tmp_path: Path
) -> None:
    kernel = "relu" if name == "ProxyObjective" else None
    net = partition(networks.mlp([64, 12, 12, 10], norm=norm, kernel=kernel, seed=0), 3)
    if name == "ProxyObjective":
        net = partition(net, ["layer2", "features"])
    before = state(net)
    path = tmp_path / "run.pt"
    few = digits.subset(n_train=20, n_test=20)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 1, "progress": False, "checkpoint": path}
    if not norm and name in ("E2EBP", "DifferenceTargetPropagation", "SyntheticGradients"):
        fit(net, METHODS[name][0](), few, **options)
        assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
        return
    with pytest.raises(
        ValueError, match=r"^batch_size.*give (batch_size=2 or more|a larger batch_size)"
    ):
        fit(net, METHODS[name][0](), few, **options)
    assert same_state(before, state(net))
    assert not list(tmp_path.iterdir())
    fit(net, METHODS[name][0](), few, **(options | {"batch_size": 10}))  # as the sentence says


# --- what a network must be -----------------------------------------------------------------------


def test_modular_training_needs_a_feature_map(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="output module begins with Layer, but modular training"):
        ProxyObjective().stages(tanh_net(), batch[0])
    with pytest.raises(ValueError, match="kernel is 'tanh', but the output module's feature map"):
        ProxyObjective(SupCon(kernel="tanh")).stages(relu_net(), batch[0])


@pytest.mark.parametrize("modules", [1, 2])
def test_target_propagation_needs_three_modules(modules: int, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="at least three modules"):
        DifferenceTargetPropagation().stages(tanh_net(modules), batch[0])


def test_target_propagation_needs_vectors_or_maps(batch: tuple[Tensor, Tensor]) -> None:
    tokens = networks.vit(8, 2, 10, heads=2, channels=1, size=8, seed=0)
    with pytest.raises(
        ValueError, match=r"vectors \(d,\) or maps \(C, H, W\), but they have shapes"
    ):
        DifferenceTargetPropagation().stages(partition(tokens, 3), batch[0])


def test_a_module_needs_something_to_train(batch: tuple[Tensor, Tensor]) -> None:
    layers = [nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), FeatureMap("relu"), nn.Linear(8, 10)]
    net = partition(nn.Sequential(*layers), ["2", "3"])
    with pytest.raises(ValueError, match="module 1 has nothing to train"):
        ProxyObjective(SupCon(kernel="relu")).stages(net, batch[0])


def test_the_default_rates_of_modular_training_solve_the_heads_problem() -> None:
    """A first comparison is made with defaults: with the hidden modules' rate the head ends near 1.5."""
    data = load("digits")
    net = partition(networks.mlp([64, 64, 10], kernel="relu", seed=0), ["features"])
    history = fit(net, ProxyObjective(SupCon(kernel="relu")), data, epochs=5, progress=False)
    assert history.final["losses"][0] < 0.3
    assert history.final["test_accuracy"] > 0.96
    for modules, rates in ((1, [1.0]), (3, [0.1, 0.1, 1.0])):
        made = [
            make([nn.Parameter(torch.zeros(1))])
            for make in ProxyObjective().default_optimizers(modules)
        ]
        assert [optimizer.defaults["lr"] for optimizer in made] == rates
        assert made[-1].defaults["weight_decay"] == 0


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("adamw", "optimizer='adamw' makes no optimiser; give a function of the parameters"),
        (["sgd"], "optimizer='sgd' makes no optimiser"),
        (torch.optim.SGD([torch.zeros(1)]), r"optimizer=SGD \( .* makes no optimiser"),
        (lambda parameters: 3, r"optimizer=<function .* makes no optimiser"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_what_makes_no_optimizer_is_refused(
    name: str, optimizer: Any, message: str, digits: Dataset
) -> None:
    kind = {"LocalLearning in turn": partial(LocalLearning, in_turn=True)}.get(name)
    kind = kind or {"ProxyObjective": partial(ProxyObjective, SupCon(kernel="relu"))}.get(name)
    make = kind or METHODS[name][0]
    if isinstance(optimizer, list):
        optimizer = optimizer * (1 if name == "E2EBP" else 3)
    with pytest.raises(TypeError, match=message):
        fit(METHODS[name][1](), make(optimizer=optimizer), digits, progress=False)
    with pytest.raises(TypeError, match=r"inverse_optimizer='adam' makes no optimiser"):
        learner = DifferenceTargetPropagation(inverse_optimizer="adam")  # type: ignore[arg-type]
        fit(tanh_net(), learner, digits, progress=False)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "LocalLearning in turn"])
def test_optimizers_may_be_one_for_all_or_one_for_each(
    name: str, batch: tuple[Tensor, Tensor]
) -> None:
    make_net = METHODS[name][1]
    count = 1 if name == "E2EBP" else 3
    rates = [0.1 * (k + 1) for k in range(count)]
    kind: Any = {"E2EBP": E2EBP, "LocalLearning": LocalLearning}.get(name)
    kind = kind or (
        DifferenceTargetPropagation
        if name == "DifferenceTargetPropagation"
        else partial(ProxyObjective, SupCon(kernel="relu"))
    )
    stages = kind(optimizer=[sgd(rate) for rate in rates]).stages(make_net(), batch[0])
    optimizers = [o for stage in stages for o in stage.optimizers][:count]
    assert [o.param_groups[0]["lr"] for o in optimizers] == rates
    with pytest.raises(ValueError, match=f"optimizer: {count + 1} given for {count} modules"):
        kind(optimizer=[sgd()] * (count + 1)).stages(make_net(), batch[0])


def test_objectives_are_instances() -> None:
    for build in (E2EBP, LocalLearning, ProxyObjective):
        with pytest.raises(TypeError, match=r"objective=<class .*CrossEntropy'> is no Objective"):
            build(CrossEntropy)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"output=Linear\(.*\) is no Objective; give one"):
        LocalLearning(output=nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_method_must_say_what_it_does() -> None:
    with pytest.raises(NotImplementedError, match="Method must define stages"):
        Method().stages(relu_net(), torch.zeros(1, 64))


class Counting(Objective):
    """An objective with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(h, y)


@pytest.mark.parametrize("kind", [E2EBP, LocalLearning])
def test_a_method_can_be_used_again(kind: type[Method], batch: tuple[Tensor, Tensor]) -> None:
    """What a run trains, the objectives' weights included, belongs to that run alone."""
    objective = Counting()
    learner = E2EBP(objective) if kind is E2EBP else LocalLearning(output=objective)
    for _ in range(2):
        (stage,) = learner.stages(relu_net(), batch[0])
        stage.step(*batch)
        assert stage.objectives[-1].scale != 1.0
        assert objective.scale == 1.0


def test_sgd_drops_nesterov_without_momentum() -> None:
    weight = [nn.Parameter(torch.zeros(1))]
    assert sgd(momentum=0.0)(weight).defaults["nesterov"] is False
    assert sgd()(weight).defaults["nesterov"] is True


# --- difference target propagation ----------------------------------------------------------------

Array = NDArray[np.float64]


def affine(layer: nn.Module) -> tuple[Array, Array]:
    (linear,) = (m for m in layer.modules() if isinstance(m, nn.Linear))
    return linear.weight.detach().numpy().copy(), linear.bias.detach().numpy().copy()


def descend(
    weight: Array, bias: Array, given: Array, target: Array, rate: float
) -> tuple[float, Array, Array]:
    """One step of tanh(W u + b) towards its target: loss, new weight, new bias."""
    out = np.tanh(given @ weight.T + bias)
    loss = float(((out - target) ** 2).sum(1).mean())
    slope = 2 * (out - target) * (1 - out**2) / len(given)
    return loss, weight - rate * slope.T @ given, bias - rate * slope.sum(0)


def test_target_propagation_is_its_equations(batch: tuple[Tensor, Tensor]) -> None:
    """METHODS 1.9, one step written in NumPy: first the inverses learn, then targets go down."""
    rate, noise, step_size = 0.05, 0.3, 0.4
    make = partial(torch.optim.SGD, lr=rate)
    net = tanh_net(4).double()
    learner = DifferenceTargetPropagation(step_size, noise, make, make)
    (stage,) = learner.stages(net, batch[0].double())
    assert isinstance(stage, TargetStage)
    for inverse in stage.auxiliary:
        inverse.double()
    modules = [affine(module) for module in net]
    inverses = [affine(inverse) for inverse in stage.auxiliary]
    x, y = batch[0].double().flatten(1).numpy(), batch[1].numpy()
    n = len(y)

    torch.manual_seed(5)
    losses = stage.step(batch[0].double(), batch[1]).tolist()

    h = []
    for weight, bias in modules[:3]:
        h.append(np.tanh((h[-1] if h else x) @ weight.T + bias))
    torch.manual_seed(5)
    for k in range(2):
        corrupted = h[k] + noise * torch.randn(n, 12, dtype=torch.float64).numpy()
        after = np.tanh(corrupted @ modules[k + 1][0].T + modules[k + 1][1])
        _, *learned = descend(*inverses[k], after, corrupted, rate)
        inverses[k] = (learned[0], learned[1])
    weight, bias = modules[3]
    logits = h[2] @ weight.T + bias
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    task = -np.log(share[np.arange(n), y]).mean()
    slope = (share - np.eye(10)[y]) / n
    target = [h[2] - step_size * n * slope @ weight]  # the gradient of each image's own loss
    for k in (1, 0):
        g = [np.tanh(u @ inverses[k][0].T + inverses[k][1]) for u in (h[k + 1], target[0])]
        target.insert(0, h[k] - g[0] + g[1])
    expected = []
    for k in range(3):
        loss, *modules[k] = descend(*modules[k], h[k - 1] if k else x, target[k], rate)
        expected.append(loss)
    modules[3] = (weight - rate * slope.T @ h[2], bias - rate * slope.sum(0))

    np.testing.assert_allclose(losses, [*expected, task], rtol=1e-10)
    for layer, numbers in zip([*net, *stage.auxiliary], [*modules, *inverses], strict=True):
        for got, want in zip(affine(layer), numbers, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def trained(
    learner: Method, data: Dataset, sizes: list[int], epochs: int, augment: None = None
) -> float:
    net = networks.mlp(sizes, activation=nn.Tanh, boundary="after", seed=0)
    history = fit(
        partition(net, len(sizes) - 1),
        learner,
        data,
        epochs=epochs,
        batch_size=32,
        schedule="constant",
        augment=augment,
        progress=False,
    )
    return float(history.final["test_accuracy"])


def test_target_propagation_trains_the_hidden_modules(digits: Dataset) -> None:
    """Better than the same output module on hidden modules that stay random: seen 0.93 and 0.8."""
    rmsprop = partial(torch.optim.RMSprop, lr=1e-3)
    still = partial(torch.optim.SGD, lr=0.0)
    random_features = LocalLearning(
        AuxiliaryClassifier("linear"), optimizer=[still, still, rmsprop]
    )
    sizes = [64, 48, 48, 10]
    baseline = trained(random_features, digits, sizes, epochs=6)
    learned = trained(DifferenceTargetPropagation(), digits, sizes, epochs=6)
    assert learned > 0.85
    assert learned > baseline + 0.05


def test_target_propagation_on_mnist(real_data: Path) -> None:
    mnist = load("mnist", real_data).subset(n_train=2000, n_test=500)
    assert trained(DifferenceTargetPropagation(), mnist, [784, 80, 80, 80, 10], epochs=2) > 0.8


@pytest.mark.parametrize(
    "kind",
    [
        partial(LocalLearning, AuxiliaryClassifier("linear")),
        partial(LocalLearning, AuxiliaryClassifier("linear"), in_turn=True),
        partial(ProxyObjective, SupCon(0.1, "relu")),
    ],
)
def test_modules_that_learn_apart_learn_the_task(
    kind: Callable[..., Method], digits: Dataset
) -> None:
    net = partition(
        networks.cnn((8, 16), 10, channels=1, size=8, stride=1, kernel="relu", seed=0),
        ["conv3", "features"],
    )
    learner = kind(optimizer=[sgd(0.1), sgd(0.1), sgd(1.0, weight_decay=0.0)])
    history = fit(net, learner, digits, epochs=4, batch_size=32, progress=False)
    assert history.final["test_accuracy"] > 0.8


def test_objectives_are_asked_once_for_each_module(batch: tuple[Tensor, Tensor]) -> None:
    net = conv_net()
    objectives = local.LocalLearning().objectives(net, batch[0])
    assert len({id(o) for o in objectives}) == 3
    assert isinstance(objectives[-1], CrossEntropy)
