"""What a method costs: floating-point operations, parameters that are thrown away, time a step.

Operations and parameters are exact counts. Times are those of this machine, so only their ratio to the
same network's end-to-end step is kept, measured in turn with it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from modlib.device import synchronise
from modlib.methods import E2EBP, Method, Stage
from modlib.network import ModularNetwork

__all__ = [
    "costs",
]


def costs(
    method: Method, net: ModularNetwork, batch: tuple[Tensor, Tensor], repeats: int = 7
) -> dict[str, Any]:
    """Count and time the steps of a method's stages on copies of a network.

    Args:
        method: how the network is trained.
        net: the network, cut.
        batch: images (N, ...) and labels (N,), on the network's device.
        repeats: steps that are timed; the median counts.

    Returns:
        ``network_flops``: of the network's forward pass, for one image. ``step_flops``: of a training step,
        for one image, forward and backward, summed over the stages. ``auxiliary_parameters``: trained, but
        not deployed. ``step_time``: seconds of a step, summed over the stages, over that of E2EBP.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2)
    >>> batch = modlib.data.Loader(modlib.data.load("digits")).sample(32)
    >>> found = costs(modlib.methods.LocalLearning(), net, batch, repeats=1)
    >>> found["network_flops"], found["auxiliary_parameters"]    # 2 (64 * 32 + 32 * 10); "mlp-sr"
    (4736, 3594)
    """
    net, method = copy.deepcopy(net), copy.deepcopy(method)
    x, y = batch
    with torch.no_grad():
        network = operations(lambda: net(x))
    stages = method.stages(net, x)
    whole = E2EBP().stages(copy.deepcopy(net), x)
    for stage in [*stages, *whole]:  # first steps make buffers, and wait for errors that come late
        for _ in range(stage.delay + 1):
            _step(stage, x, y)
    step = sum(operations(lambda stage=stage: _step(stage, x, y)) for stage in stages)  # type: ignore[misc]
    ratios = [_seconds(stages, x, y) / _seconds(whole, x, y) for _ in range(repeats)]
    return {
        "network_flops": network // len(x),
        "step_flops": step // len(x),
        "auxiliary_parameters": _auxiliary(stages, net),
        "step_time": round(median(ratios), 3),
    }


def _step(stage: Stage, x: Tensor, y: Tensor) -> None:
    stage.train()
    stage.step(x, y)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums PyTorch's own formulas for products and convolutions; its counter trips over ``autograd.grad``."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of what a function does, a multiply-add counted as two.

    >>> operations(lambda: torch.zeros(2, 3) @ torch.zeros(3, 4))
    48
    """
    with _Operations() as counter:  # type: ignore[no-untyped-call]
        work()
    return int(counter.total)


def _seconds(stages: list[Stage], x: Tensor, y: Tensor) -> float:
    clock = time.perf_counter()
    for stage in stages:
        _step(stage, x, y)
    synchronise(x.device)
    return time.perf_counter() - clock


def _auxiliary(stages: list[Stage], net: ModularNetwork) -> int:
    deployed = {id(p) for p in net.parameters()}
    trained = {
        id(p): p.numel()
        for stage in stages
        for optimizer in stage.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return sum(size for key, size in trained.items() if key not in deployed)
