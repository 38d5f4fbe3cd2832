"""Gradient checkpointing: run layers again when autograd asks for what they would have kept.

A stretch of layers keeps its input alone. When the backward pass first asks for something that was saved
inside, the stretch runs again, up to the last thing it saved and no further: a convolution or a linear
layer at its end is not computed twice, since its gradient needs its input and not its output. Random
numbers are drawn as before and batch norm counts a batch once, so training is the same bit for bit.

Source: Chen, Xu, Zhang & Guestrin 2016 (arXiv 1604.06174), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from modlib.device import autocast_now, random_state
from modlib.measure.memory import Held, hold
from modlib.networks.seeding import again

Stretches = Sequence[tuple[int, int]]  # (i, j): layers i to j - 1 run again


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers that a module runs one after another: its containers opened, as far as they are chains.

    >>> [type(layer).__name__ for layer in layers_of(nn.Sequential(nn.Sequential(nn.Flatten()), nn.ReLU()))]
    ['Flatten', 'ReLU']
    """
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return [module]
    return [layer for child in module._modules.values() if child for layer in layers_of(child)]


@contextmanager
def recomputing(stretches: Mapping[nn.Module, Stretches]) -> Iterator[None]:
    """Within the block these modules run stretches of their ``layers_of`` again for their gradient.

    Forward hooks of a module are called as ever, those of containers inside it are not.

    >>> net, h = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), torch.ones(4, 2)
    >>> net(h).sum().backward()
    >>> plain = net[0].weight.grad.clone()
    >>> with recomputing({net: [(0, 3)]}):
    ...     net.zero_grad()
    ...     net(h).sum().backward()
    >>> bool((net[0].weight.grad == plain).all())
    True
    """
    before = {module: vars(module).get("forward") for module in stretches}
    try:
        for module, chosen in stretches.items():
            # An object, not a closure: a copy of the module that somebody makes runs the copy's layers.
            module.forward = _Chain(layers_of(module), list(chosen))
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)  # the class's own is back
            else:
                module.forward = forward


def run_again(layers: Sequence[nn.Module], h: Tensor) -> Tensor:
    """The layers' output for h, of which autograd keeps h alone.

    >>> layers, h = [nn.Tanh(), nn.Linear(3, 1)], torch.ones(2, 3, requires_grad=True)
    >>> gradients = [torch.autograd.grad(out.sum(), h) for out in (layers[1](layers[0](h)), run_again(layers, h))]
    >>> bool((gradients[0][0] == gradients[1][0]).all())
    True
    """
    return _Stretch(layers).run(h)


class _Chain:
    """A module's forward pass, some stretches of which keep their input alone."""

    def __init__(self, layers: list[nn.Module], stretches: list[tuple[int, int]]) -> None:
        self.layers, self.stretches = layers, stretches

    def __call__(self, h: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return _run(self.layers, h)
        done = 0
        for start, stop in self.stretches:
            h = _run(self.layers[done:start], h)
            h = run_again(self.layers[start:stop], h)
            done = stop
        return _run(self.layers[done:], h)


def _run(layers: Sequence[nn.Module], h: Tensor) -> Tensor:
    for layer in layers:
        h = layer(h)
    return h


class _Enough(Exception):
    """Everything that was saved has been computed again."""


class _Stretch:
    """One run of some layers. It lives as long as autograd holds something of its graph."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.count = 0  # how many tensors the layers saved
        self.kept: dict[int, Held] = {}  # those that were computed again, until they are asked for

    def run(self, h: Tensor) -> Tensor:
        """The layers' output for h."""
        self.input, self.version = hold(h.detach()), h._version
        self.wanted, self.random = h.requires_grad, random_state(h.device)
        self.precision = autocast_now(h.device)
        with torch.autograd.graph.saved_tensors_hooks(self._count, _asked):
            return _run(self.layers, h)

    def saved(self, number: int) -> Tensor:
        """What was saved at this place in the order."""
        if number not in self.kept:
            self._run_again()
        return self.kept.pop(number).tensor

    def _run_again(self) -> None:
        h = self.input.tensor.detach().requires_grad_(self.wanted)
        if h._version != self.version:
            raise RuntimeError(
                "The input of layers that are to run again has been changed in place since they ran; let "
                "what follows or precedes them work out of place."
            )
        self._next = 0
        whole = nn.ModuleList(self.layers)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, _asked)
        with torch.enable_grad(), again(whole, self.random, h.device), hooks:
            try:
                with self.precision():
                    _run(self.layers, h)
            except _Enough:
                pass

    def _count(self, tensor: Tensor) -> tuple[_Stretch, int]:
        self.count += 1
        return self, self.count - 1

    def _keep(self, tensor: Tensor) -> None:
        # detach(): an operation's own output would otherwise hold the graph that holds it
        self.kept[self._next] = hold(tensor.detach())
        self._next += 1
        if self._next == self.count:
            raise _Enough


def _asked(packed: tuple[_Stretch, int]) -> Tensor:
    stretch, number = packed
    return stretch.saved(number)
