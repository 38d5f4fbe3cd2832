r"""The angle between a method's update and the gradient of the task's loss, module by module.

.. math:: \cos \angle_k =
          \langle u_k, \nabla_{\theta_k} L \rangle / (\lVert u_k \rVert \lVert \nabla_{\theta_k} L \rVert)

Below 90° a small enough step along the update lowers the loss that end-to-end backpropagation minimises.
An update's relative error, :math:`\lVert u_k - \nabla_{\theta_k} L \rVert / \lVert \nabla_{\theta_k} L \rVert`,
also says whether it has the right length.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modlib.methods.method import Method, Stage
from modlib.network import ModularNetwork
from modlib.networks.seeding import buffers_kept

__all__ = [
    "KeepStages",
    "angles",
    "angles_gone",
    "errors",
]


class KeepStages(Method):
    """A method that remembers the stages it made, so that they can be looked at while they train.

    Args:
        method: what trains the network; arguments and updates are its own.

    Attributes:
        kept: the stages of the last run, in order.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> method = KeepStages(modlib.methods.LocalLearning())
    >>> history = modlib.fit(net, method, data, epochs=1, progress=False)
    >>> last = angles(method.kept[0], net, modlib.data.Loader(data).sample(64))[-1]
    >>> last < 1.0    # the last module descends the task's loss itself
    True
    """

    def __init__(self, method: Method) -> None:
        super().__init__(method.optimizer)
        self.method = method
        self.kept: list[Stage] = []

    def check_output(self, shape: Sequence[int], classes: int) -> None:
        self.method.check_output(shape, classes)

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        self.kept = self.method.stages(net, x)
        return self.kept


def angles(stage: Stage, net: ModularNetwork, batch: tuple[Tensor, Tensor]) -> list[float | None]:
    """How far each module's next update is from the gradient that backpropagation would find.

    Copies take the step; the stage and the network stay as they are. An update is what a module's
    optimiser is given or, where a stage has no optimisers, the way its weights went, turned round. It is
    compared with the gradient, at the present weights, of the batch that it is for (``Stage.due``): where
    errors come late, one that the module ran on some steps ago.

    Args:
        stage: of a run on ``net``, at any time.
        net: what is trained, cut into K modules.
        batch: images (N, ...) and labels (N,), on the network's device.

    Returns:
        K angles in degrees, 0 to 180; None for a module that is not updated, or has no gradient.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2)
    >>> batch = modlib.data.Loader(modlib.data.load("digits")).sample(64)
    >>> (stage,) = modlib.methods.E2EBP().stages(net, batch[0])
    >>> max(angles(stage, net, batch)) < 0.1    # backpropagation's update is the gradient
    True
    """
    return [_angle(*pair) if pair else None for pair in _pairs(stage, net, batch)]


def errors(stage: Stage, net: ModularNetwork, batch: tuple[Tensor, Tensor]) -> list[float | None]:
    """Each module's next update less the gradient, as a share of the gradient's length.

    As ``angles`` in everything else. 0 is the gradient itself; 1 is no better than no update.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2)
    >>> batch = modlib.data.Loader(modlib.data.load("digits")).sample(64)
    >>> stage, = modlib.methods.LocalLearning().stages(net, batch[0])
    >>> first, last = errors(stage, net, batch)
    >>> first > 0.1, last < 1e-5
    (True, True)
    """
    pairs = _pairs(stage, net, batch)
    return [float((pair[0] - pair[1]).norm() / pair[1].norm()) if pair else None for pair in pairs]


def _pairs(
    stage: Stage, net: ModularNetwork, batch: tuple[Tensor, Tensor]
) -> list[tuple[Tensor, Tensor] | None]:
    """Each module's next update and the gradient, as vectors; None where one of them is missing or 0."""
    net, stage = copy.deepcopy((net, stage))
    due = [stage.due(k, batch) for k in range(len(net))]
    found = {id(given[0]): _gradients(net, given) for given in due}
    before = {p: p.detach().clone() for p in net.parameters()}
    held = [_Held(optimizer) for optimizer in stage.optimizers]
    stage.optimizers = cast(list[Optimizer], held)
    stage.train()
    stage.step(*batch)
    given = {p: gradient for optimizer in held for p, gradient in optimizer.given.items()}
    updates = given or {p: old - p.detach() for p, old in before.items()}
    return [
        _pair(list(module.parameters()), updates, found[id(x)])
        for module, (x, _) in zip(net, due, strict=True)
    ]


def angles_gone(net: ModularNetwork, batch: tuple[Tensor, Tensor]) -> list[float | None]:
    """The angles of the step that has been taken, where weights were given new values (``methods.Assign``).

    Such a weight's ``grad`` still holds its old value minus its new one, so that no step on copies is needed:
    for a step on a whole training set that would be dear.

    Args:
        net: what was trained, cut into K modules.
        batch: images (N, ...) and labels (N,), on which the gradient is taken, at the old weights.

    Returns:
        K angles in degrees, as from ``angles``.

    >>> import modlib
    >>> data = modlib.data.load("digits").subset(n_train=256)
    >>> batch = modlib.data.Loader(data).sample(256)
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10], boundary="after"), 2)
    >>> (stage,) = modlib.methods.BlockCoordinateDescent().stages(net, batch[0])
    >>> stage.train()
    >>> _ = stage.step(*batch)    # one sweep
    >>> [0 < angle < 180 for angle in angles_gone(net, batch)]
    [True, True]
    """
    before = copy.deepcopy(net)
    moved: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for old, p in zip(before.parameters(), net.parameters(), strict=True):
            if p.grad is not None:
                old.add_(p.grad)
                moved[old] = p.grad
    truth = _gradients(before, batch)
    pairs = [_pair(list(module.parameters()), moved, truth) for module in before]
    return [_angle(*pair) if pair else None for pair in pairs]


class _Held:
    """In an optimiser's place: keeps the gradients that it was to use, and moves nothing."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.param_groups = optimizer.param_groups
        self.given: dict[Tensor, Tensor] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._parameters():
            p.grad = None

    def step(self, *_: Any, **__: Any) -> None:
        self.given |= {p: p.grad.clone() for p in self._parameters() if p.grad is not None}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def _gradients(net: ModularNetwork, batch: tuple[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Of the cross-entropy of the network's output, in training mode."""
    x, y = batch
    net.train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    with buffers_kept(net):
        loss = nn.functional.cross_entropy(net(x), y)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {p: g for p, g in zip(parameters, gradients, strict=True) if g is not None}


def _pair(
    parameters: Sequence[Tensor], updates: dict[Tensor, Tensor], truth: dict[Tensor, Tensor]
) -> tuple[Tensor, Tensor] | None:
    shared = [p for p in parameters if p in updates and p in truth]
    if not shared:
        return None
    u = torch.cat([updates[p].flatten() for p in shared]).cpu().double()
    g = torch.cat([truth[p].flatten() for p in shared]).cpu().double()
    return (u, g) if u.any() and g.any() else None


def _angle(u: Tensor, g: Tensor) -> float:
    # of unit vectors, by their difference and sum: exact also for small angles, where a cosine is not
    u, g = u / u.norm(), g / g.norm()
    return math.degrees(2 * math.atan2(float((u - g).norm()), float((u + g).norm())))
