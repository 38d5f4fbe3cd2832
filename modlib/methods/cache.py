"""Run frozen modules once instead of in every epoch: train on their stored output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modlib.methods.method import Batches, Stage


class CachingStage(Stage):
    """A stage that runs its frozen modules once and trains on the features they gave.

    Args:
        views: how many augmented views of the data to keep; None for data that is not augmented.
    """

    def __init__(self, *args: Any, views: int | None = None) -> None:
        super().__init__(*args)
        self.views = views

    def check(self, batches: Batches) -> None:
        """Refuse randomly augmented inputs, unless the number of views is given.

        Raises:
            ValueError: one stored view would silently switch the augmentation off.
        """
        if self.frozen and batches.random and self.views is None:
            raise ValueError(
                "cache_features=True would freeze the random augmentation at one view; give views=V "
                "(how many augmented copies to store), or train with augment=None."
            )

    def batches(self, batches: Batches, seed: int) -> Batches:
        """Features in place of inputs."""
        if not self.frozen:
            return batches
        frozen, self.frozen = self.frozen, []
        for module in frozen:
            module.eval()
        return CachedFeatures(self._run(frozen, batches, seed), len(batches))

    @torch.no_grad()
    def _run(self, frozen: list[Any], batches: Batches, seed: int) -> list[tuple[Tensor, Tensor]]:
        views = []
        for view in range(self.views or 1):
            pairs = []
            for x, y in batches.epoch(seed, view):
                with self.autocast():
                    for module in frozen:
                        x = module(x)
                pairs.append((x, y.clone()))
            xs, ys = map(torch.cat, zip(*pairs, strict=True))
            if len(xs) != len(ys):
                raise ValueError(
                    f"cache_features=True: the frozen modules make {len(xs)} rows of {len(ys)} images "
                    "(patches?), which cannot be shuffled apart; leave cache_features out."
                )
            views.append((xs, ys))
        return views


class CachedFeatures:
    """Stored features as batches, in an order fixed by (seed, epoch)."""

    def __init__(self, views: list[tuple[Tensor, Tensor]], batches: int) -> None:
        self.views, self._batches = views, batches
        self.random = len(views) > 1

    def __len__(self) -> int:
        return self._batches

    def epoch(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        features, labels = self.views[epoch % len(self.views)]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for part in order.tensor_split(self._batches):
            yield features[part], labels[part]
