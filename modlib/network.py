"""A network as a list of modules: the one structure on which every method of the survey works.

Any network whose layers form a chain can be cut: ``nn.Sequential``, torchvision's ResNets and VGGs,
or your own class, whose ``forward`` is traced to find the chain. Layers are shared with the network
that was cut, not copied: training the modules trains the network.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast, overload

import torch
from torch import Tensor, fx, nn

from modlib.memory import SavedBytes

Chain = list[tuple[str, nn.Module]]
Costs = dict[tuple[int, int], float]  # (i, j) -> cost of layers i to j - 1 as one module


class ModularNetwork(nn.Sequential):
    """K modules that run one after another; ``net[k]`` is module k and ``net(x)`` the whole network.

    Attributes:
        names: for each module, the names of its layers in the network that was cut.

    >>> import modlib
    >>> net = modlib.partition(modlib.networks.mlp([4, 8, 8, 3]), modules=["layer2", "head"])
    >>> len(net), net.names[1]
    (3, ('layer2',))
    """

    def __init__(self, modules: Sequence[Chain]) -> None:
        super().__init__(*(nn.Sequential(OrderedDict(_attribute_names(m))) for m in modules))
        self.names = tuple(tuple(name for name, _ in chain) for chain in modules)

    @overload
    def __getitem__(self, index: slice) -> ModularNetwork: ...
    @overload
    def __getitem__(self, index: int) -> nn.Sequential: ...
    def __getitem__(self, index: slice | int) -> nn.Sequential:
        if not isinstance(index, slice):
            return cast(nn.Sequential, super().__getitem__(index))
        part = ModularNetwork([])
        part.extend(list(self)[index])
        part.names = self.names[index]
        return part

    def __iter__(self) -> Iterator[nn.Sequential]:
        return cast("Iterator[nn.Sequential]", super().__iter__())

    def outputs(self, x: Tensor) -> list[Tensor]:
        """The output of every module for a batch x (N, ...), in order; each is (N, ...)."""
        outputs = []
        for module in self:
            x = module(x)
            outputs.append(x)
        return outputs

    def shapes(self, x: Tensor) -> list[tuple[int, ...]]:
        """The shape of every module's output for a batch like x, without the batch dimension.

        Runs the network once in eval mode, without gradients; changes nothing.
        """
        with evaluating(self):
            return [tuple(h.shape[1:]) for h in self.outputs(x)]


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every layer is back in the mode that it was in."""
    training = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def in_precision(x: Tensor, reference: Tensor) -> Tensor:
    """x in the precision of a network's parameter; tokens stay integers."""
    return x.to(reference.dtype) if x.is_floating_point() else x


def partition(
    net: nn.Module, modules: int | Sequence[str], sample: Tensor | None = None
) -> ModularNetwork:
    """Cut a network into modules.

    Args:
        net: a network whose layers form a chain. Skip connections must lie inside one layer (as in
            torchvision's residual blocks); see ``layer_names`` for the names.
        modules: by count, a number K; or by name, the layer with which each module but the first
            begins (K - 1 names).
        sample: with a count, a batch (N, ...): the cut then makes the largest module's activation
            memory (bytes that autograd saves, measured on the batch) as small as it can be. Without
            it, modules get equal numbers of layers.

    Returns:
        The K modules as one network. The layers are those of ``net``, not copies; an activation with
        which a module begins no longer works in place, since its input is another module's output.

    Raises:
        ValueError: K is larger than the number of layers, a name is unknown or out of order, the
            network is not a chain there, or two modules would share weights.

    >>> import torch, torchvision
    >>> resnet = torchvision.models.resnet18(num_classes=10)
    >>> partition(resnet, modules=["layer2.0", "layer4.0"]).names[2]
    ('layer4.0', 'layer4.1', 'avgpool', 'flatten', 'fc')
    >>> len(partition(resnet, modules=4, sample=torch.zeros(2, 3, 32, 32)))
    4
    """
    if not isinstance(modules, int) and (isinstance(modules, str) or not _is_sequence(modules)):
        raise TypeError(
            f"modules={modules!r}: give a number of modules, or a list with the name of the layer "
            "with which each later module begins."
        )
    chain = _chain(net)
    if isinstance(modules, int):
        starts = _starts_by_count(chain, modules, sample)
    else:
        starts = _starts_by_name(chain, modules)
    parts = [chain[a:b] for a, b in pairwise([*starts, len(chain)])]
    _check_unshared(parts)
    for part in parts:
        _keep_input(part[0][1])
    return ModularNetwork(parts)


def layer_names(net: nn.Module) -> list[str]:
    """The names before which a network can be cut.

    >>> import modlib
    >>> layer_names(modlib.networks.mlp([4, 8, 3]))
    ['layer1', 'head']
    """
    return [name for name, _ in _chain(net)]


# --- where to cut ---------------------------------------------------------------------------------


def _is_sequence(names: object) -> bool:
    return isinstance(names, Sequence) and all(isinstance(name, str) for name in names)


def _keep_input(layer: nn.Module) -> None:
    if isinstance(layer, _Apply):
        layer.kwargs.pop("inplace", None)
    elif getattr(layer, "inplace", False):
        layer.inplace = False  # type: ignore[assignment]


def _starts_by_name(chain: Chain, names: Sequence[str]) -> list[int]:
    known = [name for name, _ in chain]
    for name in names:
        if name not in known:
            raise ValueError(
                f"modules: the network cannot be cut at {name!r}; it can be cut before any of "
                f"{', '.join(known[1:])}."
            )
    starts = [0, *(known.index(name) for name in names)]
    if any(a >= b for a, b in pairwise(starts)):
        raise ValueError(
            f"modules: {list(names)} are not in the network's order, or name its first layer "
            f"{known[0]!r}; give the later modules' first layers in order."
        )
    return starts


def _starts_by_count(chain: Chain, modules: int, sample: Tensor | None) -> list[int]:
    if not 1 <= modules <= len(chain):
        raise ValueError(
            f"modules={modules}, but the network has {len(chain)} layers that can be separated; "
            f"choose between 1 and {len(chain)}."
        )
    n = len(chain)
    if sample is None:
        costs = {(i, j): float(j - i) for i in range(n) for j in range(i + 1, n + 1)}
    else:
        costs = _measured_costs([layer for _, layer in chain], sample)
    return _balanced_starts(costs, n, modules)


def _measured_costs(layers: list[nn.Module], x: Tensor) -> Costs:
    """Run every part that begins with layer i as a module would run it: on an input without graph."""
    layers = [layer.train() for layer in copy.deepcopy(layers)]  # batch norm keeps its statistics
    weights = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    costs = {}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():  # dropout draws
        for i, first in enumerate(layers):
            h = x.clone()  # a first layer that works in place may not spoil the next part's input
            with SavedBytes(weights) as memory:
                for j, layer in enumerate(layers[i:], start=i + 1):
                    h = _run(layer, h)
                    costs[i, j] = float(memory.peak)
            x = _run(first, x).detach()
    return costs


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    try:
        return cast(Tensor, layer(x))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"sample: {type(layer).__name__} cannot train on a batch of shape {tuple(x.shape)} "
            f"({str(error).splitlines()[0]}); give a few images like those to train on."
        ) from error


def _balanced_starts(costs: Costs, n: int, modules: int) -> list[int]:
    """Cut n layers into contiguous parts: the largest cost is least, and the others are even."""
    largest, _ = _cheapest_cut(costs, n, modules, max)

    def squares(total: float, cost: float) -> float:
        return total + cost**2 if cost <= largest else float("inf")

    return _cheapest_cut(costs, n, modules, squares)[1]


def _cheapest_cut(
    costs: Costs, n: int, modules: int, price: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The cut whose price is least, by dynamic programming: ``price(so far, cost of one more)``."""
    best = [[0.0] + [float("inf")] * n]  # best[k][j]: least price of the first j layers in k parts
    cut: list[list[int]] = [[0] * (n + 1)]
    for k in range(1, modules + 1):
        row, cuts = [float("inf")] * (n + 1), [0] * (n + 1)
        for j in range(k, n + 1):
            row[j], cuts[j] = min((price(best[k - 1][i], costs[i, j]), i) for i in range(k - 1, j))
        best.append(row)
        cut.append(cuts)
    starts, j = [], n
    for k in range(modules, 0, -1):
        j = cut[k][j]
        starts.append(j)
    return best[modules][n], starts[::-1]


# --- the chain of layers --------------------------------------------------------------------------


class _Apply(nn.Module):
    """A function between two layers (``torch.flatten`` in torchvision's forward) as a layer."""

    def __init__(
        self,
        function: Callable[..., Any] | str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        position: int,
    ) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs
        self.position = position  # of the input among the arguments

    def forward(self, x: Tensor) -> Tensor:
        function = self.function
        if isinstance(function, str):
            function = getattr(type(x), function)
        args = (*self.args[: self.position], x, *self.args[self.position :])
        return cast(Tensor, function(*args, **self.kwargs))

    def extra_repr(self) -> str:
        return str(self.function)


class _Tracer(fx.Tracer):
    """Looks into the network and its ``nn.Sequential`` containers, but into no layer."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module) is not nn.Sequential


def _chain(net: nn.Module) -> Chain:
    if isinstance(net, ModularNetwork):  # cut it anew
        layers = [layer for module in net for layer in module]
        names = [name for module in net.names for name in module]
        return list(zip(names, layers, strict=True))
    if isinstance(net, nn.Sequential) and type(net).forward is nn.Sequential.forward:
        chain = _flattened(net)
    else:
        chain = _traced(net)
    if not chain:
        raise ValueError("net: an empty network cannot be cut; give it at least one layer.")
    return chain


def _flattened(net: nn.Sequential, prefix: str = "") -> Chain:
    chain: Chain = []
    for name, layer in net._modules.items():  # named_children() leaves out a layer's second use
        if type(layer) is nn.Sequential:
            chain += _flattened(layer, f"{prefix}{name}.")
        elif layer is not None:
            chain.append((prefix + name, layer))
    return chain


def _traced(net: nn.Module) -> Chain:
    try:
        graph = _Tracer().trace(net)
    except Exception as error:
        raise ValueError(
            f"net: the forward of {type(net).__name__} cannot be followed ({error}); "
            "write it as a chain of layers, for example with nn.Sequential."
        ) from error
    chain: Chain = []
    previous: fx.Node | None = None
    for node in graph.nodes:
        if node.op != "placeholder":
            _check_chain(net, node, previous)
        if node.op not in ("placeholder", "output"):
            used = any(name == node.target for name, _ in chain)
            name = str(node.target) if node.op == "call_module" and not used else node.name
            chain.append((name, _layer(net, node)))
        previous = node
    return chain


def _check_chain(net: nn.Module, node: fx.Node, previous: fx.Node | None) -> None:
    """Does this node use the previous one's output, once, and nothing else that is computed?"""
    used: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), used.append)
    layer_of_more = node.op == "call_module" and len(node.args) + len(node.kwargs) > 1
    if used != [previous] or previous not in node.args or layer_of_more:
        raise ValueError(
            f"net: {type(net).__name__} is not a chain at {node.name!r}, which uses something other "
            "than the layer before it; put skip connections and extra inputs inside one layer, and "
            "flatten with torch.flatten(x, 1)."
        )
    if "dropout" in node.name and node.op == "call_function":
        raise ValueError(
            f"net: {type(net).__name__} calls a dropout function, which would stay in the mode it "
            "is cut in; use the layer nn.Dropout."
        )


def _check_unshared(parts: list[Chain]) -> None:
    owner: dict[int, tuple[int, str]] = {}
    for number, part in enumerate(parts):
        for name, layer in part:
            for tensor in (*layer.parameters(), *layer.buffers()):
                module, other = owner.setdefault(id(tensor), (number, name))
                if module != number:
                    raise ValueError(
                        f"net: {other!r} and {name!r} share weights, so no cut between them isolates "
                        "a module; give each its own."
                    )


def _layer(net: nn.Module, node: fx.Node) -> nn.Module:
    if node.op == "call_module":
        return net.get_submodule(str(node.target))
    (position,) = (i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node))
    others = (*node.args[:position], *node.args[position + 1 :])
    return _Apply(node.target, others, dict(node.kwargs), position)


def _attribute_names(chain: Chain) -> list[tuple[str, nn.Module]]:
    """torch allows no dots in a child's name."""
    return [(name.replace(".", "_"), layer) for name, layer in chain]
