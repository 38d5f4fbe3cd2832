"""Measure what a method needs: the survey's taxonomy as an instrument, not a declaration.

The audit copies the network and the method's stages, runs real steps on a batch, and watches: which
module runs when, how far back each error's gradient goes, when parameters change, what autograd
holds and what crosses a boundary. It takes the same step again with class names exchanged, and with
other weights in the later modules, and in the earlier ones: what comes out the same does not depend on
them. The category follows from what was seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modlib.device import forked
from modlib.measure.memory import SavedBytes
from modlib.methods import Method, Stage
from modlib.methods.method import OneBatch
from modlib.network import ModularNetwork

__all__ = [
    "Audit",
    "StageAudit",
    "audit",
]


class Event(NamedTuple):
    """Something that happened in a step: what, to which module, and in which backward pass."""

    what: str  # "forward", "backward" (a gradient reached its parameters) or "update"
    module: int
    backward: int  # number of the backward pass; -1 before the first


@dataclass(frozen=True)
class StageAudit:
    """What one step of one stage did.

    Attributes:
        events: in the order in which they happened.
        updated: modules whose parameters changed.
        saved_bytes: the peak of what autograd held, parameters and buffers excluded.
        forward_bytes: for each boundary k, bytes of module k's output that module k + 1 took in.
        backward_bytes: for each boundary, bytes of gradient that came back through it. Targets that
            a method sends down by other means are not counted: ``told`` shows them.
        ways: how far back the gradient of one error went: (2, 0) is from module 2 through module 1
            into module 0, without a break and in one backward pass; (2, 2) stayed in module 2.
            Only the longest ways are listed, so two ways that overlap are two errors.
        delays: for each module, how many steps ago the weights of later modules were those on which its
            update depends: 0 for this step's; None where it depends on none.
        fed: updated modules whose update depends on the present weights of an earlier one, so that they
            have to wait for its output.
        kept_bytes: what the stage keeps from one step to the next, beside weights and optimisers' state,
            and beside what autograd holds, which ``saved_bytes`` has counted.
        labels: for each module, what its update depends on: "classes", "pairs" (same or different),
            "none", or "-" when it is not updated.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 32, 10]), modules=3)
    >>> batch = modlib.data.Loader(modlib.data.load("digits")).sample(32)
    >>> (stage,) = audit(modlib.methods.E2EBP(), net, batch).stages
    >>> stage.ways, stage.crossed, stage.updated
    (((2, 0),), (0, 1), (0, 1, 2))
    """

    events: tuple[Event, ...]
    updated: tuple[int, ...]
    saved_bytes: int
    forward_bytes: tuple[int, ...]
    backward_bytes: tuple[int, ...]
    ways: tuple[tuple[int, int], ...]
    delays: tuple[int | None, ...]
    labels: tuple[str, ...]
    fed: tuple[int, ...]
    kept_bytes: int

    @property
    def told(self) -> tuple[int, ...]:
        """Updated modules whose update depends on the present weights of a later module."""
        return tuple(k for k, delay in enumerate(self.delays) if delay == 0)

    @property
    def crossed(self) -> tuple[int, ...]:
        """The boundaries k through which a gradient went from module k + 1 into module k."""
        return tuple(sorted({k for top, bottom in self.ways for k in range(bottom, top)}))

    def reached(self) -> list[set[int]]:
        """For each backward pass, the modules whose parameters got a gradient from it."""
        passes: dict[int, set[int]] = {}
        for event in self.events:
            if event.what == "backward":
                passes.setdefault(event.backward, set()).add(event.module)
        return list(passes.values())

    def ran(self) -> set[int]:
        """The modules that ran."""
        return _ran(self.events)


@dataclass(frozen=True)
class Audit:
    """What a method was seen to need. ``print`` it for a table.

    Attributes:
        method: its name.
        modules: K.
        first: the first module with parameters that ask for a gradient; 0 unless it was frozen.
        stages: what one step of each stage did.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10], kernel="relu"), ["features"])
    >>> batch = modlib.data.Loader(modlib.data.load("digits")).sample(32)
    >>> method = modlib.methods.ProxyObjective(modlib.objectives.SupCon(kernel="relu"))
    >>> seen = audit(method, net, batch)
    >>> seen.category, seen.labels
    ('modular', ('pairs', 'classes'))
    """

    method: str
    modules: int
    first: int
    stages: tuple[StageAudit, ...] = field(repr=False)

    @property
    def end_to_end_forward(self) -> bool:
        """Does a step that updates a module run a later one?

        With an end-to-end backward pass it does, but for one case: where one module alone is left to
        train, every method counts as end-to-end, by convention.
        """
        return self.end_to_end_backward or any(
            stage.updated and min(stage.updated) < max(stage.ran()) for stage in self.stages
        )

    @property
    def end_to_end_backward(self) -> bool:
        """Does one error's gradient go back from the last module to the first that can be trained?"""
        return any((self.modules - 1, self.first) in stage.ways for stage in self.stages)

    @property
    def isolated(self) -> bool:
        """Does no gradient go from one module into another in one step? (``later`` tells of older ones.)"""
        return not any(stage.crossed for stage in self.stages)

    @property
    def category(self) -> str:
        """By the survey's definitions: "end-to-end", "weakly modular" or "modular"."""
        if self.end_to_end_backward:
            return "end-to-end"
        return "weakly modular" if self.end_to_end_forward else "modular"

    @property
    def locks(self) -> dict[str, bool]:
        """The locks of Jaderberg et al. 2017 that were seen.

        forward: a module's step depends on an earlier module's weights, so it has to wait for that one's
        output. update: it depends on a later module's weights, so it has to wait until that one has
        run. backward: it needs the gradient that a later module sends back.
        """
        return {
            "forward": any(stage.fed for stage in self.stages),
            "update": any(stage.told for stage in self.stages),
            "backward": any(stage.crossed for stage in self.stages),
        }

    @property
    def peak_saved_bytes(self) -> int:
        """The most that autograd holds in any step, parameters and buffers excluded."""
        return max(stage.saved_bytes for stage in self.stages)

    @property
    def kept_bytes(self) -> int:
        """The most that a stage keeps from one step to the next, beside weights and optimisers' state."""
        return max(stage.kept_bytes for stage in self.stages)

    @property
    def labels(self) -> tuple[str, ...]:
        """What each module's update depends on: "classes", "pairs" or "none"."""
        return self._by_module(lambda stage, k: stage.labels[k])

    @property
    def later(self) -> tuple[str, ...]:
        """Does each module's update depend on the weights of a later one?

        "yes", "no", "-" for a module that is not updated, or "2 steps late": on those of that time.
        """
        return self._by_module(lambda stage, k: _told(stage.delays[k]))

    @property
    def earlier(self) -> tuple[str, ...]:
        """Must earlier modules run in the step that updates each module: "yes", "no" or "-"?"""
        return self._by_module(lambda stage, k: _yes(k in stage.fed))

    def _by_module(self, fact: Callable[[StageAudit, int], str]) -> tuple[str, ...]:
        """A fact about each module's update; "-" for a module that is never updated."""
        seen = {k: fact(stage, k) for stage in self.stages for k in stage.updated}
        return tuple(seen.get(k, "-") for k in range(self.modules))

    @property
    def boundary_bytes(self) -> int:
        """Bytes of outputs and gradients over all boundaries, in the stage where they are most."""
        return max(sum(s.forward_bytes) + sum(s.backward_bytes) for s in self.stages)

    def summary(self) -> dict[str, Any]:
        """The measured facts as plain data, for a record."""
        return {
            "category": self.category,
            "end_to_end_forward": self.end_to_end_forward,
            "end_to_end_backward": self.end_to_end_backward,
            "isolated": self.isolated,
            "locks": self.locks,
            "labels": list(self.labels),
            "later": list(self.later),
            "earlier": list(self.earlier),
            "peak_saved_bytes": self.peak_saved_bytes,
            "kept_bytes": self.kept_bytes,
            "boundary_bytes": self.boundary_bytes,
        }

    def __str__(self) -> str:
        locks = ", ".join(name for name, on in self.locks.items() if on) or "none"
        lines = [
            f"{self.method}, {self.modules} modules, measured on a real step",
            f"  category              {self.category}",
            f"  end-to-end forward    {_yes(self.end_to_end_forward)}",
            f"  end-to-end backward   {_yes(self.end_to_end_backward)}",
            f"  isolated              {_yes(self.isolated)}",
            f"  locks                 {locks}",
            "  each module's update needs",
            f"    labels              {', '.join(self.labels)}",
            f"    later weights       {', '.join(self.later)}",
            f"    earlier ones to run {', '.join(self.earlier)}",
            f"  peak of saved bytes   {self.peak_saved_bytes:,}",
            f"  kept between steps    {self.kept_bytes:,}",
            f"  bytes over boundaries {self.boundary_bytes:,}",
        ]
        return "\n".join(lines)


def audit(
    method: Method, net: ModularNetwork, batch: tuple[Tensor, Tensor], seed: int = 0
) -> Audit:
    """Run a few steps of every stage on copies, and report what the last one needed.

    Two steps do, but for a stage whose errors come with a delay.

    Args:
        method: how the network is trained.
        net: a network from ``modlib.partition``; it is not changed.
        batch: images (N, ...) and labels (N,), on the network's device.
        seed: of auxiliary weights and noise.

    Raises:
        TypeError: the network has not been cut into modules.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([64, 16, 10]), modules=2)
    >>> batch = modlib.data.Loader(modlib.data.load("digits")).sample(32)
    >>> audit(modlib.methods.E2EBP(), net, batch).category
    'end-to-end'
    >>> local = audit(modlib.methods.LocalLearning(), net, batch)
    >>> local.category, local.isolated
    ('weakly modular', True)
    """
    if not isinstance(net, ModularNetwork):
        raise TypeError(
            f"net is a {type(net).__name__}, but an audit needs modules: give "
            "modlib.partition(net, K)."
        )
    count = len(_prepare(method, net, batch, seed)[1])
    stages = tuple(_audit_stage(method, net, batch, seed, number) for number in range(count))
    first = next((k for k, module in enumerate(net) if _trainable(module)), 0)
    return Audit(type(method).__name__, len(net), first, stages)


def _audit_stage(
    method: Method, net: ModularNetwork, batch: tuple[Tensor, Tensor], seed: int, number: int
) -> StageAudit:
    watched, stage, inputs = _begin(method, net, batch, seed, number)
    # Steps until each module has been updated once: a first one may start from zeros.
    first = stage.delay + 1
    # Both from the start: a graph may outlive its step.
    with SavedBytes(_owned(watched, stage)) as memory, _Watch(watched, stage) as watch:
        for _ in range(first):
            _step(stage, inputs, seed)
        before = _parameters(watched)
        watch.begin()
        _step(stage, inputs, seed)
    after = _parameters(watched)
    updated = tuple(k for k in range(len(net)) if not _equal(before[k], after[k]))

    def again(
        labels: Tensor | None = None, changed: slice = slice(0), ago: int = 0
    ) -> list[list[Tensor]]:
        """The parameters after the same steps with other labels, or other weights in these modules.

        Labels are others in every step but the first, weights from so many steps before the last on.
        """
        other, stage, (x, y) = _begin(method, net, batch, seed, number)
        for step in range(first + 1):
            if step == first - ago:
                _change(other[changed])
            _step(stage, (x, y if labels is None or not step else labels), seed)
        return _parameters(other)

    last = max(_ran(watch.events))

    def delay(k: int) -> int | None:
        """How many steps ago the weights after module k were those on which its update depends."""
        for ago in range(stage.delay + 1):
            # an old error is as old as the last module's
            changed = slice(last if ago else k + 1, None)
            if not _close(before[k], after[k], again(changed=changed, ago=ago)[k]):
                return ago
        return None

    return StageAudit(
        tuple(watch.events),
        updated,
        memory.peak,
        tuple(watch.forward_bytes[k] for k in range(len(net) - 1)),
        tuple(watch.backward_bytes[k] for k in range(len(net) - 1)),
        watch.ways(),
        tuple(delay(k) if k in updated and k < last else None for k in range(len(net))),
        _labels(again, inputs[1], before, after),
        tuple(k for k in updated if not _close(before[k], after[k], again(changed=slice(k))[k])),
        sum(tensor.nbytes for tensor in stage.kept() if not memory.holds(tensor)),
    )


def _prepare(
    method: Method, net: ModularNetwork, batch: tuple[Tensor, Tensor], seed: int
) -> tuple[ModularNetwork, list[Stage]]:
    """A copy of the network and the method's stages on it; nothing of the caller's is touched."""
    net, method = copy.deepcopy(net), copy.deepcopy(method)
    with _seeded(seed, batch[0].device):
        return net, method.stages(net, batch[0])


def _begin(
    method: Method, net: ModularNetwork, batch: tuple[Tensor, Tensor], seed: int, number: int
) -> tuple[ModularNetwork, Stage, tuple[Tensor, Tensor]]:
    """A copy of the network, a stage on it, and the stage's input."""
    copied, stages = _prepare(method, net, batch, seed)
    return copied, stages[number], _input(stages[number], batch, seed)


def _input(stage: Stage, batch: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """What the stage trains on, given a batch of the network's input: stored features, perhaps."""
    return next(iter(stage.batches(OneBatch(batch), seed).epoch(seed, 0)))


def _change(modules: ModularNetwork) -> None:
    """Other weights, as large as before."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.copy_(noise * (p.norm() + 1e-3) / noise.norm())


def _step(stage: Stage, batch: tuple[Tensor, Tensor], seed: int) -> None:
    stage.train()
    x, y = batch
    with _seeded(seed + 1, x.device):
        stage.step(x.clone(), y)  # a batch of its own, which may be held for some steps


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with forked(device):
        torch.manual_seed(seed)
        yield


# --- what a step depends on -----------------------------------------------------------------------


def _labels(
    again: Callable[[Tensor], list[list[Tensor]]],
    y: Tensor,
    before: list[list[Tensor]],
    after: list[list[Tensor]],
) -> tuple[str, ...]:
    """Take the same step with other labels: what stays the same does not depend on them."""
    renamed = int(y.max()) - y  # exchanges class names, keeps which labels are equal
    shuffled = y.roll(1)
    outcomes = [again(labels) for labels in (renamed, shuffled)]
    return tuple(
        _dependence(old, new, *(outcome[k] for outcome in outcomes))
        for k, (old, new) in enumerate(zip(before, after, strict=True))
    )


def _dependence(
    before: list[Tensor], after: list[Tensor], renamed: list[Tensor], shuffled: list[Tensor]
) -> str:
    if _equal(before, after):
        return "-"
    if not _close(before, after, renamed):
        return "classes"
    return "none" if _close(before, after, shuffled) else "pairs"


def _parameters(net: ModularNetwork) -> list[list[Tensor]]:
    return [[p.detach().clone() for p in module.parameters()] for module in net]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def _close(before: list[Tensor], after: list[Tensor], other: list[Tensor]) -> bool:
    """Are two updates from the same start equal up to rounding (1e-5 of the update)?"""
    size = sum(float((a - b).norm()) for a, b in zip(after, before, strict=True))
    gap = sum(float((a - o).norm()) for a, o in zip(after, other, strict=True))
    return gap <= 1e-5 * size


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _told(delay: int | None) -> str:
    return _yes(delay == 0) if not delay else f"{delay} step{'s' * (delay > 1)} late"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _ran(events: Iterable[Event]) -> set[int]:
    return {event.module for event in events if event.what == "forward"}


# --- watching a step ------------------------------------------------------------------------------


@dataclass(eq=False)
class _Entry:
    """One time that a module took in an output to which a gradient can go back.

    Attributes:
        module: which one.
        below: the entries through which a gradient that comes out of this one goes on.
        connected: does it go on into the network, or end at the boundary?
        passes: numbers of the backward passes in which it went on.
    """

    module: int
    below: list[_Entry]
    connected: bool
    passes: set[int] = field(default_factory=set)

    def bottom(self, number: int) -> int:
        """The lowest module into which this pass went on from here."""
        on = (entry.bottom(number) for entry in self.below if number in entry.passes)
        return min(on, default=self.module - 1)


class _Watch:
    """Hooks on a network's modules, parameters and optimisers while one step runs."""

    def __init__(self, net: ModularNetwork, stage: Stage) -> None:
        self.net, self.stage = net, stage
        self.events: list[Event] = []
        self.forward_bytes = [0] * len(net)
        self.backward_bytes = [0] * len(net)
        self._owned = {id(p) for p in net.parameters()}
        self._entries: list[_Entry] = []
        # What the stage has kept from earlier steps, by address: held, or another tensor may come to lie there.
        self._kept: dict[int, Tensor] = {}
        self._passes: dict[int, int] = {}  # autograd's name of a backward pass -> its number
        self._stack = ExitStack()

    def begin(self) -> None:
        """The step to report comes now: forget what was seen, but keep an eye on old graphs."""
        self.events.clear()
        self._entries.clear()
        self._passes.clear()
        self.forward_bytes, self.backward_bytes = ([0] * len(self.net) for _ in range(2))
        self._kept = {tensor.data_ptr(): tensor for tensor in self.stage.kept()}

    def __enter__(self) -> _Watch:
        for k, module in enumerate(self.net):
            self._hook(module.register_forward_pre_hook(self._enter(k)))
            self._hook(module.register_forward_hook(self._forward(k)))
            for parameter in _trainable(module):
                self._hook(_on_gradient(parameter, self._backward(k)))
        for optimizer in self.stage.optimizers:
            self._hook(optimizer.register_step_post_hook(self._update(optimizer)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def ways(self) -> tuple[tuple[int, int], ...]:
        """How far back gradients went, in each pass on its own: the longest ways."""
        within = {(e.module, e.module) for e in self.events if e.what == "backward"}
        across = {(e.module, e.bottom(number)) for e in self._entries for number in e.passes}
        return tuple(sorted(way for way in within | across if not _inside(way, across)))

    def _hook(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _note(self, what: str, module: int, number: int) -> None:
        event = Event(what, module, number)
        if not self.events or self.events[-1] != event:  # one event, however many parameters
            self.events.append(event)

    def _pass(self) -> int:
        """The number of the backward pass that runs now, also one of ``torch.autograd.grad``."""
        return self._passes.setdefault(torch._C._current_graph_task_id(), len(self._passes))

    def _enter(self, k: int) -> Callable[[nn.Module, Any], Any]:
        """Give module k a view of its input: gradient that reaches the view comes out of module k."""

        def hook(module: nn.Module, args: Any) -> Any:
            x, *rest = args
            if k == 0 or not (x.requires_grad and torch.is_grad_enabled()):
                return None
            entry = _Entry(k, *_sources(x, self._owned))
            entered: Any = x.view_as(x)
            entered.grad_fn.metadata[_Entry] = entry
            entered.register_hook(self._crossing(entry))
            self._entries.append(entry)
            return (entered, *rest)

        return hook

    def _crossing(self, entry: _Entry) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.backward_bytes[entry.module - 1] += gradient.nbytes
            if entry.connected:  # else it ends at the boundary, to be used otherwise
                entry.passes.add(self._pass())

        return hook

    def _forward(self, k: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            self._note("forward", k, len(self._passes) - 1)
            if k > 0 and args[0].data_ptr() not in self._kept:  # else it crossed in an earlier step
                self.forward_bytes[k - 1] += args[0].nbytes

        return hook

    def _backward(self, k: int) -> Callable[[Tensor], None]:
        return lambda gradient: self._note("backward", k, self._pass())

    def _update(self, optimizer: torch.optim.Optimizer) -> Callable[..., None]:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        modules = [k for k, m in enumerate(self.net) if any(id(p) in owned for p in m.parameters())]

        def hook(*args: Any) -> None:
            for k in modules:
                self._note("update", k, len(self._passes) - 1)

        return hook


def _owned(net: ModularNetwork, stage: Stage) -> Iterator[Tensor]:
    """Parameters and buffers, which exist whether or not a backward pass will come."""
    for owner in (net, *stage.objectives, *stage.auxiliary):
        yield from owner.parameters()
        yield from owner.buffers()


def _on_gradient(parameter: Tensor, hook: Callable[[Tensor], None]) -> Any:
    return parameter.register_hook(hook)  # type: ignore[no-untyped-call]


def _sources(x: Tensor, owned: set[int]) -> tuple[list[_Entry], bool]:
    """The entries to which a gradient of x goes back, and whether it reaches the network at all."""
    entries: list[_Entry] = []
    parameters = False
    stack: list[Any] = [x.grad_fn]
    seen = {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if _Entry in node.metadata:  # what is below was found when that module was entered
            entries.append(node.metadata[_Entry])
        else:
            parameters |= id(getattr(node, "variable", None)) in owned
            stack += [parent for parent, _ in node.next_functions]
    return entries, parameters or bool(entries)


def _inside(way: tuple[int, int], others: Iterable[tuple[int, int]]) -> bool:
    """Is this way a part of another?"""
    return any(way != other and other[0] >= way[0] and other[1] <= way[1] for other in others)
