r"""Modules on a shelf: save a trained module with what must hold where it is used again, and check it.

A module's file holds its weights and a *card*: the shapes that it takes and gives, where it came from,
the fingerprint of what it was trained behind, and its outputs on a probe. ``load`` fills a module that
you have built and refuses it unless it gives those outputs on that probe: right weights in the wrong
architecture (another stride, another activation) do not pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modlib.network import ModularNetwork, evaluating
from modlib.training import checkpoints

__all__ = [
    "Card",
    "card",
    "exchange",
    "fingerprint",
    "load",
    "save",
    "shelve",
    "take",
]

_PROBES = 4  # random inputs on which a module's outputs are kept
_ROUNDING = 1e-3  # of the outputs' size: what another device or precision may change


@dataclass(frozen=True)
class Card:
    """What is known of a saved module.

    Attributes:
        name: what to call it.
        input_shape, output_shape: without N.
        behind: fingerprint of the modules it was trained behind; "" for a first module.
        fingerprint: of those and of itself: give it as ``behind`` of what is trained on top.
        notes: plain data: recipe, commit, task, accuracy.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "layer.pt"
    >>> kept = save(nn.Linear(3, 2), path, name="layer", input_shape=[3], task="digits")
    >>> kept.name, kept.output_shape, kept.notes
    ('layer', (2,), {'task': 'digits'})
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    behind: str
    fingerprint: str
    notes: dict[str, Any]


def fingerprint(module: nn.Module, behind: str = "") -> str:
    """16 hexadecimal digits that change when a weight, a buffer, or what it stands behind changes.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> fingerprint(a) == fingerprint(a), fingerprint(a) == fingerprint(b)
    (True, False)
    """
    digest = hashlib.sha256(behind.encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save(
    module: nn.Module,
    path: str | Path,
    *,
    name: str,
    input_shape: Iterable[int],
    behind: str = "",
    **notes: Any,
) -> Card:
    """Write a module and its card to a file, whole or not at all.

    Args:
        module: trained; saved from wherever it is.
        path: the file; it must not exist.
        name: what to call it.
        input_shape: of one input, without N.
        behind: the fingerprint of what gave the inputs that it was trained on.
        notes: plain data to keep with it, such as ``recipe="..."``.

    Raises:
        ValueError: the file exists, the module does not run on inputs of that shape or gives NaN or
            infinity, or a note is no plain data.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "layer.pt"
    >>> trained = nn.Linear(3, 2)
    >>> card = save(trained, path, name="layer", input_shape=[3], task="digits")
    >>> fresh = nn.Linear(3, 2)
    >>> load(path, fresh) == card, bool((fresh.weight == trained.weight).all())
    (True, True)
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"path: {path} exists; give another name, or move it away.")
    state = _packed(module, name, tuple(int(side) for side in input_shape), behind, notes)
    checkpoints.save_whole(state, path)
    return Card(**state["card"])


def _packed(
    module: nn.Module, name: str, shape: tuple[int, ...], behind: str, notes: dict[str, Any]
) -> checkpoints.State:
    """What a module's file holds."""
    probe = torch.randn(_PROBES, *shape, generator=torch.Generator().manual_seed(0))
    outputs = _outputs(module, probe, f"input_shape: {name}")
    if not bool(outputs.isfinite().all()):
        raise ValueError(f"module: {name} gives NaN or infinity; save one that works.")
    card = Card(name, shape, tuple(outputs.shape[1:]), behind, fingerprint(module, behind), notes)
    weights = {key: value.detach().cpu() for key, value in module.state_dict().items()}
    state = {"card": asdict(card), "weights": weights, "probe": probe, "outputs": outputs}
    checkpoints.check_plain(state)
    return state


def load(path: str | Path, module: nn.Module, *, behind: str | None = None) -> Card:
    """Fill a module with saved weights, after checking that it then computes what was saved.

    Args:
        path: a file that ``save`` wrote.
        module: built as the saved one was; its own weights are replaced.
        behind: the fingerprint of what will give it its inputs; None does not compare.

    Returns:
        The card.

    Raises:
        ValueError: there is no such file, it is damaged, the weights do not fit, the outputs differ, or it
            was trained behind other modules; the module is then as it was.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "layer.pt"
    >>> _ = save(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), path, name="layer", input_shape=[2])
    >>> load(path, nn.Sequential(nn.Linear(2, 2), nn.Tanh()))    # the weights fit, the activation does not
    Traceback (most recent call last):
    ValueError: module: with the weights of 'layer' it computes something else than was saved; ...
    """
    state = _read(Path(path))
    card = Card(**state["card"])
    if behind is not None and behind != card.behind:
        raise ValueError(
            f"behind: {card.name!r} was trained behind modules with fingerprint {card.behind!r}, not "
            f"{behind!r}; use it behind those, or give behind=None and train it again."
        )
    kept = {key: value.clone() for key, value in module.state_dict().items()}
    try:
        checkpoints.fill(module, state["weights"])
    except RuntimeError as error:
        checkpoints.fill(module, kept)
        raise ValueError(
            f"module: the weights of {card.name!r} do not fit it "
            f"({' '.join(str(error).split())[:200]}); build it as it was built."
        ) from error
    try:
        found, wanted = _outputs(module, state["probe"], f"module: {card.name}"), state["outputs"]
        if found.shape != wanted.shape or not _close(found, wanted):
            raise ValueError(
                f"module: with the weights of {card.name!r} it computes something else than was "
                "saved; build it with the same strides, activations and other settings."
            )
    except ValueError:
        checkpoints.fill(module, kept)
        raise
    return card


def card(path: str | Path) -> Card:
    """The card of a saved module, without loading it into one.

    Raises:
        ValueError: there is no such file, or it is damaged.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "layer.pt"
    >>> saved = save(nn.Linear(3, 2), path, name="layer", input_shape=[3])
    >>> card(path) == saved
    True
    """
    return Card(**_read(Path(path))["card"])


def shelve(
    net: ModularNetwork,
    folder: str | Path,
    *,
    name: str,
    input_shape: Iterable[int],
    **notes: Any,
) -> list[Card]:
    """Save every module of a network, each behind those before it, as ``NAME-module0.pt`` and so on.

    Args:
        net: trained.
        folder: the shelf; it is made if it is not there.
        name: of the network.
        input_shape: of one input, without N.
        notes: plain data to keep with each module.

    Raises:
        ValueError: one of the files exists, the name is a path, or what ``save`` raises of any module;
            then nothing is written.

    >>> import modlib, tempfile
    >>> net, other = (modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2) for _ in range(2))
    >>> folder = tempfile.mkdtemp()
    >>> cards = shelve(net, folder, name="digits", input_shape=[64])
    >>> cards[1].behind == cards[0].fingerprint, take(other, folder, "digits") == cards
    (True, True)
    """
    paths = _paths(net, folder, name)
    for path in paths:
        if path.exists():
            raise ValueError(f"name: {path} exists; give another name, or move it away.")
    states, behind, shape = [], "", tuple(int(side) for side in input_shape)
    for path, module in zip(paths, net, strict=True):
        states.append(_packed(module, path.stem, shape, behind, notes))
        behind, shape = (states[-1]["card"][key] for key in ("fingerprint", "output_shape"))
    for path, state in zip(paths, states, strict=True):  # all are sound
        checkpoints.save_whole(state, path)
    return [Card(**state["card"]) for state in states]


def take(net: ModularNetwork, folder: str | Path, name: str) -> list[Card]:
    """Fill a network with the modules that ``shelve`` saved under this name, each behind those before it.

    Args:
        net: built and cut as the saved one was; its own weights are replaced.
        folder: the shelf.
        name: of the network.

    Returns:
        The cards, first module first.

    Raises:
        ValueError: what ``load`` raises; the network is then as it was.

    >>> import modlib, tempfile
    >>> net, other = (modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2) for _ in range(2))
    >>> folder, x = tempfile.mkdtemp(), torch.rand(5, 64)
    >>> _ = shelve(net, folder, name="digits", input_shape=[64])
    >>> [card.name for card in take(other, folder, "digits")]
    ['digits-module0', 'digits-module1']
    >>> torch.allclose(other(x), net(x))
    True
    """
    kept = {key: value.clone() for key, value in net.state_dict().items()}
    cards, behind = [], ""
    try:
        for path, module in zip(_paths(net, folder, name), net, strict=True):
            cards.append(load(path, module, behind=behind))
            behind = cards[-1].fingerprint
    except ValueError:
        checkpoints.fill(net, kept)
        raise
    return cards


def _paths(net: ModularNetwork, folder: str | Path, name: str) -> list[Path]:
    if not name or Path(name).name != name:
        raise ValueError(f"name={name!r}: give a name without folders; those belong in folder.")
    return [Path(folder) / f"{name}-module{k}.pt" for k in range(len(net))]


def exchange(net: ModularNetwork, k: int, module: nn.Module, x: Tensor) -> ModularNetwork:
    """The network with module k replaced; the others are shared with ``net``, which stays as it is.

    Args:
        net: a network cut into modules.
        k: the position, counted from 0; negative ones from the end.
        module: takes and gives what module k does. A last module may give something else.
        x: a batch (N, ...) of the network's input, to try it on.

    Raises:
        ValueError: there is no module k, the new one does not run there, or it gives another shape.

    >>> import modlib
    >>> a, b = (modlib.partition(modlib.networks.mlp([64, 32, 10]), modules=2) for _ in range(2))
    >>> mixed = exchange(a, 0, b[0], torch.zeros(2, 64))
    >>> mixed[0] is b[0], mixed[1] is a[1]
    (True, True)
    """
    if not -len(net) <= k < len(net):
        raise ValueError(f"k={k}: there is no such module among {len(net)}.")
    k %= len(net)
    with evaluating(net):
        inputs = net[:k](x)
        wanted = net[k](inputs).shape
    found = tuple(_outputs(module, inputs, f"module: the new module {k}").shape)
    if found != tuple(wanted) and k < len(net) - 1:
        raise ValueError(
            f"module: it gives {found[1:]} where module {k} gave {tuple(wanted[1:])}, which the next "
            "module takes; build it for that shape."
        )
    new = ModularNetwork([])
    new.extend([*net[:k], module, *net[k + 1 :]])
    new.names = net.names
    return new


def _outputs(module: nn.Module, probe: Tensor, what: str) -> Tensor:
    reference = next(module.parameters(), torch.empty(0))
    try:
        with evaluating(module):
            outputs: Tensor = module(probe.to(reference)).float().cpu()
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{what} does not run on inputs of shape {tuple(probe.shape[1:])} "
            f"({str(error).splitlines()[0]})."
        ) from error
    return outputs


def _close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) <= _ROUNDING * (float(b.norm()) + 1e-12)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"path: there is no file {path}; save a module there first.")
    try:
        state = checkpoints.read_whole(path)
        if not {"card", "weights", "probe", "outputs"} <= set(state):
            raise KeyError("card")
    except Exception as error:  # whatever a damaged file makes its reader stumble over
        raise ValueError(
            f"path: {path} is damaged or holds no module of this library; it was left as it is."
        ) from error
    state["card"] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in state["card"].items()
    }
    return state
