"""Run frozen modules once instead of in every epoch: train on their stored output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modlib.data.stratified import lonely, stratified_batches
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
            return super().batches(batches, seed)
        frozen, self.frozen = self.frozen, []
        for module in frozen:
            module.eval()
        features = CachedFeatures(self._run(frozen, batches, seed), len(batches))
        return super().batches(features, seed)

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
    """Stored features as batches, in an order fixed by (seed, epoch).

    Args:
        views: each the features and labels of the images.
        batches: in an epoch.
        pairs: fill batches so that no class is alone, as ``Loader.paired`` does.
    """

    def __init__(
        self, views: list[tuple[Tensor, Tensor]], batches: int, pairs: bool = False
    ) -> None:
        self.views, self._batches, self._pairs = views, batches, pairs
        self.random = len(views) > 1

    def __len__(self) -> int:
        return self._batches

    def paired(self) -> CachedFeatures:
        """The same features, so that batches hold pairs of every class."""
        return CachedFeatures(self.views, self._batches, pairs=True)

    def epoch(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        features, labels = self.views[epoch % len(self.views)]
        for part in self._parts(labels, seed, epoch):
            yield features[part], labels[part]

    def _parts(self, labels: Tensor, seed: int, epoch: int) -> Iterable[Tensor]:
        """The positions of each batch."""
        if self._pairs:
            on_cpu, size = labels.cpu().numpy(), len(labels) // self._batches
            if lonely(on_cpu, size):
                rows = stratified_batches(on_cpu, size, np.random.default_rng((seed, epoch)))
                return torch.from_numpy(rows).to(labels.device)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        return order.tensor_split(self._batches)
