"""A step that methods must not be mistaken for: one backward pass for the sum of all losses."""

from __future__ import annotations

import torch
from torch import Tensor

from modlib.methods import Stage


def summed_step(stage: Stage, x: Tensor, y: Tensor, boundary: bool) -> Tensor:
    """Update every module of a stage at the end, with the detach between modules or without it."""
    losses = []
    for module, objective in zip(stage.modules, stage.objectives, strict=True):
        x = module(x.detach() if boundary else x)
        losses.append(objective(x, y))
    for optimizer in stage.optimizers:
        optimizer.zero_grad()
    torch.stack(losses).sum().backward()
    for optimizer in stage.optimizers:
        optimizer.step()
    return torch.stack(losses).detach()
