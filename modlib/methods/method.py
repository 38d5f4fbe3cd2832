r"""What all methods share: a network becomes *stages*, and a stage knows how to take one step.

.. math:: h_k = f_k(\mathrm{stop}(h_{k-1})), \qquad
          \theta_k \leftarrow \theta_k - \eta\, \nabla_{\theta_k} L_k(h_k, y)

One step of a stage updates the modules it holds, each on an objective of its own. End-to-end
backpropagation is one stage that holds the whole network as ONE module; simultaneous local learning
is one stage that holds K modules; modular training is K stages that hold one module each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modlib.device import MakeContext, Scaler, scalers
from modlib.network import ModularNetwork
from modlib.networks.seeding import reseed
from modlib.objectives import Objective
from modlib.objectives.objective import Term

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Optimizers = MakeOptimizer | Sequence[MakeOptimizer] | None  # one for all modules, or one each


def sgd(
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    nesterov: bool = True,
    *,
    decoupled: bool = False,
    bias_rate: float = 1.0,
) -> MakeOptimizer:
    """Stochastic gradient descent with Nesterov momentum, to be made for each module.

    Any ``functools.partial(torch.optim.AdamW, lr=...)`` serves in its place.

    Args:
        lr: the learning rate.
        momentum: 0 for none.
        weight_decay: L2 penalty; with ``decoupled`` the share that a weight loses in a step at full rate.
        nesterov: look ahead, if there is momentum.
        decoupled: decay that does not grow with the learning rate (Loshchilov & Hutter 2019, arXiv 1711.05101).
        bias_rate: factor on the learning rate of biases and batch norm's shifts (all vectors).

    >>> import torch
    >>> optimizer = sgd(0.5, weight_decay=0.01, decoupled=True, bias_rate=10.0)(torch.nn.Linear(2, 2).parameters())
    >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]    # weights, biases
    [(0.5, 0.02), (5.0, 0.002)]
    """
    make = partial(torch.optim.SGD, momentum=momentum, nesterov=nesterov and momentum > 0)
    if not decoupled and bias_rate == 1.0:
        return partial(make, lr=lr, weight_decay=weight_decay)

    def grouped(parameters: Iterable[nn.Parameter]) -> Optimizer:
        everything = list(parameters)
        groups = []
        for rate, vectors in ((lr, False), (lr * bias_rate, True)):
            members = [p for p in everything if (p.dim() < 2) is vectors]
            decay = weight_decay / rate if decoupled else weight_decay
            groups.append({"params": members, "lr": rate, "weight_decay": decay})
        return make([group for group in groups if group["params"]])

    return grouped


def adamw(lr: float = 1e-3, weight_decay: float = 5e-5) -> MakeOptimizer:
    """Adam with decoupled decay, to be made for each module; the decay does not grow with the rate.

    A bias needs no rate of its own here: Adam's steps do not depend on a gradient's scale.

    Args:
        lr: the learning rate.
        weight_decay: the share that a weight loses in a step at full rate, as in ``sgd`` with ``decoupled``.

    Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2.

    >>> import torch
    >>> (group,) = adamw(0.01, weight_decay=1e-4)(torch.nn.Linear(2, 2).parameters()).param_groups
    >>> group["lr"], group["weight_decay"]
    (0.01, 0.01)
    """
    return partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay / lr)


class Batches(Protocol):
    """What a stage trains on: a known number of batches an epoch, fixed by (seed, epoch) alone."""

    @property
    def random(self) -> bool: ...
    def __len__(self) -> int: ...
    def epoch(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]: ...
    def paired(self) -> Batches: ...  # the same images, so that batches hold pairs of every class


@dataclass(frozen=True)
class OneBatch:
    """One batch, as all there is to train on."""

    batch: tuple[Tensor, Tensor]
    random: bool = False

    def __len__(self) -> int:
        return 1

    def epoch(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.batch

    def paired(self) -> OneBatch:
        return self


class Stage:
    """A phase of training in which the same modules are updated in every step.

    Args:
        modules: what is trained, in the order of the forward pass.
        objectives: one for each module, called as ``objective(h, y)``.
        optimizers: one for each module, over its parameters and its objective's.
        frozen: modules that run before the first trained one; they stay as they are, in eval mode.
        complete: True when the stage trains the network's last module, so that the network can be
            evaluated after it.
        auxiliary: networks that serve training alone and belong to no objective: inverses that send
            targets back, synthesisers of gradients. Their optimisers come after the modules'.

    Attributes:
        autocast: makes the context in which modules and objectives run (mixed precision).
        fused: let a parameter take its step as soon as its gradient is there (``descending``).
        scalers: one gradient scaler for each optimiser; disabled unless training is in float16.
        value: what the numbers are that ``step`` returns, for a report of one that became infinite.
        remedy: what to do then.
        delay: how many steps old the errors are, at most, by which a module is updated.
        stream: (seed, stage, step), from which each module's random numbers of a step follow; None where
            they come from PyTorch's generators as these stand.
        below: how many modules of the same step come before these; other processes hold them.

    >>> import modlib
    >>> data = modlib.data.Loader(modlib.data.load("digits"))
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2)
    >>> x, y = data.sample(32)
    >>> (stage,) = modlib.methods.LocalLearning().stages(net, x)
    >>> stage.train()
    >>> stage.step(x, y).shape    # the objectives of both modules, before the update
    torch.Size([2])
    """

    value = "objective"
    remedy = "lower the learning rate"
    delay = 0

    def __init__(
        self,
        modules: Sequence[nn.Module],
        objectives: Sequence[Objective],
        optimizers: Sequence[Optimizer],
        frozen: Sequence[nn.Module] = (),
        complete: bool = True,
        auxiliary: Sequence[nn.Module] = (),
    ) -> None:
        self.modules, self.objectives = list(modules), list(objectives)
        self.optimizers, self.frozen = list(optimizers), list(frozen)
        self.complete, self.auxiliary = complete, list(auxiliary)
        self.autocast: MakeContext = nullcontext
        self.stream: tuple[int, ...] | None = None
        self.below = 0
        self.fused = False
        self.scalers = scalers(len(self.optimizers))

    def train(self) -> None:
        """Put what is trained into training mode, and what is frozen into eval mode."""
        for module in self.frozen:
            module.eval()
        for module in [*self.modules, *self.objectives, *self.auxiliary]:
            module.train()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Update every module of the stage on one batch.

        Each backward pass runs before the next module's forward pass, so autograd holds the
        activations of one module at a time. What is passed on is the output before the update.

        Args:
            x: the network's input (N, ...).
            y: labels (N,).

        Returns:
            The objectives' values before the update, one for each module.
        """
        with self.autocast():
            h = self.features(x)
        losses = []
        for k in range(len(self.modules)):
            self.draw(k, x.device)
            h = self.forward(k, h)
            losses.append(self.learn(k, h, y, x))
        return torch.stack([loss for loss in losses if loss is not None])

    # A step is made of these: one process may do all of it, or each process that of one module.

    def draw(self, k: int, device: torch.device) -> None:
        """Begin module k's own random numbers of this step, if ``stream`` says which step it is."""
        if self.stream is not None:
            reseed(device, *self.stream, self.below + k)

    def forward(self, k: int, h: Tensor) -> Tensor:
        """Module k's output (N, ...) on what comes from below: what is passed on."""
        with self.autocast():
            h = self.modules[k](h.detach())  # the boundary: no gradient passes it
        return h

    def learn(self, k: int, h: Tensor, y: Tensor, x: Tensor) -> Tensor | None:
        """Update module k, whose output is h; its objective's value before, if there is one to report.

        A term of the objective that sees the module through h alone goes back as far as h, where its
        gradient waits, before the next term is computed: autograd holds one of them at a time.
        """
        *early, last = self.objectives[k].terms()
        scaler = self.scalers[k]
        value = torch.zeros((), device=h.device)
        with descending(self.optimizers[k], scaler, self.fused):
            below = h.detach().requires_grad_(h.requires_grad)
            for term in early:
                value = value + self._go_back(term, (below, y, x), scaler)
            if below.grad is not None:
                h.register_hook(partial(_joined, below))  # type: ignore[no-untyped-call]
            return value + self._go_back(last, (h, y, x), scaler)

    def _go_back(self, term: Term, seen: tuple[Tensor, Tensor, Tensor], scaler: Scaler) -> Tensor:
        with self.autocast():
            loss = term(*seen)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def alone(self, k: int) -> Self:
        """This stage with module k alone, as a process of its own holds it; nothing is copied."""
        part = copy.copy(self)
        for name in ("modules", "objectives", "optimizers", "scalers"):
            setattr(part, name, getattr(self, name)[k : k + 1])
        part.below, part.frozen, part.auxiliary = self.below + k, [], []
        return part

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The frozen modules' output, the input of the first trained module."""
        for module in self.frozen:
            x = module(x)
        return x

    @property
    def pairs(self) -> bool:
        """Does an objective compare images of the same class with images of others?"""
        return any(objective.pairs for objective in self.objectives)

    def accepts(self, y: Tensor) -> bool:
        """Can every objective be computed on a batch with these labels (N,)? If not, it is skipped."""
        return all(objective.accepts(y) for objective in self.objectives)

    def check(self, batches: Batches) -> None:
        """Refuse what this stage cannot train on; called before anything is trained."""

    def batches(self, batches: Batches, seed: int) -> Batches:
        """What to train on, given batches of the network's input; a stage may cache features."""
        return batches.paired() if self.pairs else batches

    def watched(self) -> Iterator[tuple[str, nn.Module | None, Iterable[Tensor]]]:
        """What must stay finite: what it is, of which module (None: of none), and its numbers."""
        for module in self.modules:
            yield "weights", module, module.parameters()
        # where there is one objective for many modules, it is the last one's
        owners = self.modules[-len(self.objectives) :]
        for module, objective in zip(owners, self.objectives, strict=False):
            yield "auxiliary network", module, objective.parameters()
        for network in self.auxiliary:
            yield "an auxiliary network", None, network.parameters()

    def due(self, module: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The batch by which the next step updates a module (its number), if it is given this one.

        An older one where errors come late; what is measured of an update is measured on it.
        """
        return batch

    def kept(self) -> Iterable[Tensor]:
        """What is kept from one step to the next, beside weights and the optimisers' own state."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the network's own weights."""
        return {name: [part.state_dict() for part in getattr(self, name)] for name in _PARTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _PARTS:
            for part, saved in zip(getattr(self, name), state[name], strict=True):
                part.load_state_dict(saved)


# Of a stage, with a state of their own.
_PARTS = ("objectives", "optimizers", "scalers", "auxiliary")


def _joined(waiting: Tensor, gradient: Tensor) -> Tensor:
    """A gradient and the one that waits at a leaf, which forgets it."""
    before, waiting.grad = waiting.grad, None
    return gradient if before is None else before.add_(gradient)


def update(loss: Tensor, optimizer: Optimizer, scaler: Scaler) -> None:
    """One step of an optimiser down the gradient of a loss."""
    with descending(optimizer, scaler):
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]


@contextmanager
def descending(optimizer: Optimizer, scaler: Scaler, fused: bool = False) -> Iterator[None]:
    """One step of an optimiser down the gradients that the backward passes in the block find.

    Args:
        optimizer: of parameters that each get a gradient once in the block.
        scaler: of the losses' gradients.
        fused: let every parameter take its step as soon as its gradient is there, and let go of the
            gradient. With a scaler that has to see all gradients first, they wait for the end.
    """
    optimizer.zero_grad(set_to_none=True)
    if not fused or scaler.is_enabled():
        yield
        scaler.step(optimizer)
        scaler.update()
        return

    def step(parameter: Tensor) -> None:
        optimizer.step()  # of the only parameter that has a gradient
        parameter.grad = None

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    hooks = [p.register_post_accumulate_grad_hook(step) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def checked(name: str, objective: Objective) -> Objective:
    """The objective that was given as an argument of this name.

    Raises:
        TypeError: it is none (a class in place of its instance, a function, a loss of torch's).
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{name}={shown(objective)} is no Objective; give one, such as "
            "modlib.objectives.CrossEntropy(), or one of a class of your own, a subclass of "
            "modlib.objectives.Objective whose forward(self, h, y) returns the scalar to minimise."
        )
    return objective


def check_logits(shape: Sequence[int], classes: int) -> None:
    """Refuse a network's output, of this shape without N, that has no logit for each class.

    Raises:
        ValueError: it has not.
    """
    if len(shape) != 1 or shape[0] < classes:
        raise ValueError(
            f"net: its output has shape {tuple(shape)}, but the data have {classes} classes; its "
            f"last layer must give {classes} logits."
        )


class Method:
    """How a network is trained: turns it into stages that ``modlib.fit`` runs one after another.

    Args:
        optimizer: makes one module's optimiser from its parameters; or a list, one for each module;
            ``default_optimizers`` if None.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 10]), modules=3)
    >>> x = torch.zeros(2, 64)
    >>> [len(stage.modules) for stage in modlib.methods.LocalLearning().stages(net, x)]
    [3]
    >>> [len(stage.modules) for stage in modlib.methods.LocalLearning(in_turn=True).stages(net, x)]
    [1, 1, 1]
    """

    def __init__(self, optimizer: Optimizers = None) -> None:
        self.optimizer = optimizer

    def default_optimizers(self, modules: int) -> Sequence[MakeOptimizer]:
        """What makes the optimisers of so many modules where none are given."""
        return [sgd()] * modules

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        """The stages of training ``net``.

        Args:
            net: the network, cut into modules.
            x: a batch (N, ...) like those it will be trained on; only its shape matters.
        """
        raise NotImplementedError(f"{type(self).__name__} must define stages(net, x).")

    def check_output(self, shape: Sequence[int], classes: int) -> None:
        """Refuse a network whose output, of this shape without N, the method cannot train."""
        check_logits(shape, classes)

    def make_optimizers(self, owners: Sequence[Sequence[nn.Module]]) -> list[Optimizer]:
        """One optimiser for each group of modules (a module and its objective, say).

        Raises:
            TypeError: ``optimizer`` is nothing that makes optimisers.
            ValueError: there is not one for each module, or a module has nothing to train.
        """
        makers = self._makers(len(owners))
        parameters = [[p for owner in group for p in owner.parameters()] for group in owners]
        for k, group in enumerate(parameters):
            if not any(p.requires_grad for p in group):
                raise ValueError(
                    f"net: module {k} has nothing to train; cut the network so that every module has "
                    "parameters, and leave requires_grad=True on some of each."
                )
        return [
            made("optimizer", make, group) for make, group in zip(makers, parameters, strict=True)
        ]

    def _makers(self, count: int) -> Sequence[MakeOptimizer]:
        given = self.default_optimizers(count) if self.optimizer is None else self.optimizer
        if isinstance(given, str) or not isinstance(given, Sequence):
            return [given] * count
        if len(given) != count:
            raise ValueError(
                f"optimizer: {len(given)} given for {count} modules that are trained apart; "
                "give one for all, or one for each."
            )
        return given


def made(name: str, make: MakeOptimizer, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimiser that an argument of this name makes.

    Raises:
        TypeError: it makes none (a name, say, or an optimiser that has been made already).
    """
    optimizer = make(parameters) if callable(make) else None
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{name}={shown(make)} makes no optimiser; give a function of the parameters, such as "
            "modlib.methods.sgd(0.1) or functools.partial(torch.optim.AdamW, lr=0.001)."
        )
    return optimizer


def shown(value: object) -> str:
    """The beginning of a value's repr, on one line."""
    return f"{' '.join(repr(value).split()):.60}"
