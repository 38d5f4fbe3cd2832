r"""Find what is wrong with a network from what each module shows by itself.

Every module has an objective of its own, so it can be examined alone. Three questions, one number each:

1. *Is a module worse than it need be?* Train a fresh copy of module k, alone, on the inputs that the
   trained one receives, for a short while; its **shortfall** is

   .. math:: s_k = L(h_k) - L(h_k^{\text{fresh}}),

   its own objective minus the fresh copy's, both on images that neither was trained on. A healthy module
   has had more training than the fresh one: :math:`s_k \le 0`. A sound module has a shortfall too where
   its inputs are not those that it was trained on, because a module before it was damaged later. So
   only the first that is named is surely at fault; the others may follow from it.
2. *Is a block dead?* The share of a layer's channels that, after the activation that follows, are
   the same number for every image.
3. *Are labels wrong?* For classes a and b, how many images labelled a lie nearest to b's mean, in features
   from modules that never saw these labels: half of the images train fresh copies, the other half are
   judged, and the other way round. **Which** images they are is returned.

Source: this book, "Modules as parts". Reading modules one by one is a claim of the survey (arXiv 2101.03419);
judging labels by held-out predictions is the idea of confident learning (Northcutt, Jiang & Chuang
2021, arXiv 1911.00068).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modlib.data import Dataset, Loader, default_augment
from modlib.kernels import Kernel
from modlib.methods.method import MakeOptimizer
from modlib.network import ModularNetwork, evaluating
from modlib.networks.seeding import redraw
from modlib.objectives import ProxyLoss
from modlib.reuse.extract import extract
from modlib.reuse.few_labels import anchors, logistic_scores
from modlib.reuse.pairs import fit_pairs, same_class

__all__ = [
    "Diagnosis",
    "LabelCheck",
    "ModuleCheck",
    "diagnose",
]

_DEAD = 0.5  # share of constant channels from which a layer is called dead
_SHORT = 0.1  # shortfall, over the larger gain, from which a module is called poor
_NOTHING = 1e-3  # gain, over the untrained objective, below which a module cannot be judged
_BATCH = 128  # images a step of the fresh copies
_STRAY = 0.1  # share of a class from which its labels are called wrong


@dataclass(frozen=True)
class ModuleCheck:
    """One module, examined alone.

    Attributes:
        position: in the network, from 0.
        objective: its own objective on the test images; the last module's is its cross-entropy.
        fresh: that of a fresh copy after a short training alone, on the same inputs; for the last module
            that of the best linear head on its features.
        untrained: that of the fresh copy before.
        dead: for each of its layers, the share of channels that are the same for every
            image, after the activation that follows.

    >>> check = ModuleCheck(position=0, objective=0.75, fresh=0.5, untrained=1.0, dead={})
    >>> check.shortfall    # the fresh copy gained 0.5, of which the module lacks half
    0.5
    """

    position: int
    objective: float
    fresh: float
    untrained: float
    dead: dict[str, float]

    @property
    def shortfall(self) -> float:
        """How much worse the module is than the fresh copy, over the larger of the two gains."""
        gain = self.untrained - min(self.objective, self.fresh)
        if gain <= _NOTHING * abs(self.untrained):  # nothing can be learned from these inputs
            return 0.0
        return (self.objective - self.fresh) / gain


@dataclass(frozen=True)
class LabelCheck:
    """Whether the labels agree with what images look like.

    Attributes:
        given: (n,) the training labels.
        seen: (n,) the class whose mean each image is nearest to.
        classes: C.

    >>> check = LabelCheck(given=torch.tensor([0, 0, 1, 1]), seen=torch.tensor([0, 1, 1, 1]), classes=2)
    >>> check.pair, check.suspects.tolist()    # one image labelled 0 looks like 1
    ((0, 1), [1])
    """

    given: Tensor = field(repr=False)
    seen: Tensor = field(repr=False)
    classes: int

    @property
    def counts(self) -> Tensor:
        """(C, C): how many images labelled a look like b."""
        pairs = torch.bincount(self.given * self.classes + self.seen, minlength=self.classes**2)
        return pairs.view(self.classes, self.classes)

    @property
    def stray(self) -> Tensor:
        """(C, C): counts minus its transpose, over the mean size of a class.

        Images labelled a that look like b, beyond those labelled b that look like a. Natural confusion
        is about as large both ways; labels that are wrong in one direction are not.
        """
        return (self.counts - self.counts.T) / (len(self.given) / self.classes)

    @property
    def pair(self) -> tuple[int, int]:
        """(a, b), where the stray is largest: labelled a, look like b."""
        a, b = divmod(int(self.stray.argmax()), self.classes)
        return a, b

    @property
    def suspects(self) -> Tensor:
        """The training images of that pair."""
        a, b = self.pair
        return ((self.given == a) & (self.seen == b)).nonzero().flatten()


@dataclass(frozen=True)
class Diagnosis:
    """What was found. ``print`` it for a table; ``faults`` names what is wrong: modules, then labels.

    Attributes:
        modules: one check each, in the order of the network.
        labels: their check.
        accuracy: of the whole network on the test images that were looked at.

    >>> module = ModuleCheck(position=0, objective=0.2, fresh=0.2, untrained=1.0, dead={"layer1": 1.0})
    >>> labels = LabelCheck(given=torch.arange(2), seen=torch.arange(2), classes=2)
    >>> Diagnosis((module,), labels, accuracy=0.9, names=("a", "b")).faults
    ('module 0, layer layer1: 100% of its channels are dead',)
    """

    modules: tuple[ModuleCheck, ...]
    labels: LabelCheck
    accuracy: float
    names: tuple[str, ...] = field(repr=False)  # of the classes

    @property
    def faults(self) -> tuple[str, ...]:
        """Sentences; empty if nothing was found."""
        dead, poor = list(self._dead()), self._poor()
        named = [check.position for check, *_ in dead] + [check.position for check in poor]
        found = [
            f"module {check.position}, layer {layer}: {share:.0%} of its channels are dead"
            for check, layer, share in dead
        ]
        found += [
            f"module {check.position}: a fresh copy, trained on the same inputs, is better by "
            f"{check.shortfall:.0%} of what could be gained; {_advice(check.position, min(named))}"
            for check in poor
        ]
        if float(self.labels.stray[self.labels.pair]) >= _STRAY:
            found.append(self._labels())
        return tuple(found)

    @property
    def note(self) -> str:
        """When a shortfall is no fault; empty if no hidden module has one."""
        if all(check is self.modules[-1] for check in self._poor()):
            return ""
        return (
            f"the network is right on {self.accuracy:.0%} of these images; a shortfall is a fault only "
            "of a module that was trained on this objective, and after end-to-end training it is none"
        )

    def _poor(self) -> list[ModuleCheck]:
        return [check for check in self.modules if check.shortfall >= _SHORT]

    def _dead(self) -> Iterator[tuple[ModuleCheck, str, float]]:
        """Layers with many dead channels, up to one that is wholly dead: behind it all others must be."""
        for check in self.modules:
            for layer, share in check.dead.items():
                if share >= _DEAD:
                    yield check, layer, share
                if share == 1.0:
                    return

    def _labels(self) -> str:
        a, b = self.labels.pair
        return (
            f"labels: {self.labels.counts[a, b]} images labelled {self.names[a]!r} look like "
            f"{self.names[b]!r}, {self.labels.counts[b, a]} the other way round"
        )

    def __str__(self) -> str:
        lines = ["module  objective  fresh copy  shortfall  dead (worst layer)"]
        for check in self.modules:
            layer = max(check.dead, key=lambda name: check.dead[name], default="-")
            lines.append(
                f"{check.position:6d}  {check.objective:9.4f}  {check.fresh:10.4f}  "
                f"{check.shortfall:9.1%}  {check.dead.get(layer, 0.0):.0%} {layer}"
            )
        lines.append(self._labels())
        lines += [f"fault: {fault}" for fault in self.faults]
        return "\n".join(lines + [f"note: {self.note}"] * bool(self.note))


def _advice(position: int, first: int) -> str:
    """A module knows the inputs that it was trained on, and a bad one before it changes them."""
    if position == first:
        return "train it again"
    return f"it may follow from module {first}: repair that one first and ask again"


def diagnose(
    net: ModularNetwork,
    data: Dataset,
    objective: ProxyLoss,
    *,
    epochs: int = 2,
    label_epochs: int = 10,
    n: int = 2000,
    optimizer: MakeOptimizer | None = None,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    seed: int = 0,
) -> Diagnosis:
    """Examine every module, its layers and the labels, each alone.

    Args:
        net: a trained network whose last layer is linear. Its hidden modules are judged by the objective
            that modular training gives them; after another training, end to end say, a shortfall is no
            fault, and ``Diagnosis.note`` says so.
        data: what it was trained on; the modules are compared on its test images. (Put held-out
            training images in their place where a repair will be judged on the test images.)
        objective: on pairs, what each hidden module is judged by.
        epochs: of the short training of each fresh copy; fewer than the network has had.
        label_epochs: of the two copies, each trained on half of the images, that judge the labels.
        n: how many test images are looked at.
        optimizer: for the fresh copies; SGD if None.
        activation: what the next layer sees of a layer's output.
        seed: of the fresh copies.

    Raises:
        TypeError: the objective is none on pairs.
        ValueError: the network has no hidden module, does not end in a linear layer, or a module gives
            NaN or infinity; there are too few training images to halve, or of a class; and what
            ``modlib.fit_pairs`` raises.

    >>> import modlib
    >>> data = modlib.data.load("digits")
    >>> net = modlib.partition(modlib.networks.mlp([64, 64, 32, 10], kernel="relu"), ["layer2", "features"])
    >>> supcon = modlib.objectives.SupCon(kernel="relu")
    >>> history = modlib.fit(net, modlib.methods.ProxyObjective(supcon), data, epochs=5, progress=False)
    >>> with torch.no_grad():
    ...     for weight in net[1].parameters():
    ...         _ = weight.zero_()
    >>> diagnose(net, data, supcon).faults[0]
    'module 1, layer layer2: 100% of its channels are dead'
    """
    if not isinstance(objective, ProxyLoss):
        raise TypeError(
            f"objective={objective!r} is no objective on pairs; give one, such as objectives.SupCon()."
        )
    if len(net) < 2:
        raise ValueError("net: it has one module, so there is no hidden one to examine; cut it.")
    last = [m for m in net[-1][-1].modules() if not isinstance(m, nn.Sequential | nn.Flatten)]
    if [type(part) for part in last] != [nn.Linear]:
        raise ValueError(
            "net: its last layer is not linear, but the head is compared with the best linear one; end "
            "the network in nn.Linear."
        )
    _check_data(data)
    hidden = net[:-1]
    device = next(net.parameters()).device
    loader = Loader(data, "test", device=device, shuffle=False, drop_last=False)
    x, y = loader.sample(min(n, loader.n))
    train = partial(_trained, objective=objective, optimizer=optimizer, seed=seed, device=device)
    _check_finite(net, x)
    checks = []
    for k in range(len(hidden)):
        trained = hidden[: k + 1]
        fresh = _fresh(trained, [k], seed)
        untrained = _value(fresh, x, y, objective)
        train(fresh, [k], data, epochs)
        ours, theirs = (_value(module, x, y, objective) for module in (trained, fresh))
        checks.append(ModuleCheck(k, ours, theirs, untrained, _dead(hidden, k, x, activation)))
    judges = partial(train, epochs=label_epochs)
    checks.append(_check_head(net, data, len(x)))
    labels = _check_labels(hidden, data, objective.kernel, judges, seed)
    with evaluating(net):
        accuracy = int((net(x).argmax(1) == y).sum()) / len(y)
    return Diagnosis(tuple(checks), labels, accuracy, data.classes)


def _check_data(data: Dataset) -> None:
    counts = np.bincount(data.train_labels, minlength=len(data.classes))
    if len(data.train_labels) < 2 * _BATCH or counts.min() < 2:
        raise ValueError(
            f"data: the labels are judged in two halves, but {data.name!r} has {counts.sum()} training "
            f"images and {counts.min()} of class {data.classes[counts.argmin()]!r}; give at least "
            f"{2 * _BATCH} and 2."
        )


def _check_finite(net: ModularNetwork, x: Tensor) -> None:
    h = x
    with evaluating(net):
        for k, module in enumerate(net):
            h = module(h)
            if not bool(h.isfinite().all()):
                raise ValueError(
                    f"net: module {k} gives NaN or infinity, so nothing after it can be examined; train "
                    "it again, at a lower rate."
                )


def _fresh(modules: ModularNetwork, redrawn: Sequence[int], seed: int) -> ModularNetwork:
    """A copy whose modules at these positions have new initial weights."""
    new = copy.deepcopy(modules)
    for k in redrawn:
        redraw(new[k], seed)
    return new


def _trained(
    modules: ModularNetwork,
    positions: Sequence[int],
    data: Dataset,
    epochs: int,
    *,
    objective: ProxyLoss,
    optimizer: MakeOptimizer | None,
    seed: int,
    device: torch.device,
) -> ModularNetwork:
    """Train these modules from the pairs of the training images."""
    fit_pairs(
        modules,
        objective,
        data.train_images,
        same_class(data.train_labels),
        modules=positions,
        optimizer=optimizer,
        mean=data.mean,
        std=data.std,
        epochs=epochs,
        batch_size=_BATCH,
        seed=seed,
        device=device,
        augment=default_augment(data) or None,
        progress=False,
    )
    return modules


def _check_head(net: ModularNetwork, data: Dataset, n: int) -> ModuleCheck:
    """The output module against the best linear head on the features that its last layer gets."""
    layers = [layer for module in net for layer in module]
    before = nn.Sequential(*layers[:-1])
    held, truth = extract(before, data, n=n)
    with evaluating(net):
        ours = F.cross_entropy(layers[-1](held), truth)
    theirs = F.cross_entropy(logistic_scores(extract(before, data, "train"), held), truth.cpu())
    return ModuleCheck(len(net) - 1, float(ours), float(theirs), math.log(len(data.classes)), {})


def _value(module: nn.Module, x: Tensor, y: Tensor, objective: ProxyLoss) -> float:
    with evaluating(module):
        return float(objective(module(x), y))


def _dead(
    hidden: ModularNetwork, k: int, x: Tensor, activation: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """For each layer of module k, the share of channels that the next layer sees as one number.

    Of tokens (N, T, d), those are the d.
    """
    shares = {}
    with evaluating(hidden):
        h = hidden[:k](x)
        for name, layer in zip(hidden.names[k], hidden[k], strict=True):
            h = layer(h)
            channels = activation(h).movedim(2 if h.dim() == 3 else 1, 0).flatten(1)
            spread = channels.amax(1) - channels.amin(1)
            shares[name] = float((spread <= 1e-6).float().mean())
    return shares


def _check_labels(
    hidden: ModularNetwork,
    data: Dataset,
    kernel: Kernel,
    train: Callable[..., ModularNetwork],
    seed: int,
) -> LabelCheck:
    """Judge each half of the training images in features that were learned on the other half."""
    order = np.random.default_rng(seed).permutation(len(data.train_labels))
    halves = np.sort(order[::2]), np.sort(order[1::2])
    seen = np.empty(len(order), np.int64)
    for mine, others in (halves, halves[::-1]):
        learned = train(
            _fresh(hidden, range(len(hidden)), seed), range(len(hidden)), _part(data, others)
        )
        features, labels = extract(learned, _part(data, mine), "train", kernel=kernel)
        seen[mine] = (features @ anchors(features, labels).T).argmax(1).cpu().numpy()
    return LabelCheck(torch.tensor(data.train_labels), torch.from_numpy(seen), len(data.classes))


def _part(data: Dataset, index: np.ndarray[Any, np.dtype[np.int64]]) -> Dataset:
    return replace(
        data, train_images=data.train_images[index], train_labels=data.train_labels[index]
    )
