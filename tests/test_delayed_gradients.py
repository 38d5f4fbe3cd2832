"""Delayed and replayed gradients against the equations, written with nothing of the library's."""

from __future__ import annotations

import copy
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
from modlib.certificates import staleness
from modlib.data import Dataset
from modlib.measure.angles import angles
from modlib.measure.audit import audit
from modlib.methods import E2EBP, DelayedGradients, FeaturesReplay, sgd
from modlib.methods.delayed_gradients import DelayedStage
from modlib.network import ModularNetwork, partition
from modlib.training import fit

BOTH = pytest.mark.parametrize("kind", [DelayedGradients, FeaturesReplay])
Batch = tuple[Tensor, Tensor]
Array = NDArray[np.float64]


def plain(rate: float) -> Any:
    return partial(torch.optim.SGD, lr=rate)


def tanh_net(modules: int) -> ModularNetwork:
    """In float64: a layer and its tanh are a module."""
    sizes = [8, *[6] * (modules - 1), 4]
    net = networks.mlp(sizes, activation=nn.Tanh, boundary="after", seed=0)
    return partition(net, modules).double()


def noisy_net(modules: int = 3, share: float = 0.3) -> ModularNetwork:
    """Batch norm keeps statistics, dropout draws: each batch must count once, and draw once."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (8, 6, 6)[:modules]:
        layers += [nn.Linear(width, 6), nn.BatchNorm1d(6), nn.Dropout(share), nn.Tanh()]
    return partition(nn.Sequential(*layers, nn.Linear(6, 4)).double(), modules)


def batches(count: int, seed: int = 0) -> list[Batch]:
    """Of different sizes."""
    make = torch.Generator().manual_seed(seed)
    sizes = [(7, 5, 9)[i % 3] for i in range(count)]
    return [
        (
            torch.randn(n, 8, dtype=torch.float64, generator=make),
            torch.randint(0, 4, (n,), generator=make),
        )
        for n in sizes
    ]


def staged(kind: type[DelayedGradients], net: ModularNetwork, rate: float = 0.3) -> DelayedStage:
    (stage,) = kind(optimizer=plain(rate)).stages(net, torch.zeros(2, 8, dtype=torch.float64))
    assert isinstance(stage, DelayedStage)
    stage.train()
    return stage


def gradients(net: ModularNetwork, batch: Batch) -> list[list[Tensor]]:
    """Backpropagation's, module by module."""
    net = copy.deepcopy(net)
    F.cross_entropy(net.train()(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
    return [[p.grad.clone() for p in module.parameters() if p.grad is not None] for module in net]


def states(net: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in net.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# --- against the equations ------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [1, 2, 4])
def test_delayed_gradients_are_blocks_of_old_gradients(modules: int) -> None:
    """Module k moves down its block of the gradient at the network of K - 1 - k steps ago, on that batch."""
    net, rate, seen = tanh_net(modules), 0.3, batches(9)
    stage, by_hand = staged(DelayedGradients, net), copy.deepcopy(net)
    past: list[list[list[Tensor]]] = []
    for batch in seen:
        loss = stage.step(*batch)
        assert loss.item() == pytest.approx(F.cross_entropy(by_hand(batch[0]), batch[1]).item())
        past.append(gradients(by_hand, batch))
        with torch.no_grad():
            for k, module in enumerate(by_hand):
                ago = modules - 1 - k
                if ago < len(past):
                    for p, g in zip(module.parameters(), past[-1 - ago][k], strict=True):
                        p.sub_(rate * g)
    for ours, theirs in zip(net.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def affine(module: nn.Module) -> tuple[Array, Array]:
    (linear,) = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return linear.weight.detach().numpy().copy(), linear.bias.detach().numpy().copy()


def run_with(layers: list[tuple[Array, Array]], x: Array) -> list[Array]:
    """What each layer takes in; a tanh ends all layers but the last."""
    inputs = [x]
    for weight, bias in layers[:-1]:
        inputs.append(np.tanh(inputs[-1] @ weight.T + bias))
    return inputs


def replayed(
    v: list[tuple[Array, Array]], inputs: list[Array], y: NDArray[np.int64]
) -> list[tuple[Array, Array]]:
    """Backpropagation at v in NumPy, but each layer runs on an input that it is given."""
    logits = inputs[-1] @ v[-1][0].T + v[-1][1]
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    slope = (share - np.eye(share.shape[1])[y]) / len(y)
    found = []
    for k in reversed(range(len(v))):
        if k < len(v) - 1:
            slope = slope * (1 - np.tanh(inputs[k] @ v[k][0].T + v[k][1]) ** 2)
        found.append((slope.T @ inputs[k], slope.sum(0)))
        slope = slope @ v[k][0]
    return found[::-1]


@pytest.mark.parametrize("modules", [1, 2, 4])
def test_features_replay_is_descent_with_old_inputs(modules: int) -> None:
    """Sorted by batch, not by time, it is one sequence v of networks, and only the inputs come late.

    v[s] are the weights that each module has when it goes back over batch s; module k ran it forward with
    those that it had K - 1 - k batches before.
    """
    net, rate, seen = tanh_net(modules), 0.3, batches(9)
    stage = staged(FeaturesReplay, net)
    v = [[affine(module) for module in net]]
    for x, y in seen:
        now = len(v) - 1
        forward = [v[max(0, now - (modules - 1 - k))][k] for k in range(modules)]
        found = replayed(v[-1], run_with(forward, x.numpy()), y.numpy())
        v.append(
            [(w - rate * a, b - rate * c) for (w, b), (a, c) in zip(v[-1], found, strict=True)]
        )
    for batch in seen:
        stage.step(*batch)
    for k, module in enumerate(net):
        for ours, theirs in zip(affine(module), v[-1 - (modules - 1 - k)][k], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@BOTH
def test_with_still_weights_the_gradient_is_backpropagations(
    kind: type[DelayedGradients],
) -> None:
    """Also with dropout, whose numbers are those of the batch's own step, and with batch norm."""
    net, seen = noisy_net(), batches(6)
    stage = staged(kind, net, rate=0.0)
    truth = []
    for number, batch in enumerate(seen):
        torch.manual_seed(number)
        truth.append(gradients(net, batch))
        torch.manual_seed(number)
        stage.step(*batch)
        for k, module in enumerate(net):
            ago = len(net) - 1 - k
            found = [p.grad for p in module.parameters()]
            if ago > number:
                assert found == [None] * len(found)  # it has nothing to go by yet
                continue
            for ours, theirs in zip(found, truth[number - ago][k], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


@BOTH
def test_statistics_count_each_batch_once(kind: type[DelayedGradients]) -> None:
    net, seen = noisy_net(share=0.0), batches(6)
    other = copy.deepcopy(net).train()
    stage = staged(kind, net, rate=0.0)
    for x, y in seen:
        stage.step(x, y)
        other(x)
    ours, theirs = ([*part.buffers()] for part in (net, other))
    assert len(ours) == 9 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@BOTH
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_with_one_module_both_are_backpropagation_bit_for_bit(
    kind: type[DelayedGradients], precision: str, digits: Dataset
) -> None:
    nets = [
        partition(networks.cnn((4, 8), 10, channels=1, size=8, stride=1, seed=0), 1)
        for _ in range(2)
    ]
    rows = [
        fit(net, method(), digits, epochs=2, precision=precision, progress=False)
        for net, method in zip(nets, (E2EBP, kind), strict=True)
    ]
    assert rows[0] == rows[1]
    assert same(states(nets[0]), states(nets[1]))


# --- what is kept between steps -------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("taken", [0, 1, 2, 5])
def test_a_copy_goes_on_as_the_original(kind: type[DelayedGradients], taken: int) -> None:
    """At any time, with graphs under way; the original is as it was."""
    net, seen = noisy_net(), batches(taken + 4)
    stage = staged(kind, net)
    for batch in seen[:taken]:
        stage.step(*batch)
    other_net, other = copy.deepcopy((net, stage))
    state = torch.get_rng_state()
    for each in (other, stage):
        torch.set_rng_state(state)
        for batch in seen[taken:]:
            each.step(*batch)
    assert same(states(net), states(other_net))


@BOTH
@pytest.mark.parametrize("taken", [1, 5])
def test_a_saved_state_goes_on_bit_for_bit(
    kind: type[DelayedGradients], taken: int, tmp_path: Path
) -> None:
    net, seen = noisy_net(), batches(taken + 4)
    stage = staged(kind, net)
    for batch in seen[:taken]:
        stage.step(*batch)
    torch.save((net.state_dict(), stage.state_dict(), torch.get_rng_state()), tmp_path / "state")
    for batch in seen[taken:]:
        stage.step(*batch)
    weights, state, random = torch.load(tmp_path / "state", weights_only=True)
    again_net = noisy_net()
    again = staged(kind, again_net)
    again_net.load_state_dict(weights)
    again.load_state_dict(state)
    torch.set_rng_state(random)
    for batch in seen[taken:]:
        again.step(*batch)
    assert same(states(net), states(again_net))


N, WIDTH = 16, 12


def relu_net(modules: int) -> ModularNetwork:
    sizes = [64, *[WIDTH] * (modules - 1), 10]
    return partition(networks.mlp(sizes, boundary="after", seed=0), modules)


@pytest.mark.parametrize("modules", [2, 3, 4])
def test_what_is_kept_is_counted_by_hand(modules: int) -> None:
    """Beside the weights, in floats of 4 bytes; batch and labels as the audit's."""
    batch = torch.randn(N, 64), torch.arange(N) % 10
    replay, delayed = (
        audit(method(), relu_net(modules), batch) for method in (FeaturesReplay, DelayedGradients)
    )
    delays = [modules - 1 - k for k in range(modules)]
    inputs = [64, *[WIDTH] * (modules - 1)]
    waiting = sum(d * N * width * 4 for d, width in zip(delays, inputs, strict=True))
    sent = (modules - 1) * N * WIDTH * 4
    labels = (modules - 1) * N * 8
    assert replay.kept_bytes == waiting + sent + labels
    # DDG: graphs hold the inputs, and outputs, which are the next module's inputs; and the weights of d steps
    images = delays[0] * N * 64 * 4
    outputs = sum(d * N * WIDTH * 4 for d in delays)
    sizes = [*inputs, 10]
    weights = sum(d * 4 * (sizes[k + 1] * sizes[k] + sizes[k + 1]) for k, d in enumerate(delays))
    least = images + outputs + weights + sent + labels
    module = (64 + 2 * WIDTH) * N * 4  # what a backward pass under way holds beside
    assert least <= delayed.kept_bytes + delayed.peak_saved_bytes <= least + module


@BOTH
@pytest.mark.parametrize("modules", [2, 3, 4])
def test_what_the_audit_sees(kind: type[DelayedGradients], modules: int) -> None:
    batch = torch.randn(N, 64), torch.arange(N) % 10
    seen = audit(kind(), relu_net(modules), batch)
    late = ["3 steps late", "2 steps late", "1 step late", "no"]
    assert seen.later == tuple(late[-modules:])
    assert seen.category == "weakly modular"
    assert seen.locks == {"forward": True, "update": False, "backward": False}
    assert seen.labels == ("classes",) * modules
    one = N * WIDTH * 4
    (stage,) = seen.stages
    assert stage.forward_bytes == (one,) * (modules - 1)  # a second run takes in nothing new
    assert stage.backward_bytes == (one,) * (modules - 1)  # also through graphs of earlier steps


@BOTH
def test_with_one_module_the_audit_sees_backpropagation(kind: type[DelayedGradients]) -> None:
    net = partition(relu_net(3), 1)
    seen = audit(kind(), net, (torch.randn(N, 64), torch.arange(N) % 10))
    assert (seen.category, seen.kept_bytes) == ("end-to-end", 0)


# --- in training ----------------------------------------------------------------------------------


@BOTH
def test_angles_are_to_the_gradient_of_the_batch_that_an_update_is_for(
    kind: type[DelayedGradients],
) -> None:
    seen = batches(8)
    for rate, wide in ((0.0, False), (3.0, True)):
        net = tanh_net(3)
        stage = staged(kind, net, rate)
        assert angles(stage, net, seen[0])[:2] == [None, None]  # nothing has come to them
        for batch in seen[:-1]:
            stage.step(*batch)
        found = [a for a in angles(stage, net, seen[-1]) if a is not None]
        assert len(found) == 3 and found[2] < 1e-4
        assert (max(found[:2]) > 0.5) == wide, found


@BOTH
def test_gradients_survive_half_precision(kind: type[DelayedGradients], digits: Dataset) -> None:
    """Each worker scales its own; what it sends down is not scaled."""
    weights = []
    for precision in ("float32", "float16"):
        net = relu_net(3)
        options: dict[str, Any] = {"epochs": 2, "schedule": "constant", "progress": False}
        fit(net, kind(optimizer=plain(0.1)), digits, precision=precision, **options)
        weights.append([p.detach() for p in net.parameters()])
    start = [p.detach() for p in relu_net(3).parameters()]
    moved = sum(float((a - b).norm()) for a, b in zip(weights[0], start, strict=True))
    apart = sum(float((a - b).norm()) for a, b in zip(*weights, strict=True))
    assert apart < 0.05 * moved


@BOTH
def test_it_learns(kind: type[DelayedGradients], digits: Dataset) -> None:
    net = partition(networks.cnn((8, 16), 10, channels=1, size=8, stride=1, seed=0), 4)
    history = fit(net, kind(), digits, epochs=6, batch_size=32, progress=False)
    assert history.final["test_accuracy"] > 0.85
    assert len(history.rows[0]["losses"]) == 1


@BOTH
def test_a_rate_a_hundred_times_too_large_is_told_and_the_checkpoint_stays(
    kind: type[DelayedGradients], digits: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    options: dict[str, Any] = {"schedule": "constant", "checkpoint": path, "progress": False}
    fit(relu_net(4), kind(optimizer=sgd(0.1)), digits, epochs=1, **options)
    good = path.read_bytes()
    path.unlink()
    wanted = (
        r"^Stage 0, epoch \d+: module \d's (objective|weights) became .*; lower the learning rate, or "
        r"cut the network into fewer modules\.$"
    )
    with pytest.raises(FloatingPointError, match=wanted):
        fit(relu_net(4), kind(optimizer=sgd(10.0)), digits, epochs=60, **options)
    assert len(good) > 0
    left = torch.load(path, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in left["net"].values())


def test_a_graph_whose_weights_have_moved_is_refused_by_torch() -> None:
    """Why delayed gradients keep the weights of that time: without them there is no backward pass."""
    net, seen = tanh_net(3), batches(2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    waiting = net(seen[0][0])
    F.cross_entropy(net(seen[1][0]), seen[1][1]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.cross_entropy(waiting, seen[0][1]).backward()  # type: ignore[no-untyped-call]


@BOTH
def test_arguments_are_checked(kind: type[DelayedGradients]) -> None:
    with pytest.raises(TypeError, match=r"objective=.* is no Objective"):
        kind(nn.CrossEntropyLoss())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer: 2 given for 3 modules"):
        kind(optimizer=[sgd()] * 2).stages(relu_net(3), torch.zeros(2, 64))


# --- the theorem ----------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 1, 2, 3, 7])
def test_the_largest_rate_on_a_parabola_is_where_a_root_leaves_the_circle(delay: int) -> None:
    limit = staleness.largest_rate(delay)
    for rate, stable in ((0.999 * limit, True), (1.001 * limit, False)):
        polynomial = [1.0, -1.0, *[0.0] * (delay - 1), rate] if delay else [1.0, rate - 1.0]
        assert (np.abs(np.roots(polynomial)).max() < 1) == stable
    assert staleness.safe_rate(delay) <= limit <= 2.5 * staleness.safe_rate(delay)


def some_parabola() -> tuple[Array, Array, Array, list[int]]:
    make = np.random.default_rng(0)
    hessian = np.diag(make.uniform(0.2, 1, 3))
    return hessian, make.standard_normal((3, 3)), make.standard_normal(3), [2, 0, 1]


def test_expected_squares_are_those_of_the_path() -> None:
    hessian, old, start, delays = some_parabola()
    path = staleness.descend(
        lambda w, v: hessian @ v + old @ (w - v), start, delays, rate=0.2, steps=20
    )
    found = staleness.expected_squares(hessian, old, start, delays, rate=0.2, steps=20)
    np.testing.assert_allclose(found, [np.sum((hessian @ v) ** 2) for v in path[:-1]], rtol=1e-9)


def test_expected_squares_are_the_mean_over_noise() -> None:
    hessian, old, start, delays = some_parabola()
    make, squares = np.random.default_rng(1), []
    for _ in range(4000):
        path = staleness.descend(
            lambda w, v: hessian @ v + old @ (w - v) + 2 * make.standard_normal(3),
            start, delays, rate=0.2, steps=8,
        )  # fmt: skip
        squares.append([np.sum((hessian @ v) ** 2) for v in path[:-1]])
    found = staleness.expected_squares(hessian, old, start, delays, 0.2, 8, variance=4.0)
    np.testing.assert_allclose(found, np.mean(squares, axis=0), rtol=0.1)


DELAYS = pytest.mark.parametrize("delay", range(5))


@DELAYS
def test_no_problem_breaks_the_bound(delay: int) -> None:
    worst = staleness.search(delay, trials=60)
    assert 0.5 < worst <= 1 + 1e-9
    assert staleness.search(delay, trials=60, faster=2.0) > 1.5  # beyond the rate it is broken


@DELAYS
@pytest.mark.parametrize("wrong", ["rate", "gap", "noise", "drift"])
def test_a_wrong_theorem_would_be_seen(
    delay: int, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate forgets the delay, a term of the bound is halved or lost, or M is taken for L."""
    right, drawn = staleness.bound, staleness._old
    if wrong == "rate":
        monkeypatch.setattr(staleness, "safe_rate", lambda delay: 1.0)
    elif wrong == "gap":
        monkeypatch.setattr(
            staleness, "bound", lambda gap, *a, **others: right(gap / 2, *a, **others)
        )
    elif wrong == "noise":
        monkeypatch.setattr(
            staleness, "bound", lambda *a, **others: right(*a, **{**others, "variance": 0.0})
        )
    else:
        monkeypatch.setattr(
            staleness, "_old", lambda rng, n, smooth: (drawn(rng, n, smooth)[0], smooth)
        )
    seen = staleness.search(delay, trials=60) > 1.1
    assert seen or (delay == 0 and wrong in ("rate", "drift"))  # without delay both play no part
