"""A plain multilayer perceptron, cut-able before every nonlinearity."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from modlib.kernels import FeatureMap
from modlib.networks.boundary import check_boundary
from modlib.networks.seeding import seeded
from modlib.networks.sizes import check_list


def mlp(
    sizes: Sequence[int],
    *,
    activation: Callable[[], nn.Module] = nn.ReLU,
    boundary: str = "before",
    kernel: str | None = None,
    norm: bool = False,
    seed: int | None = None,
) -> nn.Sequential:
    """Linear layers with an activation between them; inputs of any shape are flattened.

    Its layers are ``layer1`` … ``layer{L-1}`` and ``head``.

    Args:
        sizes: units of the input, of every hidden layer, and of the output (the classes).
        activation: makes the nonlinearity.
        boundary: "before" lets each layer begin with the activation of the one before it, so that
            modules end before their nonlinearity, where kernels want it; "after" lets layers end
            with their activation, where target propagation wants it.
        kernel: put a ``FeatureMap`` of this kernel, as layer ``features``, in place of the last
            activation; strictly modular training needs one.
        norm: batch norm, without scale and shift, behind every hidden linear layer.
        seed: of the initial weights; None takes PyTorch's global state.

    Returns:
        A network from inputs (N, ...) to logits (N, sizes[-1]).

    Raises:
        ValueError: sizes are no whole numbers above 0 or fewer than two, a choice is unknown, or the
            kernel takes no vectors.

    >>> import torch
    >>> mlp([64, 32, 10], kernel="tanh", seed=0)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    >>> mlp([64, 32, 10], norm=True).layer1[2]
    BatchNorm1d(32, ..., affine=False, ...)
    """
    check_list("sizes", sizes, least=2)
    check_boundary(boundary)
    if kernel is not None and boundary == "after":
        raise ValueError("kernel: a feature map replaces an activation; use boundary='before'.")
    with seeded(seed):
        linears = [nn.Linear(before, after) for before, after in pairwise(sizes)]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, linear in enumerate(linears, start=1):
        last = number == len(linears)
        start: list[nn.Module] = [nn.Flatten()] if number == 1 else []
        units: list[nn.Module] = [linear]
        if norm and not last:
            units.append(nn.BatchNorm1d(linear.out_features, affine=False))
        end: list[nn.Module] = [] if last else [activation()]
        if boundary == "before":
            start, end = start or [activation()], []
        if last and kernel is not None:
            layers["features"] = FeatureMap(kernel)
            layers["features"](torch.zeros(1, linear.in_features))  # it says what it cannot take
            start = []
        name = "head" if last else f"layer{number}"
        layers[name] = Layer(*start, *units, *end)
    return nn.Sequential(layers)


class Layer(nn.Sequential):
    """[activation or flatten →] linear [→ batch norm] [→ activation]: kept whole when a network is cut."""
