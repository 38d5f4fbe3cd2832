"""Batches from a data set held on the device, augmented there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from modlib.data.augment import Augment, default_augment, pad_images
from modlib.data.dataset import Dataset

Batch = tuple[Tensor, Tensor]


class Loader:
    """Batches of one split (v1)."""

    def __init__(
        self,
        dataset: Dataset,
        split: Literal["train", "test"] = "train",
        batch_size: int = 128,
        device: str | torch.device = "cpu",
        augment: Augment | bool = False,
        shuffle: bool = True,
        drop_last: bool = True,
        channels_last: bool = False,
        memory: Literal["auto", "device", "map"] = "auto",
    ) -> None:
        self.dataset, self.batch_size, self.device = dataset, batch_size, torch.device(device)
        self.shuffle, self.drop_last, self.channels_last = shuffle, drop_last, channels_last
        if augment is True:
            augment = default_augment(dataset)
        self.augment = augment if isinstance(augment, Augment) else Augment(0, False, 0)
        images = getattr(dataset, f"{split}_images")
        self.images = torch.from_numpy(np.array(images)).to(self.device)
        self.labels = torch.from_numpy(np.array(getattr(dataset, f"{split}_labels"))).to(self.device)
        self.n = len(self.labels)
        self.mean = torch.tensor(dataset.mean, device=self.device)
        self.std = torch.tensor(dataset.std, device=self.device)

    @property
    def random(self) -> bool:
        return self.augment != Augment(0, False, 0)

    def __len__(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def sample(self, n: int) -> Batch:
        order = self._order(torch.Generator().manual_seed(0))[:n]
        return self._finish(self.images[order].float()), self.labels[order]

    def epoch(self, seed: int, epoch: int) -> Iterator[Batch]:
        state = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(state)
        order = self._order(generator)
        for b in range(len(self)):
            index = order[b * self.batch_size : (b + 1) * self.batch_size]
            yield self._batch(index, generator), self.labels[index]

    def _order(self, generator: torch.Generator) -> Tensor:
        order = torch.randperm(self.n, generator=generator) if self.shuffle else torch.arange(self.n)
        return order.to(self.device)

    def _batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        x, p, n = self.images[index], self.augment.pad, len(index)
        if x.ndim == 4 and self.random:
            h, w = x.shape[1:3]
            padded = pad_images(x, p, self.augment.mode)
            oy, ox = torch.randint(2 * p + 1, (2, n), generator=generator).to(self.device)
            rows = oy[:, None] + torch.arange(h, device=self.device)
            columns = ox[:, None] + torch.arange(w, device=self.device)
            image = torch.arange(n, device=self.device)
            x = padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]
            if self.augment.flip:
                coin = (torch.rand(n, generator=generator) < 0.5).to(self.device)
                x = torch.where(coin[:, None, None, None], x.flip(2), x)
        return self._finish(x.float())

    def _finish(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return (x - self.mean) / self.std
        x = ((x / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        return x if self.channels_last else x.contiguous()
