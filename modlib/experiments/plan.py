"""What a run would take, before its data are there: ``modlib run RECIPE --profile gpu --dry-run``.

The network, its modules, objectives and optimisers are built as for the run, on images of noise in the data
set's shape, and take two real steps here, of four images and of six. Parameters and operations are counted;
what autograd holds is a line through the two steps, drawn on to the profile's batch. Time is operations over
an assumed rate: an estimate, and printed as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modlib.data import Augment, Dataset, counts, default_augment
from modlib.data.augment import Windows
from modlib.device import autocast
from modlib.experiments.recipes.recipe import Profile, Recipe
from modlib.experiments.run import found
from modlib.measure.costs import operations
from modlib.measure.memory import SavedBytes
from modlib.methods import Stage
from modlib.methods.method import Batches, OneBatch

# Operations a second, a multiply-add counted as two. GPUs: a fifth of their peak in half precision, an
# assumption. One core: what a step of the CIFAR-10 recipes reached on the processor of the book's records.
GPUS = {"a T4, as Colab has": 0.2 * 65e12, "an A100": 0.2 * 312e12, "an H100": 0.2 * 989e12}
CORE = {
    "float32": {"one core": 5e10},
    "bfloat16": {"one core that has bfloat16 in hardware": 1.5e11},
}
_LABELS = (
    0,
    0,
    1,
    1,
    0,
    1,
)  # pairs of the same and of different classes in the first four, and in all


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        recipe, profile, data: names.
        shape, classes, train, test: of the data: an image's (C, H, W), and numbers.
        epochs: of every stage.
        batch_size: images a step.
        modules: of the network.
        parameters: of the network.
        auxiliary: parameters that serve training alone.
        step_operations: of a step, for one image, in each stage.
        operations: of the whole run, in steps and in the evaluation after each epoch.
        state_bytes: weights, gradients and what optimisers keep.
        saved_bytes: what autograd holds at most in a step, by the line through two small ones.
        data_bytes: of the training images, padded and mirrored as the loader holds them.
        seconds: by device, at an assumed rate.
    """

    recipe: str
    profile: str
    data: str
    shape: tuple[int, ...]
    classes: int
    train: int
    test: int
    epochs: tuple[int, ...]
    batch_size: int
    modules: int
    parameters: int
    auxiliary: int
    step_operations: tuple[int, ...]
    operations: int
    state_bytes: int
    saved_bytes: int
    data_bytes: int
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        sides = "×".join(map(str, self.shape))
        epochs = " + ".join(map(str, self.epochs))
        steps = " + ".join(_large(n) for n in self.step_operations)
        times = "; ".join(f"{_duration(s)} on {where}" for where, s in self.seconds.items())
        command = f"modlib run {self.recipe} --profile {self.profile} --seed 0 --resume"
        drive = "/content/drive/MyDrive/modlib"
        lines = {
            "data": f"{self.data}: {self.train:,} training and {self.test:,} test images of {sides}, "
            f"{self.classes} classes",
            "network": f"{self.parameters:,} parameters in {self.modules} modules, and "
            f"{self.auxiliary:,} more that serve training alone",
            "steps": f"{epochs} epochs of {self.train // self.batch_size:,} steps with {self.batch_size} images",
            "operations": f"{steps} an image and step; {_large(self.operations)} in all",
            "memory": f"{_bytes(self.state_bytes)} for weights, gradients and optimisers; "
            f"{_bytes(self.saved_bytes)} that autograd holds (estimate); {_bytes(self.data_bytes)} of images, "
            "held on the device if they take no more than half of what is free, else read a batch ahead",
            "time": f"{times} (estimates, at a fifth of a GPU's peak)"
            if self.profile == "gpu"
            else f"{times} (an estimate)",
            "prepare": f"modlib data {self.data}",
            "run": command,
            "on Colab": f"!python -m {command} --results {drive}/results --runs {drive}/runs",
        }
        title = f"{self.recipe}, profile {self.profile}: nothing has been read or written."
        return "\n".join([title, *(f"  {name:<12}{text}" for name, text in lines.items())])


def plan(recipe: str | Recipe, profile: str = "gpu") -> Plan:
    """Build what a recipe trains, at its real size, and say what the run would take.

    Args:
        recipe, profile: as in ``run``.

    Raises:
        ValueError: the recipe or profile is unknown.
    """
    recipe, settings = found(recipe, profile)
    data = settings.stand_in()
    x = torch.from_numpy(np.array(data.train_images[:6])).permute(0, 3, 1, 2) / 127.5 - 1
    y = torch.tensor(_LABELS)
    net = recipe.network(settings, data, 0, x)
    method = recipe.method()
    stages = method.stages(net, x)
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if profile == "gpu" else "float32"
    for stage in stages:
        stage.autocast = autocast(x.device, precision)
    with torch.no_grad():
        forward = operations(lambda: net(x)) // len(x)
    steps = [_steps(stage, x, y) for stage in stages]
    train, test = _images(settings)
    lengths = recipe.epochs(settings, len(net))
    epochs = (lengths,) * len(stages) if isinstance(lengths, int) else tuple(lengths)
    batch_size = min(settings.batch_size, train)
    total = sum(train * (s.once + e * s.operations) for e, s in zip(epochs, steps, strict=True))
    total += sum(
        e * test * forward for e, stage in zip(epochs, stages, strict=True) if stage.complete
    )
    network = sum(p.numel() for p in net.parameters())
    trained = {id(p): p for stage in stages for p in _trained(stage)}
    own = {id(p) for p in net.parameters()}
    rates = GPUS if profile == "gpu" else CORE[precision]
    return Plan(
        recipe.name,
        profile,
        settings.data,
        data.shape,
        len(data.classes),
        train,
        test,
        epochs,
        batch_size,
        len(net),
        network,
        sum(p.numel() for key, p in trained.items() if key not in own),
        tuple(s.operations for s in steps),
        total,
        4 * network + max(s.state for s in steps),
        max(s.saved(batch_size) for s in steps),
        _data_bytes(recipe, data, train),
        {where: total / rate for where, rate in rates.items()},
    )


@dataclass(frozen=True)
class _Steps:
    """What two steps of a stage took.

    Attributes:
        operations: of a step, for one image.
        once: before the first step, for one image, where the features of frozen modules are stored.
        held: bytes that autograd held, of four images and of six.
        state: bytes beside the network's weights: gradients, auxiliary weights, what the optimiser keeps.
    """

    operations: int
    once: int
    held: tuple[int, int]
    state: int

    def saved(self, images: int) -> int:
        slope = (self.held[1] - self.held[0]) // 2
        return self.held[0] + slope * (images - 4)


def _steps(stage: Stage, x: Tensor, y: Tensor) -> _Steps:
    counted, once, held, frozen = 0, 0, [], stage.frozen
    weights = [p for module in (*stage.frozen, *stage.modules) for p in module.parameters()]
    for images in (4, 6):
        stage.frozen = [*frozen]  # a stage that stored features has none left to run
        some = OneBatch(
            (x[:images].clone(), y[:images].clone()), random=True
        )  # a view holds all of x
        made: list[Batches] = []
        once = operations(lambda b=some, m=made: m.append(stage.batches(b, 0))) // images  # type: ignore[misc]
        stage.train()
        batch = next(made[0].epoch(0, 0))
        with SavedBytes([*weights, *_trained(stage)]) as memory:
            counted = operations(lambda b=batch: stage.step(*b)) // images  # type: ignore[misc]
        held.append(memory.peak)
    kept = [t for o in stage.optimizers for state in o.state.values() for t in state.values()]
    state = sum(t.nbytes for t in kept if isinstance(t, Tensor))
    trained = sum(p.nbytes for p in _trained(stage))
    own = sum(p.nbytes for module in stage.modules for p in module.parameters())
    state += trained + max(0, trained - own)
    return _Steps(counted, once, (held[0], held[1]), state)


def _trained(stage: Stage) -> list[Any]:
    return [p for o in stage.optimizers for group in o.param_groups for p in group["params"]]


def _images(settings: Profile) -> tuple[int, int]:
    train, test = counts(settings.data)
    return settings.n_train or train, settings.n_test or test


def _data_bytes(recipe: Recipe, data: Dataset, train: int) -> int:
    wanted = default_augment(data) if recipe.augment == "auto" else recipe.augment
    augment = wanted if isinstance(wanted, Augment) else Augment(pad=0, flip=False)
    images = np.broadcast_to(np.uint8(0), (train, *data.train_images.shape[1:]))
    return Windows.bytes_needed(images, augment.copied)


def _scaled(number: float, units: Sequence[str], step: float) -> str:
    power = max(p for p in range(len(units)) if p == 0 or number >= step**p)
    return f"{number / step**power:.3g} {units[power]}"


def _large(number: int) -> str:
    return _scaled(number, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"), 1000)


def _bytes(number: int) -> str:
    return _scaled(number, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.2g} minutes" if seconds < 5400 else f"{seconds / 3600:.2g} hours"
