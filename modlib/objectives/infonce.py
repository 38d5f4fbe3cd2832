r"""Greedy InfoMax: a module's output for some patches of an image predicts those further down.

.. math:: L = -\frac1S \sum_{s=1}^{S} \mathrm{mean}\, \log \frac{\exp f_s(z_{r+s+g}, z_r)}
          {\sum_{z' \in \{z_{r+s+g}\} \cup N} \exp f_s(z', z_r)}, \qquad f_s(z', z) = z'^\top W_s z

z_r is the vector of a patch in row r, g the gap, and N are negatives drawn from the batch. The loss
bounds what patches tell about each other, :math:`I(z_r; z_{r+s+g}) \ge \log(|N| + 1) - L`, where the rows
of a batch are independent; patches of one image are not quite.

Source: Löwe, O'Connor & Veeling 2019 (arXiv 1905.11786), section 3; van den Oord, Li & Vinyals 2018
(arXiv 1807.03748), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modlib.device import full_precision
from modlib.kernels import wide
from modlib.objectives.objective import Objective


class InfoNCE(Objective):
    """Tell the patch that lies below from patches of the whole batch. Labels are ignored.

    A module's output holds the patches of N images, image by image and row by row, as
    ``networks.Patches`` cuts them: (N*G*G, C, H, W), whose mean over H, W is taken, or (N*G*G, C).
    y may have any length.

    Args:
        steps: S, how many distances are predicted; the farthest is steps + gap rows below.
        negatives: drawn for each prediction, with replacement, from the predicted rows of all images;
            the patch itself may be among them, as in the authors' code.
        grid: G, patches along an image's side; more than steps + gap.
        gap: rows left out between a patch and the first predicted one; overlapping patches need it.

    Raises:
        ValueError: the grid has too few rows, or the number of patches is 0 or no multiple of G*G.

    >>> objective = InfoNCE(steps=1, grid=3).for_module((4,), classes=10)
    >>> bool(objective(torch.randn(2 * 9, 4), torch.zeros(2)) > 0)
    True
    """

    def __init__(self, steps: int = 5, negatives: int = 16, grid: int = 7, gap: int = 1) -> None:
        super().__init__()
        if steps < 1 or negatives < 1 or gap < 0:
            raise ValueError(
                f"steps={steps}, negatives={negatives}, gap={gap}: give at least 1, 1 and 0."
            )
        if grid <= steps + gap:
            raise ValueError(
                f"grid={grid}: no row lies steps + gap = {steps + gap} rows below another; give "
                "smaller patches or fewer steps."
            )
        self.steps, self.negatives, self.grid, self.gap = steps, negatives, grid, gap
        self.predictors = nn.ModuleList()

    def for_module(self, shape: Sequence[int], classes: int) -> Self:
        if len(shape) not in (1, 3):
            raise ValueError(
                f"InfoNCE needs outputs (C,) or (C, H, W) of every patch, but the module's output has "
                f"shape {tuple(shape)}."
            )
        ready = super().for_module(shape, classes)
        width = shape[0]
        predictors = [nn.Conv2d(width, width, 1, bias=False) for _ in range(self.steps)]
        ready.predictors = nn.ModuleList(predictors)
        return ready

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        if not len(self.predictors):
            raise ValueError(
                "This InfoNCE has no predictors yet; call .for_module(shape, classes) with the shape "
                "of the module's output."
            )
        z = self.arranged(h)
        losses = []
        for distance, predictor in enumerate(self.predictors, start=1 + self.gap):
            predicted = predictor(z[:, :, :-distance])
            losses.append(self.loss(_vectors(predicted), _vectors(z[:, :, distance:])))
        return torch.stack(losses).mean()

    def arranged(self, h: Tensor) -> Tensor:
        """One vector for each patch, where it lies in its image: (N, C, G, G)."""
        z = h.flatten(2).mean(2) if h.dim() > 2 else h
        if len(z) % self.grid**2 or not len(z):
            raise ValueError(
                f"h holds {len(z)} patches, no multiple of grid² = {self.grid**2}; cut the images "
                f"with networks.Patches into {self.grid}×{self.grid} patches each."
            )
        return z.view(-1, self.grid, self.grid, z.shape[1]).permute(0, 3, 1, 2)

    def loss(self, predicted: Tensor, actual: Tensor) -> Tensor:
        """Cross-entropy (nats) of finding row i of ``actual`` (P, C) by row i of ``predicted``."""
        with full_precision(predicted):
            scores = wide(predicted) @ wide(actual).T
            # all P×P scores take less room than P × negatives vectors would
            choices = torch.cat(
                [scores.diagonal()[:, None], scores.gather(1, self.draw(scores))], 1
            )
            return F.cross_entropy(choices, torch.zeros_like(choices[:, 0], dtype=torch.long))

    def draw(self, scores: Tensor) -> Tensor:
        """Which rows are the negatives of each prediction: indices (P, negatives)."""
        return torch.randint(len(scores), (len(scores), self.negatives), device=scores.device)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, negatives={self.negatives}, grid={self.grid}, gap={self.gap}"


def _vectors(z: Tensor) -> Tensor:
    """(N, C, rows, G) -> (N*rows*G, C)."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)
