"""What a run would take, said before its data are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from modlib.cli import main
from modlib.data import Loader
from modlib.data.catalogue import counts, names, stand_in
from modlib.data.sources import SOURCES
from modlib.experiments import RECIPES
from modlib.experiments.plan import plan
from modlib.measure.memory import SavedBytes
from modlib.methods import E2EBP


def test_a_plan_counts_what_a_run_does() -> None:
    """Operations, parameters and autograd's bytes of a whole batch, against the step itself."""
    recipe = RECIPES["cifar10-e2ebp"]
    found, settings = plan(recipe, "smoke"), recipe.profiles["smoke"]
    data = settings.load(None)
    x, y = Loader(data).sample(settings.batch_size)
    net = recipe.network(settings, data, 0, x)
    (stage,) = E2EBP().stages(net, x)
    stage.train()
    with SavedBytes(net.parameters()) as memory:
        stage.step(x, y)
    assert found.saved_bytes == pytest.approx(memory.peak, rel=0.01)
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.state_bytes == 3 * 4 * found.parameters  # weights, gradients, momentum
    assert (found.train, found.test, found.auxiliary) == (512, 256, 0)
    forward = found.step_operations[0] / 3  # about: the first layer sends nothing back
    assert found.operations == pytest.approx(512 * 3 * forward + 256 * forward, rel=0.1)


@pytest.mark.parametrize(
    "name", ["imagenet-100-resnet18-modular-supcon", "tiny-imagenet-vit-greedy"]
)
def test_a_dry_run_needs_no_data_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODLIB_DATA", str(tmp_path))
    assert main(["run", name, "--profile", "gpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for line in ("data", "network", "operations", "memory", "time", "run", "on Colab"):
        assert f"\n  {line} " in out
    assert f"modlib run {name} --profile gpu" in out and "estimate" in out
    assert not list(tmp_path.iterdir())


def test_every_name_has_a_stand_in_and_its_counts() -> None:
    for name in names():
        if name in SOURCES:
            data, source = stand_in(name, 4), SOURCES[name]
            assert (data.name, data.shape) == (name, source.shape)
            assert len(data.classes) == source.classes
            assert counts(name) == (source.train, source.test)
            assert source.about.startswith(f"{source.train + source.test:,} ") or "million" in (
                source.about
            )
            if source.subset:
                assert (source.subset.train, source.subset.test) == counts(name)
                assert len(source.subset.classes) in (0, source.classes)
    with pytest.raises(ValueError, match="name is 'photos', of which nothing is known"):
        stand_in("photos")


def test_a_stand_in_has_the_size_that_is_asked_for() -> None:
    assert stand_in("imagenette", 4, size=224).shape == (3, 224, 224)
    assert stand_in("digits", 4, size=16).shape == (3, 16, 16)
