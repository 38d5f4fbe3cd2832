r"""Networks that go back: from a module's output towards its input.

.. math:: g \circ f = \mathrm{id} \ \text{(exact)}, \qquad g(y) = a_2(B\, a_1(y) + c) \ \text{(to be learned)}

Target propagation sends targets through them. B is a matrix or, between feature maps, a transposed
convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def learned_inverse(
    after: Sequence[int],
    before: Sequence[int],
    *,
    activation: Callable[[], nn.Module] = nn.Identity,
    input_activation: Callable[[], nn.Module] = nn.Identity,
) -> nn.Sequential:
    """One layer, to be trained, from a module's output back to its input.

    A 3×3 transposed convolution between two feature maps, with the stride that makes the sides fit; a
    linear layer wherever a vector takes part.

    Args:
        after: shape of the module's output without N, (d,) or (C, H, W).
        before: shape of its input without N.
        activation: makes what follows the layer; its range should be that of the module's input.
        input_activation: makes what comes before the layer.

    Returns:
        A network from ``(N, *after)`` to ``(N, *before)``.

    Raises:
        ValueError: no transposed convolution makes a map of the one size from the other.

    >>> learned_inverse((8, 4, 4), (4, 8, 8))(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 4, 8, 8])
    >>> learned_inverse((10,), (4, 8, 8), activation=nn.Tanh)(torch.zeros(2, 10)).shape
    torch.Size([2, 4, 8, 8])
    """
    if len(after) == len(before) == 3:
        layers: list[nn.Module] = [_transposed_convolution(after, before)]
    else:
        linear = nn.Linear(torch.Size(after).numel(), torch.Size(before).numel())
        layers = [nn.Flatten(), linear, nn.Unflatten(1, tuple(before))]
    return nn.Sequential(input_activation(), *layers, activation())


def _transposed_convolution(after: Sequence[int], before: Sequence[int]) -> nn.ConvTranspose2d:
    strides = [
        max(1, round(large / small)) for large, small in zip(before[1:], after[1:], strict=True)
    ]
    missing = [
        large - ((small - 1) * stride + 1)  # what a 3×3 kernel with padding 1 leaves to be added
        for large, small, stride in zip(before[1:], after[1:], strides, strict=True)
    ]
    if not all(0 <= more < max(stride, 1) for more, stride in zip(missing, strides, strict=True)):
        raise ValueError(
            f"net: no transposed convolution leads from a map of {after[1]}×{after[2]} pixels back to "
            f"{before[1]}×{before[2]}; cut the network so that a module's map is its input's, or the "
            "input's divided by a whole number."
        )
    return nn.ConvTranspose2d(
        after[0],
        before[0],
        3,
        (strides[0], strides[1]),
        padding=1,
        output_padding=(missing[0], missing[1]),
    )


class ELUSlope(nn.Module):
    r"""y + min(y, 0)²/2: at y = ELU(z) its slope is ELU's at z.

    Before a linear layer it lets an inverse have the transposed Jacobian of a module that ends with
    ``nn.ELU``, wherever the module is; without it a linear inverse has the mean Jacobian at best.

    >>> z = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    >>> y = nn.ELU()(z).detach().requires_grad_()
    >>> slopes = torch.autograd.grad(ELUSlope()(y).sum(), y)[0]
    >>> torch.allclose(slopes, torch.autograd.grad(nn.ELU()(z).sum(), z)[0])
    True
    """

    def forward(self, y: Tensor) -> Tensor:
        return y + y.clamp(max=0).square() / 2


class TanhSlope(nn.Module):
    """y - y³/3: at y = tanh(z) its slope is tanh's at z, 1 - y²; as ``ELUSlope`` for modules that end with tanh.

    >>> y = torch.tensor([0.5], requires_grad=True)
    >>> torch.autograd.grad(TanhSlope()(y).sum(), y)[0]
    tensor([0.7500])
    """

    def forward(self, y: Tensor) -> Tensor:
        return y - y**3 / 3


class ExactInverse(nn.Module):
    """The inverse of a module of square linear layers and invertible activations: nothing to learn.

    It always follows the module's present weights. A target outside the range of tanh is moved to
    the range's edge first.

    Args:
        module: linear layers with as many outputs as inputs, ``nn.Tanh`` and ``nn.LeakyReLU``.

    Raises:
        ValueError: it holds something else.

    >>> module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    >>> module[0].weight.data += 2 * torch.eye(3)    # far from singular
    >>> x = torch.rand(5, 3) / 4
    >>> torch.allclose(ExactInverse(module)(module(x)), x, atol=1e-3)
    True
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        leaves = [layer for layer in module.modules() if not any(layer.children())]
        for layer in leaves:
            square = isinstance(layer, nn.Linear) and layer.in_features == layer.out_features
            if not square and not isinstance(layer, tuple(_UNDO)):
                raise ValueError(
                    f"inverses='exact': {layer} has no exact inverse; build hidden modules of square "
                    "linear layers with nn.Tanh or nn.LeakyReLU, or give inverses='learned'."
                )
        self.layers = tuple(leaves)  # in a tuple: their parameters stay the module's alone

    def forward(self, y: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            y = (
                _unlinear(layer, y)
                if isinstance(layer, nn.Linear)
                else _UNDO[type(layer)](layer, y)
            )
        return y


def _unlinear(layer: nn.Linear, y: Tensor) -> Tensor:
    shifted = y if layer.bias is None else y - layer.bias
    return cast(Tensor, torch.linalg.solve(layer.weight, shifted.T)).T


def _untanh(_: Any, y: Tensor) -> Tensor:
    edge = 1 - 1e-6
    return y.clamp(-edge, edge).atanh()


def _unleak(layer: Any, y: Tensor) -> Tensor:
    return F.leaky_relu(y, 1 / layer.negative_slope)


_UNDO: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.Tanh: _untanh,
    nn.LeakyReLU: _unleak,
    nn.Identity: lambda _, y: y,
}
