r"""The network of the fast CIFAR-10 recipes: it begins with a convolution that whitens, and is not trained.

.. math:: W = \Lambda^{-1/2} U^\top, \qquad \tfrac1n \sum_i p_i p_i^\top = U \Lambda U^\top

for patches p of the training images: the outputs W p are uncorrelated and of variance 1. -W p comes along, so that
a nonlinearity loses nothing.

Source: the recipes that followed David Page's "How to train your ResNet" (2018); Jordan 2024 (arXiv 2404.00498).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modlib.kernels import double
from modlib.networks.boundary import check_boundary
from modlib.networks.cnn import with_head
from modlib.networks.seeding import seeded
from modlib.networks.sizes import check_list, check_whole


class Whitening(nn.Module):
    """A convolution by the whitening matrix of image patches and by its negative; only its bias is trained.

    Args:
        images: (N, C, H, W), normalised as the network's input will be; a few thousand do.
        patch: side of a patch in pixels; there are 2 C patch² outputs.
        stride: of the convolution.
        floor: added to the eigenvalues, against directions in which patches hardly vary.

    Raises:
        ValueError: the images are smaller than a patch.

    >>> import torch
    >>> layer = Whitening(torch.randn(50, 3, 8, 8), patch=2)
    >>> layer(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 24, 7, 7])
    """

    weight: Tensor

    def __init__(
        self, images: Tensor, patch: int = 2, stride: int = 1, floor: float = 5e-4
    ) -> None:
        super().__init__()
        check_whole(patch=patch, stride=stride)
        if images.dim() != 4 or min(images.shape[2:]) < patch:
            raise ValueError(
                f"images must be (N, C, H, W) with sides of {patch} pixels or more, but have shape "
                f"{tuple(images.shape)}."
            )
        patches = F.unfold(double(images), patch).transpose(1, 2).flatten(0, 1)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        vectors = vectors * vectors.sum(0).sign()  # an eigenvector's sign is the library's choice
        rows = (vectors / (values + floor).sqrt()).T.view(-1, images.shape[1], patch, patch)
        self.register_buffer("weight", torch.cat([rows, -rows]).float())
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride)


class WhitenedUnit(nn.Sequential):
    """[GELU →] 3×3 convolution → [max-pool →] batch norm [→ GELU]: kept whole when a network is cut."""

    def __init__(
        self, channels_in: int, channels: int, pool: int, start: bool, end: bool, momentum: float
    ) -> None:
        convolution = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        with torch.no_grad():  # the first filters pass the image on
            nn.init.dirac_(convolution.weight[:channels_in])
        norm = nn.BatchNorm2d(channels, momentum=momentum)
        norm.weight.requires_grad_(False)
        layers = [convolution, *([nn.MaxPool2d(pool)] if pool > 1 else []), norm]
        super().__init__(*[nn.GELU()] * start, *layers, *[nn.GELU()] * end)
        self._options = channels, start, end, momentum

    def like(self, channels_in: int, pool: int) -> WhitenedUnit:
        """A new one with as many outputs, of other inputs, which are pooled by another factor (1: not)."""
        channels, start, end, momentum = self._options
        return WhitenedUnit(channels_in, channels, pool, start, end, momentum)


def whitened_cnn(
    images: Tensor,
    widths: Sequence[int] = (64, 256, 256),
    classes: int = 10,
    *,
    stride: int = 1,
    boundary: str = "before",
    momentum: float = 0.4,
    seed: int | None = None,
) -> nn.Sequential:
    """A whitening convolution, blocks of two 3×3 convolutions, a feature map of unit norm, a linear layer.

    Its layers are ``whiten``, ``conv1`` … ``conv{2B}``, ``features`` and ``head``. The first unit of a block
    pools. The last unit has no nonlinearity: the feature map's ReLU follows.

    Args:
        images: (N, C, H, W) training images, normalised, from which the whitening is computed.
        widths: channels of each of the B blocks.
        classes: number of outputs.
        stride: of the whitening convolution; 2 makes everything after it four times cheaper.
        boundary: "before" lets each unit begin with the GELU of the one before it; "after" lets it end with
            its own.
        momentum: of the batch norms' running statistics (the share of the new batch).
        seed: of the initial weights; None takes PyTorch's global state.

    Returns:
        A network from images (N, C, H, W) to logits (N, classes).

    Raises:
        ValueError: an argument is out of range, or the images are too small for so many blocks.

    >>> import torch
    >>> net = whitened_cnn(torch.randn(8, 3, 32, 32), (8, 8, 16), seed=0)
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_boundary(boundary)
    check_list("widths", widths)
    check_whole(classes=classes)
    after = boundary == "after"
    with seeded(seed):
        whitening = Whitening(images, stride=stride)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["whiten"] = nn.Sequential(whitening, *[nn.GELU()] * after)
        before, count = len(whitening.weight), 2 * len(widths)
        for k in range(1, count + 1):
            width = widths[(k - 1) // 2]
            end = after and k < count
            unit = WhitenedUnit(before, width, 1 + k % 2, not after, end, momentum)
            layers[f"conv{k}"], before = unit, width
        side = (min(images.shape[2:]) - 2) // stride + 1
        if side >> len(widths) < 1:
            raise ValueError(
                f"images: {min(images.shape[2:])} pixels a side are too few for {len(widths)} blocks, each "
                "of which halves them; give larger images, or fewer widths."
            )
        layers["pool"] = nn.AdaptiveMaxPool2d(1)
        return with_head(layers, "relu", classes, tuple(images.shape[1:]))  # type: ignore[arg-type]
