r"""Train hidden modules from pairs: are these two images of the same class? No label is ever seen.

The proxy objectives use labels only through the pairs that they form, so one may give them the pairs
instead. An image's "label" is here its own number, and the objective asks an *oracle* about the
numbers it meets in a batch:

.. math:: h_k \mapsto L\bigl(G(h_k), S\bigr), \qquad S_{ij} = \mathrm{same}(i, j)

Source: Duan, Yu & Principe 2022 (arXiv 2005.05541), section on label efficiency; survey (arXiv
2101.03419), on proxy objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from modlib.data import Dataset
from modlib.data.dataset import Array
from modlib.methods.local import LocalLearning
from modlib.methods.method import Method, Optimizers, Stage, checked
from modlib.methods.only import Only
from modlib.network import ModularNetwork
from modlib.objectives import Objective
from modlib.training import History, fit

Same = Callable[[Tensor, Tensor], Tensor]


def fit_pairs(
    net: nn.Module,
    objective: Objective,
    images: Array,
    same: Same,
    *,
    modules: Sequence[int] | None = None,
    optimizer: Optimizers = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    **options: Any,
) -> History:
    """Train hidden modules one after another, from same/different pairs alone.

    Args:
        net: the hidden modules, without an output module: ``modlib.partition(...)[:-1]``.
        objective: on pairs, such as ``SupCon(kernel="relu")``; every module gets a copy.
        images: uint8 (N, H, W, C), or float vectors (N, d).
        same: the oracle. ``same(i, j)``, for two integer tensors of one shape that number the
            images, is a boolean tensor of that shape: are images i and j of the same class? It must
            be symmetric, and True where i = j. It need not come from classes.
        modules: positions of those to train; the others stay as they are. All of them if None.
        optimizer: makes one module's optimiser, or a list with one for each module.
        mean, std: what each channel is normalised with, as in ``data.Dataset``; the images' own if they
            are left out. Where the modules are used on a data set later, give that one's.
        options: of ``modlib.fit``: epochs, batch_size, seed, device, augment, checkpoint, ...

    Returns:
        The history; the modules are trained in place and left in eval mode.

    Raises:
        ValueError: a batch without pairs of both kinds, or answers of the wrong shape, type or symmetry;
            and what ``modlib.fit`` raises.

    >>> import modlib
    >>> data = modlib.data.load("digits").subset(n_train=256)
    >>> net = modlib.partition(modlib.networks.mlp([64, 32, 10], kernel="relu"), ["features"])
    >>> supcon = modlib.objectives.SupCon(kernel="relu")
    >>> oracle = same_class(data.train_labels)
    >>> history = fit_pairs(net[:-1], supcon, data.train_images, oracle, epochs=1, progress=False)
    >>> len(history.final["losses"])
    1
    """
    numbers = np.arange(len(images))
    numbered = Dataset(
        "pairs", images, numbers, images[:1], numbers[:1], mean=tuple(mean), std=tuple(std)
    )
    method: Method = _Pairs(objective, same, optimizer)
    if modules is not None:
        method = Only(method, modules)
    return fit(net, method, numbered, **options)


def same_class(labels: Array | Tensor) -> Same:
    """An oracle that keeps the labels to itself: for experiments in which they are known.

    >>> import torch
    >>> oracle = same_class(torch.tensor([7, 7, 2]))
    >>> oracle(torch.tensor([0, 0]), torch.tensor([1, 2]))
    tensor([ True, False])
    """
    known = torch.as_tensor(np.asarray(labels))

    def same(i: Tensor, j: Tensor) -> Tensor:
        place = known.to(i.device)
        return place[i] == place[j]

    return same


class _Pairs(LocalLearning):
    """One module after another, each on pairs of image numbers; there is no output module."""

    def __init__(
        self,
        objective: Objective,
        same: Same,
        optimizer: Optimizers,
    ) -> None:
        if not callable(same):
            raise TypeError(
                f"same={same!r:.60} is no function; give same(i, j) -> bool, such as "
                "modlib.pairs.same_class(labels)."
            )
        asking = _Asking(checked("objective", objective), same)
        super().__init__(asking, in_turn=True, optimizer=optimizer)

    def check_output(self, shape: Sequence[int], classes: int) -> None:
        """A hidden module may give anything: the objective looks at it."""

    def stages(self, net: ModularNetwork, x: Tensor) -> list[Stage]:
        stages = super().stages(net, x)
        stages[-1].complete = False  # its output is no answer
        return stages

    def objectives(self, net: ModularNetwork, x: Tensor) -> list[Objective]:
        local = self.hidden_objectives(net, x, net.shapes(x), classes=0)
        return [objective.to(x.device) for objective in local]


class _Asking(Objective):
    """An objective on pairs, which are asked for."""

    def __init__(self, objective: Objective, same: Same) -> None:
        super().__init__()
        self.objective, self.same = objective, same

    def for_module(self, shape: Sequence[int], classes: int) -> _Asking:
        return _Asking(self.objective.for_module(shape, classes), self.same)

    def forward(self, h: Tensor, number: Tensor) -> Tensor:
        return cast(Tensor, self.objective(h, _answers(self.same, number)))

    def extra_repr(self) -> str:
        return f"{type(self.objective).__name__}({self.objective.extra_repr()})"


def _answers(same: Same, number: Tensor) -> Tensor:
    """The oracle's answers for all pairs of a batch, (B, B), checked."""
    i, j = torch.meshgrid(number, number, indexing="ij")
    answers = same(i, j)
    if not isinstance(answers, Tensor) or answers.dtype != torch.bool or answers.shape != i.shape:
        what = f"{answers.dtype} {tuple(answers.shape)}" if isinstance(answers, Tensor) else answers
        raise ValueError(
            f"same: for two tensors of shape {tuple(i.shape)} it gave {what!r:.60}; it must give a "
            "boolean tensor of that shape."
        )
    if not bool((answers == answers.T).all()) or not bool(answers.diagonal().all()):
        raise ValueError(
            "same: its answers depend on the order of i and j, or an image is not of its own class; "
            "give a symmetric relation with same(i, i) True."
        )
    return answers
