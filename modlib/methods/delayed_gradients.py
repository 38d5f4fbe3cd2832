r"""Delayed gradients: every module is updated in every step, by an error that is some steps old.

Module k of K (the first is 0) works d = K - 1 - k steps behind. Its error has come down one module a step:

.. math:: \delta_k^{t} = \Bigl(\frac{\partial f_{k+1}}{\partial h_k}\Bigr)^{\!\top} \delta_{k+1}^{t-1},
          \qquad
          \theta_k^{t+1} = \theta_k^{t} -
          \eta \Bigl(\frac{\partial f_k}{\partial \theta_k}\Bigr)^{\!\top} \delta_k^{t}

Both derivatives are taken on the batch of step t - d. ``DelayedGradients`` (DDG) takes them at the weights
of that time, so it keeps these weights and the graph. ``FeaturesReplay`` (FR) keeps the module's input, and
runs the module again with the weights of now.

Source: Huo, Gu, Yang & Huang 2018 (arXiv 1804.10574, equation 9 and algorithm 1); Huo, Gu & Huang 2018
(arXiv 1807.04511, algorithm 1). Category measured by the audit: weakly modular, without an update lock;
end-to-end with one module, when both ARE end-to-end backpropagation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from modlib.device import MakeContext, Scaler, random_state
from modlib.methods.method import Method, Optimizers, Stage, checked, update
from modlib.network import ModularNetwork
from modlib.networks.seeding import again
from modlib.objectives import CrossEntropy, Objective

Batch = tuple[Tensor, Tensor]


class DelayedGradients(Method):
    """Decoupled backpropagation with delayed gradients (DDG): old gradients, exact at old weights.

    A module keeps, for each batch whose error has not come yet, its graph and the weights of that time.
    Module k does nothing in the first K - 1 - k steps. Gradients cross no boundary within a step: they
    are sent down, to be used in the next one.

    Batch norm's running statistics and dropout behave as in ``E2EBP``: each batch counts once.

    Args:
        objective: the loss on the network's output; cross-entropy if None.
        optimizer: makes one module's optimiser, or a list with one for each.

    Published: CIFAR-10 and 100, ResNet-8 to 110 in two to four modules, batches of 128, SGD at rate 0.01,
    momentum 0.9, divided by 10 after 150 and 225 of 300 epochs.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 10]), modules=3)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> len(modlib.fit(net, DelayedGradients(), data, epochs=1, progress=False).rows)
    1
    """

    replay = False

    def __init__(self, objective: Objective | None = None, optimizer: Optimizers = None) -> None:
        super().__init__(optimizer)
        self.objective = checked("objective", objective or CrossEntropy())

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        (classes,) = net.shapes(x)[-1]
        objective = self.objective.for_module((classes,), classes).to(x.device)
        *hidden, last = net
        optimizers = self.make_optimizers([*([module] for module in hidden), [last, objective]])
        return [DelayedStage(list(net), objective, optimizers, replay=self.replay)]


class FeaturesReplay(DelayedGradients):
    """Features replay (FR): old errors, and each module run again with the weights of now.

    A module keeps, for each batch whose error has not come yet, its input alone. When the error comes it
    runs again on that input: every module but the last runs twice in a step, and autograd holds one module
    at a time. Module k does nothing in the first K - 1 - k steps.

    The second run repeats the random numbers of the first, and leaves batch norm's running statistics as
    they are: each batch counts once, as in ``E2EBP``. (The authors' program counts it twice.)

    Args:
        objective: the loss on the network's output; cross-entropy if None.
        optimizer: makes one module's optimiser, or a list with one for each.

    Published: CIFAR-10 and 100, ResNet-164, 101 and 152 in two to four modules, batches of 128, SGD at
    rate 0.01, momentum 0.9, divided by 10 after 150 and 225 of 300 epochs; the authors' program doubles
    the first module's rate.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 10]), modules=3)
    >>> data = modlib.data.load("digits")
    >>> seen = modlib.measure.audit.audit(FeaturesReplay(), net, modlib.data.Loader(data).sample(32))
    >>> seen.later, seen.locks["update"]
    (('2 steps late', '1 step late', 'no'), False)
    """

    replay = True


# --- one module -----------------------------------------------------------------------------------


@dataclass
class _Waiting:
    """What a worker keeps of a batch until its error comes.

    Attributes:
        h: the module's input, to which the gradient will go back.
        random: the generators' state before the module ran; None if it drew nothing.
        weights: the module's parameters when it ran, where they are to be used again.
        out: the module's output with its graph, where that is kept.
    """

    h: Tensor
    random: list[Tensor] | None = None
    weights: list[Tensor] = field(default_factory=list)
    out: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Waiting:
        """A graph cannot be copied: the copy makes it again from the rest."""
        return _Waiting(self.h.detach().clone().requires_grad_(self.h.requires_grad), *self.plain())

    def plain(self) -> tuple[list[Tensor] | None, list[Tensor]]:
        """All but the input and the graph; nothing ever writes into these tensors."""
        return self.random, self.weights


class Worker:
    """One module, with what it keeps between batches; it meets the others in messages alone.

    A process of its own could run it: ``forward`` what comes from below and send the output up, ``backward``
    what comes from above and send the gradient down.

    Args:
        module: what it runs and updates.
        objective: the number to minimise, of the module's output and the error that comes: the loss and
            the labels for the last module, an inner product and a gradient for the others.
        delay: how many batches go forward between one's forward and its backward pass.
        replay: run again with the weights of now, or keep the graph and the weights of that time.
        sends: does a module below wait for gradients?
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Callable[[Tensor, Tensor], Tensor],
        *,
        delay: int,
        replay: bool,
        sends: bool,
    ) -> None:
        self.module, self.objective = module, objective
        self.delay, self.replay, self.sends = delay, replay, sends
        self.waiting: deque[_Waiting] = deque()
        self.autocast: MakeContext = nullcontext

    def forward(self, h: Tensor) -> Tensor:
        """Run the module on a batch's h (N, ...), and keep what its gradient needs: the output."""
        batch = _Waiting(h.detach().requires_grad_(self.sends))
        before = random_state(h.device) if self.delay else []
        if self.delay and not self.replay:
            batch.weights = [p.detach().clone() for p in self.module.parameters()]
        if self.delay and self.replay:
            with torch.no_grad():
                out = self._run(batch)
        else:
            out = batch.out = self._run(batch)
        if not all(map(torch.equal, before, random_state(h.device) if before else [])):
            batch.random = before
        self.waiting.append(batch)
        return out.detach()

    def backward(
        self, error: Tensor | None, optimizer: Optimizer, scaler: Scaler
    ) -> tuple[Tensor | None, Tensor | None]:
        """Update the module by the error of the batch that has waited longest.

        Args:
            error: the gradient of the loss with respect to the module's output, or the labels for the
                last module; None as long as none has come, when nothing is done.
            optimizer: of the module's parameters.
            scaler: of its gradients, in float16.

        Returns:
            The objective's value, and the gradient with respect to the module's input, to be sent down.
        """
        if error is None:
            return None, None
        batch = self.waiting.popleft()
        out = self._again(batch) if batch.out is None else batch.out
        with self.autocast():
            loss = self.objective(out, error)
        scale = scaler.get_scale()
        update(loss, optimizer, scaler)
        gradient = batch.h.grad
        if gradient is not None and scale != 1:
            gradient = gradient.float() / scale  # each worker has a scale of its own
        return loss.detach(), gradient

    def _run(self, batch: _Waiting) -> Tensor:
        """The module's output, at the weights of that time if they were kept."""
        named = [name for name, _ in self.module.named_parameters()]
        own = self.module.parameters()
        then = {
            name: _Earlier.apply(now, kept)
            for name, now, kept in zip(named, own, batch.weights, strict=False)
        }
        with self.autocast():
            out: Tensor = (
                functional_call(self.module, then, (batch.h,)) if then else self.module(batch.h)
            )
        return out

    def _again(self, batch: _Waiting) -> Tensor:
        """The same once more, with a graph; running statistics do not count the batch twice."""
        with again(self.module, batch.random, batch.h.device):
            return self._run(batch)

    def kept(self) -> Iterator[Tensor]:
        for batch in self.waiting:
            random, weights = batch.plain()
            yield from (batch.h, *(random or ()), *weights)

    def state_dict(self) -> list[dict[str, Any]]:
        return [
            {"h": batch.h.detach(), "random": batch.random, "weights": batch.weights}
            for batch in self.waiting
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        device = next(self.module.parameters()).device
        self.waiting = deque(
            _Waiting(
                saved["h"].to(device).requires_grad_(self.sends),
                saved["random"],
                [weight.to(device) for weight in saved["weights"]],
            )
            for saved in state
        )


class _Earlier(torch.autograd.Function):
    """A parameter's earlier value; a gradient goes on to the parameter itself."""

    @staticmethod
    def forward(ctx: Any, now: Tensor, then: Tensor) -> Tensor:
        return then.view_as(then)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


def _inner(out: Tensor, gradient: Tensor) -> Tensor:
    """The number whose gradient with respect to the output is this one."""
    return (out * gradient).sum()


# --- all modules in one process -------------------------------------------------------------------


class DelayedStage(Stage):
    """All modules in each step; the stage only carries messages from one worker to the next.

    Attributes:
        workers: one for each module.
        errors: the gradient that was last sent down into each module's input, and (last) None: worker k
            finds its own at k + 1, until its turn from the step before.
        labels: of the batches that wait in the first worker, so that what is late can be measured.
    """

    remedy = "lower the learning rate, or cut the network into fewer modules"

    def __init__(
        self,
        modules: Sequence[nn.Module],
        objective: Objective,
        optimizers: Sequence[Optimizer],
        *,
        replay: bool,
    ) -> None:
        super().__init__(modules, [objective], optimizers)
        self.delay = len(self.modules) - 1
        self.workers = [
            Worker(
                module,
                _inner if k < self.delay else objective,
                delay=self.delay - k,
                replay=replay,
                sends=k > 0,
            )
            for k, module in enumerate(self.modules)
        ]
        self.errors: list[Tensor | None] = [None] * (len(self.modules) + 1)
        self.labels: deque[Tensor] = deque(maxlen=self.delay)

    def forward(self, k: int, h: Tensor) -> Tensor:
        """Worker k runs forward: its output, without a graph."""
        self.workers[k].autocast = self.autocast
        return self.workers[k].forward(h)

    def learn(self, k: int, h: Tensor, y: Tensor, x: Tensor) -> Tensor | None:
        """Worker k goes back with the error that has come to it, and sends one down for the next step.

        Returns:
            The last worker's loss of this batch, before the update.
        """
        worker, last = self.workers[k], self.workers[k].delay == 0
        if self.below + k == 0:
            self.labels.append(y.clone())
        error = y if last else self.errors[k + 1]
        loss, self.errors[k] = worker.backward(error, self.optimizers[k], self.scalers[k])
        return loss if last else None

    def alone(self, k: int) -> Self:
        part = super().alone(k)
        part.workers, part.errors = self.workers[k : k + 1], self.errors[k : k + 2]
        part.objectives = self.objectives if part.workers[0].delay == 0 else []
        part.labels = deque(self.labels, maxlen=self.labels.maxlen)
        return part

    def due(self, module: int, batch: Batch) -> Batch:
        late = self.delay - module
        waiting = self.workers[0].waiting
        if not 0 < late <= len(waiting):
            return batch
        return waiting[-late].h, self.labels[-late]

    def kept(self) -> Iterator[Tensor]:
        for worker in self.workers:
            yield from worker.kept()
        yield from (error for error in self.errors if error is not None)
        yield from self.labels

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "workers": [worker.state_dict() for worker in self.workers],
            "errors": list(self.errors),
            "labels": list(self.labels),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = next(self.modules[0].parameters()).device
        for worker, saved in zip(self.workers, state["workers"], strict=True):
            worker.load_state_dict(saved)
        self.errors = [None if error is None else error.to(device) for error in state["errors"]]
        self.labels = deque((y.to(device) for y in state["labels"]), maxlen=self.delay)
