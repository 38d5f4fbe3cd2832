r"""Which layers of a module to run again, so that a step fits into a number of bytes.

.. math:: \min_S \sum_{s \in S} \text{work}(s) \quad\text{such that}\quad
          \sum_{i < s} \text{held}_i + \text{kept}(s) \le B \ \text{for all } s \in S, \qquad
          \sum_i \text{held}_i + \text{head} \le B

A module is a chain of layers. A layer that is kept holds what autograd saves of it; a stretch s that runs
again holds its input, and for the time of its own backward pass all that its layers save. Every layer is
measured once, storage by storage, and dynamic programming finds the choice of least work among all.

Source: Chen, Xu, Zhang & Guestrin 2016 (arXiv 1604.06174) for the stretches; the program is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from modlib.device import random_state
from modlib.measure.memory import SavedBytes, storage_of
from modlib.methods.method import Stage
from modlib.network import ModularNetwork
from modlib.networks.recompute import layers_of
from modlib.networks.seeding import again
from modlib.objectives import Objective
from modlib.objectives.objective import Term

_OPERATIONS_A_BYTE = 8  # what a processor computes, about, in the time in which it moves a byte


class Layer(NamedTuple):
    """What one layer of a chain does, storages by number.

    Attributes:
        given, made: of its input and its output.
        saved: what autograd saves of it, parameters left out.
        work: of its forward pass, in operations and bytes moved.
        redo: of its forward pass up to the last thing that it saves; None if it saves nothing.
        whole: may a stretch begin with it? Not if it changes its input in place.
    """

    given: int
    made: int
    saved: frozenset[int]
    work: float
    redo: float | None
    whole: bool


@dataclass(frozen=True)
class Chain:
    """A module's layers and its objective's terms, measured.

    Attributes:
        layers: in order.
        bytes: of every storage.
        terms: what autograd saves of each term of the objective.
        breaks: layers with which a part begins, into which no stretch may reach from before.
    """

    layers: tuple[Layer, ...]
    bytes: tuple[int, ...]
    terms: tuple[frozenset[int], ...] = ()
    breaks: frozenset[int] = field(default=frozenset())

    def size(self, storages: Iterable[int]) -> int:
        """Bytes of these storages."""
        return sum(self.bytes[s] for s in storages)

    def peak(self, stretches: Sequence[tuple[int, int]]) -> int:
        """The most bytes that autograd holds in a step, if these stretches run again."""
        held: set[int] = set()
        peaks, done = [0], 0
        for start, stop in [*stretches, (len(self.layers), len(self.layers))]:
            held = held.union(*(layer.saved for layer in self.layers[done:start]))
            again = self.layers[start:stop]
            if any(layer.redo is not None for layer in again):  # else nothing of it is held at all
                held = held | {self.layers[start].given}
                peaks.append(self.size(held.union(*(layer.saved for layer in again))))
            done = stop
        return max(*peaks, self.size(held), *(self.size(held | term) for term in self.terms))


def chosen(stage: Stage, x: Tensor, budget: int | None) -> dict[nn.Module, list[tuple[int, int]]]:
    """What the modules of a stage run again, for ``recomputing``.

    Args:
        stage: in training mode.
        x: a batch (N, ...) of the stage's input.
        budget: bytes that autograd may hold for each module with its objective; the fewest if None.

    Raises:
        ValueError: a module needs more.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 32, 10]), modules=1)
    >>> (stage,) = modlib.methods.E2EBP().stages(net, torch.zeros(2, 64))
    >>> chosen(stage, torch.zeros(16, 64), 20_000)
    {}
    """
    found: dict[nn.Module, list[tuple[int, int]]] = {}
    modules = nn.ModuleList(stage.modules)
    # where there is one objective for many modules, it is the last one's
    objectives = [None] * (len(stage.modules) - len(stage.objectives)) + list(stage.objectives)
    with stage.autocast(), again(modules, random_state(x.device), x.device):
        h = stage.features(x)
        for k, (module, objective) in enumerate(zip(stage.modules, objectives, strict=True)):
            parts = list(module) if isinstance(module, ModularNetwork) else [module]
            chain = measured(parts, h, x, objective)
            enough = least(chain) if budget is None else budget
            stretches = cheapest(chain, enough)
            if stretches is None:
                raise ValueError(
                    f"recompute={budget}: module {k} needs at least {least(chain):,} bytes; give that, a "
                    "smaller batch, or cut the network into more modules."
                )
            first = 0
            for part in parts:
                last = first + len(layers_of(part))
                found[part] = [(i - first, j - first) for i, j in stretches if first <= i < last]
                first = last
            with torch.no_grad():
                h = module(h)
    return {part: stretches for part, stretches in found.items() if stretches}


# --- the best choice ------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """The first layers of a chain, decided: bytes held, work done again, and the stretches so far."""

    held: int
    work: float
    stretches: tuple[tuple[int, int], ...]


def cheapest(chain: Chain, budget: int) -> tuple[tuple[int, int], ...] | None:
    """The stretches of least work with which autograd never holds more bytes; None if there are none.

    >>> layer = Layer(0, 1, frozenset({0, 1}), 1.0, 1.0, True)
    >>> chain = Chain((layer, layer._replace(given=1, made=2, saved=frozenset({1, 2}))), (10, 10, 10))
    >>> cheapest(chain, 30), cheapest(chain, 20)    # each layer again: its input, and its output
    ((), None)
    """
    n = len(chain.layers)
    # By number of layers decided, and whether the storage of the last output is held already.
    front: list[dict[bool, list[_Choice]]] = [{True: [], False: []} for _ in range(n + 1)]
    front[0][False].append(_Choice(0, 0.0, ()))
    for i in range(n):
        for known, choices in front[i].items():
            best = _undominated(choices)
            if not best:
                continue
            for j, more, most, work, then in _options(chain, i, known):
                step = ((i, j),) if work is not None else ()
                front[j][then] += [
                    _Choice(c.held + more, c.work + (work or 0.0), (*c.stretches, *step))
                    for c in best
                    if c.held + more + most <= budget
                ]
    ends = []
    for known, choices in front[n].items():
        for choice in _undominated(choices):
            out = {chain.layers[-1].made} if known and n else set()
            if all(choice.held + chain.size(term - out) <= budget for term in chain.terms):
                ends.append(choice)
    return min(ends, key=lambda c: (c.work, len(c.stretches), c.held)).stretches if ends else None


def _options(
    chain: Chain, i: int, known: bool
) -> Iterable[tuple[int, int, int, float | None, bool]]:
    """Ways to go on from layer i: to which layer, bytes held from then on, more bytes for a time, work."""
    layer = chain.layers[i]
    before = {layer.given} if known else set()
    yield i + 1, chain.size(layer.saved - before), 0, None, layer.made in layer.saved | before
    if not layer.whole:
        return
    saved: frozenset[int] = frozenset()
    done = work = 0.0
    for j in range(i, len(chain.layers)):
        if j > i and j in chain.breaks:
            return
        last = chain.layers[j]
        saved |= last.saved
        if last.redo is not None:
            work = done + last.redo
            more = chain.size({layer.given} - before)
            yield j + 1, more, chain.size(saved - {layer.given}), work, last.made == layer.given
        done += last.work


def _undominated(choices: list[_Choice]) -> list[_Choice]:
    best: list[_Choice] = []
    for choice in sorted(choices, key=lambda c: (c.held, c.work, len(c.stretches))):
        if not best or choice.work < best[-1].work:
            best.append(choice)
    return best


def least(chain: Chain) -> int:
    """The fewest bytes into which a step of the chain fits.

    >>> layer = Layer(0, 1, frozenset({0, 1}), 1.0, 1.0, True)
    >>> least(Chain((layer, layer._replace(given=1, made=2, saved=frozenset({1, 2}))), (10, 10, 20)))
    40
    """
    low, high = -1, chain.peak(())  # too few, and enough
    while high - low > 1:
        middle = (low + high) // 2
        found = cheapest(chain, middle)
        if found is None:
            low = middle
        else:
            high = min(middle, chain.peak(found))
    return high


# --- measuring ------------------------------------------------------------------------------------


def measured(
    parts: Sequence[nn.Module], h: Tensor, x: Tensor, objective: Objective | None = None
) -> Chain:
    """The chain of some parts that run one after another, and of an objective at its end.

    Layers are measured on a few images, for a batch as large as h: bytes grow with the number of images, or
    with its square where images are compared with one another. The objective is measured on all.

    Args:
        parts: in training mode.
        h: their input (N, ...).
        x: the network's input (N, ...).
        objective: what the output is trained on.
    """
    sizes = [len(h)] if len(h) <= 6 else [2, 4, 6]
    chains = [_layers(parts, h[:n]) for n in sizes]
    weights = [_lagrange(sizes, n, len(h)) for n in sizes]
    totals = [
        int(sum(w * b for w, b in zip(weights, of, strict=True)))
        for of in zip(*(chain.bytes for chain in chains), strict=True)
    ]
    chain = replace(chains[-1], bytes=tuple(totals))
    if objective is None:
        return chain
    everything = nn.ModuleList([*parts, objective])
    with again(everything, random_state(h.device), h.device):
        with torch.no_grad():
            for part in parts:
                h = part(h)
        heads = [
            _head(term, h.detach().requires_grad_(), x, objective) for term in objective.terms()
        ]
    made = {chain.layers[-1].made} if chain.layers else set()
    terms = [
        frozenset({len(totals) + k, *(made if holds else ())}) for k, (_, holds) in enumerate(heads)
    ]
    return replace(chain, bytes=(*totals, *(peak for peak, _ in heads)), terms=tuple(terms))


def _head(term: Term, h: Tensor, x: Tensor, objective: nn.Module) -> tuple[int, bool]:
    """The most bytes that autograd holds of a term and its backward pass beside h; does it hold h then?"""
    owned = [*objective.parameters(), *objective.buffers()]
    y = torch.arange(len(h), device=h.device) // 2 % 2  # some are equal and some are not
    with torch.enable_grad(), SavedBytes(owned) as whole, SavedBytes([*owned, h]) as beside:
        torch.autograd.grad(term(h, y, x), h, allow_unused=True)
    return beside.peak, whole.peak > beside.peak


def _lagrange(sizes: Sequence[int], n: int, at: int) -> Fraction:
    """What the value at n weighs in that of the polynomial through all sizes, at another place."""
    weight = Fraction(1)
    for m in sizes:
        if m != n:
            weight *= Fraction(at - m, n - m)
    return weight


def _layers(parts: Sequence[nn.Module], h: Tensor) -> Chain:
    everything = nn.ModuleList(parts)
    watch = _Storages([*everything.parameters(), *everything.buffers()])
    layers: list[Layer] = []
    breaks: list[int] = []
    with torch.enable_grad(), again(everything, random_state(h.device), h.device), watch:
        for part in parts:
            breaks.append(len(layers))
            for layer in layers_of(part):
                given, version = h, h._version
                saved, work, redo = watch.run(layer, given)
                h = watch.made
                numbers = watch.number(given), watch.number(h)
                layers.append(Layer(*numbers, saved, work, redo, given._version == version))
    return Chain(tuple(layers), tuple(watch.bytes), breaks=frozenset(breaks))


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers the storages that autograd saves, in the order in which they appear, and counts work."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ignored = {storage_of(t) for t in ignored}
        self.numbers: dict[int, int] = {}
        self.bytes: list[int] = []
        self.alive: list[Tensor] = []  # so that no other storage comes to lie at an address
        self.work = 0.0
        self.made = torch.empty(0)

    def number(self, tensor: Tensor) -> int:
        key = storage_of(tensor)
        if key not in self.numbers:
            self.numbers[key] = len(self.bytes)
            self.bytes.append(tensor.untyped_storage().nbytes())
            self.alive.append(tensor.detach())
        return self.numbers[key]

    def run(self, layer: nn.Module, h: Tensor) -> tuple[frozenset[int], float, float | None]:
        """What a layer saved, what it cost, and what it had cost when it last saved something."""
        before, saved = self.work, set()
        redo: list[float] = []

        def pack(tensor: Tensor) -> None:
            redo[:] = [self.work - before]
            if storage_of(tensor) not in self.ignored:
                saved.add(self.number(tensor))

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: torch.empty(0)):
            self.made = layer(h)
        return frozenset(saved), self.work - before, redo[0] if redo else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.work += formula(*args, **(kwargs or {}), out_val=out)
        outs = out if isinstance(out, (tuple, list)) else (out,)
        if not func.is_view:
            moved = sum(t.nbytes for t in outs if isinstance(t, Tensor))
            self.work += _OPERATIONS_A_BYTE * moved
        return out
