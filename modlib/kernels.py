r"""Kernels induced by nonlinearities: networks as kernel machines.

Put the boundary between two modules *before* the nonlinearity. The next module then begins with a
fixed feature map :math:`\varphi(u) = \mathrm{act}(u) / \lVert \mathrm{act}(u) \rVert`, and a linear
layer on top of it is a kernel machine with kernel :math:`k(u, v) = \langle \varphi(u), \varphi(v)
\rangle`.

Source: Duan, Yu & Principe 2022 (arXiv 2005.05541), section III.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modlib.tokens import pooled

__all__ = [
    "FeatureMap",
    "Gaussian",
    "Kernel",
    "get",
    "gram",
    "ideal_gram",
]

_POOL = 4  # side of the average pooling window in "relu-pool"


def _relu_pool(u: Tensor) -> Tensor:
    if u.dim() != 4 or min(u.shape[-2:]) < _POOL:
        raise ValueError(
            f"kernel 'relu-pool' pools {_POOL}×{_POOL} windows of maps (N, C, H, W), but the module's "
            f"output has shape {tuple(u.shape)}; use kernel 'relu' there."
        )
    return F.avg_pool2d(F.relu(u), _POOL)


def wide(h: Tensor) -> Tensor:
    """h in float32, or in its own precision where that is higher."""
    return h.float() if h.dtype.itemsize < 4 else h


def double(h: Tensor) -> Tensor:
    """h in float64; on the CPU if it lies on one of Apple's GPUs, which have none."""
    return (h.cpu() if h.device.type == "mps" else h).double()


@dataclass(frozen=True)
class Kernel:
    r"""A kernel on module outputs, normalised so that every output is at distance 1 from the origin.

    Attributes:
        name: how it is written in a recipe.
        floor: :math:`\inf_{u,v} k(u, v)`, the least similarity of two outputs.
        ceiling: :math:`k(u, u)`, the similarity of an output with itself.

    >>> kernel = get("relu")
    >>> kernel.floor, kernel.ceiling, kernel.gram(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).tolist()
    (0.0, 1.0, [[1.0, 0.0], [0.0, 1.0]])
    """

    name: str
    floor: float
    ceiling: float = 1.0

    def gram(self, h: Tensor) -> Tensor:
        """The Gram matrix (N, N) of module outputs h (N, d), (N, C, H, W), or tokens (N, T, d)."""
        features = self.features(h)
        return features @ features.T

    def features(self, h: Tensor) -> Tensor:
        """Feature vectors (N, D) of norm 1, in float32 at least (a norm in float16 may be 0 or ∞).

        Tokens (N, T, d) are taken by their mean.

        Raises:
            TypeError: the kernel has no finite map.
        """
        return F.normalize(_ACTIVATIONS[self.name](pooled(wide(h))).flatten(1), dim=1, eps=1e-12)


@dataclass(frozen=True)
class Gaussian(Kernel):
    r"""The kernel :math:`k(u, v) = \exp(-\lVert u - v \rVert^2 / 2\sigma^2)`.

    Args:
        width: :math:`\sigma > 0`, in the units of the module's output.

    Raises:
        ValueError: the width is not finite and above 0.

    >>> import torch
    >>> Gaussian(width=1.0).gram(torch.tensor([[0.0], [2.0]]))[0, 1].log()
    tensor(-2.)
    """

    name: str = "gaussian"
    floor: float = 0.0
    width: float = 1.0

    def __init__(self, width: float = 1.0) -> None:
        if not 0 < width < float("inf"):
            raise ValueError(f"width={width}: a Gaussian kernel needs a finite width above 0.")
        object.__setattr__(self, "width", float(width))

    def gram(self, h: Tensor) -> Tensor:
        h = pooled(wide(h)).flatten(1)
        squares = h.square().sum(1)
        distances = squares[:, None] + squares[None, :] - 2 * h @ h.T
        return torch.exp(-distances.clamp_min(0) / (2 * self.width**2))

    def features(self, h: Tensor) -> Tensor:
        raise TypeError(
            "The Gaussian kernel's feature space has no finite basis; use kernel.gram(h), or for a "
            "network's output module one of the kernels " + ", ".join(_ACTIVATIONS) + "."
        )


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu-pool": _relu_pool,
    "cosine": lambda u: u,
}
_FLOORS = {"relu": 0.0, "tanh": -1.0, "sigmoid": 0.0, "relu-pool": 0.0, "cosine": -1.0}


def get(kernel: str | Kernel) -> Kernel:
    """A kernel by its name; a Kernel is returned as it is.

    Args:
        kernel: "relu", "tanh", "sigmoid", "relu-pool" (ReLU, 4×4 average pooling, flatten) or "cosine" (no
            activation).

    Raises:
        ValueError: the name is unknown.

    >>> get("tanh").floor
    -1.0
    """
    if isinstance(kernel, Kernel):
        return kernel
    if kernel not in _FLOORS:
        raise ValueError(
            f"kernel={kernel!r} is unknown; choose from {', '.join(_FLOORS)}, or give Gaussian(width)."
        )
    return Kernel(kernel, _FLOORS[kernel])


def gram(h: Tensor, kernel: str | Kernel = "relu") -> Tensor:
    """Gram matrix (N, N) of module outputs h: (N, d), (N, C, H, W), or tokens (N, T, d).

    >>> gram(torch.tensor([[3.0, 4.0], [4.0, 3.0]]))
    tensor([[1.0000, 0.9600],
            [0.9600, 1.0000]])
    """
    return get(kernel).gram(h)


def ideal_gram(y: Tensor, kernel: str | Kernel = "relu") -> Tensor:
    r"""The Gram matrix that the theorems ask for: the kernel's ceiling where labels agree, else its floor.

    Args:
        y: labels (N,).

    >>> import torch
    >>> ideal_gram(torch.tensor([0, 0, 1]), "tanh").tolist()
    [[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]
    """
    kernel = get(kernel)
    same = y[:, None] == y[None, :]
    return torch.where(same, kernel.ceiling, kernel.floor)


class FeatureMap(nn.Module):
    r"""The first layer of an output module: :math:`\varphi(u) = \mathrm{act}(u)/\lVert\mathrm{act}(u)\rVert`.

    Maps (N, d), (N, C, H, W) or tokens (N, T, d) to unit vectors (N, D). It has no parameters and stays in the
    deployed network, whichever method trains it: the theorems are about networks that contain it.

    Args:
        kernel: "relu", "tanh", "sigmoid", "relu-pool" or "cosine".

    Raises:
        ValueError: the kernel is unknown, or has no finite map.

    >>> import torch
    >>> FeatureMap("relu")(torch.tensor([[3.0, 4.0, -1.0]]))
    tensor([[0.6000, 0.8000, 0.0000]])
    """

    def __init__(self, kernel: str | Kernel = "relu") -> None:
        super().__init__()
        self.kernel = get(kernel)
        if isinstance(self.kernel, Gaussian):
            raise ValueError(
                "kernel: a Gaussian kernel has no finite feature map; choose from "
                + ", ".join(_FLOORS)
                + "."
            )

    @property
    def floor(self) -> float:
        """The least inner product of two feature vectors."""
        return self.kernel.floor

    def forward(self, u: Tensor) -> Tensor:
        return self.kernel.features(u)

    def extra_repr(self) -> str:
        return repr(self.kernel.name)
