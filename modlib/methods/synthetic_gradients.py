r"""Synthetic gradients: a small network per boundary predicts the gradient that would come back later.

.. math::
    \hat\delta_k = s_k(h_k, y), \qquad
    \theta_k \leftarrow \theta_k - \eta\, \frac1N \sum_n
        \Bigl(\frac{\partial h_{k,n}}{\partial \theta_k}\Bigr)^{\!\top} \hat\delta_{k,n}

    \min_{s_k} \frac1N \sum_n \lVert s_k(h_{k,n}, y_n) - \delta_{k,n} \rVert^2, \qquad
    \delta_k = \Bigl(\frac{\partial h_{k+1}}{\partial h_k}\Bigr)^{\!\top} \hat\delta_{k+1}

The last module descends the loss L itself, so :math:`\hat\delta_K = N\, \partial L / \partial h_K`: the
gradient of each image's own loss, which does not depend on the batch's size. Every target below is a
bootstrap: the NEXT synthetic gradient, sent through one module.

Source: Jaderberg et al. 2017 (arXiv 1608.05343), section 2.1: decoupled neural interfaces, DNI; with the
label, cDNI; synthetic inputs, too, are theirs. Category measured by the audit: weakly modular.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from modlib.methods.method import MakeOptimizer, Method, Optimizers, Stage, checked, made, update
from modlib.network import ModularNetwork
from modlib.networks.seeding import buffers_kept
from modlib.networks.sizes import check_whole
from modlib.objectives import CrossEntropy, Objective

MakeSynthesiser = Callable[[ModularNetwork, int], nn.Module]
HIDDEN = {"linear": 0, "mlp": 2}  # hidden layers of a synthesiser, by its kind


class SyntheticGradients(Method):
    """Update each module at once, by the gradient that its synthesiser predicts from its output.

    The paper's synthesisers for perceptrons have hidden layers of 1024 with batch norm; Adam, a low rate and
    very many steps (its numbers have not been checked). Ours have no batch norm, and see one image.

    Args:
        synthesiser: "linear", or "mlp" with two hidden layers; on maps (N, C, H, W) the layers are 3×3
            convolutions, on tokens they are shared by all. Or a function of the network and the number
            k of a module that makes a network of your own, called as ``s(h, y)`` with the module's
            output (N, ...) and the labels (N,); it returns the gradient of each image's loss,
            shaped like h. One without parameters is not trained (``ExactGradient``).
        conditioned: show synthesisers the label as well (cDNI).
        width: of a synthesiser's hidden layers (channels, on maps).
        synthetic_inputs: let modules run on predictions of their inputs, made from the image; then they
            need not wait for each other in the forward pass either.
        optimizer: makes one module's optimiser, or a list with one for each; Adam at 1e-3 if None.
        synthesiser_optimizer: makes the optimiser of one synthesiser, or of one predictor of inputs; Adam
            at 1e-3 if None.
        objective: the loss on the network's output; cross-entropy if None.

    Raises:
        ValueError: ``synthesiser`` is unknown; (when training starts) the network is one module.
        TypeError: an argument is of another kind.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 10]), modules=3)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> history = modlib.fit(net, SyntheticGradients(), data, epochs=1, progress=False)
    >>> len(history.rows[0]["losses"])    # two synthesisers' errors, and the task's loss
    3
    """

    @property
    def stage_type(self) -> type[SyntheticStage]:
        """A subclass may step in its own way."""
        return SyntheticStage

    def __init__(
        self,
        synthesiser: str | MakeSynthesiser = "mlp",
        *,
        conditioned: bool = True,
        width: int = 128,
        synthetic_inputs: bool = False,
        optimizer: Optimizers = None,
        synthesiser_optimizer: MakeOptimizer | None = None,
        objective: Objective | None = None,
    ) -> None:
        adam = partial(torch.optim.Adam, lr=1e-3)
        super().__init__(adam if optimizer is None else optimizer)
        if isinstance(synthesiser, str) and synthesiser not in HIDDEN:
            raise ValueError(
                f"synthesiser={synthesiser!r} is unknown; choose from {', '.join(HIDDEN)}, or give a "
                "function of the network and a module's number that makes one."
            )
        if not (isinstance(synthesiser, str) or callable(synthesiser)):
            raise TypeError(
                f"synthesiser={synthesiser!r}: give {' or '.join(map(repr, HIDDEN))}, or a function of the "
                "network and a module's number."
            )
        check_whole(width=width)
        self.synthesiser, self.conditioned, self.width = synthesiser, conditioned, width
        self.synthetic_inputs = synthetic_inputs
        self.synthesiser_optimizer = synthesiser_optimizer or adam
        self.objective = checked("objective", objective or CrossEntropy())

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        *hidden, (classes,) = net.shapes(x)
        if not hidden:
            raise ValueError(
                "net: synthetic gradients stand in for those that come back from a later module, but the "
                "network is one module; cut it with modlib.partition(net, 2) or finer."
            )
        synthesisers = [self._synthesiser(net, k, shape, classes) for k, shape in enumerate(hidden)]
        predictors = [self._predictor(x, shape) for shape in hidden if self.synthetic_inputs]
        like = next(net.parameters())  # its device and precision
        auxiliary = [network.to(like) for network in (*synthesisers, *predictors)]
        make = self.synthesiser_optimizer
        return [
            self.stage_type(
                list(net),
                self.objective.for_module((classes,), classes).to(x.device),
                self.make_optimizers([[module] for module in net]),
                auxiliary,
                [
                    made("synthesiser_optimizer", make, parameters)
                    for network in auxiliary
                    if (parameters := list(network.parameters()))
                ],
            )
        ]

    def _synthesiser(
        self, net: ModularNetwork, k: int, shape: tuple[int, ...], classes: int
    ) -> nn.Module:
        if not isinstance(self.synthesiser, str):
            return self.synthesiser(net, k)
        widths = [self.width] * HIDDEN[self.synthesiser]
        return Predictor(shape, shape, widths, classes * self.conditioned, zero=True)

    def _predictor(self, x: Tensor, shape: tuple[int, ...]) -> nn.Module:
        """Of the input of the next module, whose shape this is, from the network's."""
        return Predictor(tuple(x.shape[1:]), shape, [self.width])


class Predictor(nn.Module):
    """Predicts one tensor from another and, if there are classes, from the label.

    Layers are 3×3 convolutions from maps to maps, else linear ones on the last axis (from tokens to
    tokens) or on all of the tensor. A label adds a vector of its own to what the first layer gives,
    which is what a linear layer does with a one-hot code beside its input.

    Args:
        given: shape of what is seen, without N.
        wanted: of what is predicted.
        widths: of the hidden layers, each with a ReLU behind it.
        classes: number of labels; 0 shows none.
        zero: begin with predictions of zero.

    >>> s = Predictor((8, 4, 4), (8, 4, 4), [16], classes=10, zero=True)
    >>> s(torch.ones(2, 8, 4, 4), torch.tensor([3, 5])).abs().sum().item()
    0.0
    """

    def __init__(
        self,
        given: tuple[int, ...],
        wanted: tuple[int, ...],
        widths: Sequence[int],
        classes: int = 0,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.wanted = wanted
        self.maps = len(given) == len(wanted) == 3
        self.tokens = len(given) == len(wanted) == 2 and given[0] == wanted[0]
        before, after = (
            (given[0], wanted[0])
            if self.maps
            else (given[-1], wanted[-1])
            if self.tokens
            else (torch.Size(given).numel(), torch.Size(wanted).numel())
        )
        sizes = [before, *widths, after]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) if self.maps else nn.Linear(a, b)
            for a, b in pairwise(sizes)
        )
        self.labels = nn.Embedding(classes, sizes[1]) if classes else None
        if zero:
            for parameter in self.layers[-1].parameters():
                nn.init.zeros_(parameter)
            if self.labels is not None and not widths:
                nn.init.zeros_(self.labels.weight)

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        """The prediction (N, *wanted) for h (N, *given) and labels (N,)."""
        z: Tensor = h.to(next(self.parameters()).dtype)
        if self.maps:
            height, width = self.wanted[1:]
            z = F.adaptive_avg_pool2d(z, (height, width))  # nothing happens to a map of that size
        elif not self.tokens:
            z = z.flatten(1)
        z = self.layers[0](z)
        if self.labels is not None:
            label = self.labels(y)
            z = z + label.view(
                len(z), *(-1, 1, 1) if self.maps else (1, -1) if self.tokens else (-1,)
            )
        for layer in self.layers[1:]:
            z = layer(z.relu())
        return z.reshape(len(h), *self.wanted)


class ExactGradient(nn.Module):
    """The synthesiser that errs on no image: it runs the later modules and asks autograd.

    It saves nothing, and unlocks nothing. With it, synthetic gradients are backpropagation: what can be
    had at best, and a test of everything else.

    Args:
        net: the network, cut.
        k: number of the module whose output is given.
        objective: the loss on the network's output; cross-entropy if None.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2)
    >>> _, batch = net.train(), modlib.data.Loader(modlib.data.load("digits")).sample(32)
    >>> stage, = SyntheticGradients(ExactGradient).stages(net, batch[0])
    >>> max(gradient_errors(stage, net, batch)) < 1e-5
    True
    """

    def __init__(self, net: ModularNetwork, k: int, objective: Objective | None = None) -> None:
        super().__init__()
        self.later = (net[k + 1 :],)  # in a tuple: these weights are the network's
        self.objective = objective or CrossEntropy()

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        (later,) = self.later
        with torch.enable_grad(), buffers_kept(later):
            h = h.detach().requires_grad_()
            loss = self.objective(later(h), y)
            return torch.autograd.grad(loss, h)[0] * len(y)


class SyntheticStage(Stage):
    """All modules in each step, in float32: a gradient's parts are small numbers.

    Args:
        modules: K modules.
        objective: of the last one's output.
        optimizers: of the modules.
        auxiliary: K - 1 synthesisers, then no or K - 1 predictors of the later modules' inputs.
        auxiliary_optimizers: of those that have parameters, in the same order.
    """

    value = "loss"
    remedy = "lower the learning rate of the modules or of the synthesisers"

    def __init__(
        self,
        modules: Sequence[nn.Module],
        objective: Objective,
        optimizers: Sequence[Optimizer],
        auxiliary: Sequence[nn.Module],
        auxiliary_optimizers: Sequence[Optimizer],
    ) -> None:
        optimizers = [*optimizers, *auxiliary_optimizers]
        super().__init__(modules, [objective], optimizers, auxiliary=auxiliary)
        # News of the last module reaches a synthesiser one boundary below in each step.
        self.delay = len(self.modules) - 1
        trained = [k for k, network in enumerate(self.auxiliary) if list(network.parameters())]
        self._number = {k: len(self.modules) + i for i, k in enumerate(trained)}

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Update each module when it has run, then the synthesiser below it by what came out of it.

        Autograd holds one module at a time, and the synthesiser below it.

        Returns:
            Each synthesiser's squared error before its update, summed over features and averaged over
            the batch; for the last module the task's loss.
        """
        losses: list[Tensor] = []
        h, predicted = x, None
        for k, module in enumerate(self.modules):
            given, guess = self._input(k, x, h)
            out = module(given)
            synthetic = self._synthetic(k, out, y)
            loss = self.objectives[0](out, y) if synthetic is None else inner_with(synthetic, out)
            arrived = self._descend(k, loss, given)
            if predicted is not None:
                losses.append(self._learn(k - 1, predicted, arrived))
            if guess is not None:
                self._learn(len(self.modules) + k - 2, guess, h.detach())
            h, predicted = out, synthetic
        return torch.stack([*losses, loss.detach()])

    def _input(self, k: int, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """What module k runs on, cut off from what made it; and the prediction of it, if it is one."""
        if k == 0:
            return x, None
        if len(self.auxiliary) < len(self.modules):
            return h.detach().requires_grad_(), None
        guess = self.auxiliary[len(self.modules) + k - 2](x)
        return guess.detach().requires_grad_(), guess

    def _synthetic(self, k: int, out: Tensor, y: Tensor) -> Tensor | None:
        """The gradient that is to come back to this output; None for the last module, which knows."""
        if k == len(self.modules) - 1:
            return None
        given = out.detach()  # the synthesiser's error must not move the module
        return cast(Tensor, self.auxiliary[k](given, y))

    def _descend(self, k: int, loss: Tensor, given: Tensor) -> Tensor:
        """Update module k; the gradient of each image's loss that comes out at its input."""
        scale = self.scalers[k].scale(loss.new_ones((), requires_grad=True)).detach()
        update(loss, self.optimizers[k], self.scalers[k])
        return given if given.grad is None else given.grad * (len(given) / scale)

    def _learn(self, k: int, predicted: Tensor, target: Tensor) -> Tensor:
        """Move auxiliary network k to its target; its error before."""
        error = (predicted - target).square().flatten(1).sum(1).mean()
        if k in self._number:
            update(error, self.optimizers[self._number[k]], self.scalers[self._number[k]])
        return error.detach()

    def watched(self) -> Iterator[tuple[str, nn.Module | None, Iterable[Tensor]]]:
        for module in self.modules:
            yield "weights", module, module.parameters()
        above = self.modules[1:] * 2
        for k, network in enumerate(self.auxiliary):
            what = "synthesiser" if k < len(self.modules) - 1 else "predicted input"
            owner = self.modules[k] if what == "synthesiser" else above[k]
            yield what, owner, network.parameters()


def inner_with(synthetic: Tensor, out: Tensor) -> Tensor:
    """A function of the output (N, ...) whose gradient is the synthetic one, averaged over the batch."""
    return (out * synthetic.detach()).sum() / len(out)


def gradient_errors(stage: Stage, net: ModularNetwork, batch: tuple[Tensor, Tensor]) -> list[float]:
    r"""How far each synthetic gradient is from the true one, at the outputs (updates: ``errors``).

    .. math:: \varepsilon_k = \lVert \hat\delta_k - \delta_k \rVert / \lVert \delta_k \rVert

    over all images of the batch, with the gradient of the loss of the whole network, all modules running
    on each other's outputs. Nothing is changed.

    Args:
        stage: of a run of ``SyntheticGradients`` on ``net``.
        net: what is trained, cut into K modules.
        batch: images (N, ...) and labels (N,).

    Returns:
        K - 1 numbers: 0 where it is exact, 1 where nothing would have been as good.
    """
    x, y = batch
    stage.train()
    with buffers_kept(net, *stage.auxiliary):
        outputs = net.outputs(x)
        truth = torch.autograd.grad(stage.objectives[-1](outputs[-1], y), outputs[:-1])
        with torch.no_grad():
            errors = [
                (s(h.detach(), y) / len(y) - delta).norm() / delta.norm()
                for s, h, delta in zip(stage.auxiliary, outputs, truth, strict=False)
            ]
    return [float(error) for error in errors]
