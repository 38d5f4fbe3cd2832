r"""InfoPro: a module keeps what it may still need of the image, and what it knows of the label.

.. math:: L_k = \lambda_1\, \mathrm{BCE}(\mathrm{dec}(h_k), \tilde x) + \lambda_2\, L_y(h_k)

The better the image can be rebuilt, the more h must know of it; early modules that are trained on labels
alone throw away what later ones need.

Source: Wang et al. 2021 (arXiv 2101.10832), section 3; decoder and head: its appendix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modlib.kernels import wide
from modlib.networks.recompute import run_again
from modlib.objectives.cross_entropy import checked_share, cross_entropy
from modlib.objectives.objective import Objective, Term
from modlib.objectives.proxy import SupCon
from modlib.tokens import as_maps, maps_shape


class InfoPro(Objective):
    """Reconstruction of the input image, and a loss on labels.

    Args:
        reconstruction: λ1 ≥ 0.
        label: λ2 ≥ 0.
        form: of the loss on labels: "softmax" (cross-entropy of an auxiliary classifier) or
            "contrast" (``SupCon`` with τ = 0.07 on 128 outputs of an auxiliary network).
        mean, std: what each channel of x was normalised with, so that the decoder predicts pixels in
            0..1, as published; ``modlib.fit`` tells it. Where nobody does, the decoder predicts σ(x),
            which is near 1/2 + x/4.
        channels: of the image.
        smoothing: of the labels, as in ``CrossEntropy``; "contrast" has none.

    Raises:
        ValueError: called as ``objective(h, y)``: use ``objective.local(h, y, x)`` with the images
            x (N, channels, H, W). Or: a module's output is no map (C, H, W); the labels do not fit, or
            for "contrast" no two of the batch are equal.

    >>> objective = InfoPro(form="contrast").for_module((8, 4, 4), classes=10)
    >>> x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 0, 1, 1])
    >>> bool(objective.local(torch.randn(4, 8, 4, 4), y, x) > 0)
    True
    """

    mean: Tensor  # (channels, 1, 1)
    std: Tensor

    def __init__(
        self,
        reconstruction: float = 5.0,
        label: float = 0.5,
        form: str = "softmax",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: int = 3,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.smoothing = checked_share("smoothing", smoothing)
        if form not in ("softmax", "contrast"):
            raise ValueError(f"form={form!r}: choose 'softmax' or 'contrast'.")
        if min(reconstruction, label) < 0 or not reconstruction + label > 0:
            raise ValueError(
                f"reconstruction={reconstruction}, label={label}: give weights of at least 0, one of "
                "them above."
            )
        if (mean is None) != (std is None) or any(
            t is not None and len(t) != channels for t in (mean, std)
        ):
            raise ValueError(
                f"mean={mean}, std={std}: give one number for each of the {channels} channels, or "
                "neither of the two."
            )
        self.reconstruction, self.label, self.form = reconstruction, label, form
        self.channels = channels
        self.pixels = False
        self.register_buffer("mean", torch.zeros(channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(channels, 1, 1), persistent=False)
        if mean is not None and std is not None:
            self.set_normalisation(mean, std)
        self.decoder: nn.Module | None = None
        self.head: nn.Module | None = None

    @property
    def pairs(self) -> bool:
        return self.form == "contrast" and self.label > 0

    def accepts(self, y: Tensor) -> bool:
        return not self.pairs or SupCon().accepts(y)

    def for_module(self, shape: Sequence[int], classes: int) -> Self:
        shape = maps_shape(shape)
        if len(shape) != 3:
            raise ValueError(
                f"InfoPro needs a module's output (C, H, W) or the tokens of a square grid of patches, not "
                f"{tuple(shape)}; cut the network where it still has maps."
            )
        ready = super().for_module(shape, classes)
        ready.decoder = _decoder(shape[0], self.channels)
        ready.head = _head(shape, 128 if self.form == "contrast" else classes)
        return ready

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if self.pixels or len(mean) != self.channels:
            return
        for own, given in ((self.mean, mean), (self.std, std)):
            own.copy_(torch.tensor(given).view_as(own))
        self.pixels = True

    def local(self, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return torch.stack([term(h, y, x) for term in self.terms()]).sum()

    def terms(self) -> Sequence[Term]:
        # a term of weight 0 is not computed: the decoder works at the image's full size
        terms: list[Term] = []
        if self.reconstruction:
            terms.append(lambda h, y, x: self.reconstruction * self.reconstruction_loss(h, x))
        if self.label:
            terms.append(lambda h, y, x: self.label * self.label_loss(h, y))
        return terms

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        raise ValueError(
            "InfoPro compares h with the network's input x; call objective.local(h, y, x)."
        )

    def reconstruction_loss(self, h: Tensor, x: Tensor) -> Tensor:
        """How badly the decoder tells the images x (N, channels, H, W), a mean over all pixels.

        A cross-entropy, whose gradient stays bounded where the decoder is far off; that of a squared
        error grows with the error, and a step that is too long makes the next one longer.
        """
        # the decoder's sigmoid is in the loss, where it cannot overflow
        return F.binary_cross_entropy_with_logits(self.rebuilt(h, x), self.brightness(x))

    def brightness(self, x: Tensor) -> Tensor:
        """What the decoder has to tell, in 0..1."""
        return x * self.std + self.mean if self.pixels else x.sigmoid()

    def rebuilt(self, h: Tensor, x: Tensor) -> Tensor:
        """The decoder's image from h, as logits, in the size of x."""
        if x.dim() != 4 or x.shape[1] != self.channels or not len(x) == len(h) > 0:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but the decoder makes images (N, {self.channels}, H, "
                f"W) from {len(h)} outputs; give the network's input (not stored features) and its "
                "number of channels."
            )
        first, *rest = cast(nn.Sequential, _made(self.decoder))
        maps, size = as_maps(wide(h)), (x.shape[2], x.shape[3])
        # Held would be a map of the image's size: it is copied where it has that size already, and the
        # larger one is made again.
        maps = (
            first(maps)
            if maps.shape[-2:] == size
            else run_again([nn.UpsamplingBilinear2d(size), first], maps)
        )
        return wide(nn.Sequential(*rest)(maps))

    def label_loss(self, h: Tensor, y: Tensor) -> Tensor:
        """Loss of the auxiliary network's output."""
        out = cast(Tensor, _made(self.head)(as_maps(h)))
        if self.form == "contrast":
            return cast(Tensor, SupCon(0.07)(out, y))
        return cross_entropy(out, y, self.smoothing)

    def extra_repr(self) -> str:
        target = "pixels" if self.pixels else "σ(x)"
        return f"reconstruction={self.reconstruction}, label={self.label}, {self.form!r}, {target}"


def infopro_weights(
    modules: int, first: tuple[float, float], last: tuple[float, float]
) -> list[tuple[float, float]]:
    """(λ1, λ2) of all modules but the last, linear in the module's number.

    Args:
        modules: K; the last module has the task's loss.
        first: of module 1.
        last: of module K - 1; not used with two modules.

    >>> infopro_weights(4, first=(1.0, 0.0), last=(0.0, 1.0))
    [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    """
    if modules < 1:
        raise ValueError(f"modules={modules}: give at least 1.")
    shares = [k / max(modules - 2, 1) for k in range(modules - 1)]
    return [((1 - t) * first[0] + t * last[0], (1 - t) * first[1] + t * last[1]) for t in shares]


def _decoder(channels: int, image: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, image, 3, padding=1),
    )


def _head(shape: Sequence[int], outputs: int) -> nn.Sequential:
    """One convolution and two linear layers ("1c2f").

    The paper gives it for maps of 32², 16² and 8²; the last keeps its size, and so do smaller ones.
    """
    channels, *sides = shape
    stride = 1 if min(sides) <= 8 else 2
    width = channels * stride
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 128),
        nn.ReLU(),
        nn.Linear(128, outputs),
    )


def _made(network: nn.Module | None) -> nn.Module:
    if network is None:
        raise ValueError(
            "This InfoPro has no networks yet; call .for_module(shape, classes) with the shape of the "
            "module's output."
        )
    return network
