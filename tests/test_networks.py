"""The reference networks refuse when they are built what they could not run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modlib import networks
from modlib.data import Dataset
from modlib.experiments import compare

BUILD: dict[str, Callable[..., nn.Module]] = {
    "cnn": partial(networks.cnn, (4, 4, 4)),
    "cnn, stride 1": partial(networks.cnn, (4, 4, 4), stride=1),
    "resnet": partial(networks.resnet, (2, 2, 2), 1),
    "vgg8b": partial(networks.vgg8b, width=2),
    "vit": partial(networks.vit, 8, 1),
    "patch_cnn": partial(networks.patch_cnn, (4, 4), channels=3, patch=8, stride=4),
}


@pytest.mark.parametrize("name", BUILD)
def test_an_image_size_is_refused_when_the_network_is_built_or_it_runs(name: str) -> None:
    built = []
    for size in range(41):
        try:
            net = BUILD[name](size=size)
        except ValueError as error:
            assert "size=" in str(error)
            continue
        built.append(size)
        assert net(torch.zeros(2, 3, size, size)).shape == (2, 10)
    assert built and 32 in built and 0 not in built


@pytest.mark.parametrize("build", [networks.cnn, networks.resnet])
def test_advice_on_small_images_is_good(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(
        ValueError, match=r"size=8: .*×.* for kernel='relu-pool'; give larger images, or"
    ):
        build(size=8)
    assert build(size=32)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    for size in (1, 8):
        assert build(size=size, kernel="relu")(torch.zeros(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: networks.cnn(24), r"widths=24: give a list of whole numbers of at least 1"),
        (lambda: networks.cnn(()), r"widths=\(\): give a list"),
        (lambda: networks.cnn(size=32.0), "size=32.0: give a whole number of at least 1"),
        (lambda: networks.cnn(stride=0), "stride=0: give a whole number"),
        (lambda: networks.cnn(channels=0), "channels=0: give a whole number"),
        (lambda: networks.resnet(blocks=0), "blocks=0: give a whole number"),
        (lambda: networks.resnet((4, 0)), r"widths=\(4, 0\): give a list"),
        (lambda: networks.vgg8b(classes=-1), "classes=-1: give a whole number"),
        (lambda: networks.patch_cnn(stride=0), "stride=0: give a whole number"),
        (lambda: networks.vit(size=32.0), "size=32.0: give a whole number"),
        (lambda: networks.vit(depth=0), "depth=0: give a whole number"),
        (
            lambda: networks.mlp([64, 0, 10]),
            r"sizes=\[64, 0, 10\]: give a list of at least 2 whole",
        ),
        (lambda: networks.mlp([64]), r"sizes=\[64\]: give a list of at least 2 whole numbers"),
        (lambda: networks.mlp("ab"), "sizes='ab': give a list"),
        (lambda: networks.mlp([64, 8, 10], kernel="relu-pool"), "use kernel 'relu' there"),
    ],
)
def test_what_no_network_can_be_built_of_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def pictures(height: int, width: int) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (60, height, width, 1), np.uint8)
    labels = np.arange(60) % 10
    return Dataset("small", images, labels, images, labels)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (12, 8)])
def test_compare_refuses_images_that_its_network_cannot_take(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modlib.data.load", lambda *_: pictures(height, width))
    with pytest.raises(
        ValueError, match=r"data='small' holds images of .* square ones of at least 7"
    ):
        compare("small", progress=False)


@pytest.mark.parametrize("size", [7, 16])
def test_compare_takes_small_images_and_few_of_them(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modlib.data.load", lambda *_: pictures(size, size))
    assert len(compare("small", epochs=1, progress=False)) == 3


def test_a_residual_network_has_as_many_blocks_as_each_group_is_given() -> None:
    net = networks.resnet((4, 8), (1, 3), size=16, stride=2, seed=0)
    names = [name for name, _ in net.named_children()]
    assert names == ["stem", *(f"block{k}" for k in range(1, 5)), "features", "head"]
    assert net[:-2](torch.zeros(2, 3, 16, 16)).shape == (
        2,
        8,
        4,
        4,
    )  # halved by the stem and once more
    with pytest.raises(ValueError, match="give one number for each of the 2 groups"):
        networks.resnet((4, 8), (1, 2, 3))


def test_the_perceptrons_of_a_transformer_are_as_wide_as_asked() -> None:
    usual, wide = (networks.vit(8, 1, heads=2, hidden=hidden) for hidden in (None, 32))
    widths = [net.block1[1].branch[1].out_features for net in (usual, wide)]  # type: ignore[union-attr,index]
    assert widths == [16, 32]
