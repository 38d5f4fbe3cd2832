"""Modules on a shelf: what is loaded is what was saved, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import modlib
from modlib import zoo


def block(stride: int = 1, activation: type[nn.Module] = nn.ReLU, width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride, 1),
        nn.BatchNorm2d(width),
        activation(),
        nn.AdaptiveAvgPool2d(2),
    )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Sequential]:
    module = block()
    module(torch.randn(8, 3, 8, 8))  # running statistics
    with torch.no_grad():
        module[0].weight.mul_(1.5)
    path = tmp_path / "block.pt"
    zoo.save(module, path, name="block", input_shape=[3, 8, 8], behind="abc", task="none")
    return path, module


def test_a_module_comes_back_exactly(saved: tuple[Path, nn.Sequential]) -> None:
    path, module = saved
    fresh = block()
    card = zoo.load(path, fresh, behind="abc")
    assert card == zoo.card(path)
    assert (card.name, card.input_shape, card.output_shape) == ("block", (3, 8, 8), (4, 2, 2))
    assert card.notes == {"task": "none"}
    for a, b in zip(module.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert zoo.fingerprint(fresh, "abc") == card.fingerprint != zoo.fingerprint(fresh, "abd")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: block(stride=2), "computes something else"),
        (lambda: block(activation=nn.Tanh), "computes something else"),
        (lambda: block(width=5), "do not fit"),
        (lambda: nn.Linear(3, 3), "do not fit"),
    ],
)
def test_the_wrong_module_is_refused_and_left_alone(
    other: object, message: str, saved: tuple[Path, nn.Sequential]
) -> None:
    module = other()  # type: ignore[operator]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        zoo.load(saved[0], module)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_files_are_checked(saved: tuple[Path, nn.Sequential], tmp_path: Path) -> None:
    path, module = saved
    with pytest.raises(ValueError, match=r"block\.pt exists"):
        zoo.save(module, path, name="again", input_shape=[3, 8, 8])
    with pytest.raises(ValueError, match="trained behind modules with fingerprint 'abc'"):
        zoo.load(path, block(), behind="other")
    with pytest.raises(ValueError, match="there is no file"):
        zoo.load(tmp_path / "none.pt", block())
    content = path.read_bytes()
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or holds no module"):
        zoo.load(damaged, block())
    with pytest.raises(ValueError, match="does not run on inputs of shape"):
        zoo.save(module, tmp_path / "new.pt", name="new", input_shape=[1, 8, 8])
    assert not (tmp_path / "new.pt").exists()


def test_fingerprints_of_half_precision() -> None:
    module = nn.Linear(2, 2).bfloat16()
    before = zoo.fingerprint(module)
    with torch.no_grad():
        module.bias += 1
    assert len(before) == 16 and before != zoo.fingerprint(module)


def test_exchange_checks_shapes() -> None:
    net = modlib.partition(modlib.networks.mlp([64, 32, 16, 10]), modules=3)
    x = torch.zeros(2, 64)
    for k, module, message in (
        (1, nn.Linear(32, 8), r"gives \(8,\) where module 1 gave \(16,\)"),
        (1, nn.Linear(31, 16), "module: the new module 1 does not run"),
        (5, nn.Linear(1, 1), "no such module among 3"),
    ):
        with pytest.raises(ValueError, match=message):
            modlib.zoo.exchange(net, k, module, x)
    mixed = modlib.zoo.exchange(net, -1, nn.Linear(16, 3), x)
    assert mixed(x).shape == (2, 3) and net(x).shape == (2, 10)


def network(seed: int) -> modlib.ModularNetwork:
    return modlib.partition(modlib.networks.cnn((4, 8, 8), seed=seed), modules=3)


def test_a_network_comes_back_from_the_shelf(tmp_path: Path) -> None:
    net, other = network(seed=0), network(seed=1)
    cards = zoo.shelve(net, tmp_path / "shelf", name="net", input_shape=[3, 32, 32], task="none")
    assert [card.name for card in cards] == ["net-module0", "net-module1", "net-module2"]
    assert cards[2].behind == cards[1].fingerprint and cards[2].output_shape == (10,)
    assert zoo.take(other, tmp_path / "shelf", "net") == cards
    for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_what_a_file_would_not_give_back_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(ValueError, match=r"accuracy holds .* of type float64"):
        zoo.save(block(), path, name="a", input_shape=[3, 8, 8], accuracy=np.float64(0.9))
    sick = block()
    next(sick.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="a gives NaN or infinity"):
        zoo.save(sick, path, name="a", input_shape=[3, 8, 8])
    with pytest.raises(ValueError, match="give a name without folders"):
        zoo.shelve(network(seed=0), tmp_path, name="../a", input_shape=[3, 32, 32])
    with pytest.raises(ValueError, match="give a name without folders"):
        zoo.take(network(seed=0), tmp_path, "../a")
    assert not any(tmp_path.iterdir())
    shape = np.array([3, 8, 8])
    assert zoo.save(block(), path, name="a", input_shape=shape) == zoo.card(path)


def test_a_network_is_shelved_whole_or_not_at_all(tmp_path: Path) -> None:
    """Whatever module is refused: no file is there, and no folder that was not there before."""
    net, shape = network(seed=0), [3, 32, 32]
    with pytest.raises(ValueError, match="does not run on inputs of shape"):
        zoo.shelve(net, tmp_path / "shelf", name="net", input_shape=[1, 8, 8])
    with pytest.raises(ValueError, match="of type float64"):
        zoo.shelve(net, tmp_path / "shelf", name="net", input_shape=shape, accuracy=np.float64(1))
    next(net[2].parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="net-module2 gives NaN or infinity"):
        zoo.shelve(net, tmp_path / "shelf", name="net", input_shape=shape)
    assert not any(tmp_path.iterdir())


def test_a_shelf_is_never_overwritten(tmp_path: Path) -> None:
    zoo.shelve(network(seed=0), tmp_path, name="net", input_shape=[3, 32, 32])
    (tmp_path / "net-module0.pt").unlink()
    with pytest.raises(ValueError, match=r"net-module1\.pt exists"):
        zoo.shelve(network(seed=1), tmp_path, name="net", input_shape=[3, 32, 32])
    assert not (tmp_path / "net-module0.pt").exists()


def test_a_network_that_is_refused_in_the_middle_is_as_it_was(tmp_path: Path) -> None:
    zoo.shelve(network(seed=0), tmp_path, name="a", input_shape=[3, 32, 32])
    zoo.shelve(network(seed=1), tmp_path, name="b", input_shape=[3, 32, 32])
    (tmp_path / "b-module1.pt").replace(tmp_path / "a-module1.pt")
    other = network(seed=2)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="was trained behind modules with fingerprint"):
        zoo.take(other, tmp_path, "a")
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    with pytest.raises(ValueError, match="there is no file"):
        zoo.take(other, tmp_path, "c")
