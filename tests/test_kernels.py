"""Kernels against NumPy, their bounds, and the feature map that a network keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from modlib import kernels
from modlib.kernels import FeatureMap, Gaussian, Kernel, gram, ideal_gram

NAMES = ["relu", "tanh", "sigmoid", "relu-pool", "cosine"]
FLOORS = {"relu": 0.0, "tanh": -1.0, "sigmoid": 0.0, "relu-pool": 0.0, "cosine": -1.0}


def features(u: NDArray[np.float64], kernel: str) -> NDArray[np.float64]:
    """φ(u) as METHODS 1.2 writes it, one image at a time."""
    rows = []
    for image in u:
        if kernel == "relu-pool":
            channels, height, width = image.shape
            act = np.maximum(image, 0).reshape(channels, height // 4, 4, width // 4, 4).mean((2, 4))
        else:
            act = {
                "relu": np.maximum(image, 0),
                "tanh": np.tanh(image),
                "sigmoid": 1 / (1 + np.exp(-image)),
                "cosine": image,
            }[kernel]
        flat = act.reshape(-1)
        rows.append(flat / max(np.sqrt((flat * flat).sum()), 1e-12))
    return np.array(rows)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name in NAMES
        for shape in ((7,), (2, 4, 8))
        if (name, shape) != ("relu-pool", (7,))
    ],
)
def test_gram_is_the_product_of_features(name: str, shape: tuple[int, ...]) -> None:
    h = np.random.default_rng(0).normal(size=(6, *shape))
    expected = features(h, name) @ features(h, name).T
    np.testing.assert_allclose(
        gram(torch.tensor(h), name).numpy(), expected, rtol=1e-12, atol=1e-14
    )
    single = gram(torch.tensor(h, dtype=torch.float32), name).numpy()
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-6)
    mapped = FeatureMap(name)(torch.tensor(h)).numpy()
    np.testing.assert_allclose(mapped, features(h, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("width", [0.3, 1.0, 7.0])
def test_gaussian_gram(width: float) -> None:
    h = np.random.default_rng(0).normal(size=(5, 2, 3, 3))
    squares = ((h[:, None] - h[None]) ** 2).sum((2, 3, 4))
    expected = np.exp(-squares / (2 * width**2))
    np.testing.assert_allclose(Gaussian(width).gram(torch.tensor(h)).numpy(), expected, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100.0), name=st.sampled_from(NAMES[:3]))
def test_no_similarity_leaves_floor_and_ceiling(seed: int, scale: float, name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = scale * torch.randn(8, 3, generator=generator, dtype=torch.float64)
    kernel = kernels.get(name)
    values = kernel.gram(h)
    assert values.min() >= kernel.floor - 1e-12
    assert values.max() <= kernel.ceiling + 1e-12


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("relu", [[1.0, 0.0], [0.0, 1.0]]),
        ("tanh", [[1.0, 1.0], [-1.0, -1.0]]),
        ("sigmoid", [[50.0, -50.0], [-50.0, 50.0]]),
        ("cosine", [[1.0, 2.0], [-1.0, -2.0]]),
    ],
)
def test_the_floor_is_reached(name: str, pair: list[list[float]]) -> None:
    value = gram(torch.tensor(pair, dtype=torch.float64), name)
    assert kernels.get(name).floor == FLOORS[name]
    assert float(value[0, 1]) == pytest.approx(FLOORS[name], abs=1e-12)
    assert float(value[0, 0]) == pytest.approx(1.0, abs=1e-12)


def test_ideal_gram() -> None:
    y = torch.tensor([2, 0, 2])
    expected = {0.0: [[1, 0, 1], [0, 1, 0], [1, 0, 1]], -1.0: [[1, -1, 1], [-1, 1, -1], [1, -1, 1]]}
    for kernel in (*NAMES, Gaussian(2.0)):
        floor = kernels.get(kernel).floor
        assert ideal_gram(y, kernel).tolist() == expected[floor]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_unit_vectors(name: str, dtype: torch.dtype) -> None:
    """A norm in float16 would overflow, or turn an output of zeros into NaN."""
    h = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2000
    h[0] = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = FeatureMap(name)(h.to(dtype))
    assert out.isfinite().all()
    norms = out.float().norm(dim=1)
    expected = torch.tensor([0.0 if name != "sigmoid" else 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(norms, expected, rtol=1e-2, atol=1e-6)


def test_a_dead_output_gives_no_infinite_gradient() -> None:
    h = torch.tensor([[-1.0, -2.0], [1.0, 0.5]], requires_grad=True)
    gram(h, "relu").sum().backward()
    assert h.grad is not None
    assert h.grad.isfinite().all()
    assert h.grad[0].tolist() == [0.0, 0.0]


def test_the_feature_map_has_nothing_to_train() -> None:
    layer = FeatureMap("tanh")
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert (layer.floor, repr(layer)) == (-1.0, "FeatureMap('tanh')")


def test_kernels_are_compared_by_what_they_compute() -> None:
    assert kernels.get("relu") == Kernel("relu", 0.0) != kernels.get("tanh")
    assert Gaussian(1.0) == Gaussian(1) != Gaussian(2.0)
    assert kernels.get(Gaussian(3.0)) == Gaussian(3.0)


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf")])
def test_a_width_must_be_finite_and_positive(width: float) -> None:
    with pytest.raises(ValueError, match="finite width above 0"):
        Gaussian(width)


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel='gauss' is unknown; choose from relu, tanh"):
        kernels.get("gauss")
    with pytest.raises(ValueError, match="no finite feature map"):
        FeatureMap(Gaussian(1.0))
    with pytest.raises(TypeError, match="no finite basis"):
        Gaussian(1.0).features(torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 3, 8)])
def test_pooling_needs_maps_of_four_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="use kernel 'relu' there"):
        FeatureMap("relu-pool")(torch.zeros(shape))
