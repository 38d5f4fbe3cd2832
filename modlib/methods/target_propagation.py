r"""Target propagation: modules get targets, not gradients.

.. math::
    \hat h_m = h_m - \eta\, \partial L / \partial h_m, \qquad
    \hat h_{k-1} = g_k(\hat h_k) \quad \text{(TP)}, \qquad
    \hat h_{k-1} = h_{k-1} + g_k(\hat h_k) - g_k(h_k) \quad \text{(DTP)}

    \min_{\theta_k} \lVert f_k(h_{k-1}) - \hat h_k \rVert^2

Targets begin at the last hidden output (m = K - 1; the last module then descends L itself) or at the
network's output (m = K). Direct DTP has g_k lead from h_m, at once, to every h_{k-1}. With noise
:math:`\varepsilon, \nu` of standard deviation :math:`\sigma` the g_k learn, all else held still, on

.. math::
    \text{reconstruction} &\quad \lVert g_k(f_k(h + \varepsilon)) - (h + \varepsilon) \rVert^2 \\
    \text{difference} &\quad \sigma^{-2} \lVert h + \bar g_k(f_{k..m}(h + \varepsilon)) - \bar g_k(h_m)
        - (h + \varepsilon) \rVert^2 \\
    \text{local difference} &\quad \sigma^{-2} (\lVert g_k(h_k + \nu) - g_k(h_k) \rVert^2
        - 2 \langle \varepsilon, g_k(f_k(h + \varepsilon)) - g_k(f_k(h)) \rangle)

with h for h_{k-1}, and g̅ the way from h_m back through all inverses with their differences. Sources: TP
and DTP: Lee, Zhang, Fischer & Bengio 2015 (arXiv 1412.7525), algorithm 1; difference reconstruction
loss (DRL) and direct DTP: Meulemans et al. 2020 (arXiv 2006.14331), section 4; local DRL: Ernoult et
al. 2022 (arXiv 2201.13415), section 4. Category measured by the audit: weakly modular.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modlib.methods.method import MakeOptimizer, Method, Optimizers, Stage, made, sgd, update
from modlib.network import ModularNetwork
from modlib.networks.inverses import ExactInverse, learned_inverse
from modlib.networks.seeding import buffers_kept
from modlib.networks.sizes import check_positive, check_whole
from modlib.objectives import CrossEntropy

LOSSES = ("reconstruction", "difference", "local difference")


class TargetPropagation(Method):
    """Train each module to reach a target that inverses send back.

    Args:
        step_size: η, how far the output where targets begin moves down its gradient.
        noise: standard deviation of the noise under which the inverses are learned; or a list, one for
            each inverse.
        optimizer: makes one module's optimiser, or a list with one for each; RMSprop if None.
        inverse_optimizer: makes one inverse's optimiser; RMSprop if None.
        activation: of the inverses' output; the range of the modules' outputs, so Tanh for Tanh.
        inverses: "learned", or "exact" where the modules have an inverse (``networks.ExactInverse``).
        inverse_steps: updates of every inverse in a step.
        from_output: targets begin at the network's output; False: at the last hidden output, and the
            last module descends the loss.
        input_activation: makes what inverses of hidden outputs begin with, as ``networks.ELUSlope``.

    Raises:
        ValueError: an argument cannot work; or (when training starts) fewer than three modules, or a
            hidden output that is neither a vector (d,) nor a map (C, H, W).

    >>> import modlib, torch
    >>> net = modlib.networks.mlp([64, 32, 32, 10], activation=torch.nn.Tanh, boundary="after")
    >>> net = modlib.partition(net, modules=3)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> history = modlib.fit(net, TargetPropagation(), data, epochs=1, progress=False)
    >>> len(history.rows[0]["losses"])
    3
    """

    difference = False  # are targets corrected by g(h)?
    loss = LOSSES[0]  # of the inverses
    direct = False  # does one inverse lead from where targets begin to each hidden output?

    def __init__(
        self,
        step_size: float = 1.0,
        noise: float | Sequence[float] = 0.1,
        optimizer: Optimizers = None,
        inverse_optimizer: MakeOptimizer | None = None,
        activation: Callable[[], nn.Module] = nn.Tanh,
        *,
        inverses: str = "learned",
        inverse_steps: int = 1,
        from_output: bool = False,
        input_activation: Callable[[], nn.Module] = nn.Identity,
    ) -> None:
        rmsprop = partial(torch.optim.RMSprop, lr=1e-3)
        super().__init__(rmsprop if optimizer is None else optimizer)
        if inverses not in ("learned", "exact"):
            raise ValueError(f"inverses={inverses!r}: choose 'learned' or 'exact'.")
        check_whole(inverse_steps=inverse_steps)
        several = noise if isinstance(noise, Sequence) else [noise]
        check_positive(step_size=step_size)
        for sigma in several:
            check_positive(noise=sigma)
        self.inverse_optimizer = inverse_optimizer or rmsprop
        self.step_size, self.noise, self.activation = step_size, noise, activation
        self.inverses, self.inverse_steps = inverses, inverse_steps
        self.from_output, self.input_activation = from_output, input_activation

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        shapes = net.shapes(x)
        if not self.from_output:
            shapes.pop()
        if len(shapes) < 2 or any(len(shape) not in (1, 3) for shape in shapes):
            least = "two" if self.from_output else "three"
            raise ValueError(
                f"net: target propagation needs at least {least} modules whose outputs are vectors (d,) "
                f"or maps (C, H, W), but they have shapes {shapes}; cut a multilayer perceptron or a "
                f"convolutional network into {least} or more."
            )
        inverses = self._inverses(net, shapes, x)
        return [
            TargetStage(
                list(net),
                inverses,
                self.make_optimizers([[module] for module in net]),
                [
                    made("inverse_optimizer", self.inverse_optimizer, inverse.parameters())
                    for inverse in inverses
                    if self.inverses == "learned"
                ],
                step_size=self.step_size,
                noise=self._noises(len(inverses)),
                steps=self.inverse_steps if self.inverses == "learned" else 0,
                loss=self.loss,
                difference=self.difference,
                direct=self.direct,
            )
        ]

    def _inverses(
        self, net: ModularNetwork, shapes: Sequence[tuple[int, ...]], x: Tensor
    ) -> list[nn.Module]:
        """One for each output but the one where targets begin."""
        if self.inverses == "exact":
            return [ExactInverse(module) for module in net[1 : len(shapes)]]
        pairs = [(shape, shapes[-1]) for shape in shapes[:-1]] if self.direct else pairwise(shapes)
        logits = shapes[-1] if self.from_output else None  # no activation made them
        return [
            learned_inverse(
                after,
                before,
                activation=self.activation,
                input_activation=nn.Identity if after is logits else self.input_activation,
            ).to(x)
            for before, after in pairs
        ]

    def _noises(self, count: int) -> list[float]:
        noises = [*self.noise] if isinstance(self.noise, Sequence) else [self.noise] * count
        if len(noises) != count:
            raise ValueError(
                f"noise: {len(noises)} given for {count} inverses; give one number, or one for each."
            )
        return noises


class DifferenceTargetPropagation(TargetPropagation):
    """Target propagation whose targets are corrected by what the inverses get wrong.

    Args:
        loss: what the inverses learn on: "reconstruction", "difference" or "local difference".
        direct: one inverse leads from where targets begin to each hidden output; needs "difference".
        options: those of ``TargetPropagation``.

    Raises:
        ValueError: an argument cannot work; or (when training starts) as ``TargetPropagation``.

    >>> import modlib, torch
    >>> net = modlib.networks.mlp([64, 32, 32, 10], activation=torch.nn.Tanh, boundary="after")
    >>> net = modlib.partition(net, modules=3)
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> method = DifferenceTargetPropagation(step_size=0.5, loss="difference")
    >>> history = modlib.fit(net, method, data, epochs=1, progress=False)
    >>> len(history.rows[0]["losses"])
    3
    """

    difference = True

    def __init__(
        self,
        step_size: float = 1.0,
        noise: float | Sequence[float] = 0.1,
        optimizer: Optimizers = None,
        inverse_optimizer: MakeOptimizer | None = None,
        activation: Callable[[], nn.Module] = nn.Tanh,
        *,
        loss: str = LOSSES[0],
        direct: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(step_size, noise, optimizer, inverse_optimizer, activation, **options)
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}: choose {', '.join(map(repr, LOSSES))}.")
        if direct and (loss != "difference" or self.inverses == "exact"):
            raise ValueError(
                f"direct=True with loss={loss!r} and inverses={self.inverses!r}: direct inverses are "
                "learned on the difference; give loss='difference' and inverses='learned'."
            )
        self.loss, self.direct = loss, direct


def dtp_drl(
    step_size: float = 0.1,
    noise: float | Sequence[float] = 0.1,
    optimizer: Optimizers = None,
    inverse_optimizer: MakeOptimizer | None = None,
    *,
    inverse_steps: int = 1,
) -> DifferenceTargetPropagation:
    """DTP with the difference reconstruction loss (Meulemans et al. 2020, section 4); linear inverses.

    >>> dtp_drl().loss
    'difference'
    """
    return DifferenceTargetPropagation(
        step_size,
        noise,
        optimizer,
        inverse_optimizer,
        nn.Identity,
        inverse_steps=inverse_steps,
        loss="difference",
        from_output=True,
    )


def ddtp(
    step_size: float = 0.1,
    noise: float | Sequence[float] = 0.1,
    optimizer: Optimizers = None,
    inverse_optimizer: MakeOptimizer | None = None,
    *,
    inverse_steps: int = 1,
) -> DifferenceTargetPropagation:
    """Direct DTP (Meulemans et al. 2020, section 4): linear inverses from the output to every module.

    >>> ddtp().direct
    True
    """
    method = dtp_drl(step_size, noise, optimizer, inverse_optimizer, inverse_steps=inverse_steps)
    method.direct = True
    return method


def l_drl(
    step_size: float = 0.5,
    noise: float | Sequence[float] = 0.1,
    optimizer: Optimizers = None,
    inverse_optimizer: MakeOptimizer | None = None,
    *,
    inverse_steps: int = 1,
    from_output: bool = True,
    input_activation: Callable[[], nn.Module] = nn.Identity,
) -> DifferenceTargetPropagation:
    """DTP with the local difference reconstruction loss (Ernoult et al. 2022), by SGD.

    Its update is about ``2 * step_size`` times backpropagation's once the inverses' Jacobians are
    the modules' transposed ones. Maps and positions count alike: the inverses' loss is divided by
    σ² and by the number of positions of a map, so that one rate serves inverses of all sizes.

    >>> l_drl().loss
    'local difference'
    """
    return DifferenceTargetPropagation(
        step_size,
        noise,
        sgd() if optimizer is None else optimizer,
        sgd(0.03, weight_decay=0.0) if inverse_optimizer is None else inverse_optimizer,
        nn.Identity,
        inverse_steps=inverse_steps,
        loss="local difference",
        from_output=from_output,
        input_activation=input_activation,
    )


class TargetStage(Stage):
    """All modules and their inverses in each step, in float32: targets are small differences.

    ``inverses[k]`` maps the output of module k+1 (direct: the output where targets begin) back to the
    output of module k: the first module needs no inverse. Modules above the one where targets begin
    get the loss itself.
    """

    value = "distance to its target"
    remedy = "lower the learning rates of the modules and of their inverses, or step_size"

    def __init__(
        self,
        modules: Sequence[nn.Module],
        inverses: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        inverse_optimizers: Sequence[Optimizer],
        *,
        step_size: float,
        noise: Sequence[float],
        steps: int = 1,
        loss: str = LOSSES[0],
        difference: bool = True,
        direct: bool = False,
    ) -> None:
        optimizers = [*optimizers, *inverse_optimizers]
        super().__init__(modules, [CrossEntropy()], optimizers, auxiliary=inverses)
        self.step_size, self.noise, self.steps = step_size, list(noise), steps
        self.loss, self.difference, self.direct = loss, difference, direct
        self.top = len(inverses)  # targets begin at this module's output

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Learn the inverses, send targets back through them, move every module to its target.

        Modules run once to find the outputs and once more to be updated, so autograd holds one
        module at a time.

        Returns:
            Each module's loss before its update: squared distance to its target, summed over units
            and averaged over the batch; the task's loss for a last one without a target.
        """
        with buffers_kept(*self.modules):  # batch norm counts a batch once, in the update
            outputs = self._outputs(x)
            self._learn_inverses(outputs)
            targets = self._targets(outputs, y)
        losses = []
        for k, module in enumerate(self.modules):
            out = module(outputs[k - 1] if k else x)
            loss = _distance(out, targets[k]) if k < len(targets) else self.objectives[0](out, y)
            update(loss, self.optimizers[k], self.scalers[k])
            losses.append(loss.detach())
        return torch.stack(losses)

    @torch.no_grad()
    def _outputs(self, x: Tensor) -> list[Tensor]:
        """Every module's output, up to the one where targets begin, without a graph."""
        outputs = []
        for module in self.modules[: self.top + 1]:
            x = module(x)
            outputs.append(x)
        return outputs

    # --- inverses ---------------------------------------------------------------------------------

    def _learn_inverses(self, outputs: list[Tensor]) -> None:
        losses = (self._reconstruction, self._difference, self._local_difference)
        loss_of = dict(zip(LOSSES, losses, strict=True))[self.loss]
        for _ in range(self.steps):
            for k in range(len(self.auxiliary)):
                number = len(self.modules) + k
                update(loss_of(k, outputs), self.optimizers[number], self.scalers[number])

    def _reconstruction(self, k: int, outputs: list[Tensor]) -> Tensor:
        corrupted = outputs[k] + self.noise[k] * torch.randn_like(outputs[k])
        with torch.no_grad():
            after = self.modules[k + 1](corrupted)
        return _distance(self.auxiliary[k](after), corrupted)

    def _difference(self, k: int, outputs: list[Tensor]) -> Tensor:
        """Carry a corrupted output up to where targets begin, and back by the way of the targets."""
        corrupted = outputs[k] + self.noise[k] * torch.randn_like(outputs[k])
        with torch.no_grad():
            sent = corrupted
            for module in self.modules[k + 1 : self.top + 1]:
                sent = module(sent)
            for j in reversed(range(k + 1, self.top) if not self.direct else ()):
                sent = self._back(j, sent, outputs)
        return _distance(self._back(k, sent, outputs), corrupted) / self.noise[k] ** 2

    def _local_difference(self, k: int, outputs: list[Tensor]) -> Tensor:
        """Least where the inverse's Jacobian is the transposed one of the module."""
        here, above = outputs[k], outputs[k + 1]
        noise = self.noise[k] * torch.randn_like(here)
        noise_above = self.noise[k] * torch.randn_like(above)
        with torch.no_grad():
            moved = self.modules[k + 1](here + noise)
        inverse = self.auxiliary[k]
        base = inverse(above)
        around = _distance(inverse(above + noise_above), base)
        across = (noise * (inverse(moved) - base)).flatten(1).sum(1).mean()
        positions = above[0, 0].numel()  # of a map; 1 of a vector
        return cast(Tensor, around - 2 * across) / (self.noise[k] ** 2 * positions)

    # --- targets ----------------------------------------------------------------------------------

    def _targets(self, outputs: list[Tensor], y: Tensor) -> list[Tensor]:
        """The target of every module up to the one where targets begin, in order."""
        top = outputs[-1].requires_grad_()
        out = top
        for module in self.modules[self.top + 1 :]:
            out = module(out)
        loss = self.objectives[0](out, y)
        (gradient,) = torch.autograd.grad(loss, top)
        top.requires_grad_(False)
        # the loss is a mean over the batch: times N, the step does not depend on the batch's size
        targets = [top - self.step_size * len(y) * gradient]
        with torch.no_grad():
            for k in reversed(range(self.top)):
                targets.append(self._back(k, targets[0 if self.direct else -1], outputs))
        return targets[::-1]

    def _back(self, k: int, target: Tensor, outputs: list[Tensor]) -> Tensor:
        """A target of module k from one of module k+1, or from the one where targets begin."""
        inverse = self.auxiliary[k]
        sent = cast(Tensor, inverse(target))
        if not self.difference:
            return sent
        above = outputs[self.top if self.direct else k + 1]
        return outputs[k] - cast(Tensor, inverse(above)) + sent

    def watched(self) -> Iterator[tuple[str, nn.Module | None, Iterable[Tensor]]]:
        for module in self.modules:
            yield "weights", module, module.parameters()
        for module, inverse in zip(self.modules[1:], self.auxiliary, strict=False):
            owner = None if self.direct else module
            yield "inverse", owner, inverse.parameters()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).sum(1).mean()
