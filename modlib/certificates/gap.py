r"""How far is a trained network from the best that any input module could have done?

.. math::

    \underbrace{R(W, b; \varphi) - B(r)}_{\text{gap}} =
    \underbrace{R^*(r; \varphi) - B(r)}_{\text{the input module's share}} +
    \underbrace{R(W, b; \varphi) - R^*(r; \varphi)}_{\text{the output module's share}},
    \qquad R^*(r; \varphi) = \min_{\lVert W' \rVert \le r,\, b'} R(W', b'; \varphi)

with :math:`r = \lVert W \rVert_F` the norm that the trained head has (for the softmax after the mean row,
which it ignores, is taken off) and :math:`B(r)` the global bound. Both shares are nonnegative.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from modlib.certificates import losses
from modlib.certificates.bounds import global_bound
from modlib.certificates.head import Rows, best_head, count_classes

Split = Literal["train", "test"]
_PAIRS = 2048  # examples whose pairwise inner products are compared with the floor
_ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-9}


@dataclass(frozen=True)
class OptimalityGap:
    """A trained network's risk, the least that any input module could reach, and who owes what.

    Attributes:
        achieved: mean risk of the network on the data.
        bound: no input module with this feature norm and kernel floor, and no head of this norm, has a
            smaller risk on data with these class proportions. None if an assumption is broken.
        best_head: the least risk of a head of this norm on the network's features.
        duality_gap: ``best_head`` is within this of the least (certified).
        head_norm: the budget ``r`` of the comparison.
        feature_norm, floor: as used in the bound, the features' rounding errors allowed for.
        loss, classes, n: what the risk is, and how many classes and examples it is over.
        broken: the assumptions of the theorem that do not hold for this network; then there is no bound.
        notes: why the bound, though true, may be out of reach for this network.

    >>> weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    >>> gap = gap_from_features(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 1, 1]), weight, None, floor=0.0)
    >>> gap.input_share > 0.1, abs(gap.gap - gap.input_share - gap.output_share) < 1e-9
    (True, True)
    """

    achieved: float
    head_norm: float
    feature_norm: float
    floor: float
    loss: str
    classes: int
    n: int
    bound: float | None = None
    best_head: float | None = None
    duality_gap: float | None = None
    broken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def gap(self) -> float | None:
        """``achieved - bound``"""
        return None if self.bound is None else self.achieved - self.bound

    @property
    def input_share(self) -> float | None:
        """What the input module owes: the best head on its features against the bound."""
        if self.bound is None or self.best_head is None:
            return None
        return self.best_head - self.bound

    @property
    def output_share(self) -> float | None:
        """What the output module owes: the trained head against the best head on the same features."""
        return None if self.best_head is None else self.achieved - self.best_head

    def __str__(self) -> str:
        lines = [
            f"achieved risk    {self.achieved:.6f}  ({self.loss}, {self.n} examples, "
            f"{self.classes} classes)"
        ]
        if self.bound is not None and self.best_head is not None:
            lines += [
                f"global bound     {self.bound:.6f}  (head norm {self.head_norm:.4g}, "
                f"feature norm {self.feature_norm:.4g}, floor {self.floor:.4g})",
                f"gap              {self.gap:.6f}",
                f"  input module   {self.input_share:.6f}",
                f"  output module  {self.output_share:.6f}  (certified to {self.duality_gap:.1e})",
            ]
        lines += [f"no bound: {reason}" for reason in self.broken]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def gap_from_features(
    features: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    weight: Tensor,
    bias: Tensor | None,
    floor: float,
    *,
    feature_norm: float = 1.0,
    loss: str = "cross_entropy",
    tolerance: float = 1e-7,
    subsample: int | None = None,
) -> OptimalityGap:
    """The optimality gap of a linear head on given features.

    Arguments:
        features: ``(n, d)``, normalised to ``feature_norm``; any float type, computed in float64.
        labels: ``(n,)`` integers, every class present.
        weight: ``(C, d)``; ``(1, d)`` for the binary losses, whose class 1 is positive.
        bias: ``(C,)`` or ``(1,)``; None is a bias of zero.
        floor: the least cosine that the kernel allows (`FeatureMap.floor`).
        feature_norm: the norm that the features are meant to have.
        loss: as in `global_bound`.
        tolerance: wanted duality gap of the best head.
        subsample: take this many examples, the classes in proportion; all numbers are about these.

    Raises:
        ValueError: for arguments of wrong shape or range, NaN, and a class without examples.

    >>> import torch
    >>> weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    >>> gap = gap_from_features(torch.eye(2), torch.tensor([0, 1]), weight, None, floor=0.0)
    >>> round(gap.achieved, 5), round(gap.gap, 6)
    (0.12693, 0.0)
    """
    return _gap(
        features, labels, weight, bias, floor, feature_norm, loss, tolerance, subsample, broken=()
    )


def _gap(
    features: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    weight: Tensor,
    bias: Tensor | None,
    floor: float,
    feature_norm: float,
    loss: str,
    tolerance: float,
    subsample: int | None,
    broken: tuple[str, ...],
) -> OptimalityGap:
    """`gap_from_features`, with the assumptions that are already known to be broken."""
    x = features.detach() if isinstance(features, Tensor) else np.asarray(features)
    y = torch.as_tensor(labels).detach().cpu().long()
    w = weight.detach().cpu().double()
    b = torch.zeros(len(w)).double() if bias is None else bias.detach().cpu().double()
    classes = _check_shapes(x, y, w, b, loss)
    if subsample is not None and subsample < len(y):
        keep = _in_proportion(y, subsample)
        x, y = x[keep], y[keep]
    if loss == "cross_entropy":
        w, b = w - w.mean(0), b - b.mean()
    rows = Rows(x, y, torch.full((len(y),), 1.0 / len(y)).double())
    achieved, norm = _risk(rows, w, b, loss), float(w.norm())
    report = OptimalityGap(
        achieved, norm, feature_norm, floor, loss, classes, len(y), broken=broken
    )
    if broken:
        return report
    facts = _Facts.of(rows, classes, feature_norm, floor)
    if facts.broken:
        return replace(report, broken=facts.broken)
    if norm == 0:
        raise ValueError("weight has norm 0: an untrained head of zeros has no gap to speak of")
    shares = (torch.bincount(y, minlength=classes).double() / len(y)).tolist()
    head = best_head(rows.features, y, loss, head_norm=norm, tolerance=tolerance, start=(w, b))
    return replace(
        report,
        bound=global_bound(loss, shares, facts.floor, facts.norm, head_norm=norm),
        best_head=min(head.risk, achieved),  # the trained head is one of those that compete
        duality_gap=head.duality_gap,
        feature_norm=facts.norm,
        floor=facts.floor,
        notes=_notes(rows, shares, bias is None, facts, loss),
    )


def _check_shapes(
    x: Tensor | np.ndarray[Any, Any], y: Tensor, w: Tensor, b: Tensor, loss: str
) -> int:
    losses.named(loss)
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y) or len(y) == 0:
        raise ValueError(
            f"features {tuple(x.shape)}, labels {tuple(y.shape)}: give (n, d) features and (n,) labels"
        )
    outputs = len(w) if loss == "cross_entropy" and len(w) > 1 else 1
    if w.shape != (outputs, x.shape[1]) or b.shape != (outputs,):
        raise ValueError(
            f"weight {tuple(w.shape)}, bias {tuple(b.shape)}: for {x.shape[1]} features give (C, "
            f"{x.shape[1]}) and (C,), with C = 1 for a binary loss"
        )
    if loss == "cross_entropy" and outputs == 1:
        raise ValueError("weight has one row: cross_entropy needs one for each class")
    if not bool(torch.isfinite(w).all() and torch.isfinite(b).all()):
        raise ValueError("weight, bias: they contain NaN or infinity")
    return count_classes(y, outputs if outputs > 1 else 2)


def _in_proportion(labels: Tensor, size: int) -> Tensor:
    """Indices of about ``size`` examples, spread evenly over each class; at least one a class."""
    if size < 1:
        raise ValueError(f"subsample is {size}: give a positive number of examples")
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    kept, start = [], 0
    for count in counts.tolist():
        take = max(1, round(size * count / len(labels)))
        kept.append(order[start : start + count][torch.arange(take) * count // take])
        start += count
    return torch.cat(kept).sort().values


def _risk(rows: Rows, weight: Tensor, bias: Tensor, loss: str) -> float:
    scores = rows.scores(torch.cat([weight, bias[:, None]], dim=1))
    value = float(losses.named(loss)(scores, rows.labels).values.mean())
    if not math.isfinite(value):
        raise ValueError("features contain NaN or infinity: mend the network or the data first")
    return value


@dataclass(frozen=True)
class _Facts:
    """What the theorem assumes of the features, measured."""

    norm: float
    floor: float
    broken: tuple[str, ...]
    dead: int  # features that are zero: every unit is off
    slack: float  # how far rounding has moved norm and floor

    @staticmethod
    def of(rows: Rows, classes: int, norm: float, floor: float) -> _Facts:
        kind = rows.original
        tolerance = _ROUNDING.get(kind, 1e-5)
        sizes = torch.cat([x.norm(dim=1) for _, x in rows])
        alive = sizes[sizes > 0]
        most, least = float(sizes.max()), float(alive.min()) if len(alive) else 0.0
        broken = []
        if most > norm * (1 + tolerance) or least < norm * (1 - tolerance):
            broken.append(
                f"the features are not normalised: their norms go from {least:.4g} to {most:.4g}, "
                f"not {norm:g}; end the input module with a FeatureMap, or give feature_norm"
            )
        lowest = _lowest_cosine(rows, classes, norm, floor)
        if lowest < floor - 4 * tolerance:
            broken.append(
                f"the features violate the kernel's floor: an inner product of {lowest:.4g} between "
                f"classes, below {floor:g}; give the floor of the kernel that is in the network"
            )
        used = max(norm, most)
        return _Facts(
            norm=used,
            floor=min(floor, lowest * (norm / used) ** 2),
            broken=tuple(broken),
            dead=len(sizes) - len(alive),
            slack=max(used / norm - 1, floor - lowest, 0.0),
        )


def _lowest_cosine(rows: Rows, classes: int, norm: float, floor: float) -> float:
    """The least inner product (over ``norm²``) between classes: all class means, and a sample of pairs.

    The proof of the bound uses the floor for the class means alone, which are checked exactly.
    """
    if floor <= -1:
        return floor
    if floor <= 0 and all(bool((x >= 0).all()) for _, x in rows):
        return max(floor, 0.0)
    onehot = torch.nn.functional.one_hot(rows.labels, classes).double()
    sums = rows.pull(onehot / onehot.sum(0))[:, :-1] * rows.n
    keep = torch.linspace(0, rows.n - 1, min(rows.n, _PAIRS)).long()
    sample = torch.as_tensor(rows.features[keep]).cpu().double()
    lowest = math.inf
    for points, kinds in ((sums, torch.arange(classes)), (sample, rows.labels[keep])):
        gram = points @ points.T
        gram[kinds[:, None] == kinds[None, :]] = math.inf
        lowest = min(lowest, float(gram.min()) / norm**2)
    return lowest


def _notes(
    rows: Rows, shares: list[float], biasless: bool, facts: _Facts, loss: str
) -> tuple[str, ...]:
    notes = []
    classes = len(shares)
    needed = classes if facts.floor > -1 / (classes - 1) else classes - 1
    if rows.d < needed:
        notes.append(
            f"{rows.d} features cannot hold {classes} ideal class points, which span {needed} "
            "dimensions: the bound may be out of reach"
        )
    if biasless:
        notes.append("the head has no bias, the heads that it is compared with have one")
    if facts.dead:
        notes.append(f"{facts.dead} of {rows.n} features are zero: every unit before them is off")
    if facts.slack > 1e-5:
        notes.append(
            f"rounding: norm or floor is off by {facts.slack:.1e}; the bound allows for it"
        )
    if loss == "cross_entropy" and classes >= 5 and facts.floor >= 0 and max(shares) > min(shares):
        notes.append("unbalanced classes: the bound is true, but perhaps not reached")
    return tuple(notes)


def optimality_gap(
    network: nn.Sequential,
    data: Any,
    *,
    split: Split = "train",
    loss: str = "cross_entropy",
    feature_norm: float = 1.0,
    floor: float | None = None,
    batch_size: int = 512,
    device: str | torch.device | None = None,
    tolerance: float = 1e-7,
    subsample: int | None = None,
) -> OptimalityGap:
    """The optimality gap of a partitioned network on a data set.

    The data are streamed: one pass of the network over batches, whose features go to a temporary file
    (4 n d bytes) that is mapped into memory; the risk and the best head are then computed from it in
    float64, a chunk of rows at a time. Nothing of the size of the images is held.

    Arguments:
        network: an ``nn.Sequential`` of modules, the last of which is a ``Sequential`` that ends in a
            `FeatureMap` and a ``Linear``. One module alone (E2EBP) is a network too.
        data: a `modlib.data.Dataset`, or an iterable of batches ``(x, y)``, iterated over once.
        split: ``"train"`` or ``"test"``, for a `Dataset`.
        floor: the least cosine of features of different classes; that of the `FeatureMap` by default.
        batch_size: images a forward pass, for a `Dataset`.
        device: where the network runs; where its parameters are by default.
        loss, feature_norm, tolerance, subsample: as in `gap_from_features`.

    Returns:
        The gap and its split; without them, but with the reason, if the network does not meet the
        assumptions of the theorem. The network's training mode is left as it was.

    Raises:
        ValueError: for data without batches and for what `gap_from_features` raises.

    >>> import torch
    >>> from modlib.kernels import FeatureMap
    >>> network = nn.Sequential(nn.Linear(2, 4), nn.Sequential(FeatureMap("relu"), nn.Linear(4, 2)))
    >>> batches = [(torch.randn(8, 2), torch.arange(8) % 2)]
    >>> optimality_gap(network, batches).gap >= 0
    True
    """
    if device is None:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
    body, head, reasons = _split(network)
    if floor is None:
        floor = float(getattr(body[-1], "floor", -1.0)) if len(body) else -1.0
    with _Spool() as spool, _evaluating(network):
        for x, y in _batches(data, split, batch_size, device):
            spool.add(body(x), y)
        features, labels = spool.read()
        if head is None:  # the "features" are the network's scores
            head = nn.Linear(features.shape[1], features.shape[1])
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)
        return _gap(
            features, labels, head.weight, head.bias, floor, feature_norm, loss, tolerance, subsample,
            reasons,
        )  # fmt: skip


def _split(network: nn.Sequential) -> tuple[nn.Sequential, nn.Linear | None, tuple[str, ...]]:
    """Everything up to the features, the head, and the assumptions that this structure breaks."""
    layers = [network[-1]]
    # Down to what comes last of all: a layer may hold the Linear.
    while isinstance(layers[-1], nn.Sequential) and len(layers[-1]):
        layers[-1:] = list(layers[-1])
    if not isinstance(layers[-1], nn.Linear):
        kind = type(layers[-1]).__name__
        return network, None, (f"the head is not a Linear layer but a {kind}",)
    body = nn.Sequential(*network[:-1], *layers[:-1])
    if len(layers) > 1 and hasattr(layers[-2], "floor"):
        return body, layers[-1], ()
    reason = "the features are not normalised: no FeatureMap stands before the head"
    return body, layers[-1], (reason,)


def _batches(
    data: Any, split: Split, batch_size: int, device: str | torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    batches: Iterable[Any] = data
    if hasattr(data, "part"):
        from modlib.data import Loader

        batches = Loader(
            data,
            split,
            min(batch_size, len(data.part(split)[1])),
            device=str(device),
            augment=False,
            shuffle=False,
            drop_last=False,
            memory="map",  # the images stay where they are: this pass needs each of them once
        ).epoch(0, 0)
    for x, y in batches:
        yield x.to(device), y


class _evaluating:
    """Evaluation mode without gradients; every module's own mode comes back afterwards."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.modes = {module: module.training for module in network.modules()}
        self.no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self.network.eval()
        self.no_grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.no_grad.__exit__(*error)
        for module, mode in self.modes.items():
            module.training = mode


class _Spool:
    """Features on disk as they come, mapped into memory when they are complete."""

    def __enter__(self) -> _Spool:
        self.file = tempfile.TemporaryFile()
        self.labels: list[Tensor] = []
        self.d = 0
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def add(self, features: Tensor, labels: Tensor) -> None:
        flat = features.flatten(1)
        self.d = flat.shape[1]
        self.labels.append(labels.detach().cpu().long())
        self.file.write(flat.detach().float().cpu().numpy().tobytes())

    def read(self) -> tuple[np.ndarray[Any, Any], Tensor]:
        if not self.labels:
            raise ValueError("data has no batches: give a Dataset or an iterable of (x, y)")
        labels = torch.cat(self.labels)
        self.file.flush()
        shape = (len(labels), self.d)
        return np.memmap(self.file, dtype=np.float32, mode="r+", shape=shape), labels
