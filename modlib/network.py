"""A network as a list of modules: the one structure on which every method of the survey works.

Any network can be cut where one tensor is all that one part hands to the next: ``nn.Sequential``,
torchvision's networks, vision transformers, or your own class, whose ``forward`` is traced to find these
places. Layers are shared with the network that was cut, not copied: training the modules trains the
network.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, cast, overload

import torch
from torch import Tensor, fx, nn

from modlib.measure.memory import SavedBytes

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
        net: from one tensor to one tensor. What lies between two places where a single tensor is
            passed on (a skip connection, say) stays together as one layer, called after the first
            layer in it; see ``layer_names`` for the names.
        modules: by count, a number K; or by name, the layer with which each module but the first
            begins (K - 1 names; the name of a container stands for its first layer).
        sample: with a count, a batch (N, ...): the cut then makes the largest module's activation
            memory (bytes that autograd saves, measured on the batch) as small as it can be. Without
            it, modules get equal numbers of layers.

    Returns:
        The K modules as one network. The layers are those of ``net``, not copies; an activation with
        which a module begins no longer works in place, since its input is another module's output.

    Raises:
        ValueError: K is larger than the number of layers, a name is unknown, out of order or no place to
            cut, the forward pass cannot be followed, or two modules would share weights.

    >>> import torch, torchvision
    >>> resnet = torchvision.models.resnet18(num_classes=10)
    >>> partition(resnet, modules=["layer2.0", "layer4.0"]).names[2]
    ('layer4.0', 'layer4.1', 'avgpool', 'flatten', 'fc')
    >>> len(partition(resnet, modules=4, sample=torch.zeros(2, 3, 32, 32)))
    4
    >>> vit = torchvision.models.VisionTransformer(32, 8, 4, 2, hidden_dim=16, mlp_dim=32)
    >>> partition(vit, ["encoder.layers.encoder_layer_2"]).shapes(torch.zeros(2, 3, 32, 32))
    [(17, 16), (1000,)]
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
    """Let a layer that works in place leave what it is given as it is."""
    if isinstance(layer, fx.GraphModule):
        given = next(iter(layer.graph.nodes))
        if any(_in_place(layer, user) for user in given.users):
            with layer.graph.inserting_after(given):
                copy = layer.graph.call_method("clone", (given,))
            given.replace_all_uses_with(copy, lambda user: user is not copy)
            layer.recompile()
    elif getattr(layer, "inplace", False):
        layer.inplace = False  # type: ignore[assignment]


def _in_place(layer: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(layer.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace")) or name.endswith("_")


def _starts_by_name(chain: Chain, names: Sequence[str]) -> list[int]:
    known = [name for name, _ in chain]
    starts = [0]
    for name in names:
        found = [i for i, layer in enumerate(known) if f"{layer}.".startswith(f"{name}.")]
        if not found:
            raise ValueError(
                f"modules: the network cannot be cut at {name!r}; it can be cut before any of "
                f"{', '.join(known[1:])}, where nothing but one tensor is passed on."
            )
        starts.append(found[0])
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
    except (RuntimeError, ValueError, AssertionError) as error:
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
    chain: dict[str, nn.Module] = {}
    for link in _links(net, _graph(net)):
        first = next((node for node in link.nodes if node.op == "call_module"), link.output)
        name = str(first.target) if first.op == "call_module" else first.name
        chain[first.name if name in chain else name] = _layer(net, link)
    return list(chain.items())


class _Link(NamedTuple):
    """A stretch of a graph that one tensor enters and one tensor leaves, and nothing else."""

    input: fx.Node
    nodes: list[fx.Node]
    output: fx.Node


def _links(net: nn.Module, graph: fx.Graph) -> Iterator[_Link]:
    """The shortest stretches, in order: each ends where all that follows needs one tensor only."""
    given, *other = (node for node in graph.nodes if node.op == "placeholder")
    unused = _made_of(graph, other)
    steps = [node for node in graph.nodes if node.op.startswith("call_") and node not in unused]
    (returned,) = (node for node in graph.nodes if node.op == "output")
    for node in (*steps, returned):
        if unused & set(node.all_input_nodes) or (node is returned and node.args[0] not in steps):
            raise ValueError(
                f"net: {type(net).__name__} is not a chain at {node.name!r}, which uses or gives something "
                "other than one tensor that is computed from the network's first input; put the rest "
                "inside one layer."
            )
    when = {node: i for i, node in enumerate((*steps, returned))}
    start, nodes = given, []
    for now, node in enumerate(steps):
        nodes.append(node)
        alive = [n for n in (start, *nodes) if any(when.get(user, 0) > now for user in n.users)]
        if len(alive) == 1 and alive[0] is not start and not _is_tuple(alive[0]):
            yield _Link(start, nodes, alive[0])
            start, nodes = alive[0], []


def _made_of(graph: fx.Graph, inputs: list[fx.Node]) -> set[fx.Node]:
    """These and all that is computed from nothing else: for optional inputs, that they are left out."""
    made = set(inputs)
    for node in graph.nodes:
        if node.all_input_nodes and made.issuperset(node.all_input_nodes):
            made.add(node)
    return made


def _is_tuple(node: fx.Node) -> bool:
    """Is it taken apart by whole numbers? No layer takes one image out of a batch."""
    return any(
        user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users
    )


def _layer(net: nn.Module, link: _Link) -> nn.Module:
    """The layer itself where a link is one, else what lies in it; parameters are the network's."""
    first, *more = link.nodes
    if not more and first.op == "call_module" and (first.args, first.kwargs) == ((link.input,), {}):
        return net.get_submodule(str(first.target))
    graph = fx.Graph()
    copies = {link.input: graph.placeholder("x")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter is looked up where it is used
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in link.nodes:
        copied(node)
    graph.output(copies[link.output])
    return fx.GraphModule(net, graph, class_name=link.output.name)


# --- the forward pass as a graph ------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Looks into the network, its ``nn.Sequential`` containers and what holds blocks, but into no layer."""

    def __init__(self, opened: set[nn.Module]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module) is not nn.Sequential and module not in self.opened


def _graph(net: nn.Module) -> fx.Graph:
    """What the forward pass computes, optional inputs left out.

    Raises:
        ValueError: it cannot be followed, or differs between training and evaluation.
    """
    parts = [part for part in net.modules() if part is not net and _holds_blocks(part)]
    tracer = _Tracer({part for part in parts if _can_be_followed(part)})
    graphs = []
    with evaluating(net):
        for mode in (False, True):
            for part in net.modules():
                part.training = mode
            graphs.append(_followed(net, tracer))
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError(
            f"net: the forward of {type(net).__name__} computes something else in training than in "
            "evaluation, outside its layers, and would stay in the mode it is cut in; use the layer "
            "nn.Dropout for dropout, and switch auxiliary outputs off."
        )
    return graphs[0]


def _followed(net: nn.Module, tracer: fx.Tracer) -> fx.Graph:
    _, *others = inspect.signature(net.forward).parameters.values()
    left_out = {p.name: p.default for p in others if p.default is not p.empty}
    try:
        return tracer.trace(net, left_out)
    except Exception as error:
        raise ValueError(
            f"net: the forward of {type(net).__name__} cannot be followed ({error}); "
            "write it as a chain of layers, for example with nn.Sequential."
        ) from error


def _holds_blocks(module: nn.Module) -> bool:
    """Is one of its children a list of blocks: of layers of one class, with a forward of their own?"""
    kinds = (nn.Sequential, nn.ModuleList)
    lists = [[*child.children()] for child in module.children() if type(child) in kinds]
    alike = [blocks for blocks in lists if len(blocks) > 1 and len({type(b) for b in blocks}) == 1]
    of_torch = type(module).__module__.startswith("torch.")
    return not of_torch and any(_is_block(blocks[0]) for blocks in alike)


def _is_block(layer: nn.Module) -> bool:
    return any(layer.children()) and type(layer).forward is not nn.Sequential.forward


def _can_be_followed(module: nn.Module) -> bool:
    try:
        return bool(list(_links(module, _graph(module))))
    except ValueError:
        return False


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


def _attribute_names(chain: Chain) -> list[tuple[str, nn.Module]]:
    """torch allows no dots in a child's name."""
    return [(name.replace(".", "_"), layer) for name, layer in chain]
