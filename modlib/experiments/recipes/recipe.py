"""What an experiment is made of: a network, where it is cut, how it is trained, and in which size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modlib import data as datasets
from modlib import networks
from modlib.data import Augment, Dataset
from modlib.data.catalogue import selected
from modlib.measure.angles import angles, angles_gone, errors
from modlib.methods import Method, Stage
from modlib.methods.synthetic_gradients import gradient_errors
from modlib.network import ModularNetwork, partition
from modlib.training import Schedule

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Profile:
    """The size of a run.

    Attributes:
        data: name of the data set.
        widths: of the network.
        epochs: of every module but an output module that is trained alone.
        output_epochs: of an output module that is trained alone, on stored features.
        stride: of the network's first convolution.
        n_train, n_test: class-balanced subsets; None takes all.
        size: resize images to this side; None leaves them.
        batch_size: images a step.
        channels_last: memory layout.
        precision: as in ``modlib.fit``.
        blocks: residual blocks in each group, where the recipe leaves them open.
        classes: how many of the data set's classes, drawn by the run's seed; None takes all.

    >>> small = Profile("digits", widths=(8, 8), epochs=1, n_train=100, n_test=50)
    >>> small.load(None)
    Dataset('digits', shape=(1, 8, 8), train=100, test=50, classes=10)
    """

    data: str
    widths: tuple[int, ...]
    epochs: int
    output_epochs: int = 1
    stride: int = 2
    n_train: int | None = None
    n_test: int | None = None
    size: int | None = None
    batch_size: int = 128
    channels_last: bool = True
    precision: str = "auto"
    blocks: tuple[int, ...] = ()
    classes: int | None = None

    def load(self, root: str | Path | None, seed: int = 0) -> Dataset:
        """The data set, or its subset; where there are fewer classes, the seed says which."""
        data = datasets.load(self.data, root, size=self.size)
        if self.classes is not None:
            order = np.random.default_rng(seed).permutation(len(data.classes))
            chosen = [data.classes[i] for i in order[: self.classes]]
            data = datasets.load(self.data, root, size=self.size, classes=chosen)
        if self.n_train is None and self.n_test is None:
            return data
        return data.subset(n_train=self.n_train, n_test=self.n_test)

    def stand_in(self, images: int = 64) -> Dataset:
        """A few images of noise in the data set's place; it need not be on this machine."""
        data = datasets.stand_in(self.data, images, size=self.size)
        return data if self.classes is None else selected(data, data.classes[: self.classes])


_SMOKE = Profile("digits", (8, 8, 16), 1, 1, n_train=512, n_test=256, size=32, batch_size=64)
CIFAR10 = {
    "smoke": _SMOKE,
    "cpu": Profile("cifar10", (24, 48, 96), 8, 8),
    "gpu": Profile("cifar10", (64, 128, 256), 60, 20, stride=1),
}
MNIST_CNN = {  # the convolutional network, on digits of 28 × 28
    "smoke": _SMOKE,
    "cpu": replace(CIFAR10["cpu"], data="mnist"),
    "gpu": replace(CIFAR10["gpu"], data="mnist"),
}
MNIST = {
    "smoke": Profile("digits", (32, 32, 32), 1, n_train=512, n_test=256, channels_last=False),
    "cpu": Profile("mnist", (240,) * 5, 10, channels_last=False),
    "gpu": Profile("mnist", (240,) * 7, 100, channels_last=False),
}
MNIST_HSIC = {  # five layers of 128 and batches of 512, as Ma et al. 2020
    "smoke": MNIST["smoke"],
    "cpu": Profile("mnist", (128,) * 5, 10, batch_size=512, channels_last=False),
    "gpu": Profile("mnist", (128,) * 5, 50, batch_size=512, channels_last=False),
}
MNIST_DNI = {  # hidden layers of 256 with batch norm, as Jaderberg et al. 2017
    "smoke": MNIST["smoke"],
    "cpu": Profile("mnist", (256,) * 3, 10, channels_last=False),
    "gpu": Profile("mnist", (256,) * 5, 100, channels_last=False),
}
MNIST_WIDE = {  # one wide hidden layer, for sweeps over all images at once
    "smoke": replace(MNIST["smoke"], widths=(32,)),
    "cpu": Profile("mnist", (1000,), 10, batch_size=5000, channels_last=False),
    "gpu": Profile("mnist", (1500,) * 3, 50, batch_size=5000, channels_last=False),
}


def cifar10_for(epochs: int) -> dict[str, Profile]:
    """The sizes of CIFAR-10 with so many epochs on a few cores, where 8 are usual."""
    return {**CIFAR10, "cpu": replace(CIFAR10["cpu"], epochs=epochs)}


@dataclass(frozen=True)
class Recipe:
    """A network, where it is cut, and how it is trained.

    Attributes:
        name: of the recipe and of its records.
        cut: first layers of the later modules; or a number of modules, balanced by activation
            memory; 0 makes every layer a module.
        method: makes the training method.
        note: the choices that matter (learning rates and the like), for the record.
        profiles: the sizes it comes in.
        build: makes the network from (profile, data, seed).
        output_apart: the output module is a stage of its own, on stored features.
        schedule: of the learning rates, as in ``modlib.fit``.
        flip_at_test: the record says as well how the network does when each image and its mirror image are
            averaged.
        watch: what to measure after every epoch, of (stage, network, batch), for the record's history.
        augment: as in ``modlib.fit``.

    >>> from modlib.methods import E2EBP
    >>> small = Profile("digits", widths=(8, 8, 16), epochs=1, n_train=100, n_test=50, size=32)
    >>> own = Recipe("own", cut=("conv3",), method=E2EBP, note={"lr": 0.1}, profiles={"smoke": small})
    >>> data = small.load(None)
    >>> own.network(small, data, seed=0, x=torch.zeros(2, *data.shape)).names[0]
    ('conv1', 'conv2')
    """

    name: str
    cut: tuple[str, ...] | int
    method: Callable[[], Method]
    note: Mapping[str, Any]
    profiles: Mapping[str, Profile] = field(default_factory=lambda: CIFAR10)
    build: Callable[[Profile, Dataset, int], nn.Module] = field(default_factory=lambda: trunk)
    output_apart: bool = False
    schedule: str | Schedule = "one-cycle"
    flip_at_test: bool = False
    watch: Callable[[Stage, ModularNetwork, Batch], dict[str, Any]] | None = None
    augment: Augment | str | None = "auto"

    def network(self, profile: Profile, data: Dataset, seed: int, x: Tensor) -> ModularNetwork:
        """The network, cut; x is a batch to balance the cut on."""
        net = self.build(profile, data, seed)
        if isinstance(self.cut, tuple):
            return partition(net, self.cut)
        return partition(net, self.cut or len(list(net.children())), sample=x)

    def epochs(self, profile: Profile, modules: int) -> int | tuple[int, ...]:
        """Epochs of every stage."""
        if self.output_apart:
            return (*[profile.epochs] * (modules - 1), profile.output_epochs)
        return profile.epochs

    def settings(self) -> dict[str, Any]:
        """What the record says of the recipe."""
        return {"cut": self.cut, **self.note}


def watch_angles(stage: Stage, net: ModularNetwork, batch: Batch) -> dict[str, Any]:
    """Each module's angle to the gradient, in degrees."""
    return {"angles": [a if a is None else round(a, 3) for a in angles(stage, net, batch)]}


def watch_synthetic(stage: Stage, net: ModularNetwork, batch: Batch) -> dict[str, Any]:
    """The angles, and the relative errors of synthetic gradients and of the updates made from them."""
    synthetic: list[float | None] = [*gradient_errors(stage, net, batch)]
    found = {"gradient_errors": synthetic, "update_errors": errors(stage, net, batch)}
    return watch_angles(stage, net, batch) | {
        key: [e if e is None else round(e, 4) for e in values] for key, values in found.items()
    }


def trunk(
    profile: Profile,
    data: Dataset,
    seed: int,
    boundary: str = "before",
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    """The convolutional network of the CIFAR-10 recipes; its layers end before or after their activation."""
    channels, size, _ = data.shape
    return networks.cnn(
        profile.widths,
        len(data.classes),
        channels=channels,
        size=size,
        stride=profile.stride,
        boundary=boundary,
        activation=activation,
        seed=seed,
    )


def watch_sweep(stage: Stage, net: ModularNetwork, batch: Batch) -> dict[str, Any]:
    """Of the sweep just made: each module's angle to the gradient, in degrees, and its residuals, if any."""
    went = [a if a is None else round(a, 3) for a in angles_gone(net, batch)]
    residuals = getattr(stage, "residuals", None)
    return {"angles": went, **({"residuals": residuals} if residuals else {})}


def dense(profile: Profile, data: Dataset, seed: int, **options: Any) -> nn.Module:
    """Fully connected layers; options are those of ``networks.mlp``."""
    pixels = torch.Size(data.shape).numel()
    return networks.mlp([pixels, *profile.widths, len(data.classes)], seed=seed, **options)


tanh_mlp = partial(dense, activation=nn.Tanh, boundary="after")  # as target propagation wants them
norm_mlp = partial(dense, boundary="after", norm=True)  # as the HSIC bottleneck does
wide_mlp = partial(dense, boundary="after")
wide_before = dense  # codes are what linear layers give
wide_tanh = partial(dense, activation=nn.Tanh)  # and smooth: the limit theorem of MAC holds


# --- networks of the papers -----------------------------------------------------------------------

VGG8B = {  # batches and epochs of Nøkland & Eidnes 2019
    "smoke": replace(_SMOKE, widths=(4,)),
    "gpu": Profile("cifar10", (128,), 400),
}
_SMALL = replace(_SMOKE, size=16, n_train=64, n_test=32, batch_size=32, stride=1)
RESNET = {  # of Wang et al. 2021
    "smoke": replace(_SMALL, widths=(2, 2, 4)),
    "gpu": Profile("cifar10", (16, 32, 64), 160, stride=1, batch_size=1024),
}


def vgg8b(slope: float, profile: Profile, data: Dataset, seed: int) -> nn.Module:
    """The network of the local error signals; slope of its leaky ReLU."""
    channels, size, _ = data.shape
    (width,) = profile.widths
    return networks.vgg8b(
        len(data.classes), width=width, channels=channels, size=size, slope=slope, seed=seed
    )


def resnet(
    profile: Profile, data: Dataset, seed: int, boundary: str = "after", blocks: int | None = None
) -> nn.Module:
    """A residual network, whose modules end after their ReLU as published, or before it."""
    channels, size, _ = data.shape
    return networks.resnet(
        profile.widths,
        blocks or profile.blocks,
        len(data.classes),
        channels=channels,
        size=size,
        stride=profile.stride,
        boundary=boundary,
        seed=seed,
    )


def steps(factor: float, *milestones: float) -> Schedule:
    """A schedule that multiplies the rates by a factor at each milestone of progress in [0, 1).

    >>> [steps(0.25, 0.5, 0.75)(progress) for progress in (0.0, 0.6, 0.8)]
    [1.0, 0.25, 0.0625]
    """
    return lambda progress: factor ** sum(progress >= milestone for milestone in milestones)
