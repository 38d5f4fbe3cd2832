"""Synthetic gradients: equal to backpropagation where exact, to their equations where learned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from modlib import networks
from modlib.data import Dataset, Loader
from modlib.measure.angles import errors
from modlib.measure.audit import audit
from modlib.methods import E2EBP, ExactGradient, SyntheticGradients, sgd
from modlib.methods.synthetic_gradients import Predictor, SyntheticStage, gradient_errors
from modlib.network import ModularNetwork, partition
from modlib.training import fit

Batch = tuple[Tensor, Tensor]
Array = NDArray[np.float64]


def tanh_net(modules: int = 3) -> ModularNetwork:
    sizes = [64, *[12] * (modules - 1), 10]
    return partition(networks.mlp(sizes, activation=nn.Tanh, boundary="after", seed=0), modules)


def conv_net() -> ModularNetwork:
    """With batch norm, whose statistics must not be counted twice."""
    net = networks.cnn((4, 8), 10, channels=1, size=8, stride=1, kernel="relu", seed=0)
    return partition(net, ["conv2", "conv3", "features"])


@pytest.fixture
def batch(digits: Dataset) -> Batch:
    return Loader(digits).sample(64)


def stage_of(net: ModularNetwork, batch: Batch, learner: SyntheticGradients) -> SyntheticStage:
    torch.manual_seed(0)
    (stage,) = learner.stages(net, batch[0])
    assert isinstance(stage, SyntheticStage)
    stage.train()
    return stage


def still(lr: float = 0.0) -> Any:
    return partial(torch.optim.SGD, lr=lr)


# --- exact: backpropagation -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [tanh_net, partial(tanh_net, 5), conv_net])
def test_exact_synthetic_gradients_are_backpropagation(
    make: Callable[[], ModularNetwork], digits: Dataset
) -> None:
    """Weights and running statistics after some steps, against a loop in plain PyTorch."""
    net = make()
    plain = copy.deepcopy(net).train()
    steps = list(Loader(digits, batch_size=64).epoch(0, 0))
    descent = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    stage = stage_of(net, steps[0], SyntheticGradients(ExactGradient, optimizer=descent))
    optimizer = descent(plain.parameters())
    for x, y in steps:
        *_, loss = stage.step(x, y).tolist()
        expected = F.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), abs=1e-5)
    for ours, theirs in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert gradient_errors(stage, net, steps[0]) == pytest.approx([0.0] * (len(net) - 1), abs=1e-5)


# --- learned: the equations -----------------------------------------------------------------------


def affine(layer: nn.Module) -> tuple[Array, Array]:
    (linear,) = (m for m in layer.modules() if isinstance(m, nn.Linear))
    return linear.weight.detach().numpy().copy(), linear.bias.detach().numpy().copy()


@pytest.mark.parametrize("conditioned", [True, False])
def test_a_step_is_its_equations(conditioned: bool, batch: Batch) -> None:
    """Three steps written in NumPy: linear synthesisers from zero, each taught by the one above it."""
    rate, teach = 0.3, 0.02
    net = tanh_net().double()
    learner = SyntheticGradients(
        "linear",
        conditioned=conditioned,
        optimizer=still(rate),
        synthesiser_optimizer=still(teach),
    )
    stage = stage_of(net, (batch[0].double(), batch[1]), learner)
    x, y = batch[0].double().flatten(1).numpy(), batch[1].numpy()
    n, code = len(y), np.eye(10)[batch[1].numpy()]
    weights = [list(affine(module)) for module in net]
    synth = [[np.zeros((12, 12)), np.zeros(12), np.zeros((12, 10))] for _ in range(2)]
    for _ in range(3):
        losses = stage.step(batch[0].double(), batch[1]).tolist()
        h, sent, expected = x, None, []
        for k, (weight, bias) in enumerate(weights):
            z = h @ weight.T + bias
            if k < 2:
                out = np.tanh(z)
                a, b, c = synth[k]
                guess = out @ a.T + b + (code @ c.T if conditioned else 0)
                slope = guess * (1 - out**2)
            else:
                share = np.exp(z - z.max(1, keepdims=True))
                share /= share.sum(1, keepdims=True)
                slope = share - code
            arrived = slope @ weight
            weights[k] = [weight - rate * slope.T @ h / n, bias - rate * slope.mean(0)]
            if k:
                a, b, c = synth[k - 1]
                gap = sent - arrived
                expected.append((gap**2).sum(1).mean())
                synth[k - 1] = [
                    a - teach * 2 * gap.T @ h / n,
                    b - teach * 2 * gap.mean(0),
                    c - teach * 2 * gap.T @ code / n,
                ]
            if k < 2:
                h, sent = out, guess
        expected.append(-np.log(share[np.arange(n), y]).mean())
        np.testing.assert_allclose(losses, expected, rtol=1e-9)
    for module, want in zip(net, weights, strict=True):
        for got, wanted in zip(affine(module), want, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-11)
    for s, (a, b, c) in zip(stage.auxiliary, synth, strict=True):
        np.testing.assert_allclose(s.layers[0].weight.detach().numpy(), a, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(s.layers[0].bias.detach().numpy(), b, rtol=1e-8, atol=1e-12)
        if conditioned:
            np.testing.assert_allclose(s.labels.weight.detach().numpy().T, c, rtol=1e-8, atol=1e-12)


def test_synthesisers_begin_with_zero_and_news_goes_down_one_boundary_a_step(batch: Batch) -> None:
    net = tanh_net(4)
    learner = SyntheticGradients(optimizer=still(0.1), synthesiser_optimizer=still(0.1))
    stage = stage_of(net, batch, learner)
    for first in (3, 2, 1, 0):
        before = copy.deepcopy(net.state_dict())
        stage.step(*batch)
        moved = {name[0] for name, p in net.state_dict().items() if not p.equal(before[name])}
        assert moved == {str(k) for k in range(first, 4)}


def test_targets_do_not_depend_on_the_size_of_the_batch(batch: Batch) -> None:
    twice = batch[0].repeat(2, 1, 1, 1), batch[1].repeat(2)
    found = [
        stage_of(tanh_net(), given, SyntheticGradients(optimizer=still())).step(*given)
        for given in (batch, twice)
    ]
    torch.testing.assert_close(*found)
    assert found[0][1] > 0


# --- the regressor's loss must not move the module ------------------------------------------------


def attached(self: SyntheticStage, k: int, out: Tensor, y: Tensor) -> Tensor | None:
    """SyntheticStage._synthetic without its detach."""
    return None if k == len(self.modules) - 1 else self.auxiliary[k](out, y)


def own_gradients(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """What lies in the modules' gradients after a step, and what the synthetic gradients give by hand."""
    net = tanh_net()
    stage = stage_of(net, batch, SyntheticGradients(optimizer=still()))
    stage.step(*batch)
    stage.step(*batch)
    guesses, expected, h = copy.deepcopy(stage.auxiliary), [], batch[0]
    stage.step(*batch)
    for k, module in enumerate(net):
        given = h.detach()
        h = module(given)
        if k < 2:
            loss = (h * guesses[k](h.detach(), batch[1]).detach()).sum() / len(h)
        else:
            loss = F.cross_entropy(h, batch[1])
        expected += torch.autograd.grad(loss, list(module.parameters()))
    return [p.grad for p in net.parameters() if p.grad is not None], expected


def test_the_error_of_a_synthesiser_does_not_move_its_module(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.testing.assert_close(*own_gradients(batch))
    monkeypatch.setattr(SyntheticStage, "_synthetic", attached)
    with pytest.raises(RuntimeError, match="second time"):  # two losses in one graph
        own_gradients(batch)


# --- what the audit sees --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learner", "locks", "later"),
    [
        (SyntheticGradients(), {"forward"}, ("2 steps late", "1 step late", "no")),
        (
            SyntheticGradients("linear", conditioned=False),
            {"forward"},
            ("2 steps late", "1 step late", "no"),
        ),
        (SyntheticGradients(synthetic_inputs=True), set(), ("2 steps late", "1 step late", "no")),
        (
            SyntheticGradients(ExactGradient),
            {"forward", "update", "backward"},
            ("yes", "yes", "no"),
        ),
        (E2EBP(), {"forward", "update", "backward"}, ("yes", "yes", "no")),
    ],
)
def test_the_locks_that_are_seen(
    learner: SyntheticGradients, locks: set[str], later: tuple[str, ...], batch: Batch
) -> None:
    found = audit(learner, tanh_net(), batch)
    assert {name for name, on in found.locks.items() if on} == locks
    assert found.later == later
    assert found.category == ("end-to-end" if isinstance(learner, E2EBP) else "weakly modular")
    assert found.labels == ("classes",) * 3
    assert found.earlier == (("no", "yes", "yes") if "forward" in locks else ("no",) * 3)


def test_gradients_cross_boundaries_but_end_there(batch: Batch) -> None:
    (stage,) = audit(SyntheticGradients(), tanh_net(), batch).stages
    assert stage.crossed == ()
    assert stage.forward_bytes == stage.backward_bytes == (64 * 12 * 4,) * 2


def test_predicted_inputs_learn_what_the_module_below_gives(digits: Dataset) -> None:
    net = tanh_net()
    learner = SyntheticGradients(
        synthetic_inputs=True,
        optimizer=still(),
        synthesiser_optimizer=partial(torch.optim.Adam, lr=3e-3),
    )
    stage = stage_of(net, next(iter(Loader(digits, batch_size=64).epoch(0, 0))), learner)
    for epoch in range(20):
        for x, y in Loader(digits, batch_size=64).epoch(0, epoch):
            stage.step(x, y)
    with torch.no_grad():
        first = net[0](x)
        guess = stage.auxiliary[2](x)
        assert (guess - first).norm() < 0.2 * first.norm()
        second = net[1](guess)  # the target of the next one: what the module made of ITS prediction
        assert (stage.auxiliary[3](x) - second).norm() < 0.3 * second.norm()


# --- how exact ------------------------------------------------------------------------------------


def test_errors_against_differences_of_the_loss(batch: Batch) -> None:
    """The true gradient of one boundary by finite differences, in float64."""
    net = tanh_net().double()
    x, y = batch[0][:4].double(), batch[1][:4]
    stage = stage_of(net, (x, y), SyntheticGradients())
    for s in stage.auxiliary:
        nn.init.normal_(s.layers[-1].weight, std=0.1)
    first, _ = gradient_errors(stage, net, (x, y))
    with torch.no_grad():
        h = net[0](x)
        truth, step = torch.zeros_like(h), 1e-5
        for i in range(h.numel()):
            move = torch.zeros(h.numel(), dtype=torch.float64)
            move[i] = step
            up, down = (F.cross_entropy(net[1:](h + m.view_as(h)), y) for m in (move, -move))
            truth.view(-1)[i] = (up - down) / (2 * step)
        expected = (stage.auxiliary[0](h, y).double() / 4 - truth).norm() / truth.norm()
    assert first == pytest.approx(float(expected), rel=1e-4)


def test_nothing_is_as_good_as_an_error_of_one(batch: Batch) -> None:
    net = tanh_net()
    stage = stage_of(net, batch, SyntheticGradients())
    before = copy.deepcopy(net.state_dict())
    assert gradient_errors(stage, net, batch) == [1.0, 1.0]  # they begin with zero
    assert errors(stage, net, batch)[:2] == [None, None]  # no update at all
    assert all(p.equal(before[name]) for name, p in net.state_dict().items())


@pytest.mark.parametrize(("factor", "error"), [(1.0, 0.0), (2.0, 1.0), (-1.0, 2.0), (0.25, 0.75)])
def test_the_error_of_an_update_sees_its_length(factor: float, error: float, batch: Batch) -> None:
    class Times(ExactGradient):
        def forward(self, h: Tensor, y: Tensor) -> Tensor:
            return factor * super().forward(h, y)

    net = tanh_net()
    found = errors(stage_of(net, batch, SyntheticGradients(Times)), net, batch)
    assert found == pytest.approx([error, error, 0.0], abs=1e-5)


# --- training -------------------------------------------------------------------------------------


def accuracy(digits: Dataset, learner: Any, net: ModularNetwork) -> float:
    history = fit(net, learner, digits, epochs=12, batch_size=32, augment=None, progress=False)
    return float(history.final["test_accuracy"])


def test_conditioned_synthetic_gradients_train_the_hidden_modules(digits: Dataset) -> None:
    """Better than a last module alone on hidden ones that stay as they were drawn."""
    fast = partial(torch.optim.Adam, lr=5e-3)
    learned = SyntheticGradients(optimizer=fast, synthesiser_optimizer=fast)
    random = SyntheticGradients(optimizer=[still(), still(), fast])
    found = [accuracy(digits, learner, tanh_net()) for learner in (learned, random)]
    assert found[0] > 0.75 and found[0] > found[1] + 0.05, found


@pytest.mark.parametrize(
    ("learner", "named"),
    [
        (
            SyntheticGradients(optimizer=still(1e5), synthesiser_optimizer=still(1e5)),
            r"module \d's (loss|weights|synthesiser) became",
        ),
        (
            SyntheticGradients("linear", synthesiser_optimizer=still(1e3)),
            r"module \d's (loss|weights|synthesiser) became",
        ),
    ],
)
def test_rates_too_large_stop_with_a_sentence(
    learner: SyntheticGradients, named: str, digits: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(
        FloatingPointError, match=rf"^Stage 0, epoch \d+: {named} .*; lower the learning rate of"
    ):
        fit(
            tanh_net(),
            learner,
            digits,
            epochs=9,
            checkpoint=path,
            schedule="constant",
            progress=False,
        )
    state = torch.load(path, weights_only=False)
    assert all(t.isfinite().all() for t in state["net"].values())


def test_a_rate_a_hundred_times_too_large_stops_or_stays_finite(digits: Dataset) -> None:
    learner = SyntheticGradients(optimizer=sgd(10.0))
    net = tanh_net()
    try:
        fit(net, learner, digits, epochs=2, progress=False)
    except FloatingPointError as error:
        assert "lower the learning rate of the modules or of the synthesisers" in str(error)
    else:
        assert all(p.isfinite().all() for p in net.parameters())


# --- what is given --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((12,), (12,)),
        ((3, 8, 8), (5, 4, 4)),
        ((7, 6), (7, 4)),
        ((1, 8, 8), (12,)),
        ((9,), (2, 2, 2)),
    ],
)
def test_predictors_fit_vectors_maps_and_tokens(
    given: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    predictor = Predictor(given, wanted, [6], classes=10)
    h, y = torch.randn(3, *given), torch.tensor([1, 2, 2])
    found = predictor(h, y)
    assert found.shape == (3, *wanted)
    other = predictor(h, torch.tensor([4, 2, 2]))
    assert not found[0].allclose(other[0]) and torch.equal(found[1:], other[1:])
    changed = h.clone()
    changed[2] += 1
    assert not predictor(changed, y)[2].allclose(found[2])


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: SyntheticGradients("cnn"), ValueError, "synthesiser='cnn' is unknown; choose"),
        (lambda: SyntheticGradients(3), TypeError, "synthesiser=3: give 'linear' or"),
        (lambda: SyntheticGradients(width=0), ValueError, "width=0"),
        (lambda: SyntheticGradients(objective=nn.MSELoss()), TypeError, "is no Objective"),
    ],
)
def test_wrong_arguments_are_refused(
    make: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_one_module_and_no_optimizer_are_refused(digits: Dataset) -> None:
    with pytest.raises(ValueError, match=r"the network is one module; cut it"):
        fit(tanh_net(1), SyntheticGradients(), digits, progress=False)
    with pytest.raises(TypeError, match="synthesiser_optimizer='adam' makes no optimiser"):
        learner = SyntheticGradients(synthesiser_optimizer="adam")  # type: ignore[arg-type]
        fit(tanh_net(), learner, digits, progress=False)
