"""Apple's GPUs (device "mps") have no float64: what needs it works on the CPU.

There is none here, so a tensor pretends to lie on one: it says so, refuses float64, and will not be
mixed with a tensor on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import modlib
from modlib import few_labels, objectives, transfer
from modlib.certificates import Deviations, best_head, gap_from_features
from modlib.objectives import hsic, nhsic


class OnMPS(Tensor):
    """A tensor on the CPU that says that it lies on "mps" and behaves so."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("mps")
        with torch._C.DisableTorchFunctionSubclass():
            given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
            if func is not Tensor.to and any(t.dim() and type(t) is Tensor for t in given):
                raise RuntimeError("Expected all tensors to be on the same device, mps:0 and cpu")
            plain_args, plain_kwargs = tree_map(_plain, (args, kwargs or {}))
            out = func(*plain_args, **plain_kwargs)
            # When a move to the CPU converts as well, torch converts first, on the device.
            made = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
            if any(t.dtype == torch.float64 for t in made):
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        moved = func is Tensor.cpu or (func is Tensor.to and "cpu" in map(str, args[1:]))
        return out if moved else tree_map(on_mps, out)


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, OnMPS) else value


def on_mps(value: Any) -> Any:
    """The same numbers, there."""
    return value.as_subclass(OnMPS) if isinstance(value, Tensor) else value


def test_the_pretended_device_is_strict() -> None:
    a = on_mps(torch.eye(2))
    assert a.device.type == "mps" and (a @ a).device.type == "mps" and a.cpu().device.type == "cpu"
    assert a.cpu().double().dtype == torch.float64 and isinstance(a.tolist(), list)
    for wrong in (
        lambda: a.double(),
        lambda: a.to(torch.float64),
        lambda: a.to("cpu", torch.float64),
        lambda: torch.zeros_like(a, dtype=torch.float64),
        lambda: a.sum(dtype=torch.float64),
        lambda: a + torch.eye(2),
    ):
        with pytest.raises((TypeError, RuntimeError), match=r"float64|same device"):
            wrong()


FEATURES = torch.nn.functional.normalize(
    torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=1
)
LABELS = torch.arange(40) % 4
UNIT = FEATURES[:4]
WEIGHT = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

USES: dict[str, Callable[..., Any]] = {
    "hsic": lambda x, y, a, w: float(hsic(x, x * 2, 5.0)),
    "nhsic": lambda x, y, a, w: float(nhsic(x, x.square(), 5.0)),
    "HSIC": lambda x, y, a, w: float(objectives.HSIC(classes=4).local(x, y, x * 2)),
    "anchor_bound": lambda x, y, a, w: few_labels.anchor_bound(a, x, y).counted,
    "one_label_bound": lambda x, y, a, w: few_labels.one_label_bound((x, y), (x, y)),
    "nearest_anchor": lambda x, y, a, w: few_labels.nearest_anchor((x, y), (x, y)),
    "logistic_head": lambda x, y, a, w: few_labels.logistic_head((x, y), (x, y)),
    "centred_alignment": lambda x, y, a, w: transfer.centred_alignment(x, y),
    "log_evidence": lambda x, y, a, w: transfer.log_evidence(x, y),
    "leep": lambda x, y, a, w: transfer.leep(torch.softmax(x, 1), y),
    "entropy": lambda x, y, a, w: transfer.negative_conditional_entropy(y, y.flip(0)),
    "best_head": lambda x, y, a, w: best_head(x, y, penalty=0.1).risk,
    "Deviations": lambda x, y, a, w: Deviations.of(x, y, -1.0).within.tolist(),
    "gap_from_features": lambda x, y, a, w: gap_from_features(x, y, w, None, -1.0).gap,
}


@pytest.mark.parametrize("use", USES)
def test_what_needs_float64_works_on_the_cpu(use: str) -> None:
    expected = USES[use](FEATURES, LABELS, UNIT, WEIGHT)
    assert USES[use](*map(on_mps, (FEATURES, LABELS, UNIT, WEIGHT))) == expected


def test_nothing_converts_to_float64_but_through_the_cpu() -> None:
    """Outside the certificates, which compute on the CPU, one function makes float64 of a tensor."""
    package = Path(modlib.__file__).parent
    rest = [f for f in package.rglob("*.py") if f.parent.name != "certificates"]
    found = [f"{f.name}: {line.strip()}" for f in rest for line in f.read_text().splitlines()]
    direct = [
        line
        for line in found
        if re.search(r"(?<!cpu\(\))\.double\(\)|torch\.(float64|double)", line)
    ]
    assert sorted(direct) == [
        "few_labels.py: delta = torch.linspace(-1.0, 1.0, 401, dtype=torch.float64, device=own.device)",
        'kernels.py: return (h.cpu() if h.device.type == "mps" else h).double()',
        "messages.py: torch.float64,",  # one of the types that a message may name
    ]
