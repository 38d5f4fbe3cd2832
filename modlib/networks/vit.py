"""A small vision transformer, cut-able between its blocks."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modlib.kernels import FeatureMap
from modlib.networks.seeding import seeded
from modlib.networks.sizes import check_whole
from modlib.tokens import MeanToken


class Embed(nn.Module):
    """Patches as tokens: (N, C, S, S) to (N, T, width), each with what is learned of its place.

    With ``class_token`` a learned token stands before them.
    """

    def __init__(
        self, channels: int, size: int, patch: int, width: int, class_token: bool = False
    ) -> None:
        super().__init__()
        tokens = (size // patch) ** 2 + class_token
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.place = nn.Parameter(torch.empty(tokens, width))
        self.class_token = nn.Parameter(torch.empty(1, width)) if class_token else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for learned in (self.place, self.class_token):
            if learned is not None:
                nn.init.normal_(learned, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.patches(x).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(x), 1, -1), tokens], 1)
        return tokens + self.place


class Attention(nn.Module):
    """Multi-head self-attention: (N, T, d) to (N, T, d)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        by_head = self.qkv(h).unflatten(2, (3, self.heads, -1))  # (N, T, 3, heads, d / heads)
        q, k, v = by_head.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Residual(nn.Module):
    """h → h + branch(h), where the branch begins with a layer norm.

    Attributes:
        branch: what is added.
    """

    def __init__(self, width: int, *layers: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(width), *layers)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.branch(h)
        return out


class Block(nn.Sequential):
    """Attention and a perceptron, each on a residual branch: kept whole when a network is cut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        perceptron = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        super().__init__(Residual(width, Attention(width, heads)), Residual(width, *perceptron))


class ClassToken(nn.Module):
    """(N, T, d) to (N, d): the first token."""

    def forward(self, h: Tensor) -> Tensor:
        return h[:, 0]


class Head(nn.Sequential):
    """Layer norm → mean or class token → linear: kept whole when a network is cut."""


def vit(
    width: int = 64,
    depth: int = 4,
    classes: int = 10,
    *,
    heads: int = 4,
    patch: int = 4,
    hidden: int | None = None,
    channels: int = 3,
    size: int = 32,
    pool: str = "mean",
    kernel: str | None = None,
    seed: int | None = None,
) -> nn.Sequential:
    """A vision transformer with pre-norm blocks.

    Its layers are ``embed``, ``block1`` … ``block{depth}`` and ``head``. All but the head give tokens
    (N, T, width), of which objectives see what ``modlib.tokens`` says.

    Args:
        width: d, numbers in a token.
        depth: blocks.
        classes: number of outputs.
        heads: of every attention.
        patch: side of a patch, in pixels.
        hidden: width of the perceptrons' hidden layers; 2 × width if None.
        channels: of the image, 3 for colour.
        size: side H = W of the images, in pixels.
        pool: what the head reads: "mean" of all tokens, or the "class" token, which is then added.
        kernel: put a ``FeatureMap`` of this kernel, as layer ``features``, in place of the head's norm
            and mean; strictly modular training needs one.
        seed: of the initial weights; None takes PyTorch's global state.

    Returns:
        A network from images (N, channels, H, W) to logits (N, classes).

    Raises:
        ValueError: the patches do not cover the image, the heads do not share the width, or ``pool`` is
            neither of the two.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929); the mean in place of the class token: Beyer, Zhai &
    Kolesnikov 2022 (arXiv 2205.01580).

    >>> import torch
    >>> vit(seed=0)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_whole(width=width, depth=depth, classes=classes, channels=channels, size=size)
    hidden = 2 * width if hidden is None else hidden
    check_whole(patch=patch, heads=heads, hidden=hidden)
    if size % patch:
        raise ValueError(f"size={size}, patch={patch}: the side must be a multiple of the patch's.")
    if width % heads:
        raise ValueError(
            f"width={width}, heads={heads}: the width must be a multiple of the heads."
        )
    if pool not in ("mean", "class") or (kernel is not None and pool == "class"):
        raise ValueError(
            f"pool={pool!r}: choose 'mean' or 'class'; a feature map takes the mean of all tokens."
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with seeded(seed):
        layers["embed"] = Embed(channels, size, patch, width, class_token=pool == "class")
        for number in range(1, depth + 1):
            layers[f"block{number}"] = Block(width, heads, hidden)
        linear = nn.Linear(width, classes)
    if kernel is None:
        layers["head"] = Head(
            nn.LayerNorm(width), MeanToken() if pool == "mean" else ClassToken(), linear
        )
    else:
        layers["features"], layers["head"] = FeatureMap(kernel), linear
    return nn.Sequential(layers)
