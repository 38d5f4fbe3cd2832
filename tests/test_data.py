"""Data sets, caches, folder trees and the loader.

Nothing here touches the network. Tests on real images skip where $MODLIB_DATA does not have them.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat
from torchvision import transforms
from torchvision.transforms import functional as vision

import modlib
import modlib.data
from modlib import cli
from modlib.data import (
    Augment,
    Dataset,
    Loader,
    default_augment,
    distortion,
    explain,
    load,
    prepare,
    sources,
    subsets,
    trees,
)
from modlib.data import augment as augment_file
from modlib.data import loader as loader_file
from modlib.data import memory as memory_file
from modlib.data.augment import Windows, cutout_mask, pad_images, spans, spans_by_index
from modlib.data.cache import PARTS, read, root_folder, scratch, write, writing
from modlib.data.dataset import statistics
from modlib.data.distortion import Distortion, draw_boxes, resized_crops
from modlib.data.memory import ahead
from modlib.data.pictures import decode
from modlib.data.stratified import lonely, stratified_batches

# --------------------------------------------------------------------------- what tests use


def pictures(n: int, side: int = 12, channels: int = 3, seed: int = 0) -> Any:
    """Random images, no two alike."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, side, side, channels), np.uint8)


def made(n: int = 60, side: int = 12, channels: int = 3, classes: int = 4) -> Dataset:
    """A small data set of random images."""
    labels = np.arange(n) % classes
    test = pictures(n // 2, side, channels, seed=1)
    return Dataset("made", pictures(n, side, channels), labels, test, labels[: n // 2])


def epoch(loader: Loader, seed: int = 0, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """All batches of an epoch as one."""
    x, y = zip(*loader.epoch(seed, number), strict=True)
    return torch.cat(x), torch.cat(y)


def raw(x: torch.Tensor, data: Dataset) -> torch.Tensor:
    """Undo the normalisation: uint8 (B, C, H, W)."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    return ((x * std + mean) * 255).round().to(torch.uint8)


def real(name: str) -> Path:
    """Folder of a real data set; skips where it is absent."""
    root = os.environ.get("MODLIB_DATA")
    if not root:
        pytest.skip(f"MODLIB_DATA is not set: {name} is not here")
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which has to be one line that ends like a sentence."""
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    return message


# --------------------------------------------------------------------------- data sets


@pytest.mark.parametrize("name", ["digits", "spirals", "moons", "rings"])
def test_embedded_sets_are_whole_balanced_and_always_the_same(name: str) -> None:
    first, again = load(name), load(name)
    assert np.array_equal(first.train_images, again.train_images)
    assert np.array_equal(first.test_labels, again.test_labels)
    counts = np.bincount(first.test_labels)
    assert len(counts) == len(first.classes) and counts.max() - counts.min() <= 1


def test_digits_are_the_ones_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    digits, bunch = load("digits"), load_digits()
    ours = np.concatenate([digits.train_images, digits.test_images])[..., 0]
    theirs = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    assert sorted(i.tobytes() for i in ours) == sorted(i.tobytes() for i in theirs)
    label = {i.tobytes(): int(t) for i, t in zip(theirs, bunch.target, strict=True)}
    where = zip(digits.test_images[..., 0], digits.test_labels, strict=True)
    assert all(label[image.tobytes()] == y for image, y in where)


def test_digits_in_the_shape_of_cifar() -> None:
    small, large = load("digits"), load("digits", size=32)
    assert large.shape == (3, 32, 32) and large.train_images.dtype == np.uint8
    assert np.array_equal(large.train_labels, small.train_labels)
    assert np.ptp(large.train_images.astype(int), axis=-1).max() == 0  # grey in three channels
    shrunk = large.train_images[..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4))
    assert np.corrcoef(shrunk.ravel(), small.train_images.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("shape", [(70_000, 1, 1, 2), (37, 5, 6, 3), (50, 7)])
def test_statistics_are_exact(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    if len(shape) == 4:
        images = rng.integers(250, 256, shape, np.uint8)
        scaled = images / 255.0
        axes: tuple[int, ...] = (0, 1, 2)
    else:
        images, axes = rng.normal(3, 2, shape).astype(np.float32), (0,)
        scaled = images.astype(np.float64)
    mean, std = statistics(images)
    assert np.allclose(mean, scaled.mean(axes), rtol=1e-12)
    assert np.allclose(std, scaled.std(axes), rtol=1e-9)


def test_subset_is_balanced_seeded_and_leaves_the_normalisation_alone() -> None:
    data = load("digits")
    small = data.subset(n_train=200, n_test=33, seed=1)
    assert np.bincount(small.train_labels).tolist() == [20] * 10
    assert sorted(np.bincount(small.test_labels)) == [3] * 7 + [4] * 3
    assert (small.mean, small.std) == (data.mean, data.std)
    assert np.array_equal(small.train_images, data.subset(200, seed=1).train_images)
    assert not np.array_equal(small.train_images, data.subset(200, seed=2).train_images)
    assert len(np.unique(small.train_images.reshape(200, -1), axis=0)) == 200
    assert data.subset(n_test=5).train_images is data.train_images


def test_subset_takes_what_there_is_of_a_rare_class() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 50)
    data = Dataset("rare", pictures(103), labels, pictures(3), np.array([0, 1, 2]))
    assert np.bincount(data.subset(n_train=23).train_labels).tolist() == [10, 3, 10]
    assert np.bincount(data.subset(n_train=103).train_labels).tolist() == [50, 3, 50]
    assert len(set(data.subset(n_train=23).train_labels[:8].tolist())) > 1  # mixed, unlike these


def test_subset_labels_belong_to_their_images() -> None:
    data = made()
    known = {i.tobytes(): int(t) for i, t in zip(data.train_images, data.train_labels, strict=True)}
    small = data.subset(n_train=17)
    pairs = zip(small.train_images, small.train_labels, strict=True)
    assert all(known[image.tobytes()] == label for image, label in pairs)


@pytest.mark.parametrize("n", [0, -1, 1438])
def test_subset_refuses_what_there_is_not(n: int) -> None:
    with pytest.raises(ValueError, match=f"n_train is {n} but digits has 1437") as error:
        load("digits").subset(n_train=n)
    one_sentence(error)


def bad_labels(data: dict[str, Any]) -> None:
    data["train_labels"] = data["train_labels"] + 1


def negative_labels(data: dict[str, Any]) -> None:
    data["test_labels"] = data["test_labels"] - 1


def float_labels(data: dict[str, Any]) -> None:
    data["train_labels"] = data["train_labels"].astype(np.float32)


def flat_labels(data: dict[str, Any]) -> None:
    data["train_labels"] = data["train_labels"][:, None]


def too_few_labels(data: dict[str, Any]) -> None:
    data["test_labels"] = data["test_labels"][1:]


def float_images(data: dict[str, Any]) -> None:
    data["train_images"] = data["train_images"] / 255


def other_size(data: dict[str, Any]) -> None:
    data["test_images"] = data["test_images"][:, 1:]


def no_images(data: dict[str, Any]) -> None:
    data["test_images"], data["test_labels"] = data["test_images"][:0], data["test_labels"][:0]


def not_a_number(data: dict[str, Any]) -> None:
    data["train_images"] = np.full((60, 2), np.nan, np.float32)


def negative_tokens(data: dict[str, Any]) -> None:
    data["train_images"] = np.full((60, 5), -1)


def targets(data: dict[str, Any]) -> None:
    data["test_labels"] = np.linspace(0, 1, 30)


def counted_from_one(data: dict[str, Any]) -> None:
    data["train_labels"], data["test_labels"] = data["train_labels"] + 1, data["test_labels"] + 1
    data["classes"] = ()


def with_a_gap(data: dict[str, Any]) -> None:
    data["train_labels"], data["test_labels"] = data["train_labels"] * 10, data["test_labels"] * 0
    data["classes"] = ()


def tensors(data: dict[str, Any]) -> None:
    data["train_images"] = torch.from_numpy(data["train_images"])


def short_mean(data: dict[str, Any]) -> None:
    data["mean"] = (0.5,)


def mean_not_a_number(data: dict[str, Any]) -> None:
    data["mean"] = (0.5, float("nan"), 0.5)


def zero_std(data: dict[str, Any]) -> None:
    data["std"] = (0.5, 0.0, 0.5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (bad_labels, "train_labels run from 1 to 4 but there are 4 classes"),
        (negative_labels, "test_labels run from -1 to 2"),
        (float_labels, "train_labels is float32"),
        (flat_labels, r"train_labels has shape \(60, 1\)"),
        (too_few_labels, "test_images has 30 rows but test_labels has 29"),
        (float_images, "train_images is float64 of shape"),
        (other_size, r"test_images are \(11, 12, 3\)"),
        (no_images, "test_images is empty"),
        (not_a_number, "train_images holds NaN or infinity"),
        (tensors, "train_images is a Tensor"),
        (negative_tokens, "train_images holds token -1; number tokens 0 and up"),
        (targets, "test_labels is float64; .*classification only"),
        (counted_from_one, "labels run from 1 to 4 and class 0 has no image"),
        (with_a_gap, "labels run from 0 to 30 and class 1 has no image.* name all 31 in classes"),
        (short_mean, "mean and std need 3 numbers"),
        (zero_std, "finite, std above 0"),
        (mean_not_a_number, "finite, std above 0"),
    ],
)
def test_a_wrong_array_is_named(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    data = made()
    fields = {part: getattr(data, part) for part in (*PARTS, "classes", "mean", "std")}
    spoil(fields)
    with pytest.raises((TypeError, ValueError), match=message) as error:
        Dataset("made", **fields)
    assert one_sentence(error).startswith("made: ")


def test_a_class_without_images_may_be_named() -> None:
    data = made()
    parts = [getattr(data, part) for part in PARTS]
    parts[1], parts[3] = parts[1] + 1, parts[3] + 1
    named = Dataset("made", *parts, classes=("background", *"abcd"))
    assert len(named.classes) == 5
    only_tested = Dataset("made", parts[0], parts[1] % 4, parts[2], np.arange(30) % 5)
    assert len(only_tested.classes) == 5


# --------------------------------------------------------------------------- tokens


def tokens(n: int = 60, length: int = 5, dtype: type = np.int64) -> Dataset:
    """Rows of tokens 0..9, no two alike, whose class is their first token."""
    grid = np.stack(np.meshgrid(*[np.arange(10)] * length), -1).reshape(-1, length)
    rows = np.random.default_rng(0).permutation(grid[grid[:, 0] < 3]).astype(dtype)
    labels = rows[:, 0].astype(np.int64)
    return Dataset("words", rows[:n], labels[:n], rows[n : 2 * n], labels[n : 2 * n])


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("memory", ["device", "map"])
def test_tokens_come_as_they_are(dtype: type, memory: Any) -> None:
    data = tokens(dtype=dtype)
    assert data.is_tokens and not data.is_vector and data.shape == (5,)
    assert data.train_images.dtype == np.int64 and (data.mean, data.std) == ((), ())
    assert repr(data) == "Dataset('words', shape=(5,), train=60, test=60, classes=3)"
    assert default_augment(data) is False
    loader = Loader(data, batch_size=12, augment=True, memory=memory, channels_last=True)
    x, y = epoch(loader)
    assert x.dtype == torch.int64 and x.shape == (60, 5) and torch.equal(x[:, 0], y)
    assert sorted(x.tolist()) == sorted(data.train_images.tolist())
    first = Loader(data, "test", shuffle=False, memory=memory).sample(4)[0]
    assert np.array_equal(first.numpy(), data.test_images[:4])
    x, y = epoch(Loader(data, batch_size=12, sampler="stratified", memory=memory))
    assert torch.equal(x[:, 0], y)


def test_tokens_are_prepared_and_split_as_images_are(tmp_path: Path) -> None:
    data = tokens()
    write(tmp_path / "words", {part: getattr(data, part) for part in PARTS}, list("abc"))
    again = load("words", tmp_path)
    assert again.is_tokens and again.train_images.tolist() == data.train_images.tolist()
    assert load("words", tmp_path, classes=["b"]).train_images[:, 0].tolist() == [1] * sum(
        data.train_labels == 1
    )
    small = data.subset(n_train=9)
    assert small.train_images[:, 0].tolist() == small.train_labels.tolist()


def test_tokens_are_neither_augmented_nor_resized_nor_normalised(tmp_path: Path) -> None:
    data = tokens()
    with pytest.raises(ValueError, match="words holds tokens; leave augment out"):
        Loader(data, augment=Augment())
    with pytest.raises(ValueError, match="mean and std need 0 numbers"):
        Dataset("words", *(getattr(data, part) for part in PARTS), mean=(0.5,), std=(1.0,))
    write(tmp_path / "words", {part: getattr(data, part) for part in PARTS}, list("abc"))
    with pytest.raises(ValueError, match="words holds no images; leave size out"):
        load("words", tmp_path, size=8)


def test_a_network_trains_on_tokens() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(10, 16), torch.nn.Flatten(), torch.nn.Linear(80, 3)]
    net = modlib.partition(torch.nn.Sequential(*layers), modules=1)
    data = tokens(n=600)
    history = modlib.fit(net, modlib.methods.E2EBP(), data, epochs=6, progress=False)
    assert history.final["test_accuracy"] > 0.9
    assert modlib.extract(net, data)[0].shape == (600, 3)


# --------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize("pad", [1, 4, 11])
def test_padding_is_that_of_torchvision(mode: str, pad: int) -> None:
    images = torch.from_numpy(pictures(3, side=12))
    kind = "constant" if mode == "zeros" else "reflect"
    expected = vision.pad(images.permute(0, 3, 1, 2), pad, padding_mode=kind).permute(0, 2, 3, 1)
    assert torch.equal(pad_images(images, pad, mode), expected)


@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (3, False), (3, True)])
def test_crop_and_flip_are_those_of_torchvision_image_by_image(
    planar: bool, mode: Any, pad: int, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment_file, "_BLOCK_BYTES", 4000)  # several blocks, the last not full
    images = pictures(10, side=9)
    windows = Windows(images, Augment(pad, flip, mode=mode), torch.device("cpu"), planar)
    rng = np.random.default_rng(0)
    index = rng.permutation(10)
    flips = rng.integers(0, 1 + flip, 10)
    row, column = rng.integers(0, 2 * pad + 1, (2, 10))
    row[:2], column[:2] = (0, 2 * pad), (2 * pad, 2 * pad)  # the corners as well
    crops = windows.crops(windows.starts(index, flips, row, column))
    crops = crops if planar else crops.permute(0, 3, 1, 2)
    for crop, i, mirrored, r, c in zip(crops, index, flips, row, column, strict=True):
        image = torch.from_numpy(images[i]).permute(2, 0, 1)
        image = vision.hflip(image) if mirrored else image
        padded = vision.pad(image, pad, padding_mode="constant" if mode == "zeros" else mode)
        assert torch.equal(crop, vision.crop(padded, int(r), int(c), 9, 9))


def test_both_ways_to_gather_agree() -> None:
    flat = torch.randint(0, 256, (500,), dtype=torch.uint8)
    starts = torch.tensor([0, 499 - 40, 460, 17, 17])
    assert torch.equal(spans(flat, starts, 40), spans_by_index(flat, starts, 40))


def test_bytes_needed_is_what_is_used() -> None:
    images, augment = pictures(10, side=9), Augment(pad=2)
    windows = Windows(images, augment, torch.device("cpu"), planar=True)
    needed = Windows.bytes_needed(images, augment)
    assert needed == 2 * 10 * 13 * 13 * 3 and needed <= len(windows._flat) < 1.1 * needed


@pytest.mark.parametrize("channels_last", [False, True])
def test_loader_delivers_every_crop_and_flip_and_nothing_else(channels_last: bool) -> None:
    one = pictures(1, side=6)  # so that all that can come out can be listed
    same, labels = np.repeat(one, 4000, 0), np.zeros(4000, np.int64)
    data = Dataset("one", same, labels, one, labels[:1])
    loader = Loader(data, augment=Augment(pad=1), channels_last=channels_last, batch_size=1000)
    x, _ = epoch(loader)
    seen, counts = torch.unique(raw(x, data), dim=0, return_counts=True)
    image = torch.from_numpy(data.train_images[0]).permute(2, 0, 1)
    possible = torch.stack(
        [
            vision.crop(vision.pad(side, 1, padding_mode="reflect"), r, c, 6, 6)
            for side in (image, vision.hflip(image))
            for r in range(3)
            for c in range(3)
        ]
    )
    assert torch.equal(seen, torch.unique(possible, dim=0))
    # 18 outcomes with 4000/18 = 222 each and a standard deviation of 14.5: five of them.
    assert len(counts) == 18 and (counts - 4000 / 18).abs().max() < 73


@pytest.mark.parametrize("channels_last", [False, True])
def test_cutout_against_a_loop(channels_last: bool) -> None:
    data = made(n=40)
    plain = Loader(data, batch_size=40, shuffle=False, channels_last=channels_last)
    cut = Loader(
        data,
        batch_size=40,
        shuffle=False,
        channels_last=channels_last,
        augment=Augment(0, False, cutout=5),
    )
    (x, _), (z, _) = epoch(plain), epoch(cut)
    centres = set()
    for before, after in zip(x, z, strict=True):
        gone = (after == 0).all(0)
        rows, columns = (torch.nonzero(gone.any(d)).flatten().tolist() for d in (1, 0))
        # A rectangle, no larger than 5x5, full size unless it touches the border.
        assert gone.sum() == len(rows) * len(columns)
        for line in (rows, columns):
            assert len(line) == 5 or (3 <= len(line) < 5 and (line[0] == 0 or line[-1] == 11))
        assert torch.equal(after[:, ~gone], before[:, ~gone])
        centres.add((rows[0], columns[0]))
    assert len(centres) > 20


def test_cutout_mask_is_clipped_at_the_border() -> None:
    mask = cutout_mask(torch.tensor([0, 3]), torch.tensor([3, 1]), 3, 4, 4)
    assert mask[0].int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0] * 4, [0] * 4]
    assert mask[1].int().tolist() == [[0] * 4, [0] * 4, [1, 1, 1, 0], [1, 1, 1, 0]]


def test_default_augment() -> None:
    assert default_augment(load("digits", size=32)) == Augment(pad=4, flip=False)
    assert default_augment(made(side=32)) == Augment(pad=4, flip=True)
    assert default_augment(load("moons")) is False
    assert default_augment(load("digits")) is False  # 8 x 8: too small to shift
    renamed = Dataset("mnist", *(getattr(made(side=28), part) for part in PARTS))
    assert default_augment(renamed) == Augment(pad=3, flip=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pad": -1}, "pad is -1"),
        ({"cutout": -2}, "cutout is -2"),
        ({"mode": "edge"}, "mode is 'edge'"),
        ({"scale": (0.5, 1)}, r"pad is 4 and scale is \(0.5, 1\), but only one of them can crop"),
        ({"pad": 0, "scale": (0, 1)}, r"scale is \(0, 1\)"),
        ({"pad": 0, "scale": (0.5, 1.5)}, r"scale is \(0.5, 1.5\)"),
        ({"pad": 0, "scale": (0.5, 0.1)}, r"scale is \(0.5, 0.1\)"),
        ({"ratio": (2, 1)}, r"ratio is \(2, 1\)"),
        ({"brightness": -0.1}, "brightness is -0.1; give a number of 0 or more"),
        ({"contrast": float("nan")}, "contrast is nan"),
        ({"saturation": float("inf")}, "saturation is inf"),
        ({"hue": 0.6}, "hue is 0.6; give a number from 0 to 0.5"),
    ],
)
def test_augment_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Augment(**wrong)
    one_sentence(error)


# --------------------------------------------------------------------------- resized crops and colours


@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 16)])
def test_resized_crops_are_those_of_torchvision_image_by_image(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(0, 255, (40, 3, height, width)).astype(np.float32))
    boxes = np.stack(draw_boxes(rng, 40, height, width, (0.02, 1), (0.5, 2)))
    boxes[:, 0] = 0, 0, height, width  # the whole image, and a single pixel of a corner
    boxes[:, 1] = height - 1, width - 1, 1, 1
    flip = rng.integers(0, 2, 40)
    out = resized_crops(x, torch.from_numpy(np.stack([*boxes, flip])).float())
    for image, crop, box, mirrored in zip(x, out, boxes.T.tolist(), flip, strict=True):
        crop = vision.hflip(crop) if mirrored else crop
        size = [height, width]
        for antialias in (False, True):  # no crop is scaled down: it makes no difference
            expected = vision.resized_crop(image, *box, size, antialias=antialias)
            assert torch.allclose(crop, expected, atol=2e-3)
    assert torch.allclose(out[1], x[1, :, -1:, -1:].expand(3, height, width), atol=1e-3)


def test_boxes_are_drawn_as_they_should_be() -> None:
    n, side = 20_000, 200
    rng = np.random.default_rng(0)
    top, left, high, wide = draw_boxes(rng, n, side, side, (0.08, 1), (3 / 4, 4 / 3))
    assert top.min() == left.min() == 0 and (top + high).max() == (left + wide).max() == side
    assert high.min() > 0 and wide.min() > 0
    whole = (high == side) & (wide == side)
    share, aspect = (high * wide)[~whole] / side**2, np.log(wide / high)[~whole]
    assert share.min() > 0.075 and share.max() <= 1
    assert aspect.min() > np.log(3 / 4) - 0.03 and aspect.max() < np.log(4 / 3) + 0.03
    # Where every ratio fits, the share is uniform: 9 in 67 of it lies below 0.08 + 0.09.
    small = draw_boxes(rng, n, side, side, (0.08, 0.75), (3 / 4, 4 / 3))
    below = ((small[2] * small[3]) < 0.17 * side**2).mean()
    assert abs(below - 9 / 67) < 5 * np.sqrt(9 / 67 / n)
    assert abs(np.log(small[3] / small[2]).mean()) < 0.01
    theirs = [
        transforms.RandomResizedCrop.get_params(
            torch.empty(3, side, side), [0.08, 1], [3 / 4, 4 / 3]
        )
        for _ in range(2000)
    ]
    assert abs(np.mean([h * w for *_, h, w in theirs]) - np.mean(high * wide)) < 0.03 * side**2


def test_where_no_box_fits_the_largest_in_the_middle_is_taken() -> None:
    rng = np.random.default_rng(0)
    for size, ratio, expected in [
        ((8, 8), (2.0, 2.0), [2, 0, 4, 8]),
        ((8, 8), (0.5, 0.5), [0, 2, 8, 4]),
        ((6, 12), (1.0, 1.0), [0, 3, 6, 6]),
    ]:
        boxes = draw_boxes(rng, 3, *size, (1, 1), ratio)
        assert [sides.tolist() for sides in boxes] == [[side] * 3 for side in expected]


def colours(n: int = 30) -> Any:
    """Values 0..255, among them grey, black and white pixels and ties of the largest."""
    x = np.random.default_rng(0).uniform(0, 255, (n, 3, 6, 6)).astype(np.float32)
    x[:, :, 0, 0], x[:, :, 0, 1], x[:, :, 0, 2] = 100, 0, 255
    x[:, 0, 1], x[:, 1, 2], x[:, 2, 3] = x[:, 1, 1], x[:, 2, 2], x[:, 0, 3]
    return torch.from_numpy(x)


@pytest.mark.parametrize(
    ("change", "theirs", "low", "high"),
    [
        (distortion.brighter, vision.adjust_brightness, 0.0, 2.0),
        (distortion.contrasted, vision.adjust_contrast, 0.0, 2.0),
        (distortion.saturated, vision.adjust_saturation, 0.0, 2.0),
        (distortion.turned, vision.adjust_hue, -0.5, 0.5),
    ],
)
def test_colours_change_as_those_of_torchvision(
    change: Any, theirs: Any, low: float, high: float
) -> None:
    x = colours()
    factors = torch.linspace(low, high, len(x))
    out = change(x.clone(), factors.view(-1, 1, 1, 1)) / 255
    for image, new, factor in zip(x / 255, out, factors, strict=True):
        assert torch.allclose(new, theirs(image, float(factor)), atol=2e-4)
    assert (out.min(), out.max()) == (0, 1) or theirs is vision.adjust_hue


def test_a_distorted_batch_is_what_torchvision_makes_of_each_image() -> None:
    augment = Augment(0, scale=(0.3, 1), brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    flip = np.arange(30) % 2
    made_of = Distortion(augment, np.random.default_rng(1), flip, 6, 6, torch.device("cpu"))
    assert list(made_of._factors) == ["brightness", "contrast", "saturation", "hue"]
    for what, drawn in made_of._factors.items():
        middle, strength = (0 if what == "hue" else 1), getattr(augment, what)
        assert (drawn - middle).abs().max() <= strength and drawn.std() > strength / 3
    out = made_of(colours()[10:], slice(10, 30)) / 255
    for i, (image, new) in enumerate(zip(colours()[10:] / 255, out, strict=True), 10):
        *box, mirrored = made_of._boxes[:, i].int().tolist()
        image = vision.resized_crop(image, *box, [6, 6], antialias=True)
        image = vision.hflip(image) if mirrored else image
        for what, drawn in made_of._factors.items():
            image = getattr(vision, f"adjust_{what}")(image, float(drawn[i]))
        assert torch.allclose(new, image, atol=1e-3)


DISTORTED = [
    Augment(0, scale=(0.2, 1)),
    Augment(0, flip=False, scale=(0.2, 1), ratio=(1, 1), cutout=3),
    Augment(0, flip="alternate", scale=(0.2, 1)),
    Augment(2, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    Augment(0, scale=(0.2, 1), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, cutout=4),
]


@pytest.mark.parametrize("augment", DISTORTED)
def test_distorted_batches_depend_on_seed_and_epoch_alone(augment: Augment) -> None:
    def batches(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return epoch(Loader(made(), augment=augment, **options), seed=3, number=5)

    x, y = batches(batch_size=10)
    assert x.is_contiguous() and x.dtype == torch.float32
    for options in (
        {"memory": "map"},
        {"memory": "device"},
        {"batch_size": 20},
        {"channels_last": True},
    ):
        u, v = batches(**{"batch_size": 10, **options})
        assert torch.equal(x, u) and torch.equal(y, v)
        assert u.is_contiguous(memory_format=torch.channels_last) is bool(
            options.get("channels_last")
        )
    for other in ((3, 6), (4, 5)):
        z, _ = epoch(Loader(made(), augment=augment, batch_size=10), *other)
        assert not torch.equal(z, x)
    assert Loader(made(), augment=augment, batch_size=8).random


def test_a_mirrored_resized_crop_comes_half_of_the_time() -> None:
    ramp = np.tile(np.arange(0, 240, 20, dtype=np.uint8)[None, None, :, None], (400, 12, 1, 3))
    labels = np.arange(400) % 2
    data = Dataset("ramps", ramp, labels, ramp, labels)
    x, _ = epoch(Loader(data, augment=Augment(0, scale=(0.5, 1)), batch_size=400))
    right = (x[..., -1] > x[..., 0]).all(2).all(1)
    assert 150 < right.sum() < 250 and torch.equal((x[..., -1] < x[..., 0]).all(2).all(1), ~right)
    x, _ = epoch(Loader(data, augment=Augment(0, flip=False, scale=(0.5, 1)), batch_size=400))
    assert (x[..., -1] > x[..., 0]).all()


def test_resized_crops_need_one_copy_of_the_images() -> None:
    loader = Loader(made(), augment=Augment(0, scale=(0.5, 1)), batch_size=8, memory="device")
    assert loader._windows is not None
    assert len(loader._windows._flat) == 61 * 12 * 12 * 3  # of 60, and one that a copy may run into


def test_grey_images_change_brightness_and_contrast_alone() -> None:
    data = made(channels=1)
    x, _ = epoch(Loader(data, augment=Augment(1, brightness=0.5, contrast=0.5), batch_size=8))
    assert x.shape[1] == 1 and x.isfinite().all()
    for what in ("saturation", "hue"):
        with pytest.raises(
            ValueError, match=f"augment changes the {what} but made has 1 colour"
        ) as error:
            Loader(data, augment=Augment(1, **{what: 0.1}), batch_size=8)  # type: ignore[arg-type]
        one_sentence(error)


def test_what_an_augmentation_does_is_in_its_name() -> None:
    assert repr(Augment()) == "Augment(pad=4, flip=True, cutout=0, mode='reflect')"
    for augment in DISTORTED:
        assert eval(repr(augment)) == augment


# --------------------------------------------------------------------------- reading ahead


def running() -> list[str]:
    """Threads that read ahead."""
    return [thread.name for thread in threading.enumerate() if "ahead" in thread.name]


def test_one_is_made_ahead_in_order() -> None:
    made_, asked = [], []

    def make(part: int) -> int:
        made_.append(part)
        return 10 * part

    for value in ahead(make, range(5)):
        asked.append(value)
        assert len(made_) <= len(asked) + 1
    assert asked == [0, 10, 20, 30, 40] and made_ == list(range(5))
    assert list(ahead(make, [])) == [] and running() == []


def test_the_next_one_is_made_while_this_one_is_used() -> None:
    begun, used, seen = threading.Event(), threading.Event(), []

    def make(part: int) -> int:
        if part == 1:
            begun.set()
            seen.append(used.wait(10))
        return part

    values = ahead(make, range(3))
    assert next(values) == 0 and begun.wait(10)  # nobody asked for it yet
    used.set()
    assert list(values) == [1, 2] and seen == [True]


def test_what_goes_wrong_in_the_thread_is_raised_where_it_belongs() -> None:
    def make(part: int) -> int:
        if part == 2:
            raise OSError("the disk is gone")
        return part

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for value in ahead(make, range(5)):
            seen.append(value)
    assert seen == [0, 1] and running() == []


@pytest.mark.parametrize("how", ["left", "closed", "forgotten", "whole", "an error of the loop"])
def test_the_thread_ends_with_the_epoch(how: str) -> None:
    loader = Loader(made(), batch_size=8, memory="map")
    before = threading.active_count()
    batches = loader.epoch(0, 0)
    next(batches)
    assert running()
    if how == "left":
        for _ in batches:
            break
        del batches
    elif how == "closed":
        batches.close()  # type: ignore[attr-defined]
    elif how == "forgotten":
        del batches
    elif how == "whole":
        assert len(list(batches)) == len(loader) - 1
    else:
        with pytest.raises(ZeroDivisionError):
            for _ in batches:
                _ = 1 / 0
        del batches
    gc.collect()
    assert running() == [] and threading.active_count() == before


def test_limits_of_the_process_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    cpu = torch.device("cpu")
    used = 1024 * int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])
    unlimited = resource.RLIM_INFINITY
    limits = {resource.RLIMIT_AS: unlimited, resource.RLIMIT_DATA: used + (64 << 20)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], unlimited))
    assert 32 << 20 < memory_file.free_memory(cpu) <= 64 << 20
    limits[resource.RLIMIT_DATA] = 1
    assert memory_file.free_memory(cpu) == 0


def test_limits_of_the_control_group_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listed = Path("/proc/self/cgroup").read_text()
    path = next(line[3:] for line in listed.splitlines() if line.startswith("0::")).strip("/")
    monkeypatch.setattr(memory_file, "_GROUPS", tmp_path)
    group = tmp_path / path
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("2900000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    assert memory_file.free_memory(torch.device("cpu")) == 500_000
    (group / "memory.max").write_text("max\n")
    assert memory_file.free_memory(torch.device("cpu")) > 1 << 26


# --------------------------------------------------------------------------- loader


@pytest.mark.parametrize("channels_last", [False, True])
def test_plain_batches_are_the_images_normalised(channels_last: bool) -> None:
    data = made()
    loader = Loader(data, "test", 7, shuffle=False, drop_last=False, channels_last=channels_last)
    x, y = epoch(loader)
    mean, std = np.array(data.mean), np.array(data.std)
    expected = ((data.test_images / 255.0 - mean) / std).transpose(0, 3, 1, 2)
    assert np.allclose(x.numpy(), expected, atol=1e-5) and x.dtype == torch.float32
    assert np.array_equal(y.numpy(), data.test_labels) and y.dtype == torch.int64
    assert len(loader) == 5 and [len(b) for _, b in loader.epoch(0, 0)] == [7, 7, 7, 7, 2]


def test_memory_format_is_the_one_asked_for() -> None:
    for channels_last in (False, True):
        loader = Loader(made(), augment=Augment(2), batch_size=8, channels_last=channels_last)
        for x in (next(loader.epoch(0, 0))[0], loader.sample(8)[0]):
            assert x.is_contiguous() is not channels_last
            assert x.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_the_formats_hold_the_same_batches() -> None:
    planar, last = (
        Loader(made(), augment=Augment(3, cutout=4), batch_size=8, channels_last=c)
        for c in (False, True)
    )
    for (x, y), (u, v) in zip(planar.epoch(1, 2), last.epoch(1, 2), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_do_not_depend_on_where_images_are_held(channels_last: bool) -> None:
    def held(memory: Any) -> Loader:
        return Loader(
            made(),
            augment=Augment(3, cutout=4),
            batch_size=8,
            memory=memory,
            channels_last=channels_last,
        )

    on_device, mapped = held("device"), held("map")
    assert mapped._windows is None
    for (x, y), (u, v) in zip(on_device.epoch(1, 2), mapped.epoch(1, 2), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_images_that_do_not_fit_stay_in_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = Windows.bytes_needed(made().train_images, Augment())
    monkeypatch.setattr(loader_file, "free_memory", lambda device: 2 * needed)
    assert Loader(made(), augment=Augment(), batch_size=8)._windows is not None
    monkeypatch.setattr(loader_file, "free_memory", lambda device: 2 * needed - 2)
    assert Loader(made(), augment=Augment(), batch_size=8)._windows is None


def test_free_memory_is_plausible() -> None:
    assert 1 << 26 < loader_file.free_memory(torch.device("cpu")) < 1 << 50


def test_order_and_augmentation_depend_on_seed_and_epoch_alone() -> None:
    loader = Loader(made(), augment=Augment(2), batch_size=10)
    x, y = epoch(loader, seed=3, number=5)
    torch.rand(3), np.random.rand(3), epoch(loader, 3, 6)  # none of it matters
    same, _ = epoch(Loader(made(), augment=Augment(2), batch_size=15), seed=3, number=5)
    assert torch.equal(x, same)
    for other in ((3, 6), (4, 5), (5, 3)):
        z, w = epoch(loader, *other)
        assert not torch.equal(z, x) and not torch.equal(w, y)


def test_an_epoch_shows_every_image_once() -> None:
    data = made(n=64)
    x, y = epoch(Loader(data, batch_size=16))
    key = {i.tobytes(): int(t) for i, t in zip(data.train_images, data.train_labels, strict=True)}
    shown = [i.contiguous().numpy().tobytes() for i in raw(x, data).permute(0, 2, 3, 1)]
    assert sorted(shown) == sorted(key)
    assert [key[i] for i in shown] == y.tolist()  # labels go with their images


def test_drop_last_drops_other_images_in_each_epoch() -> None:
    loader = Loader(made(n=60), batch_size=50)
    assert len(loader) == 1
    assert len({tuple(epoch(loader, 0, e)[0].sum((1, 2, 3)).sort()[0][:3]) for e in range(5)}) > 1


def test_batches_may_be_kept() -> None:
    kept = list(Loader(made(), augment=Augment(2), batch_size=10).epoch(0, 0))
    again = list(Loader(made(), augment=Augment(2), batch_size=10).epoch(0, 0))
    assert all(torch.equal(x, u) for (x, _), (u, _) in zip(kept, again, strict=True))
    assert len({x.data_ptr() for x, _ in kept}) == len(kept)


def test_vectors() -> None:
    data = load("spirals")
    loader = Loader(data, batch_size=100)
    x, y = epoch(loader)
    assert x.shape == (1000, 2) and not loader.random
    assert torch.allclose(x.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(x.std(0), torch.ones(2), atol=1e-2)
    expected = (data.train_images - np.array(data.mean)) / np.array(data.std)
    key = {int(t): set() for t in range(3)}  # type: dict[int, set[float]]
    for row, label in zip(expected.astype(np.float32), data.train_labels, strict=True):
        key[int(label)].add(round(float(row[0]), 3))
    assert all(round(float(r[0]), 3) in key[int(t)] for r, t in zip(x[:50], y[:50], strict=True))


def test_sample_is_plain_fixed_and_mixed() -> None:
    labels = np.repeat(np.arange(4), 15)  # sorted by class, as folder trees are
    data = Dataset("sorted", pictures(60), labels, pictures(30), labels[:30])
    loader = Loader(data, augment=Augment(4), batch_size=8)
    (x, y), (u, _) = loader.sample(20), loader.sample(20)
    assert torch.equal(x, u) and len(set(y.tolist())) == 4
    known = {i.tobytes(): int(t) for i, t in zip(data.train_images, labels, strict=True)}
    shown = [i.contiguous().numpy().tobytes() for i in raw(x, data).permute(0, 2, 3, 1)]
    assert [known[i] for i in shown] == y.tolist()
    in_order = Loader(data, "test", shuffle=False, batch_size=8).sample(5)
    assert np.array_equal(raw(in_order[0], data).permute(0, 2, 3, 1).numpy(), data.test_images[:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "split is 'valid'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"sampler": "balanced"}, "sampler is 'balanced'"),
        ({"sampler": "stratified", "shuffle": False}, "full batches in random order"),
        ({"sampler": "stratified", "drop_last": False}, "full batches in random order"),
        ({"sampler": "stratified", "batch_size": 2}, "from 3 .two of a class and one of another"),
        ({"memory": "disk"}, "memory is 'disk'"),
        ({"device": "gpu"}, "device='gpu' cannot be used here"),
        ({"augment": Augment(pad=12)}, "augment pads by 12 but made has a side of 12"),
        ({"augment": "auto"}, "augment is 'auto'"),
        ({"dataset": load("moons"), "augment": Augment()}, "moons holds vectors"),
    ],
)
def test_loader_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        Loader(**{"dataset": made(), "batch_size": 8, **arguments})
    one_sentence(error)


def test_a_wrong_seed_is_refused_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match="seed is -1"):
        Loader(made(), batch_size=8).epoch(-1, 0)
    with pytest.raises(ValueError, match="n is 61"):
        Loader(made(), batch_size=8).sample(61)


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_batch_is_no_larger_than_the_set(drop_last: bool) -> None:
    loader = Loader(made(n=120), drop_last=drop_last)
    assert loader.batch_size == 120 and len(loader) == 1
    assert loader.sample(50)[1].shape == (50,) and epoch(loader)[1].shape == (120,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_delivers_the_batches_of_the_cpu() -> None:
    for channels_last in (False, True):
        cpu, cuda = (
            Loader(
                made(),
                augment=Augment(3, cutout=4),
                batch_size=8,
                device=d,
                channels_last=channels_last,
            )
            for d in ("cpu", "cuda")
        )
        for (x, y), (u, v) in zip(cpu.epoch(0, 0), cuda.epoch(0, 0), strict=True):
            assert u.is_cuda and torch.allclose(x, u.cpu(), atol=1e-6) and torch.equal(y, v.cpu())


# --------------------------------------------------------------------------- stratified batches


def unbalanced(counts: tuple[int, ...]) -> Dataset:
    """So many images of each class, sorted by class, no two alike."""
    labels, test = np.repeat(np.arange(len(counts)), counts), np.arange(len(counts))
    side = 6
    return Dataset("rare", pictures(len(labels), side), labels, pictures(len(test), side), test)


@pytest.mark.parametrize(
    ("counts", "batch_size"),
    [
        ((95, 5), 16),  # 5 % positives
        ((95, 5), 4),  # no more than two of each
        ((19, 19, 19), 7),  # an odd remainder
        ((300, 2, 1, 40), 10),  # a class of two, a class of one
        ((4, 1), 3),
        ((2, 2, 2), 6),  # the whole set
        ((0, 30, 0, 30), 9),  # numbers that no image has
    ],
)
def test_a_stratified_batch_holds_each_class_in_proportion_and_two_of_each(
    counts: tuple[int, ...], batch_size: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    n, have = len(labels), np.array(counts)
    for seed in range(20):
        rows = stratified_batches(labels, batch_size, np.random.default_rng(seed))
        assert rows.shape == (n // batch_size, batch_size)
        assert all(len(set(row)) == batch_size for row in rows.tolist())  # none twice in a batch
        held = np.stack([np.bincount(labels[row], minlength=len(counts)) for row in rows])
        least = np.minimum(have, 2)
        assert (held >= least).all()
        lifted = batch_size * have < least * n
        if lifted.any():
            assert (held[:, lifted] == least[lifted]).all()
        else:
            assert (held >= batch_size * have // n).all()
            assert (held <= -(-batch_size * have // n)).all()
            assert np.bincount(rows.ravel()).max() == 1  # none twice in an epoch
            in_all = len(rows) * batch_size * have
            assert (held.sum(0) >= in_all // n).all() and (held.sum(0) <= -(-in_all // n)).all()


@pytest.mark.parametrize(("classes", "batch_size"), [(2, 3), (10, 4), (10, 7), (100, 16), (6, 9)])
def test_a_small_stratified_batch_holds_pairs_of_as_many_classes_as_it_can(
    classes: int, batch_size: int
) -> None:
    counts = np.arange(classes) % 5 + 2
    counts[-1] = 1 if classes > 2 else 2  # which has no pair
    labels = np.repeat(np.arange(classes), counts)
    seen = np.zeros(classes, int)
    for seed in range(30):
        rows = stratified_batches(labels, batch_size, np.random.default_rng(seed))
        assert all(len(set(row)) == batch_size for row in rows.tolist())
        held = np.stack([np.bincount(labels[row], minlength=classes) for row in rows])
        pairs, ones = (held == 2).sum(1), (held == 1).sum(1)
        assert (pairs == batch_size // 2).all() and (ones == batch_size % 2).all()
        assert pairs[0] * 2 + ones[0] == batch_size
        mine = held.astype(bool).sum(0)
        assert np.ptp(mine[counts >= 2]) <= 1  # equally often
        seen += mine
    assert (seen > 0).tolist() == (counts >= 2).tolist()


def test_single_images_have_their_share_where_there_is_no_room_for_all() -> None:
    labels = np.repeat(np.arange(10), [20, *[1] * 9])
    rows = np.concatenate(
        [stratified_batches(labels, 8, np.random.default_rng(seed)) for seed in range(300)]
    )
    singles = (labels[rows] > 0).sum(1)
    assert abs(singles.mean() - 8 * 9 / 29) < 0.1 and (singles <= 6).all()
    assert [lonely(labels, size) for size in (2, 8, 11)] == [False, False, True]
    alone = np.arange(40)  # no class has a pair: dealt out as ever
    assert not any(lonely(alone, size) for size in range(1, 40))


def test_stratified_batches_come_in_another_order_each_epoch_and_in_the_same_again() -> None:
    data = unbalanced((57, 3))
    loader, again = (
        Loader(data, batch_size=12, sampler="stratified", augment=Augment(1)) for _ in range(2)
    )
    x, y = epoch(loader, 3, 5)
    torch.rand(3), epoch(again, 3, 6)
    u, v = epoch(again, 3, 5)
    assert torch.equal(x, u) and torch.equal(y, v)
    assert not torch.equal(epoch(loader, 3, 6)[0], x) and not torch.equal(epoch(loader, 4, 5)[0], x)
    assert len({tuple(batch.tolist()) for _, batch in loader.epoch(3, 5)}) == len(loader)  # mixed
    plain = Loader(data, batch_size=12)
    assert torch.equal(loader.sample(9)[0], plain.sample(9)[0])


def test_stratified_labels_belong_to_their_images() -> None:
    data = unbalanced((57, 3))
    known = {i.tobytes(): int(t) for i, t in zip(data.train_images, data.train_labels, strict=True)}
    for memory in ("device", "map"):
        x, y = epoch(Loader(data, batch_size=12, sampler="stratified", memory=memory))
        shown = [i.contiguous().numpy().tobytes() for i in raw(x, data).permute(0, 2, 3, 1)]
        assert [known[i] for i in shown] == y.tolist()
        assert set(shown) >= {i.tobytes() for i in data.train_images[57:]}  # all of the rare ones


def test_neighbouring_classes_meet_in_some_epoch() -> None:
    labels = np.repeat(np.arange(8), 9)
    met = np.zeros((8, 8), bool)
    for seed in range(40):  # 20 in a batch of 8 classes: two of each, and a third of every other
        for row in stratified_batches(labels, 20, np.random.default_rng(seed)):
            third = np.flatnonzero(np.bincount(labels[row], minlength=8) == 3)
            met[np.ix_(third, third)] = True
    assert met.all()


# --------------------------------------------------------------------------- prepared caches


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared folder <root>/made."""
    data = made()
    write(tmp_path / "made", {part: getattr(data, part) for part in PARTS}, list("abcd"))
    return tmp_path / "made"


def test_a_prepared_folder_is_memory_mapped(prepared: Path) -> None:
    data = load("made", prepared.parent)
    assert isinstance(data.train_images, np.memmap)
    assert np.array_equal(data.train_images, made().train_images)
    assert data.classes == ("a", "b", "c", "d") and data.name == "made"
    assert load(str(prepared)).classes == data.classes  # its path will do as well
    assert prepare("made", prepared.parent) == prepared


def test_statistics_are_kept_beside_the_images_and_follow_them(prepared: Path) -> None:
    first = read(prepared)
    assert first.mean == statistics(made().train_images)[0]
    path = prepared / "statistics.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "mean": [0.1, 0.2, 0.3]}))
    assert read(prepared).mean == (0.1, 0.2, 0.3)  # read, not computed
    np.save(prepared / "train_images.npy", made().train_images // 2)
    os.utime(prepared / "train_images.npy", ns=(1, 1))
    assert read(prepared).mean == statistics(made().train_images // 2)[0]
    path.write_text("{")
    assert read(prepared).mean == statistics(made().train_images // 2)[0]


def test_a_cache_that_cannot_be_written_is_read(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert read(prepared).mean == statistics(made().train_images)[0]
    assert not (prepared / "statistics.json").exists()


def test_root_is_the_argument_then_the_variable_then_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MODLIB_DATA", str(tmp_path / "variable"))
    assert root_folder(tmp_path / "argument") == tmp_path / "argument"
    assert root_folder() == tmp_path / "variable"
    monkeypatch.setenv("MODLIB_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert root_folder() == tmp_path / "modlib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert root_folder() == Path.home() / ".cache" / "modlib"


def cut_short(folder: Path) -> str:
    path = folder / "train_images.npy"
    path.write_bytes(path.read_bytes()[:-100])
    return "train_images.npy cannot be read"


def empty(folder: Path) -> str:
    (folder / "test_labels.npy").write_bytes(b"")
    return "test_labels.npy cannot be read"


def nonsense(folder: Path) -> str:
    (folder / "test_labels.npy").write_bytes(b"<html>not found</html>")
    return "test_labels.npy cannot be read"


def missing_labels(folder: Path) -> str:
    (folder / "train_labels.npy").unlink()
    return "train_labels.npy is missing"


def missing_classes(folder: Path) -> str:
    (folder / "classes.json").unlink()
    return "classes.json is missing"


def half_classes(folder: Path) -> str:
    (folder / "classes.json").write_text('["a", "b"')
    return "classes.json is not JSON"


def wrong_classes(folder: Path) -> str:
    (folder / "classes.json").write_text("{}")
    return "classes.json is not a list of class names"


def too_few_classes(folder: Path) -> str:
    (folder / "classes.json").write_text('["a", "b"]')
    return "train_labels run from 0 to 3 but there are 2 classes"


def empty_class(folder: Path) -> str:
    (folder / "classes.json").write_text('["a", "b", "c", "d", "e"]')
    return "class 'e' has no training image"


def disagreeing(folder: Path) -> str:
    np.save(folder / "train_labels.npy", np.zeros(59, np.int64))
    return "train_images has 60 rows but train_labels has 59"


def float_pixels(folder: Path) -> str:
    np.save(folder / "train_images.npy", np.zeros((60, 12, 12, 3), np.float32))
    return "train_images is float32"


@pytest.mark.parametrize(
    "spoil",
    [
        cut_short,
        empty,
        nonsense,
        missing_labels,
        missing_classes,
        half_classes,
        wrong_classes,
        too_few_classes,
        empty_class,
        disagreeing,
        float_pixels,
    ],
)
@pytest.mark.parametrize("used_before", [False, True])
def test_a_damaged_cache_is_explained_and_left_alone(
    prepared: Path, spoil: Callable[[Path], str], used_before: bool
) -> None:
    if used_before:
        read(prepared)
    expected = spoil(prepared)
    before = {p.name: p.read_bytes() for p in prepared.iterdir()}
    with pytest.raises(ValueError, match=r"move the prepared folder away") as error:
        load("made", prepared.parent)
    message = one_sentence(error)
    assert expected in message and str(prepared) in message
    assert {p.name: p.read_bytes() for p in prepared.iterdir()} == before


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "set") as temporary:
        (temporary / "train_images.npy").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []

    def save_two(path: Path, array: Any) -> None:
        if len(saved) == 2:
            raise OSError("No space left on device")
        saved.append(path.write_bytes(array.tobytes()))

    monkeypatch.setattr(np, "save", save_two)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "set", {part: getattr(made(), part) for part in PARTS}, list("abcd"))
    assert len(saved) == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_preparation_leaves_nothing_that_is_read(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = os.fork()
    if child == 0:  # killed in the middle of the training images
        calls = iter(range(100))

        def decode(*arguments: Any) -> Any:
            if next(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return np.zeros((8, 8, 3), np.uint8)

        monkeypatch.setattr(trees, "decode", decode)
        trees.prepare_tree(tree, tmp_path / "root")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = [p.name for p in (tmp_path / "root").iterdir()]
    assert len(left) == 1 and left[0].startswith(".")  # it was at work, and it is hidden
    data = load(str(tree), tmp_path / "root")
    assert np.array_equal(data.train_images, pictures(12, 8, seed=0))
    assert [p.name for p in (tmp_path / "root").iterdir()] == [data.name]  # the rest is removed


def test_what_another_process_is_preparing_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    waiting = tmp_path / "waiting.py"
    waiting.write_text(
        "import sys, pathlib\nfrom modlib.data.cache import writing\n"
        "with writing(pathlib.Path(sys.argv[1])) as place:\n"
        "    print(place, flush=True)\n    sys.stdin.read()\n    (place / 'classes.json').write_text('[]')\n"
    )
    root = tmp_path / "root"
    child = subprocess.Popen(
        [sys.executable, str(waiting), str(root / "set")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin and child.stdout
    place = Path(child.stdout.readline().strip())
    with scratch(root / "set", "preparing"):
        assert place.is_dir()  # at work: its lock is held
    child.stdin.close()
    assert child.wait() == 0
    child.stdout.close()
    assert [p.name for p in root.iterdir()] == ["set"]
    with scratch(root / "set", "preparing") as own, scratch(root / "se", "preparing") as other:
        own_, other_ = own, other
    assert not own_.exists() and not other_.exists()


def test_a_full_disk_is_told_before_anything_is_decoded(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def full(file: int, start: int, size: int) -> None:
        asked.append((start, size))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(trees, "decode", None)
    with pytest.raises(
        OSError, match=r"root has no room for 2.43e-06 GB of train_images.npy"
    ) as error:
        load(str(tree), tmp_path / "root")
    one_sentence(error)
    assert asked == [(0, 128 + 12 * 8 * 8 * 3)] and list((tmp_path / "root").iterdir()) == []


def test_a_file_system_that_reserves_nothing_will_do(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot, raising=False)
    assert len(load(str(tree), tmp_path / "root").train_labels) == 12


def test_two_that_prepare_at_once_agree(tmp_path: Path) -> None:
    data = made()
    arrays = {part: getattr(data, part) for part in PARTS}
    with writing(tmp_path / "set") as slower:
        write(tmp_path / "set", arrays, list("abcd"))
        (slower / "classes.json").write_text("[]")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert read(tmp_path / "set").classes == ("a", "b", "c", "d")


def test_a_folder_that_is_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("years of work")
    with pytest.raises(OSError), writing(tmp_path / "set"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["set", "thesis.tex"]


# --------------------------------------------------------------------------- by name


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing can be reached; returns the addresses that were tried."""
    tried: list[str] = []

    def refuse(request: Any, *_: Any, **__: Any) -> None:
        tried.append(getattr(request, "full_url", request))
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return tried


@pytest.mark.parametrize(
    "name", [name for name, source in sources.SOURCES.items() if source.prepare]
)
def test_without_a_network_the_message_says_what_to_do(
    name: str, tmp_path: Path, no_network: list[str]
) -> None:
    for call in (load, prepare):
        with pytest.raises(ConnectionError) as error:
            call(name, tmp_path)
        message = one_sentence(error)
        for part in (
            str(tmp_path / name),
            f"modlib data {name} --root {tmp_path}",
            "train_images.npy",
            "classes.json",
            "load('digits') works offline",
            "not known",
        ):
            assert part in message
    assert no_network and list(tmp_path.iterdir()) == []


def test_every_mirror_of_cifar_is_tried(tmp_path: Path, no_network: list[str]) -> None:
    with pytest.raises(ConnectionError):
        load("cifar10", tmp_path)
    tried = [next(i for i, u in enumerate(no_network) if m in u) for m in sources._CIFAR10]
    assert tried == sorted(tried) and len(set(tried)) == 5
    assert "toronto" in sources._CIFAR10[-1]  # the slow one comes last


@pytest.mark.parametrize("name", ["imagewoof", "imagenet"])
def test_sets_to_fetch_by_hand_are_explained(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"does not download {name}") as error:
        load(name, tmp_path)
    assert str(tmp_path / name) in one_sentence(error) and "https://" in str(error.value)


def fake_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """An archive laid out as CIFAR-10's, with ten images a batch, that torchvision accepts."""
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(parents=True)
    images = pictures(60, 32).transpose(0, 3, 1, 2).reshape(60, -1)
    labels = [i % 10 for i in range(60)]
    sums = {}
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = slice(10 * i, 10 * i + 10)
        content = pickle.dumps({"data": images[part], "labels": labels[part]})
        (inside / name).write_bytes(content)
        sums[name] = md5(content).hexdigest()
    content = pickle.dumps({"label_names": list("abcdefghij")})
    (inside / "batches.meta").write_bytes(content)
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(inside, inside.name)
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "tgz_md5", md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "train_list", [[n, s] for n, s in sums.items() if n != "test_batch"])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5(content).hexdigest()})
    return archive, images


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """Serves a folder on this machine; returns its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    def serve(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_cifar_comes_from_the_first_mirror_that_is_right(
    tmp_path: Path,
    host: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive, images = fake_cifar(tmp_path / "host" / "right", monkeypatch)
    wrong = tmp_path / "host" / "wrong" / archive.name
    wrong.parent.mkdir()
    wrong.write_bytes(b"not the archive")
    mirrors = [f"{host(tmp_path / 'host')}/{d}/{archive.name}" for d in ("gone", "wrong", "right")]
    source = sources.Source("", "", sources._from_torchvision("CIFAR10", mirrors))
    monkeypatch.setitem(sources.SOURCES, "cifar10", source)
    data = load("cifar10", tmp_path / "root")
    expected = images.reshape(60, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(data.train_images, expected[:50])
    assert np.array_equal(data.test_images, expected[50:])
    assert data.test_labels.tolist() == list(range(10)) and data.classes == tuple("abcdefghij")
    assert f"prepared in {tmp_path / 'root' / 'cifar10'}" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["cifar10"]  # no archive stays
    load("cifar10", tmp_path / "root")
    assert capsys.readouterr().out == ""  # found there the second time
    mirrors[2] = mirrors[1]
    with pytest.raises(ConnectionError, match="not found or corrupted"):
        load("cifar10", tmp_path / "elsewhere")


def stand_in(data: Any, labels: Any, by: str, classes: list[str] | None) -> type:
    """A class with the face of a torchvision data set."""

    class StandIn:
        def __init__(self, root: str, download: bool, **split: Any) -> None:
            part = slice(0, 8) if split in ({"train": True}, {"split": "train"}) else slice(8, 12)
            self.data = data[part]
            setattr(self, by, labels[part])
            if classes:
                self.classes = classes

    return StandIn


@pytest.mark.parametrize(
    ("name", "kind", "layout", "by"),
    [
        ("mnist", "MNIST", "NHW", "targets"),
        ("fashion-mnist", "FashionMNIST", "NHW", "targets"),
        ("svhn", "SVHN", "NCHW", "labels"),
        ("stl10", "STL10", "NCHW", "labels"),
        ("cifar100", "CIFAR100", "NHWC", "targets"),
    ],
)
def test_each_layout_of_torchvision_becomes_nhwc(
    name: str, kind: str, layout: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(12, side=8, channels=1 if layout == "NHW" else 3)
    labels = np.arange(12) % 4
    data = {"NHW": images[..., 0], "NCHW": images.transpose(0, 3, 1, 2), "NHWC": images}[layout]
    given = torch.from_numpy(data.copy()) if layout == "NHW" else data
    names = ["0 - zero", "1 - one", "2 - two", "3 - three"]
    fake = stand_in(given, labels.tolist(), by, None if name == "svhn" else names)
    monkeypatch.setattr(torchvision.datasets, kind, fake)
    if name == "svhn":  # ten classes, each of which needs an image
        fake = stand_in(np.repeat(data, 2, 0)[:24], [*range(8), 8, 9, 0, 1], by, None)
        with pytest.raises(ValueError, match="class '8' has no training image"):
            monkeypatch.setattr(torchvision.datasets, kind, fake)
            load(name, tmp_path)
        stored = np.load(tmp_path / name / "train_images.npy")
        assert np.array_equal(stored, np.repeat(images, 2, 0)[:8])
        return
    prepared = load(name, tmp_path)
    assert np.array_equal(prepared.train_images, images[:8])
    assert prepared.test_labels.tolist() == [0, 1, 2, 3]
    assert prepared.classes == ("0", "1", "2", "3")


def save(path: Path, image: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_imagenette_is_prepared_in_the_size_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def unpack(url: str, folder: str, md5: str) -> None:
        asked.append((url.rsplit("/", 1)[1], md5))
        for split in ("train", "val"):
            for wnid in ("n01440764", "n02102040"):
                place = Path(folder) / Path(url).stem / split / wnid
                save(place / f"{wnid}.JPEG", pictures(1, 40)[0])

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", unpack)
    data = load("imagenette", tmp_path)
    assert data.shape == (3, 128, 128) and data.classes == ("tench", "English springer")
    assert load("imagenette", tmp_path, size=24).shape == (3, 24, 24)
    assert load("imagenette", tmp_path, size=200, classes=["tench"]).classes == ("tench",)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "imagenette",
        "imagenette-200px",
        "imagenette-24px",
    ]
    from torchvision.datasets import Imagenette

    known = {url.rsplit("/", 1)[1]: s for url, s in Imagenette._ARCHIVES.values()}
    assert asked and all(known[archive] == checksum for archive, checksum in asked)
    assert {archive for archive, _ in asked} == {"imagenette2-160.tgz", "imagenette2-320.tgz"}


def unpack_tiny_imagenet(tree: Path) -> None:
    """Two of its classes, a grey each."""
    for wnid, grey in (("n1", 10), ("n2", 200)):
        image = np.full((64, 64, 3), grey, np.uint8)
        for i in range(3):
            save(tree / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", image)
        save(tree / "val" / "images" / f"val_{grey}.JPEG", image)
    (tree / "wnids.txt").write_text("n2\nn1\n")
    (tree / "words.txt").write_text("n1\tcat, domestic cat\nn2\tdog\nn3\tcar\n")
    table = "val_200.JPEG\tn2\t0\t0\t1\t1\nval_10.JPEG\tn1\t0\t0\t1\t1\n"
    (tree / "val" / "val_annotations.txt").write_text(table)


def test_tiny_imagenet_finds_its_validation_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(url: str, folder: str, md5: str) -> None:
        unpack_tiny_imagenet(Path(folder) / "tiny-imagenet-200")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", unpack)
    data = load("tiny-imagenet", tmp_path)
    assert data.classes == ("cat", "dog") and data.shape == (3, 64, 64)
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        expected = np.array([10, 200])[labels]
        assert np.abs(images.mean((1, 2, 3)) - expected).max() < 2
    assert data.test_labels.tolist() == [1, 0]


def test_classes_and_size_of_a_named_set(prepared: Path) -> None:
    data = load("made", prepared.parent, classes=["d", "b"], size=6)
    assert data.classes == ("d", "b") and data.shape == (3, 6, 6)
    whole = load("made", prepared.parent)
    assert len(data.train_labels) == (whole.train_labels % 2 == 1).sum()
    kept = load("made", prepared.parent, classes=["d", "b"])
    first = whole.train_images[whole.train_labels == 3][0]
    assert np.array_equal(kept.train_images[kept.train_labels == 0][0], first)
    assert kept.mean == statistics(kept.train_images)[0] and data.name == "made-2classes-6px"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar", {}, "did you mean 'cifar10'"),
        ("nothing-like-it", {}, "known are digits, spirals"),
        ("/no/such/folder", {}, "there is no such folder"),
        ("digits", {"classes": ["ten"]}, "classes names 'ten'"),
        ("digits", {"classes": []}, "at least one"),
        ("digits", {"classes": ["1", "1"]}, "each class once"),
        ("digits", {"classes": "12"}, "give a list of names"),
        ("digits", {"size": 0}, "size is 0"),
        ("spirals", {"size": 8}, "spirals holds no images"),
    ],
)
def test_load_refuses(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        load(name, tmp_path, **options)
    one_sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"root is .*file, where nothing can be written") as error:
        load("cifar10", tmp_path / "file")
    one_sentence(error)


def test_every_name_is_explained(prepared: Path, tree: Path) -> None:
    for name in modlib.data.names():
        assert explain(name, prepared.parent).startswith(f"{name}: ")
    assert f"modlib data svhn --root {prepared.parent}" in explain("svhn", prepared.parent)
    assert explain("made", prepared.parent) == f"made: prepared in {prepared}"
    assert explain(str(tree), "/data") == f"{tree}: a folder tree, prepared in /data"
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        explain("minst", prepared.parent)
    prepared.rename(prepared.parent / "svhn")
    assert f"\nprepared in {prepared.parent / 'svhn'}" in explain("svhn", prepared.parent)


# --------------------------------------------------------------------------- folder trees


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Folders train and val with classes ant, bee, cat: four and two 8x8 images in each."""
    folder = tmp_path / "insects"
    for split, n, seed in (("train", 4, 0), ("val", 2, 1)):
        images = pictures(3 * n, 8, seed=seed).reshape(3, n, 8, 8, 3)
        for name, group in zip(("ant", "bee", "cat"), images, strict=True):
            for i, image in enumerate(group):
                save(folder / split / name / f"{i}.png", image)
    return folder


def test_a_tree_becomes_memory_mapped_arrays(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "_BLOCK", 5)  # several blocks, the last not full
    (tree / "train" / "ant" / "notes.txt").write_text("no image")
    data = load(str(tree), tmp_path / "root")
    assert np.array_equal(data.train_images, pictures(12, 8, seed=0))
    assert np.array_equal(data.test_images, pictures(6, 8, seed=1))
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.classes == ("ant", "bee", "cat") and isinstance(data.train_images, np.memmap)
    assert data.name.startswith("insects-8px-")
    assert load(data.name, tmp_path / "root").shape == (3, 8, 8)  # by the name it was given


def test_a_tree_is_decoded_once_for_each_wish(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    load(str(tree), root)
    few = load(str(tree), root, classes=["cat", "ant"], size=4)
    assert few.classes == ("cat", "ant") and few.shape == (3, 4, 4)
    assert isinstance(few.train_images, np.memmap)  # prepared so, not derived in memory
    assert few.name.startswith("insects-4px-2classes-")
    assert np.allclose(
        few.train_images[0].mean((0, 1)), pictures(12, 8)[8].mean((0, 1)), atol=12
    )  # the first is a cat
    monkeypatch.setattr(trees, "prepare_files", None)  # must not be called again
    assert load(str(tree), root).shape == (3, 8, 8)
    assert load(str(tree), root, classes=["cat", "ant"], size=4).name == few.name


def test_trees_of_the_same_name_are_kept_apart(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "insects"
    other.parent.mkdir()
    tree_copy = [(p, other / p.relative_to(tree)) for p in tree.rglob("*.png")]
    for old, new in tree_copy:
        save(new, 255 - np.asarray(Image.open(old)))
    a, b = load(str(tree), tmp_path / "root"), load(str(other), tmp_path / "root")
    assert np.array_equal(a.train_images, 255 - np.asarray(b.train_images))


def added(tree: Path) -> str:
    save(tree / "val" / "bee" / "9.png", pictures(1, 8)[0])
    return "val/bee/9.png is new"


def removed(tree: Path) -> str:
    (tree / "train" / "bee" / "2.png").unlink()
    return "train/bee/2.png is gone"


def overwritten(tree: Path) -> str:
    """Same names and number of files, as when pictures are made again."""
    for i, path in enumerate(sorted(tree.rglob("*.png"))):
        save(path, pictures(1, 8, seed=100 + i)[0])
        os.utime(path, ns=(2**60, 2**60))  # clocks may be coarse
    return "train/ant/0.png is another file, 18 changes in all"


def overwritten_at_the_same_time(tree: Path) -> str:
    path = tree / "val" / "cat" / "1.png"
    time = path.stat().st_mtime_ns
    save(path, np.zeros((8, 8, 3), np.uint8))
    os.utime(path, ns=(time, time))
    return "val/cat/1.png is another file"


def corrupted(tree: Path) -> str:
    (tree / "train" / "cat" / "3.png").write_text("<html>not found</html>")
    return "train/cat/3.png is another file"


def moved(tree: Path) -> str:
    (tree / "train" / "ant" / "0.png").rename(tree / "train" / "bee" / "7.png")
    return "train/ant/0.png is gone, 2 changes in all"


@pytest.mark.parametrize(
    "change", [added, removed, overwritten, overwritten_at_the_same_time, corrupted, moved]
)
def test_a_tree_that_changed_is_not_served_from_the_cache(
    tree: Path, tmp_path: Path, change: Callable[[Path], str]
) -> None:
    root = tmp_path / "root"
    folder = prepare(str(tree), root)
    assert folder
    load(str(tree), root)  # unchanged: served
    what = change(tree)
    before = {p: p.read_bytes() for p in (*folder.rglob("*"), *tree.rglob("*")) if p.is_file()}
    with pytest.raises(ValueError) as error:
        load(str(tree), root)
    message = one_sentence(error)
    assert f"{folder} was prepared before {tree} last changed ({what})" in message
    assert {p: p.read_bytes() for p in before} == before  # nothing is lost
    assert len(load(folder.name, root).train_labels) == 12  # the old pixels, asked for by name
    folder.rename(tmp_path / "away")  # as the message says
    if change is corrupted:
        with pytest.raises(ValueError, match=r"cat/3.png cannot be read as an image"):
            load(str(tree), root)
        return
    new = load(str(tree), root)
    shown = {i.tobytes() for i in (*new.train_images, *new.test_images)}
    assert shown == {np.asarray(Image.open(p)).tobytes() for p in tree.rglob("*.png")}


def test_a_list_of_classes_that_changed_is_not_served_from_the_cache(
    tree: Path, tmp_path: Path
) -> None:
    list_flat(tree, "val.txt")
    prepare(str(tree), tmp_path / "root")
    text = (tree / "val.txt").read_text()
    (tree / "val.txt").write_text(text + "\n")
    load(str(tree), tmp_path / "root")  # the same classes
    (tree / "val.txt").write_text(text.replace("ant_0.png ant", "ant_0.png bee"))
    with pytest.raises(ValueError, match=r"last changed .val/ant_0.png is another file"):
        load(str(tree), tmp_path / "root")


def test_a_tree_prepared_without_the_times_of_its_files_is_prepared_anew(
    tree: Path, tmp_path: Path
) -> None:
    folder = prepare(str(tree), tmp_path / "root")
    assert folder
    (folder / "source.json").write_text(json.dumps({"tree": str(tree), "changed": 1}))
    with pytest.raises(ValueError, match=r"by an older modlib, .* move the prepared folder away"):
        load(str(tree), tmp_path / "root")


def test_images_of_any_shape_and_mode_are_brought_to_one_size(tree: Path, tmp_path: Path) -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 8:32] = 255  # white in the middle, which a centre crop keeps
    save(tree / "train" / "ant" / "0.png", wide)
    save(tree / "train" / "ant" / "1.png", np.full((30, 10), 77, np.uint8))
    Image.fromarray(np.full((9, 9, 4), 50, np.uint8), "CMYK").save(
        tree / "train" / "ant" / "2.jpg", quality=100
    )
    data = load(str(tree), tmp_path / "root", size=8)
    assert (data.train_images[0] == 255).all() and (data.train_images[1] == 77).all()
    with pytest.raises(ValueError, match=r"not square .*40x20.*pass size=") as error:
        load(str(tree), tmp_path / "root")
    one_sentence(error)


def other_shape(tree: Path) -> str:
    save(tree / "train" / "cat" / "3.png", pictures(1, 9)[0])
    return r"cat/3.png is 9x9 but others are 8x8; pass size="


def broken_image(tree: Path) -> str:
    path = tree / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    return r"val/bee/1.png cannot be read as an image"


def broken_first(tree: Path) -> str:
    (tree / "train" / "ant" / "0.png").write_text("<html>")
    return r"train/ant/0.png cannot be read as an image"


def empty_folder(tree: Path) -> str:
    for path in (tree / "val" / "cat").iterdir():
        path.unlink()
    return r"val/cat holds no image"


def odd_class(tree: Path) -> str:
    (tree / "val" / "dog").mkdir()
    return r"different classes \('dog' is in one only\)"


def no_test(tree: Path) -> str:
    (tree / "val").rename(tree / "hidden")
    return "has no val or test folder"


def flat_test(tree: Path) -> str:
    (tree / "val").rename(tree / "hidden")
    save(tree / "test" / "0.png", pictures(1, 8)[0])
    return "has no val or test folder with a folder a class or a list of classes"


@pytest.mark.parametrize(
    "spoil",
    [other_shape, broken_image, broken_first, empty_folder, odd_class, no_test, flat_test],
)
def test_a_tree_that_will_not_do_is_explained(
    tree: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    expected = spoil(tree)
    with pytest.raises(ValueError, match=expected) as error:
        load(str(tree), tmp_path / "root")
    assert str(tree) in one_sentence(error)
    assert not any((tmp_path / "root").glob("*"))


@pytest.mark.parametrize("part", ["train", "val", "train/ant"])
def test_a_part_of_a_tree_is_told_from_the_tree(tree: Path, tmp_path: Path, part: str) -> None:
    folder = tree / part
    for call in (load, prepare, explain):
        with pytest.raises(ValueError) as error:
            call(str(folder), tmp_path / "root")
        message = one_sentence(error)
        if "/" in part:
            assert f"{folder} is neither a prepared data set" in message
        else:
            assert (
                f"load that, with train and test images in it: modlib.data.load('{tree}')"
                in message
            )
    assert not any((tmp_path / "root").glob("*"))


# --------------------------------------------------------------------------- odd pictures


def photo(tmp_path: Path, picture: Image.Image, name: str = "odd.png", **options: Any) -> Any:
    """The picture, saved and decoded again in its own size."""
    path = tmp_path / name
    picture.save(path, **options)
    return decode(path, max(picture.size), exact=picture.size[0] == picture.size[1])


def test_grey_pictures_have_three_equal_channels(tmp_path: Path) -> None:
    grey = pictures(1, 16, channels=1)[0, ..., 0]
    assert np.array_equal(photo(tmp_path, Image.fromarray(grey)), np.stack([grey] * 3, -1))
    black_and_white = Image.fromarray(grey > 128)
    assert black_and_white.mode == "1"
    expected = np.stack([(grey > 128) * np.uint8(255)] * 3, -1)
    assert np.array_equal(photo(tmp_path, black_and_white), expected)


@pytest.mark.parametrize(
    ("name", "mode"), [("odd.png", None), ("odd.tif", None), ("odd.tif", "I;16B")]
)
def test_sixteen_bits_become_the_eight_high_ones(tmp_path: Path, name: str, mode: Any) -> None:
    high = pictures(1, 16, channels=1)[0, ..., 0]
    values = high.astype(np.uint16) * 256 + 77
    picture = Image.fromarray(values)
    if mode:
        raw_ = values.astype(">u2").tobytes()
        picture = Image.frombytes(mode, (16, 16), raw_)
    assert np.array_equal(photo(tmp_path, picture, name), np.stack([high] * 3, -1))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    inks = np.zeros((16, 16, 4), np.uint8)  # white; then cyan, black
    inks[4:8, :, 0], inks[8:, :, 3] = 255, 255
    out = photo(tmp_path, Image.fromarray(inks, "CMYK"), "odd.jpg", quality=100).astype(int)
    for rows, colour in ((slice(0, 3), 255), (slice(5, 7), (0, 255, 255)), (slice(9, 16), 0)):
        assert np.abs(out[rows] - colour).max() < 40
    tif = photo(tmp_path, Image.fromarray(inks, "CMYK"), "odd.tif")
    assert (tif[:4] == 255).all() and (tif[8:] == 0).all()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "one colour of a palette", "one of RGB"])
def test_what_is_transparent_shows_white(tmp_path: Path, kind: str) -> None:
    colours_ = np.full((16, 16, 3), 40, np.uint8)
    colours_[8:] = 200
    seen = np.zeros((16, 16), np.uint8)
    seen[8:] = 255  # the upper half is transparent
    options: dict[str, Any] = {}
    if kind == "RGBA":
        picture = Image.fromarray(np.dstack([colours_, seen]))
    elif kind == "LA":
        picture = Image.fromarray(np.dstack([colours_[..., 0], seen]))
    elif kind == "one of RGB":
        picture, options = Image.fromarray(colours_), {"transparency": (40, 40, 40)}
    else:
        picture = Image.fromarray((seen > 0).astype(np.uint8))
        picture = picture.convert("P")
        picture.putpalette([40] * 3 + [200] * 3)
        options = {"transparency": bytes([0, 255]) if kind == "palette" else 0}
    out = photo(tmp_path, picture, **options)
    assert (out[:8] == 255).all() and (out[8:] == 200).all()
    half = Image.fromarray(np.full((4, 4, 4), (0, 0, 0, 128), np.uint8))
    assert np.abs(photo(tmp_path, half).astype(int) - 127).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16], upright[:16, 16:], upright[16:, :16] = 250, 160, 80
    # How the camera's sensor saw it, by the table of the EXIF standard.
    seen = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(seen))
    for name in ("odd.jpg", "odd.png"):
        out = photo(tmp_path, picture, name, exif=exif.tobytes()).astype(int)
        for place in ((8, 8), (8, 24), (24, 8), (24, 24)):
            assert np.abs(out[place] - upright[place]).max() < 4
    path = tmp_path / "wide.jpg"  # scaled down while it is read, then turned and cropped
    Image.fromarray(np.repeat(np.repeat(seen, 8, 0), 8, 1)).save(path, exif=exif.tobytes())
    assert np.abs(decode(path, 4, False)[0, 0].astype(int) - 250).max() < 4


def test_a_picture_of_one_pixel_is_one_colour(tree: Path, tmp_path: Path) -> None:
    path = tree / "train" / "bee" / "one.png"
    save(path, np.full((1, 1, 3), 93, np.uint8))
    data = load(str(tree), tmp_path / "root", size=8)
    assert (data.train_images == 93).all((1, 2, 3)).sum() == 1
    with pytest.raises(ValueError, match=r"bee/one.png is 1x1 but others are 8x8; pass size="):
        load(str(tree), tmp_path / "a")
    save(path, np.full((1, 300, 3), 94, np.uint8))  # a line
    assert (load(str(tree), tmp_path / "b", size=8).train_images == 94).all((1, 2, 3)).sum() == 1


def cut_in_half(path: Path) -> None:
    Image.fromarray(pictures(1, 64)[0]).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_text(path: Path) -> None:
    path.write_text("<html>404 not found</html>")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def head_alone(path: Path) -> None:
    Image.fromarray(pictures(1, 64)[0]).save(path)
    path.write_bytes(path.read_bytes()[:30])


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def a_bomb(path: Path) -> None:
    content = bytearray()
    Image.new("1", (1, 1)).save(path, "PNG")
    content += path.read_bytes()
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil", [cut_in_half, a_text, nothing, head_alone, a_bomb, a_link_to_nothing]
)
@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_is_no_picture_is_named(
    tmp_path: Path, spoil: Callable[[Path], None], size: int | None, first: bool
) -> None:
    tree = tmp_path / "photos"
    for split in ("train", "val"):
        for i in range(2):
            save(tree / split / "ant" / f"{i}.png", pictures(1, 64, seed=i)[0])
    path = tree / "train" / "ant" / ("00.jpg" if first else "2.jpg")
    spoil(path)
    with pytest.raises(ValueError) as error:
        load(str(tree), tmp_path / "root", size=size)
    assert one_sentence(error).startswith(f"{path} cannot be read as an image (")
    assert list((tmp_path / "root").glob("*")) == []


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "odd.tif"
    Image.new(mode, (8, 8), 1000).save(path)
    with pytest.raises(ValueError, match=r"odd.tif .*32-bit numbers") as error:
        decode(path, 8, True)
    one_sentence(error)


def test_what_a_mac_leaves_beside_a_file_is_no_picture(tree: Path, tmp_path: Path) -> None:
    (tree / "train" / "ant" / "._0.png").write_bytes(b"\0\5\x16\7 Mac OS X")
    assert len(load(str(tree), tmp_path / "root").train_labels) == 12


# --------------------------------------------------------------------------- sets of ImageNet photographs


def photos(tree: Path, wnids: Sequence[str], side: int = 8) -> Path:
    """Two training images and one test image a class, of the brightness of its place in the list."""
    for i, wnid in enumerate(wnids):
        for split, n in (("train", 2), ("val", 1)):
            for k in range(n):
                save(tree / split / wnid / f"{wnid}_{k}.png", np.full((side, side, 3), i, np.uint8))
    return tree


BY_TREE = [
    "imagenette",
    "imagewoof",
    "tiny-imagenet",
    "tiny-imagenet-20",
    "imagenet-100",
    "imagenet",
]


@pytest.mark.parametrize("name", BY_TREE)
def test_a_set_of_photographs_is_taken_from_a_tree(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.SOURCES[name]
    assert source.subset
    own = list(source.subset.classes) or ["n00000001", "n00000002"]
    tree = photos(
        tmp_path / "unpacked", [*own, *([] if not source.subset.classes else ["n99999999"])]
    )
    (tree / "words.txt").write_text("n00000001\tcat, domestic cat\n")
    few = replace(source.subset, train=2 * len(own), test=len(own))
    monkeypatch.setitem(sources.SOURCES, name, replace(source, subset=few))
    assert f"--root {tmp_path}" in explain(name, tmp_path) and "--from FOLDER" in explain(
        name, tmp_path
    )
    arguments = ["data", name, "--root", str(tmp_path), "--from", str(tree)]
    assert cli.main(arguments) == 0
    assert f"{name}: prepared in {tmp_path / name}" in capsys.readouterr().out
    data = load(name, tmp_path)
    side = source.size or 64
    assert data.shape == (3, side, side) and data.name == name
    assert data.train_labels.tolist() == [i for i in range(len(own)) for _ in range(2)]
    assert data.train_images[:, 0, 0, 0].tolist() == data.train_labels.tolist()
    assert data.test_images[:, 0, 0, 0].tolist() == list(range(len(own)))
    assert data.classes == tuple(source.subset.classes.values()) or data.classes == (
        "cat",
        "n00000002",
    )
    if source.size:
        assert cli.main([*arguments, "--size", "24"]) == 0
        assert load(name, tmp_path, size=24).shape == (3, 24, 24)
        assert (tmp_path / f"{name}-24px").is_dir()
    else:
        assert load(name, tmp_path, size=24).shape == (3, 24, 24)


def test_lists_of_photographs_are_those_that_are_known() -> None:
    from torchvision.datasets import Imagenette

    known = {wnid: names_[0] for wnid, names_ in Imagenette._WNID_TO_CLASS.items()}
    assert dict(subsets.IMAGENETTE.classes) == known
    assert list(subsets.IMAGEWOOF.classes) == sorted(subsets.IMAGEWOOF.classes)
    assert [len(set(s.classes)) for s in (subsets.IMAGEWOOF, subsets.TINY_20)] == [10, 20]
    hundred = list(subsets.IMAGENET_100.classes)
    assert len(set(hundred)) == 100 and all(re.fullmatch(r"n\d{8}", wnid) for wnid in hundred)
    # The published list, in its order: MD5 of its lines.
    text = "".join(f"{wnid}\n" for wnid in hundred)
    assert (
        len(text) == 1000 and md5(text.encode()).hexdigest() == "9974508e5d4cc0098b70e8b6a0fe6067"
    )


def test_real_classes_of_tiny_imagenet_20() -> None:
    folder = real("tiny-imagenet-20-folder")
    assert sorted(subsets.TINY_20.classes) == sorted(p.name for p in (folder / "train").iterdir())
    whole = load("tiny-imagenet-20", folder.parent)
    assert whole.classes == tuple(subsets.TINY_20.classes.values())
    for number, wnid in enumerate(subsets.TINY_20.classes):
        first = sorted((folder / "test" / wnid).iterdir())[0]
        assert whole.test_labels[int(first.stem)] == number


def test_another_set_is_told_from_the_one_that_was_named(tmp_path: Path) -> None:
    tree = photos(tmp_path / "mine", list(subsets.IMAGEWOOF.classes))
    with pytest.raises(
        ValueError, match=r"holds 20 training and 10 test images .* has 9025 and 3929"
    ) as e:
        prepare("imagewoof", tmp_path, tree=tree)
    one_sentence(e)
    with pytest.raises(
        ValueError, match=r"classes names 'n02869837' but .*mine/train has no such"
    ) as e:
        prepare("imagenet-100", tmp_path, tree=tree)
    one_sentence(e)
    with pytest.raises(
        ValueError, match=r"has no folder train; give the folder that imagewoof2.tgz"
    ) as e:
        prepare("imagewoof", tmp_path, tree=tmp_path)
    one_sentence(e)
    with pytest.raises(ValueError, match=r"tree is given but cifar10 is not taken out of") as e:
        prepare("cifar10", tmp_path, tree=tree)
    one_sentence(e)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_list_of_classes_comes_from_a_file(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("cat the cat\n\nant\n")
    arguments = ["data", str(tree), "--root", str(tmp_path / "root")]
    assert cli.main([*arguments, "--classes", str(tmp_path / "mine.txt")]) == 0
    assert load(str(tree), tmp_path / "root", classes=["cat", "ant"]).classes == ("cat", "ant")
    assert len(list((tmp_path / "root").iterdir())) == 1
    capsys.readouterr()
    assert cli.main([*arguments, "--classes", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().err


def test_a_set_to_fetch_by_hand_is_explained_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["data", "imagenet-100", "--root", str(tmp_path)])
    said = capsys.readouterr()
    assert error.value.code == 1 and said.err == ""
    assert said.out.count("does not download imagenet-100") == 1
    assert f"`modlib data imagenet-100 --root {tmp_path} --from FOLDER`" in said.out


# --------------------------------------------------------------------------- flat layouts


def list_flat(tree: Path, name: str) -> list[tuple[str, str]]:
    """Lay val out flat with such a list; returns the images' names and classes in alphabetical order."""
    rows = []
    for folder in sorted((tree / "val").iterdir()):
        for path in sorted(folder.iterdir()):
            rows.append((f"{folder.name}_{path.name}", folder.name))
            path.rename(tree / "val" / rows[-1][0])
        folder.rmdir()
    rows.sort()
    number = {"ant": "0", "bee": "1", "cat": "2"}
    kit = {"ant": 3, "bee": 1, "cat": 2}  # in an order of its own, as the kit's are
    content = {
        "val_annotations.txt": [f"{n}\t{c}\t0\t0\t7\t7" for n, c in rows],
        "val.txt": [f"{n} {c}" for n, c in rows],
        "caffe/val.txt": [f"{n} {number[c]}" for n, c in rows],
        "LOC_val_solution.csv": [
            "ImageId,PredictionString",
            *(f"{n.removesuffix('.png')},{c} 1 2 3 4 {c} 5 6 7 8" for n, c in rows[::-1]),
        ],
        "imagenet_2012_validation_synset_labels.txt": [c for _, c in rows],
        "ILSVRC2012_validation_ground_truth.txt": [str(kit[c]) for _, c in rows],
    }[name]
    text, name = "\n".join(content) + "\n", name.removeprefix("caffe/")
    (tree / name).write_text(text)
    if name.startswith("ILSVRC"):
        synsets = [(kit[c], c, "words") for c in kit] + [(4, "insects", "words")]
        kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
        savemat(tree / "meta.mat", {"synsets": np.array(synsets, kinds)})
    return rows


LISTS = [
    "val_annotations.txt",
    "val.txt",
    "caffe/val.txt",
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
]


@pytest.mark.parametrize("name", LISTS)
def test_a_flat_val_is_read_with_its_list(tree: Path, tmp_path: Path, name: str) -> None:
    expected = load(str(tree), tmp_path / "foldered")
    known = {
        i.tobytes(): int(t) for i, t in zip(expected.test_images, expected.test_labels, strict=True)
    }
    list_flat(tree, name)
    data = load(str(tree), tmp_path / "root")
    assert data.classes == ("ant", "bee", "cat") and len(data.test_labels) == 6
    assert [known[i.tobytes()] for i in data.test_images] == data.test_labels.tolist()
    few = load(str(tree), tmp_path / "root", classes=["cat", "bee"])
    assert np.bincount(few.test_labels).tolist() == [2, 2]
    assert [known[i.tobytes()] for i in few.test_images] == (2 - few.test_labels).tolist()


@pytest.mark.parametrize("place", ["val", "ILSVRC2012_devkit_t12/data"])
def test_the_list_may_lie_where_the_archives_put_it(tree: Path, tmp_path: Path, place: str) -> None:
    list_flat(tree, "ILSVRC2012_validation_ground_truth.txt")
    (tree / place).mkdir(parents=True, exist_ok=True)
    for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"):
        (tree / name).rename(tree / place / name)
    assert np.bincount(load(str(tree), tmp_path / "root").test_labels).tolist() == [2, 2, 2]


def test_kaggles_archive_is_read(tree: Path, tmp_path: Path) -> None:
    list_flat(tree, "LOC_val_solution.csv")
    (tree / "test").mkdir()  # images without classes
    save(tree / "test" / "ILSVRC2012_test_1.png", pictures(1, 8)[0])
    place = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    place.parent.mkdir(parents=True)
    (tree / "LOC_val_solution.csv").rename(tmp_path / "kaggle" / "LOC_val_solution.csv")
    tree.rename(place)
    assert np.bincount(load(str(place), tmp_path / "root").test_labels).tolist() == [2, 2, 2]


def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path: Path) -> None:
    tree = tmp_path / "tiny-imagenet-200"
    unpack_tiny_imagenet(tree)
    (tree / "test" / "images").mkdir(parents=True)
    save(tree / "test" / "images" / "test_0.JPEG", pictures(1, 64)[0])
    (tree / "train" / "n1" / "n1_boxes.txt").write_text("n1_0.JPEG\t0\t0\t1\t1\n")
    data = load(str(tree), tmp_path / "root")
    assert data.shape == (3, 64, 64) and data.classes == ("n1", "n2")
    assert data.train_labels.tolist() == [0] * 3 + [1] * 3
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        assert np.abs(images.mean((1, 2, 3)) - np.array([10, 200])[labels]).max() < 2


def test_folders_go_before_a_list(tree: Path, tmp_path: Path) -> None:
    (tree / "val.txt").write_text("left over from before the images were sorted")
    assert load(str(tree), tmp_path / "root").test_labels.tolist() == [0, 0, 1, 1, 2, 2]


def no_kit(tree: Path) -> str:
    list_flat(tree, "ILSVRC2012_validation_ground_truth.txt")
    (tree / "meta.mat").unlink()
    return "put the kit's meta.mat beside it"


def a_line_too_few(tree: Path) -> str:
    list_flat(tree, "imagenet_2012_validation_synset_labels.txt")
    path = tree / "imagenet_2012_validation_synset_labels.txt"
    path.write_text(path.read_text().removesuffix("cat\n"))
    return "has 5 lines but .*val has 6 images"


@pytest.mark.parametrize("spoil", [no_kit, a_line_too_few])
def test_a_list_without_names_that_will_not_do_is_explained(
    tree: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    list_is_refused(tree, tmp_path, spoil(tree))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "ant_1.png ant",
            "ant_1.png wasp",
            "val.txt names class 'wasp' but .*train has no such folder",
        ),
        ("ant_1.png ant", "ant_1.png 3", "val.txt names class '3'"),
        (
            "bee_1.png bee",
            "bee_9.png bee",
            "the line 'bee_9.png bee', which names no image in .*val with its class",
        ),
        ("bee_1.png bee", "bee_1.png", "the line 'bee_1.png', which names no image"),
        ("bee_1.png bee\n", "", "val.txt has no line for .*val/bee_1.png"),
        (" bee", " ant", "val.txt names no image of class 'bee'"),
    ],
)
def test_a_list_that_will_not_do_is_explained(
    tree: Path, tmp_path: Path, old: str, new: str, expected: str
) -> None:
    list_flat(tree, "val.txt")
    text = (tree / "val.txt").read_text()
    assert old in text
    (tree / "val.txt").write_text(text.replace(old, new))
    list_is_refused(tree, tmp_path, expected)


def list_is_refused(tree: Path, tmp_path: Path, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        load(str(tree), tmp_path / "root")
    assert str(tree) in one_sentence(error)
    assert not any((tmp_path / "root").glob("*"))


def test_an_unknown_class_of_a_tree_is_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names 'wasp' but .*train has no such folder") as error:
        load(str(tree), tmp_path / "root", classes=["ant", "wasp"])
    one_sentence(error)


# --------------------------------------------------------------------------- real images


def test_real_cifar10() -> None:
    data = load("cifar10", real("cifar10").parent)
    assert data.shape == (3, 32, 32) and len(data.train_labels) == 50_000
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    assert np.allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=1e-3)  # as published everywhere
    small = data.subset(n_train=1000, n_test=100)
    x, _ = epoch(Loader(small, batch_size=500))
    assert x.mean().abs() < 0.05 and (x.std() - 1).abs() < 0.05


def test_real_tree_is_decoded_to_the_prepared_pixels(tmp_path: Path) -> None:
    whole = load("tiny-imagenet-20", real("tiny-imagenet-20").parent)
    folder = real("tiny-imagenet-20-folder")
    name = sorted(p.name for p in (folder / "test").iterdir())[3]
    data = load(str(folder), tmp_path, classes=[name])
    first = sorted((folder / "test" / name).iterdir())[0]
    position = int(first.stem)  # files are numbered in the order of the arrays
    assert np.array_equal(data.test_images[0], whole.test_images[position])
    assert len(data.train_labels) == 500 and data.shape == (3, 64, 64)


def test_real_mnist() -> None:
    data = load("mnist", real("mnist").parent)
    assert data.shape == (1, 28, 28) and data.classes == tuple("0123456789")
    assert default_augment(data) == Augment(pad=3, flip=False)
