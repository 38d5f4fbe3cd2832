"""A step in fewer bytes: the same training bit for bit, the bytes that were promised, and no more work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modlib import networks
from modlib.data import load
from modlib.measure.memory import SavedBytes
from modlib.measure.segments import Chain, Layer, cheapest, chosen, least, measured
from modlib.methods import (
    E2EBP,
    LocalLearning,
    Method,
    decoupled_greedy,
    hsic_bottleneck,
    infopro,
    local_error_signals,
    sgd,
    transport,
)
from modlib.network import ModularNetwork, partition
from modlib.networks.recompute import recomputing
from modlib.objectives import AuxiliaryClassifier, InfoPro, PredSim
from modlib.training import fit

DATA = load("digits").subset(n_train=64, n_test=32)
X, Y = torch.randn(16, 1, 8, 8), torch.arange(16) % 10


def conv_net() -> ModularNetwork:
    net = networks.cnn(
        (4, 8), channels=1, size=8, stride=1, kernel="relu", boundary="after", seed=0
    )
    return partition(net, ["conv3", "features"])


def residual_net() -> ModularNetwork:
    net = networks.resnet((4, 8), 1, channels=1, size=8, kernel="relu", boundary="after", seed=0)
    return partition(net, ["block2"])


def noisy_net() -> ModularNetwork:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(4):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.3)]
    return partition(nn.Sequential(*layers, nn.Linear(64, 10)), 3)


METHODS: dict[str, tuple[Callable[[], Method], Callable[[], ModularNetwork]]] = {
    "end to end": (E2EBP, noisy_net),
    "greedy, dropout": (decoupled_greedy, noisy_net),
    "greedy in turn": (
        partial(LocalLearning, AuxiliaryClassifier("linear"), in_turn=True, cache_features=True),
        conv_net,
    ),
    "InfoPro": (partial(infopro, form="softmax"), conv_net),
    "InfoPro with pairs": (infopro, conv_net),
    "similarities": (local_error_signals, conv_net),
    "HSIC": (hsic_bottleneck, noisy_net),
    "transport": (transport, residual_net),
}


def trained(method: Method, net: ModularNetwork, **options: Any) -> tuple[Any, list[Tensor]]:
    history = fit(
        net, method, DATA, epochs=1, batch_size=32, progress=False, augment=None, **options
    )
    return history, list(net.state_dict().values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "options", [{"recompute": "least"}, {"fused": True}], ids=["again", "fused"]
)
def test_training_is_the_same_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    make, build = METHODS[name]
    (one, plain), (two, thrifty) = trained(make(), build()), trained(make(), build(), **options)
    assert one == two
    assert all(torch.equal(a, b) for a, b in zip(plain, thrifty, strict=True))


def test_mixed_precision_is_the_same_too() -> None:
    options = {"precision": "bfloat16"}
    one, plain = trained(infopro(form="softmax"), conv_net(), **options)
    two, thrifty = trained(infopro(form="softmax"), conv_net(), recompute="least", **options)
    assert one == two and all(torch.equal(a, b) for a, b in zip(plain, thrifty, strict=True))


# --- the bytes that were promised -----------------------------------------------------------------


def stage_of(method: Method, net: ModularNetwork, x: Tensor = X) -> Any:
    (stage,) = method.stages(net, x)
    stage.train()
    return stage


def held(stage: Any, net: nn.Module, stretches: Any = None) -> int:
    owners = [net, *stage.objectives]
    owned = [t for m in owners for t in (*m.parameters(), *m.buffers())]
    with SavedBytes(owned) as memory, recomputing(stretches or {}):
        stage.step(X, Y)
    assert memory.now == 0
    return memory.peak


@pytest.mark.parametrize("name", ["end to end", "greedy, dropout", "InfoPro", "similarities"])
def test_bytes_are_those_that_were_promised(name: str) -> None:
    make, build = METHODS[name]
    net = build()
    stage = stage_of(make(), net)
    plain, low = held(copy.deepcopy(stage), net), 0
    h = X
    for module, objective in zip(stage.modules, stage.objectives, strict=True):
        parts = list(module) if isinstance(module, ModularNetwork) else [module]
        low = max(low, least(measured(parts, h, X, objective)))
        with torch.no_grad():
            h = module(h)
    assert held(stage, net, chosen(stage, X, None)) == low < 0.85 * plain
    middle = (low + plain) // 2
    assert low <= held(stage, net, chosen(stage, X, middle)) <= middle
    with pytest.raises(ValueError, match=r"module \d needs at least [\d,]+ bytes"):
        chosen(stage, X, low - 1)


def test_the_choice_is_the_best_of_all() -> None:
    """Against every choice of stretches, on random chains: the fewest bytes, and the least work for them."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for _ in range(12):
        n = 5
        layers = []
        for i in range(n):
            saved = {
                s for s, kept in ((i, draw(2)), (i + 1, draw(2)), (n + 1 + i, draw(3))) if kept
            }
            work = float(1 + draw(9))
            redo = (work if saved - {i} else 0.0) if saved else None
            layers.append(Layer(i, i + 1, frozenset(saved), work, redo, bool(draw(5))))
        sizes = tuple(1 + draw(20) for _ in range(2 * n + 2))
        chain = Chain(
            tuple(layers), sizes, (frozenset({n, 2 * n + 1}),), frozenset({0, 1 + draw(3)})
        )
        options = [(chain.peak(c), work_of(chain, c)) for c in all_choices(chain)]
        fewest = min(peak for peak, _ in options)
        assert least(chain) == fewest
        for budget in {fewest, (fewest + chain.peak(())) // 2, chain.peak(())}:
            found = cheapest(chain, budget)
            assert found is not None and chain.peak(found) <= budget
            assert work_of(chain, found) == min(work for peak, work in options if peak <= budget)
        assert cheapest(chain, fewest - 1) is None


def work_of(chain: Chain, stretches: Any) -> float:
    total = 0.0
    for start, stop in stretches:
        last = max(
            (j for j in range(start, stop) if chain.layers[j].redo is not None), default=None
        )
        if last is not None:
            total += sum(layer.work for layer in chain.layers[start:last]) + chain.layers[last].redo
    return total


def all_choices(chain: Chain) -> Iterator[tuple[tuple[int, int], ...]]:
    n = len(chain.layers)
    pieces = [
        (i, j)
        for i in range(n)
        for j in range(i + 1, n + 1)
        if chain.layers[i].whole and not any(i < b < j for b in chain.breaks)
    ]
    for count in range(n + 1):
        for chosen_pieces in combinations(pieces, count):
            if all(a[1] <= b[0] for a, b in pairwise(chosen_pieces)):
                yield chosen_pieces


# --- no more work than is needed ------------------------------------------------------------------


def operations(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        run().sum().backward()
    return counter.get_total_flops()


def test_a_convolution_at_the_end_of_a_stretch_is_computed_once() -> None:
    """Its gradient needs its input, not its output."""
    layers = [nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3)]
    net, x = nn.Sequential(*layers), torch.randn(4, 2, 8, 8, requires_grad=True)
    plain = operations(lambda: net(x))
    with SavedBytes(net.parameters()) as memory, recomputing({net: [(0, 3)]}):
        out = net(x)
        assert memory.now == x.nbytes
        again = operations(lambda: net(x))
    assert again == plain
    del out


def test_what_is_asked_for_twice_is_run_twice() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(5, 3)
    with recomputing({net: [(0, 2)]}):
        out = net(x).sum()
        first, second = (
            torch.autograd.grad(out, net[0].weight, retain_graph=True) for _ in range(2)
        )
    assert torch.equal(first[0], second[0])


def test_an_input_that_was_changed_is_noticed() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(5, 3)
    with recomputing({net: [(0, 2)]}):
        out = net(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


def test_no_stretch_begins_with_a_layer_that_works_in_place() -> None:
    layers = [nn.Linear(64, 64), nn.Hardtanh(inplace=True)] * 2
    net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10)).train()
    chain = measured([net], X, X)
    assert [layer.whole for layer in chain.layers] == [True, True, False, True, False, True]


def test_a_copy_made_in_training_runs_its_own_layers() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    with recomputing({net: [(0, 2)]}):
        other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight.zero_()
        other[0].bias.zero_()
    assert not other(torch.ones(2, 3)).any() and "forward" not in vars(net)


def test_what_is_no_budget_is_refused() -> None:
    for given in (0, -1, True, 1.5, "most"):
        with pytest.raises(ValueError, match="recompute"):
            fit(conv_net(), E2EBP(), DATA, recompute=given)  # type: ignore[arg-type]


# --- terms, and steps within the backward pass ----------------------------------------------------


@pytest.mark.parametrize(
    "objective", [PredSim(), InfoPro(channels=1), InfoPro(form="contrast", channels=1)]
)
def test_terms_make_the_same_gradients_as_their_sum(objective: Any) -> None:
    ready = objective.for_module((4, 8, 8), 10)
    if isinstance(ready, PredSim):  # whose classifier starts at zero, and sends nothing back
        nn.init.normal_(next(ready.pred.parameters()))
    h = torch.randn(16, 4, 8, 8, requires_grad=True)
    whole = torch.autograd.grad(ready.local(h, Y, X), [h, *ready.parameters()])
    for term in ready.terms():
        term(h, Y, X).backward()
    assert len(ready.terms()) == 2
    for parameter, expected in zip([h, *ready.parameters()], whole, strict=True):
        torch.testing.assert_close(
            parameter.grad, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
        )


def test_terms_hold_the_larger_of_two_heads() -> None:
    """Counted by hand: what module and map hold, and the decoder's activations."""
    net = partition(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 10)), ["1"]
    )
    stage = stage_of(infopro(form="softmax", mean=[0.5], std=[0.5]), net)
    n, pixels, number = len(X), 64, 4
    module = n * pixels * number  # the image
    decoder = n * pixels * number * (4 + 12 + 12 + 1 + 1) + 2 * 12 * number
    assert held(stage, net) == module + decoder


@contextmanager
def watching(parameters: list[nn.Parameter], sizes: list[int]) -> Iterator[None]:
    """Notes how many bytes of gradients there are whenever one is complete."""

    def note(_: Tensor) -> None:
        sizes.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

    hooks = [p.register_post_accumulate_grad_hook(note) for p in parameters]
    yield
    for hook in hooks:
        hook.remove()


def test_a_fused_step_holds_one_gradient_at_a_time() -> None:
    net = conv_net()
    stage = stage_of(decoupled_greedy(optimizer=sgd(0.1)), net)
    parameters = [p for o in (net, *stage.objectives) for p in o.parameters()]
    for fused, expected in ((False, sum), (True, max)):
        stage.fused, sizes = fused, []
        for parameter in parameters:
            parameter.grad = None
        with watching(parameters, sizes):
            stage.step(X, Y)
        assert max(sizes) == expected(p.nbytes for p in parameters)
    assert all(p.grad is None for p in parameters)


def test_a_residual_block_works_in_place_without_a_trace() -> None:
    """Bit-equal to the sum and the ReLU out of place, and autograd misses nothing that was overwritten."""
    block = networks.residual.ResidualUnit(4, 4, 1, "after").train()
    s = torch.randn(8, 4, 8, 8, requires_grad=True)
    plain = torch.relu(s + copy.deepcopy(block).branch(s))
    expected = torch.autograd.grad(plain.square().sum(), s)
    found = block(s)
    assert torch.equal(found, plain)
    assert torch.equal(*torch.autograd.grad(found.square().sum(), s), *expected)
