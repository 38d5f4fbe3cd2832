"""What a step holds for its backward pass, and what it takes, with and without running layers again.

    python tests/bench_memory.py [--times] [--images 64] [--repeats 3] [--threads 1]

The networks are those that the authors of InfoPro and of decoupled greedy learning train: ResNet-32 with
batches of 64 images, and six convolutions with batches of 32. Bytes are exact counts, the same on every
machine, taken on the device "meta", where nothing is computed; tests/test_bench_memory.py asserts them. Times
are processor time, as ratios to the step as it was ("before": all terms of an objective in one backward pass,
what a decoder enlarges kept, nothing run again), in turn with it; fewer images will do for them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modlib.measure.memory import LiveBytes, SavedBytes
from modlib.measure.segments import chosen
from modlib.methods import E2EBP, Method, Stage, decoupled_greedy, infopro
from modlib.network import ModularNetwork, partition
from modlib.networks.recompute import Stretches, recomputing

MIB = 2**20


# --- the networks of the papers -------------------------------------------------------------------


class Block(nn.Module):
    """The residual block of InfoPro's authors: where the map shrinks, the shortcut is a convolution."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *unit(before, width, stride),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            convolution = nn.Conv2d(before, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(self.branch(h) + self.shortcut(h))


def unit(before: int, width: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(before, width, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


def resnet32() -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(*unit(3, 16)))
    before = 16
    for group, width in enumerate((16, 32, 64), 1):
        for number in range(5):
            layers[f"block{group}_{number}"] = Block(before, width, 2 if group > 1 > number else 1)
            before = width
    layers["end"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(layers)


def six_layers() -> nn.Sequential:
    """Decoupled greedy learning's: pooling before the second and the fourth convolution."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = 3
    for number, width in enumerate((128, 256, 256, 512, 512, 512)):
        pool = [nn.MaxPool2d(2)] if number in (1, 3) else []
        layers[f"layer{number + 1}"] = nn.Sequential(*pool, *unit(before, width))
        before = width
    end = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), *wide(2048), *wide(2048), nn.Linear(2048, 10)]
    layers["end"] = nn.Sequential(*end)
    return nn.Sequential(layers)


def wide(width: int) -> list[nn.Module]:
    return [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]


# --- cases ----------------------------------------------------------------------------------------

BLOCKS = [f"block{group}_{number}" for group in (1, 2, 3) for number in range(5)]


@dataclass(frozen=True)
class Case:
    """A network, how it is cut and trained, and into how many MiB a step should fit.

    Attributes:
        name: of the method.
        build: makes the network.
        cut: the layers with which modules begin.
        method: how it is trained.
        images: in a batch.
        bound: MiB; None for end-to-end backpropagation, which is there to compare with.
    """

    name: str
    build: Callable[[], nn.Sequential]
    cut: Sequence[str]
    method: Callable[[], Method]
    images: int
    bound: int | None = None

    @property
    def modules(self) -> int:
        return len(self.cut) + 1

    def stage(self, device: str = "cpu", images: int | None = None) -> tuple[Stage, ModularNetwork]:
        torch.manual_seed(0)
        net = partition(self.build(), list(self.cut)).to(device)
        (stage,) = self.method().stages(net, self.batch(device, images)[0])
        stage.train()
        return stage, net

    def batch(self, device: str = "cpu", images: int | None = None) -> tuple[Tensor, Tensor]:
        n = images or self.images
        return torch.randn(n, 3, 32, 32, device=device), torch.arange(n, device=device) % 10


def _infopro(first: tuple[float, float], last: tuple[float, float]) -> Callable[[], Method]:
    """The published weights, with the loss that the device "meta" can follow."""
    return lambda: infopro(first, last, form="softmax")


CASES = [
    Case("E2EBP", resnet32, [], E2EBP, 64),
    Case("InfoPro", resnet32, ["block2_2"], _infopro((5, 0.5), (5, 0.5)), 64, 70),
    Case(
        "InfoPro", resnet32, ["block1_3", "block2_2", "block3_1"], _infopro((1, 0), (0, 1)), 64, 50
    ),
    Case("InfoPro", resnet32, BLOCKS[1::2], _infopro((5, 0), (0, 1)), 64, 36),
    Case("InfoPro", resnet32, BLOCKS, _infopro((5, 0), (0.5, 1)), 64, 28),
    Case("E2EBP", six_layers, [], E2EBP, 32),
    Case("DGL", six_layers, ["layer4"], decoupled_greedy, 32, 50),
    Case("DGL", six_layers, ["layer3", "layer5"], decoupled_greedy, 32, 45),
    Case("DGL", six_layers, [f"layer{k}" for k in range(2, 7)], decoupled_greedy, 32, 33),
]


def as_before(stage: Stage) -> Stage:
    """All terms of an objective in one backward pass, and decoders that keep what they enlarge."""
    for objective in stage.objectives:
        if len(terms := objective.terms()) > 1:
            whole = _Whole(terms)
            objective.terms = lambda whole=whole: (whole,)  # type: ignore[method-assign]
        if hasattr(objective, "decoder"):
            objective.decoder = nn.Sequential(nn.UpsamplingBilinear2d(32), objective.decoder)
    return stage


class _Whole:
    def __init__(self, terms: Sequence[Callable[..., Tensor]]) -> None:
        self.terms = terms

    def __call__(self, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return torch.stack([term(h, y, x) for term in self.terms]).sum()


def owned(stage: Stage, net: nn.Module) -> list[Tensor]:
    return [t for m in (net, *stage.objectives) for t in (*m.parameters(), *m.buffers())]


def variants(
    case: Case, stage: Stage, net: ModularNetwork, x: Tensor
) -> dict[str, dict[nn.Module, Stretches]]:
    """What is run again in each."""
    share = len(x) / case.images
    found: dict[str, dict[nn.Module, Stretches]] = {"now": {}}
    if case.bound is not None:
        found["bound"] = dict(chosen(stage, x, int(case.bound * MIB * share)))
    return found | {"least": dict(chosen(stage, x, None))}


def bytes_held(case: Case) -> dict[str, int]:
    """The most bytes that autograd holds in a step."""
    stage, net = case.stage("meta")
    x, y = case.batch("meta")
    found = {}
    runs = {"before": {}} | variants(case, stage, net, x)
    for name, stretches in runs.items():
        if name == "before":
            running, its_net = case.stage("meta")
            as_before(running)
        else:
            running, its_net = stage, net
        with SavedBytes(owned(running, its_net)) as memory, recomputing(stretches):
            running.step(x, y)
        found[name] = memory.peak
    return found


def bytes_alive(case: Case) -> dict[str, int]:
    """The most bytes of all tensors that a second step makes: activations, gradients, what is passed on."""
    found = {}
    for name in ("now", "fused"):
        stage, _ = case.stage("meta")
        x, y = case.batch("meta")
        stage.fused = name == "fused"
        stage.step(x, y)  # makes the optimisers' own buffers
        with LiveBytes() as alive:
            stage.step(x, y)
        found[name] = alive.peak
    return found


def seconds(case: Case, images: int, repeats: int) -> dict[str, float]:
    """Median processor time of a step over that of the step before, in turn with it."""
    stage, net = case.stage(images=images)
    x, y = case.batch(images=images)
    steps: dict[str, tuple[Stage, dict[nn.Module, Stretches]]] = {
        name: (stage, stretches) for name, stretches in variants(case, stage, net, x).items()
    }
    steps["before"] = as_before(case.stage(images=images)[0]), {}
    fused = case.stage(images=images)[0]
    fused.fused = True
    steps["fused"] = fused, {}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, (running, stretches) in steps.items():
            with recomputing(stretches):
                clock = time.process_time()
                running.step(x, y)
                if repeat:  # the first warms up
                    taken[name].append(time.process_time() - clock)
    pairs = {
        name: [a / b for a, b in zip(times, taken["before"], strict=True)]
        for name, times in taken.items()
    }
    return {name: statistics.median(ratios) for name, ratios in pairs.items()}


def main() -> None:
    """Print MiB, and with --times what a step takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("MiB that autograd holds: before, now, to the bound, least; in brackets times to before")
    for case in CASES:
        held, alive = bytes_held(case), bytes_alive(case)
        taken = (
            seconds(case, options.images or case.images, options.repeats) if options.times else {}
        )
        shown = [f"{name} {size / MIB:.1f}" + _ratio(taken, name) for name, size in held.items()]
        whole = f"all tensors {alive['now'] / MIB:.1f}, fused {alive['fused'] / MIB:.1f}"
        bound = f" (bound {case.bound})" if case.bound else ""
        print(
            f"{case.name} K={case.modules}{bound}: {', '.join(shown)}; {whole}"
            + _ratio(taken, "fused")
        )


def _ratio(taken: dict[str, float], name: str) -> str:
    return f" [{taken[name]:.2f}]" if name in taken else ""


if __name__ == "__main__":
    main()
