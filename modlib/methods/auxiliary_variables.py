r"""What training with auxiliary variables shares: codes, sweeps over all images, linear solves.

.. math:: \min_\theta \ell(f_K(\dots f_1(x)), y)
          \quad\longrightarrow\quad
          \min_{\theta, z} \ell(f_K(z_{K-1}), y) \quad\text{subject to}\quad z_k = f_k(z_{k-1})

Each image gets *codes* z of its own, one for the output of each hidden module, which are trained beside
the weights. With the codes held, the modules are separate problems; with the weights held, the images
are. A *sweep* solves for one block of variables after another, on all images at once: one step of the
stage is one sweep, and one epoch.

Source: Carreira-Perpinan & Wang 2014 (arXiv 1212.5921), section 2. Category measured by the audit:
weakly modular.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from modlib.kernels import double
from modlib.methods.method import Batches, OneBatch, Stage
from modlib.network import ModularNetwork


class Assign(Optimizer):
    """Gives weights the values that a block's solution has, in place of a step along a gradient.

    A parameter's ``grad`` is what to take away from it: its old value minus the new one. There is no
    learning rate; what a schedule sets is not looked at.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad)


Codes = dict[str, list[Tensor]]


class CodesStage(Stage, ABC):
    """All modules and the codes of all images; one step is one sweep over the blocks.

    Attributes:
        codes: for each kind of code a list of tensors (N, ...), one for each module that has one.
        weights: each module's parameters, as the sweep that is under way has them; the modules
            themselves are given them at its end.
        sweeps: how many have been made.
    """

    value = "distance to its code"
    remedy = "lower the penalty, or keep the weights nearer to their last values"

    def __init__(
        self, modules: Sequence[nn.Module], optimizers: Sequence[Optimizer], classes: int
    ) -> None:
        super().__init__(modules, [], optimizers)
        self.classes = classes
        self.codes: Codes = {}
        self.weights: list[list[Tensor]] = []
        self.sweeps = 0

    def check(self, batches: Batches) -> None:
        """Refuse randomly augmented images.

        Raises:
            ValueError: a code would belong to another image in every sweep.
        """
        if batches.random:
            raise ValueError(
                "augment: codes belong to images that stay the same in every sweep; give augment=None."
            )

    def batches(self, batches: Batches, seed: int) -> Batches:
        """All images as one batch, in an order fixed by the seed."""
        xs, ys = zip(*batches.epoch(seed, 0), strict=True)
        return OneBatch((torch.cat(xs), torch.cat(ys)))

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One sweep. Codes begin as the network's own outputs, also when another number of images comes.

        Args:
            x: all images (N, ...).
            y: labels (N,).

        Returns:
            For each hidden module half the squared distance between its output and its code, for the last
            half its squared error on the one-hot labels; summed over units, averaged over images.
        """
        for _ in self.sweep(x, y):
            pass
        for module, new, optimizer in zip(self.modules, self.weights, self.optimizers, strict=True):
            for p, value in zip(trainable(module), new, strict=True):
                p.grad = p.detach() - value
            optimizer.step()
        self.weights = []
        self.sweeps += 1
        return torch.stack(self._distances(x, y))

    def sweep(self, x: Tensor, y: Tensor) -> Iterator[str]:
        """Solve for one block after another; a block's name comes when its solution is in place."""
        if not self.codes or len(next(iter(self.codes.values()))[0]) != len(x):
            self.codes, self.sweeps = self.begin(x), 0
        self.weights = self.present()
        yield from self.blocks(x, self.one_hot(y, x))

    @abstractmethod
    def begin(self, x: Tensor) -> Codes:
        """The codes that the network's own outputs are."""

    @abstractmethod
    def blocks(self, x: Tensor, y: Tensor) -> Iterator[str]:
        """Solve for the blocks of one sweep, in order; y are one-hot labels (N, classes)."""

    @abstractmethod
    def terms(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Each module's term of the objective, summed over images; y are one-hot labels."""

    @torch.no_grad()
    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The objective that the blocks lower, averaged over images; with proximal terms left out.

        Args:
            x: all images (N, ...), those of the last step or of a sweep that is under way.
            y: labels (N,).

        Returns:
            (K,): each module's term; their sum is the objective.
        """
        return torch.stack(self.terms(x, self.one_hot(y, x))) / len(x)

    def present(self) -> list[list[Tensor]]:
        """Each module's parameters: those of a sweep that is under way, else its own."""
        return self.weights or [[p.detach() for p in trainable(m)] for m in self.modules]

    def one_hot(self, y: Tensor, x: Tensor) -> Tensor:
        """Labels (N,) as rows (N, classes) with a single 1."""
        return F.one_hot(y, self.classes).to(self.present()[0][0].dtype)

    @abstractmethod
    def targets(self) -> list[Tensor]:
        """The hidden modules' codes: what their outputs should be."""

    def _distances(self, x: Tensor, y: Tensor) -> list[Tensor]:
        targets = self.targets()
        inputs = [x, *targets]
        goals = [*targets, self.one_hot(y, x)]
        return [
            half_square(module(given) - goal) / len(x)
            for module, given, goal in zip(self.modules, inputs, goals, strict=True)
        ]

    def watched(self) -> Iterator[tuple[str, nn.Module | None, Iterable[Tensor]]]:
        yield from super().watched()
        for name, codes in self.codes.items():
            for module, code in zip(self.modules[-len(codes) :], codes, strict=True):
                yield f"codes {name}", module, [code]

    def kept(self) -> Iterable[Tensor]:
        return [code for codes in self.codes.values() for code in codes]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "codes": self.codes, "sweeps": self.sweeps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = next(self.modules[0].parameters()).device
        self.codes = {
            name: [code.to(device) for code in codes] for name, codes in state["codes"].items()
        }
        self.sweeps = state["sweeps"]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def half_square(t: Tensor) -> Tensor:
    return t.square().sum() / 2


# --- perceptrons ----------------------------------------------------------------------------------


class DenseStage(CodesStage):
    """For modules that are one linear layer with a ReLU behind it, the last one without."""

    def linear(self, k: int, below: Tensor) -> Tensor:
        """Module k's linear layer on codes (N, d)."""
        weight, bias = self.present()[k]
        return F.linear(below, weight, bias)

    def fit_linear(
        self,
        k: int,
        below: Tensor,
        gap: Tensor,
        penalty: float,
        proximal: float,
        decay: float = 0.0,
    ) -> None:
        r"""Weight and bias of module k together, as one exact block.

        .. math:: \min_{W, b} \tfrac{\rho}{2} \lVert Z W^\top + \mathbf 1 b^\top - T \rVert_F^2
                  + \tfrac{\alpha}{2} \lVert (W, b) - (W, b)_{\text{old}} \rVert_F^2
                  + \tfrac{\lambda}{2} \lVert (W, b) \rVert_F^2

        The step is solved for, not the weights, and in double precision: images' constant pixels make the
        matrix all but singular.

        Args:
            below: Z, the codes (N, d) that come in.
            gap: what the layer gives too little, T minus its output (N, units).
            penalty: rho.
            proximal: alpha.
            decay: lambda.
        """
        weight, bias = self.weights[k]
        rows = torch.cat([below, below.new_ones(len(below), 1)], 1)
        gram = double(penalty * rows.T @ rows)
        gram.diagonal().add_(proximal + decay)
        right = double(penalty * rows.T @ gap - decay * torch.cat([weight.T, bias[None]]))
        step = solve(gram, right, f"inputs of module {k}").to(weight)
        self.weights[k] = [weight + step[:-1].T, bias + step[-1]]

    def fit_code(self, k: int, goal: Tensor, near: Tensor, penalty: float, hold: float) -> Tensor:
        r"""The codes (N, d) that come into module k.

        .. math:: \min_v \tfrac{\rho}{2} \lVert W v + b - t \rVert^2
                  + \tfrac{\gamma}{2} \lVert v - a \rVert^2,
                  \qquad v = a + \rho W^\top (\gamma I + \rho W W^\top)^{-1} (t - W a - b)

        Args:
            goal: t, what should come out of its linear layer (N, units).
            near: a, (N, d).
            penalty: rho.
            hold: gamma.
        """
        weight, _ = self.weights[k]
        matrix = penalty * weight @ weight.T
        matrix.diagonal().add_(hold)
        gap = penalty * (goal - self.linear(k, near))
        return near + solve(matrix, gap.T, f"weights of module {k}").T @ weight


def solve(matrix: Tensor, right: Tensor, of: str) -> Tensor:
    """The solution (d, m) of a symmetric positive definite system (d, d), by Cholesky's factors.

    Raises:
        FloatingPointError: the matrix is not positive definite, or not finite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not bool(factor.isfinite().all()):
        raise FloatingPointError(
            f"The Gram matrix of the {of} is singular or not finite, so its block has no solution; give "
            "a larger proximal weight, smaller penalties, or inputs that are finite."
        )
    return torch.cholesky_solve(right, factor)


def relu_prox(a: Tensor, b: Tensor, weight: float) -> Tensor:
    r"""The global minimiser over u, entry by entry, of a function with two valleys.

    .. math:: \tfrac12 (\operatorname{ReLU}(u) - a)^2 + \tfrac{w}{2} (u - b)^2

    On each side of 0 it is a parabola; the lower of the two least values counts.

    >>> relu_prox(torch.tensor([3.0, 2.0]), torch.tensor([-0.5, -1.0]), 1.0)
    tensor([ 1.2500, -1.0000])
    """
    right = ((a + weight * b) / (1 + weight)).clamp(min=0)
    left = b.clamp(max=0)
    cost_right = (right - a).square() + weight * (right - b).square()
    cost_left = a.square() + weight * (left - b).square()
    return torch.where(cost_left < cost_right, left, right)


def check_perceptron(net: ModularNetwork, name: str) -> None:
    """Refuse a network whose modules are not one linear layer and a ReLU each.

    Raises:
        ValueError: a module is another.
    """
    for k, module in enumerate(net):
        layers = [layer for layer in module.modules() if not list(layer.children())]
        kinds = [type(layer) for layer in layers if not isinstance(layer, nn.Flatten)]
        last = k == len(net) - 1
        linear = next((layer for layer in layers if isinstance(layer, nn.Linear)), None)
        if kinds != [nn.Linear] + [nn.ReLU] * (not last) or linear is None or linear.bias is None:
            raise ValueError(
                f"net: module {k} is {[kind.__name__ for kind in kinds]}, but {name} solves for linear "
                "layers (with a bias), each followed by a ReLU but the last; give such a network cut after "
                "every layer, such as modlib.networks.mlp([784, 300, 10], boundary='after')."
            )
        if not all(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"net: module {k} has frozen parameters, but {name} solves for weight and bias of every "
                "layer; set requires_grad=True on them."
            )
