"""What makes the fast CIFAR-10 recipes fast: each ingredient against an independent computation."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import modlib
from modlib.data import Augment, Dataset, Loader
from modlib.measure.angles import KeepStages
from modlib.methods import adamw, sgd
from modlib.networks import whitened_cnn
from modlib.networks.whitened import Whitening
from modlib.objectives import AuxiliaryClassifier, CrossEntropy


def images(n: int = 64, side: int = 12) -> torch.Tensor:
    """Smooth pictures: neighbouring pixels and channels are alike."""
    noise = torch.randn(n, 3, side + 2, side + 2, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.avg_pool2d(noise, 3, 1)
    return smooth + smooth.mean(1, keepdim=True)


def small(**options: Any) -> nn.Sequential:
    return whitened_cnn(images(side=16), (8, 8, 16), seed=0, **options)


# --- whitening ------------------------------------------------------------------------------------


def test_whitened_patches_have_the_identity_as_second_moment() -> None:
    x = images()
    h = Whitening(x, floor=0.0)(x)
    half = h[:, :12].permute(0, 2, 3, 1).reshape(-1, 12).double()
    assert torch.allclose(half.T @ half / len(half), torch.eye(12).double(), atol=1e-3)
    assert torch.allclose(h[:, 12:], -h[:, :12], atol=1e-5)
    raw = (
        nn.functional.unfold(x, 2).transpose(1, 2).reshape(-1, 12)
    )  # and they were not white before
    assert (raw.T @ raw / len(raw) - torch.eye(12)).abs().max() > 0.1


def test_the_whitening_stays_and_its_bias_learns() -> None:
    layer = Whitening(images())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert "weight" in layer.state_dict()


def test_the_whitening_refuses_images_smaller_than_a_patch() -> None:
    with pytest.raises(ValueError, match="sides of 3 pixels or more"):
        Whitening(torch.zeros(4, 3, 2, 2), patch=3)


# --- the network ----------------------------------------------------------------------------------


def test_both_boundaries_compute_the_same() -> None:
    x = images(4, 16)
    before, after = (small(boundary=side).eval() for side in ("before", "after"))
    assert torch.allclose(before(x), after(x), atol=1e-5)


def test_a_unit_starts_by_passing_its_input_on() -> None:
    (convolution,) = [m for m in small().conv3 if isinstance(m, nn.Conv2d)]  # type: ignore[union-attr]
    x = torch.randn(1, 8, 5, 5)
    assert torch.allclose(convolution(x)[:, :8], x, atol=1e-6)


def test_it_is_cut_and_trained_by_local_learning(digits: Dataset) -> None:
    data = modlib.data.load("digits", size=16).subset(n_train=256, n_test=64)
    x, _ = Loader(data).sample(200)
    net = modlib.partition(
        whitened_cnn(x, (8, 16), seed=0, boundary="after"), ["conv3", "features"]
    )
    history = modlib.fit(net, modlib.methods.LocalLearning(), data, epochs=1, progress=False)
    assert len(history.rows[0]["losses"]) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [({"boundary": "inside"}, "boundary"), ({"stride": 0}, "stride"), ({"classes": 0}, "classes")],
)
def test_the_network_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**options)


def test_the_network_refuses_images_that_its_blocks_would_halve_away() -> None:
    with pytest.raises(ValueError, match="too few for 4 blocks"):
        whitened_cnn(images(side=12), (4, 4, 4, 4))


# --- alternating flip -----------------------------------------------------------------------------


def mirrored(data: Dataset, flip: Any, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """For each image, in the data set's order: was it mirrored?"""
    loader = Loader(data, batch_size=64, augment=Augment(pad=0, flip=flip), drop_last=False)
    found = np.zeros(loader.n, dtype=bool)
    for x, y in loader.epoch(seed, epoch):
        found[y.numpy()] = (
            x[:, 0, 0, 0] > x[:, 0, 0, -1]
        ).numpy()  # brighter at the right, unless mirrored
    return found


def ramps(n: int = 300) -> Dataset:
    """Images that grow brighter to the right; each is its own class, so that a label names it."""
    row = np.array([0, 100, 200, 250], dtype=np.uint8)
    x = np.broadcast_to(row[None, None, :, None], (n, 4, 4, 1)).copy()
    y = np.arange(n)
    return Dataset("ramps", x, y, x[:2], y[:2], tuple(map(str, range(n))))


def test_alternating_flips_show_each_image_both_ways_in_any_two_epochs() -> None:
    data = ramps()
    epochs = [mirrored(data, "alternate", seed=3, epoch=e) for e in range(3)]
    assert (epochs[0] != epochs[1]).all() and (epochs[0] == epochs[2]).all()
    assert 0.35 < epochs[0].mean() < 0.65
    assert (mirrored(data, "alternate", seed=4, epoch=0) != epochs[0]).any()
    coins = [mirrored(data, True, seed=3, epoch=e) for e in range(2)]
    assert (
        0.35 < (coins[0] == coins[1]).mean() < 0.65
    )  # where random flips repeat themselves half the time


def test_an_unknown_flip_is_refused() -> None:
    with pytest.raises(ValueError, match="flip is 'alternating'; give True, False or 'alternate'"):
        Augment(flip="alternating")  # type: ignore[arg-type]


# --- smoothing, decay, test-time flip -------------------------------------------------------------


def test_smoothing_mixes_the_label_with_all_classes() -> None:
    h = torch.randn(5, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0])
    p = h.log_softmax(1).numpy()
    target = 0.8 * np.eye(4)[y.numpy()] + 0.2 / 4
    oracle = -(target * p).sum(1).mean()
    assert float(CrossEntropy(0.2)(h, y)) == pytest.approx(oracle, rel=1e-12)
    head = AuxiliaryClassifier(nn.Identity(), smoothing=0.2)
    assert float(head(h, y)) == pytest.approx(oracle, rel=1e-12)
    with pytest.raises(ValueError, match=r"smoothing=1\.0: give a share"):
        CrossEntropy(1.0)


SMOOTHED = {
    "layerwise_greedy": modlib.methods.layerwise_greedy,
    "decoupled_greedy": modlib.methods.decoupled_greedy,
    "cascade": modlib.methods.cascade,
    "local_error_signals": modlib.methods.local_error_signals,
    "infopro": partial(modlib.methods.infopro, form="softmax"),
    "AugLocal": modlib.methods.AugLocal,
}


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_reaches_the_classifiers_and_the_output(name: str) -> None:
    """A loss on labels, plain and smoothed, differs by what the other classes' share adds."""
    x, y = images(4, 16), torch.tensor([0, 1, 2, 0])
    net = modlib.partition(small(boundary="after"), ["conv3"])
    plain, smooth = (
        [o for stage in SMOOTHED[name](smoothing=s).stages(net, x) for o in stage.objectives]
        for s in (0.0, 0.2)
    )
    for one, other in zip(plain, smooth, strict=True):
        for parameter in one.parameters():
            nn.init.normal_(parameter)  # a classifier that starts at zero would not notice
        other.load_state_dict(one.state_dict())
    logits = torch.randn(4, 10, dtype=torch.float64)
    output = float(smooth[1](logits, y))
    target = 0.8 * nn.functional.one_hot(y, 10) + 0.02
    assert output == pytest.approx(float(-(target * logits.log_softmax(1)).sum(1).mean()))
    h = net[0].eval()(x).detach()
    values = [float(o.eval().local(h, y, x).detach()) for o in (plain[0], smooth[0])]
    assert values[0] != values[1]


def test_adam_decays_by_the_same_share_at_every_rate() -> None:
    for rate in (1e-3, 1e-1):
        layer = nn.Linear(3, 2)
        before = [p.detach().clone() for p in layer.parameters()]
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        adamw(rate, weight_decay=0.01)(layer.parameters()).step()
        for old, new in zip(before, layer.parameters(), strict=True):
            assert torch.allclose(new, 0.99 * old, rtol=1e-5)


def test_copies_of_whitened_units_end_with_the_maps_of_the_units_they_copy() -> None:
    """31×31 → 15 → 7 → 3: AugLocal's classifiers pool by the whole factor at once."""
    net = modlib.partition(
        whitened_cnn(images(4, 32), (4, 8, 16), seed=0, boundary="after"), ["conv2", "conv3"]
    )
    x = images(4, 32)
    first, *_ = modlib.methods.AugLocal(depth=2).stages(net, x)[0].objectives
    h = net[0](x)
    maps = [tuple(h.shape[1:])]
    for unit in list(first.network.children())[:2]:  # type: ignore[union-attr]
        h = unit(h)
        maps.append(tuple(h.shape[1:]))
    assert maps == [(4, 15, 15), (8, 7, 7), (16, 3, 3)]
    assert first.logits(net[0](x)).shape == (4, 10)


def test_decoupled_decay_does_not_grow_with_the_rate() -> None:
    """One step without gradient: a weight loses its share of decay, whatever the rate; biases too."""
    for rate in (0.1, 2.0):
        layer = nn.Linear(3, 2)
        make = sgd(rate, momentum=0.0, weight_decay=0.01, decoupled=True, bias_rate=7.0)
        before = [p.detach().clone() for p in layer.parameters()]
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        make(layer.parameters()).step()
        for old, new in zip(before, layer.parameters(), strict=True):
            assert torch.allclose(new, 0.99 * old, rtol=1e-5)


def test_biases_take_larger_steps() -> None:
    layer = nn.Linear(3, 2)
    optimizer = sgd(0.1, momentum=0.0, weight_decay=0.0, bias_rate=10.0)(layer.parameters())
    before = [p.detach().clone() for p in layer.parameters()]
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [
        float((old - new.detach()).mean())
        for old, new in zip(before, layer.parameters(), strict=True)
    ]
    assert moved == pytest.approx([0.1, 1.0], rel=1e-5)


def test_rates_of_both_groups_follow_the_schedule(digits: Dataset) -> None:
    net = modlib.partition(modlib.networks.mlp([64, 16, 10], seed=0), modules=2)
    method = KeepStages(modlib.methods.E2EBP(optimizer=sgd(0.05, decoupled=True, bias_rate=4.0)))
    data = digits.subset(n_train=256, n_test=64)
    modlib.fit(net, method, data, epochs=1, schedule=lambda progress: 0.5, progress=False)
    (optimizer,) = method.kept[0].optimizers
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.1])


def test_flipped_evaluation_averages_the_logits_of_both_sides(digits: Dataset) -> None:
    net = modlib.networks.mlp([64, 32, 10], seed=0)
    modlib.fit(net, modlib.methods.E2EBP(), digits, epochs=1, progress=False)
    x, y = Loader(digits, "test", shuffle=False).sample(len(digits.test_labels))
    with torch.no_grad():
        logits = (net(x) + net(x.flip(3))) / 2
    found = modlib.evaluate(net, digits, flip=True)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-4)
    assert found.accuracy != modlib.evaluate(net, digits).accuracy


def test_vectors_have_no_mirror_image() -> None:
    x, y = np.zeros((4, 3), dtype=np.float32), np.array([0, 1, 0, 1])
    data = Dataset("vectors", x, y, x, y, ("a", "b"))
    with pytest.raises(ValueError, match="flip=True mirrors images"):
        modlib.evaluate(modlib.networks.mlp([3, 2]), data, flip=True)
