"""Outputs of transformers: T tokens of d numbers for each of N images, (N, T, d).

Where one vector an image is wanted (by kernels, classifiers, similarities), it is the MEAN of the image's
tokens. One rule for all: every transformer has that mean, but not every one has a class token, and an
objective that looks at the class token alone tells a module's last block nothing about the other tokens,
from which later modules read.

Where maps are wanted, they are the patches' tokens on their square grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = [
    "MeanToken",
    "as_maps",
    "maps_shape",
    "pooled",
    "pooled_shape",
]


def pooled(h: Tensor) -> Tensor:
    """Tokens (N, T, d) as their means (N, d); any other shape as it is.

    >>> import torch
    >>> pooled(torch.tensor([[[1.0, 0.0], [3.0, 4.0]]]))
    tensor([[2., 2.]])
    """
    return h.mean(1) if h.dim() == 3 else h


def pooled_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """What ``pooled`` makes of outputs of this shape (without N).

    >>> pooled_shape((17, 64)), pooled_shape((8, 4, 4))
    ((64,), (8, 4, 4))
    """
    return tuple(shape[1:]) if len(shape) == 2 else tuple(shape)


class MeanToken(nn.Module):
    """``pooled`` as a layer: (N, T, d) to (N, d).

    >>> import torch
    >>> MeanToken()(torch.zeros(2, 17, 64)).shape
    torch.Size([2, 64])
    """

    def forward(self, h: Tensor) -> Tensor:
        return pooled(h)


def as_maps(h: Tensor) -> Tensor:
    """Tokens (N, G*G, d) as maps (N, d, G, G), without a class token before them; else h as it is.

    >>> import torch
    >>> as_maps(torch.zeros(2, 17, 64)).shape, as_maps(torch.zeros(2, 15, 64)).shape
    (torch.Size([2, 64, 4, 4]), torch.Size([2, 15, 64]))
    """
    shape = maps_shape(h.shape[1:])
    if h.dim() != 3 or len(shape) != 3:
        return h
    return h[:, -math.prod(shape[1:]) :].transpose(1, 2).reshape(len(h), *shape)


def maps_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """What ``as_maps`` makes of outputs of this shape (without N).

    >>> maps_shape((16, 64)), maps_shape((17, 64)), maps_shape((15, 64))
    ((64, 4, 4), (64, 4, 4), (15, 64))
    """
    side = math.isqrt(shape[0]) if len(shape) == 2 else 0
    fits = side and shape[0] - side**2 in (0, 1)
    return (shape[1], side, side) if fits else tuple(shape)
