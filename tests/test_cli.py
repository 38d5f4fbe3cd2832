"""The ``modlib`` command: help that reads like documentation, plain data, and one line for errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from interrupted import command, long_recipe

from modlib import methods
from modlib.cli import main
from modlib.experiments import RECIPES, run
from modlib.methods import __all__ as all_methods

COMMANDS = ["compare", "run", "data", "audit"]
CATEGORIES = ["end-to-end", "weakly modular", "modular"]


def call(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as end:  # argparse's own way out
        return int(end.code or 0)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command; exit status, standard output, standard error."""

    def run_command(*arguments: str) -> tuple[int, str, str]:
        status = call(*arguments)
        out, err = capsys.readouterr()
        return status, out, err

    return run_command


# --- help -----------------------------------------------------------------------------------------


def test_help_says_where_to_start(said: Any) -> None:
    status, out, err = said("--help")
    assert (status, err) == (0, "")
    for name in COMMANDS:
        assert f"modlib {name}" in out
    assert "Start here:" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_its_options_and_gives_an_example(name: str, said: Any) -> None:
    status, out, err = said(name, "--help")
    assert (status, err) == (0, "")
    assert f"modlib {name} " in out.split("xample", 1)[1]
    options = [line for line in out.splitlines() if line.startswith("  -")]
    assert len(options) >= 2
    for i, line in enumerate(out.splitlines()):
        if line.startswith("  -"):  # an explanation beside it or below
            following = out.splitlines()[i + 1] if i + 1 < len(out.splitlines()) else ""
            assert len(line.split("  ")) > 2 or following.startswith("        "), line


def test_the_examples_in_the_help_are_commands_that_exist(said: Any) -> None:
    for page in ([], *([name] for name in COMMANDS)):
        _, out, _ = said(*page, "--help")
        for line in out.splitlines():
            words = line.replace("Example:", "").replace("Examples:", "").split()
            if words[:1] == ["modlib"] and "..." not in line and "COMMAND" not in line:
                arguments = [w for w in words[1:] if not w.startswith("~")]
                assert arguments[0] in COMMANDS
                if arguments[0] == "run":
                    assert arguments[1] == "list" or arguments[1] in RECIPES
                if arguments[0] == "audit":
                    assert arguments[1] in all_methods


def test_without_a_command_the_usage_is_shown(said: Any) -> None:
    status, out, err = said()
    assert (status, out) == (2, "")
    assert err.startswith("usage: modlib")


# --- what the commands print ----------------------------------------------------------------------


def test_compare_prints_plain_data_for_machines(said: Any) -> None:
    status, out, err = said("compare", "--data", "digits", "--json", "--epochs", "1")
    assert (status, err) == (0, "")
    rows = json.loads(out)["rows"]
    assert [row["category"] for row in rows] == CATEGORIES
    for row in rows:
        assert set(row) == {"method", "category", "test_accuracy", "wall_s", "peak_saved_bytes"}
        assert row["method"] in all_methods
        assert 0 <= row["test_accuracy"] <= 1
        assert row["wall_s"] > 0
        assert isinstance(row["peak_saved_bytes"], int)
    peak = {row["category"]: row["peak_saved_bytes"] for row in rows}
    assert peak["weakly modular"] < peak["end-to-end"]


def test_compare_prints_a_table_for_people(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"method": "M", "category": "modular", "test_accuracy": 0.5, "wall_s": 1.0}
    rows = [row | {"peak_saved_bytes": 3 * 2**20}]
    monkeypatch.setattr("modlib.experiments.compare", lambda *args, **options: rows)
    status, out, _ = said("compare")
    assert status == 0
    assert "M               modular                 50.0%    1.0 s      3.00 MiB" in out


def test_audit_prints_every_method(said: Any) -> None:
    status, out, _ = said("audit", "--json")
    found = json.loads(out)["audits"]
    assert status == 0
    classes = {name for name in all_methods if isinstance(getattr(methods, name), type)}
    helpers = {"Method", "Stage", "KeepHeads", "Ensemble", "Only", "ExactGradient"}
    assert {row["method"] for row in found} == classes - helpers
    assert {row["category"] for row in found} == set(CATEGORIES)
    status, out, _ = said("audit", "LocalLearning", "--modules", "2")
    assert status == 0
    assert "LocalLearning, 2 modules, measured on a real step" in out
    assert "isolated              yes" in out
    assert "later weights       no, no" in out


def test_lists(said: Any) -> None:
    _, out, _ = said("run", "list")
    assert [line.split()[0] for line in out.splitlines()] == list(RECIPES)
    _, out, _ = said("data", "list")
    assert "digits" in out.split()


# --- what cannot be done --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run", "cifar"], 1, "recipe='cifar' is unknown; the nearest are cifar10-"),
        (
            ["run", "cifar10-e2ebp", "--profile", "huge"],
            1,
            "profile='huge': recipe 'cifar10-e2ebp' has",
        ),
        (["run", "cifar10-e2ebp", "--device", "gpu"], 1, "device='gpu' cannot be used here"),
        (["compare", "--data", "digit"], 1, "digit"),
        (["compare", "--data", "spirals"], 1, "data='spirals' holds no images"),
        (["data", "cifra10"], 1, "cifra10"),
        (["audit", "E2E"], 1, "method='E2E' is unknown; choose from E2EBP, LocalLearning"),
        (["audit", "DifferenceTargetPropagation", "--modules", "2"], 1, "at least three modules"),
        (["audit", "--modules", "1"], 2, "--modules: 1 is too small; give 2 or more"),
        (["compare", "--epochs", "0"], 2, "--epochs: 0 is too small; give 1 or more"),
        (["run", "list", "--threads", "two"], 2, "invalid whole number value: 'two'"),
        (["run", "list", "--seed", "-1"], 2, "--seed: -1 is too small"),
        (["train"], 2, "invalid choice: 'train'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_sentence(
    arguments: list[str], status: int, message: str, said: Any, tmp_path: Path
) -> None:
    folders = ["--results", str(tmp_path), "--runs", str(tmp_path)] if arguments[0] == "run" else []
    ended, out, err = said(*arguments, *folders)
    assert (ended, out) == (status, "")
    assert message in err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line]
    assert lines[-1].startswith("modlib")
    assert status == 2 or len(lines) == 1
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "modlib", "data", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
    process.stderr.close()


# --- a run, interrupted and resumed ---------------------------------------------------------------


def test_ctrl_c_leaves_a_run_that_goes_on(
    processes: Any, said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "long", long_recipe())
    expected = run("long", results=tmp_path / "whole", runs=tmp_path / "whole", progress=False)
    results, runs = tmp_path / "results", tmp_path / "runs"
    arguments = ["run", "long", "--results", str(results), "--runs", str(runs)]
    process = processes.Process(target=command, args=(arguments, tmp_path / "errors"))
    process.start()
    second = runs / "long" / "smoke-seed0" / "stage0-epoch0.pt"
    while not second.exists():
        assert process.exitcode is None, (tmp_path / "errors").read_text()
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 130
    assert "Traceback" not in errors
    assert "modlib: interrupted. The last epoch's checkpoint is kept; go on with" in errors
    assert not results.exists()

    status, _, err = said(*arguments, "--quiet")
    assert status == 1
    assert "checkpoint.pt exists; give resume=True" in err
    status, out, _ = said(*arguments, "--quiet", "--resume")
    assert status == 0
    assert "test accuracy" in out
    record = json.loads((results / "long" / "smoke-seed0.json").read_text())
    for row in (*record["history"], *expected["history"]):
        row.pop("seconds")
    assert record["history"] == expected["history"]
    assert record["final"] == expected["final"]
