"""Counting what autograd holds: against numbers worked out by hand, and the claim about modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modlib import networks
from modlib.data import Dataset, Loader
from modlib.measure.audit import audit
from modlib.measure.memory import SavedBytes
from modlib.methods import E2EBP, LocalLearning
from modlib.network import ModularNetwork, partition
from modlib.objectives import AuxiliaryClassifier, CrossEntropy, Objective

N, FLOAT, INDEX = 5, 4, 8  # images; bytes of a float32 and of an int64


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(4, 3), (4,), N * 4 * FLOAT),  # its input
        (nn.Conv2d(2, 3, 3), (2, 8, 8), N * 2 * 64 * FLOAT),  # its input
        (nn.ReLU(), (4,), N * 4 * FLOAT),  # its output
        (nn.Sigmoid(), (4,), N * 4 * FLOAT),  # its output
        (nn.BatchNorm2d(2), (2, 8, 8), N * 2 * 64 * FLOAT + 2 * 2 * FLOAT),  # input, mean and scale
        (nn.MaxPool2d(2), (2, 8, 8), N * 2 * 64 * FLOAT + N * 2 * 16 * INDEX),  # and positions
        (nn.Flatten(), (2, 8, 8), 0),
        # the output of the activation is the input of the next layer: one storage
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (4,), N * (4 + 6) * FLOAT),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double(), (4,), N * 10 * 8),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_saved_bytes_are_those_counted_by_hand(
    layer: nn.Module, shape: tuple[int, ...], expected: int
) -> None:
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    x = torch.randn(N, *shape, dtype=dtype, requires_grad=True)
    with SavedBytes([*layer.parameters(), *layer.buffers()]) as memory:
        out = layer(x)
        assert memory.now == memory.peak == expected
        out.sum().backward()
        assert memory.now == 0
    assert memory.peak == expected


def test_parameters_count_only_if_they_are_not_named() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(N, 4, requires_grad=True)
    with SavedBytes() as memory:
        out = layer(x)
    assert memory.now == N * 4 * FLOAT + 4 * 3 * FLOAT  # input and weight, which is a view of it
    del out
    assert memory.now == 0


def test_saved_bytes_are_released_when_the_graph_is_dropped() -> None:
    x = torch.randn(N, 4, requires_grad=True)
    with SavedBytes() as memory:
        first = x.exp()
        second = x.sin()
        assert memory.now == 2 * N * 4 * FLOAT  # the output of exp, and x once
        del first
        assert memory.now == N * 4 * FLOAT
        del second
    assert (memory.now, memory.peak) == (0, 2 * N * 4 * FLOAT)


def test_counting_does_not_change_the_gradient() -> None:
    net = networks.cnn((4, 8), 3, stride=1, kernel="relu", seed=0)
    x = torch.randn(4, 3, 32, 32)
    gradients = []
    for counted in (False, True):
        net.zero_grad()
        if counted:
            with SavedBytes(net.parameters()):
                net(x).square().sum().backward()
        else:
            net(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- the memory of local learning -----------------------------------------------------------------


def needed_alone(module: nn.Module, objective: Objective, x: Tensor, y: Tensor) -> int:
    """Bytes of the storages that one module and its objective save, counted without the library."""
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # a storage that is kept alive keeps its address to itself

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(module(x.detach()), y)
    own = [t for m in (module, objective) for t in (*m.parameters(), *m.buffers())]
    for tensor in own:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def needs(net: ModularNetwork, head: str, x: Tensor, y: Tensor) -> list[int]:
    bytes_needed = []
    for k, (module, shape) in enumerate(zip(net.train(), net.shapes(x), strict=True)):
        last = k == len(net) - 1
        objective = CrossEntropy() if last else AuxiliaryClassifier(head).for_module(shape, 10)
        bytes_needed.append(needed_alone(module, objective, x, y))
        x = module(x)
    return bytes_needed


@pytest.mark.parametrize("modules", [2, 3, 4])
@pytest.mark.parametrize("head", ["linear", "mlp-sr"])
def test_local_learning_needs_the_memory_of_its_largest_module(
    modules: int, head: str, record_property: Callable[[str, object], None]
) -> None:
    net = networks.cnn((16, 32, 64), 10, stride=1, seed=0)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    cut = partition(net, modules, sample=x)
    local = audit(LocalLearning(AuxiliaryClassifier(head)), cut, (x, y)).peak_saved_bytes
    largest = max(needs(cut, head, x, y))
    assert largest <= local <= 1.15 * largest
    whole = audit(E2EBP(), cut, (x, y)).peak_saved_bytes
    record_property("share of E2EBP's memory", local / whole)
    record_property("share of the largest module's memory", local / largest)
    assert local < 0.75 * whole


def test_frozen_modules_need_no_memory() -> None:
    """Each stage of training in turn holds what its own module and head save."""
    net = networks.cnn((16, 32, 64), 10, stride=1, seed=0)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    cut = partition(net, 3, sample=x)
    stages = audit(LocalLearning(AuxiliaryClassifier("linear"), in_turn=True), cut, (x, y)).stages
    assert [stage.saved_bytes for stage in stages] == needs(cut, "linear", x, y)


def test_end_to_end_memory_is_that_of_one_module(digits: Dataset) -> None:
    x, y = Loader(digits).sample(64)
    net = networks.mlp([64, 32, 32, 10], seed=0)
    alone = needed_alone(net, CrossEntropy(), x, y)
    for modules in (1, 2, 3):
        assert audit(E2EBP(), partition(net, modules), (x, y)).peak_saved_bytes == alone
    assert audit(LocalLearning(), partition(net, 1), (x, y)).peak_saved_bytes == alone


def test_losses_that_are_summed_save_no_memory() -> None:
    """METHODS trap 1: one backward pass after all modules holds all their activations at once."""
    net = partition(
        networks.cnn((16, 32), 10, stride=1, seed=0), 3, sample=torch.zeros(8, 3, 32, 32)
    )
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    heads = [AuxiliaryClassifier("linear").for_module(shape, 10) for shape in net.shapes(x)[:-1]]
    owners = [net, *heads]
    with SavedBytes(t for m in owners for t in (*m.parameters(), *m.buffers())) as memory:
        h, losses = x, []
        for module, objective in zip(net, [*heads, CrossEntropy()], strict=True):
            h = module(h.detach())
            losses.append(objective(h, y))
        torch.stack(losses).sum().backward()
    whole = audit(E2EBP(), net, (x, y)).peak_saved_bytes
    local = audit(LocalLearning(AuxiliaryClassifier("linear")), net, (x, y)).peak_saved_bytes
    assert local < 0.75 * memory.peak
    assert memory.peak > 0.95 * whole
