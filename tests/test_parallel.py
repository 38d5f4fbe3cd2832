"""One module in each process, in real processes: the same bits, and what happens when one is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import parallel
import pytest
import torch

from modlib.cli import main
from modlib.methods import E2EBP, FeaturesReplay, LocalLearning, hsic_bottleneck
from modlib.network import partition
from modlib.networks import mlp
from modlib.parallel.checkpoints import GroupCheckpoint
from modlib.parallel.group import Group
from modlib.parallel.messages import Message, _flat, _layout
from modlib.parallel.parts import check_parts
from modlib.parallel.replay import ReplayBuffer
from modlib.training.checkpoints import save_whole

LIMIT = 30.0  # seconds in which a group has stopped


def start(processes: Any, target: Any, size: int, folder: Path, **options: Any) -> list[Any]:
    """The processes of a group; ``port`` is where they meet."""
    folder.mkdir(exist_ok=True)
    port = options.pop("port", None) or parallel.free_port()
    started = [
        processes.Process(target=target, args=(rank, size, port, folder), kwargs=options)
        for rank in range(size)
    ]
    for process in started:
        process.start()
    return started


def codes(started: list[Any], limit: float = 240.0) -> list[int | None]:
    """How they ended; whoever has not within the limit is killed, and has None."""
    end = time.monotonic() + limit
    for process in started:
        process.join(max(end - time.monotonic(), 0.0))
    found = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return found


def errors(folder: Path) -> str:
    return "".join(f"[{path.name}] {path.read_text()}" for path in sorted(folder.glob("errors*")))


def same(folder: Path, rows: list[dict[str, Any]], net: torch.nn.Module) -> None:
    """What a group has left behind is this, bit for bit."""
    found = torch.load(folder)
    assert found["rows"] == rows
    for name, value in net.state_dict().items():
        assert torch.equal(found["net"][name], value), name


# --- the same bits as in one process --------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3])
def whole_group(request: pytest.FixtureRequest, processes: Any, tmp_path_factory: Any) -> Any:
    """All cases, trained by two processes and by three."""
    folder = tmp_path_factory.mktemp(f"group{request.param}")
    started = start(processes, parallel.all_cases, request.param, folder)
    assert codes(started) == [0] * request.param, errors(folder)
    return request.param, folder


@pytest.mark.parametrize("case", parallel.CASES)
def test_many_processes_end_with_the_weights_of_one(whole_group: Any, case: str) -> None:
    modules, folder = whole_group
    same(folder / f"{case}.pt", *parallel.train(case, modules))


def test_random_numbers_matter_here() -> None:
    """Or equal weights above would say nothing of dropout."""
    rows, _ = parallel.train("greedy", 2)
    other, _ = parallel.train("greedy", 2, seed=2)
    assert rows != other


def test_nobody_waits_for_the_module_below_with_replay(processes: Any, tmp_path: Path) -> None:
    """A slow first module: the second trains more often than it, on batches that are a little old."""
    options = {"case": "greedy", "replay": 4, "epochs": 8}
    started = start(processes, parallel.one, 2, tmp_path, setup=parallel.slow_below, **options)
    assert codes(started) == [0, 0], errors(tmp_path)
    rows = torch.load(tmp_path / "out.pt")["rows"]
    first, second = zip(*(row["updates"] for row in rows), strict=True)
    assert set(first) == {4}  # of an epoch's four batches
    assert sum(second) > sum(first)
    assert all(0 <= row["stale"][1]["max"] < 8 for row in rows)
    assert [row["stale"][0] for row in rows] == [{"mean": 0.0, "max": 0}] * 8
    apart = parallel.train("greedy", 2, epochs=8)[0][-1]["test_accuracy"]
    assert rows[-1]["test_accuracy"] > apart - 0.15


# --- one is lost ----------------------------------------------------------------------------------


def resumed(processes: Any, folder: Path, size: int = 3, epochs: int = 4) -> None:
    """The group goes on and ends as if nothing had happened."""
    options = {"checkpoint": folder / "parts", "resume": True, "epochs": epochs}
    started = start(processes, parallel.one, size, folder, **options)
    assert codes(started) == [0] * size, errors(folder)
    same(folder / "out.pt", *parallel.train("old errors", size, epochs=epochs))
    assert len(list((folder / "parts").iterdir())) == size + 1  # the last set and its list


def test_a_killed_process_stops_the_group_which_goes_on_later(
    processes: Any, tmp_path: Path
) -> None:
    """Another process each time, in another step; MODLIB_KILLS=20 takes a few minutes."""
    dice, kills = (
        random.Random(int.from_bytes(os.urandom(4))),
        int(os.environ.get("MODLIB_KILLS", "3")),
    )
    options = {"checkpoint": tmp_path / "parts", "resume": True, "epochs": 2 * kills}
    for _ in range(kills):
        victim, steps = dice.randrange(3), dice.randrange(1, 8)
        setup = {"setup": parallel.die, "arguments": (victim, steps)}
        started = start(processes, parallel.one, 3, tmp_path, **options, **setup)
        started[victim].join(240)
        found = codes(started, LIMIT)
        assert found[victim] == -9, f"{victim} after {steps}: {errors(tmp_path)}"
        assert found.count(1) == 2, f"{found}: {errors(tmp_path)}"
    assert errors(tmp_path).count("checkpoint is whole") >= 2 * kills
    resumed(processes, tmp_path, epochs=2 * kills)


def failing(processes: Any, folder: Path, setup: Any, *arguments: Any, **options: Any) -> str:
    """A group of three of which one fails: what they say. Every process has ended within the limit."""
    settings = {"checkpoint": folder / "parts", "epochs": 4, "setup": setup, **options}
    started = start(processes, parallel.one, 3, folder, arguments=arguments, **settings)
    while all(process.is_alive() for process in started):
        time.sleep(0.1)
    found = codes(started, LIMIT)
    assert None not in found, f"{found}: {errors(folder)}"
    assert 0 not in found, f"{found}: {errors(folder)}"
    return errors(folder)


def test_a_cut_connection_stops_the_group(processes: Any, tmp_path: Path) -> None:
    assert "lost" in failing(processes, tmp_path, parallel.cut_connections, 1, 6)
    resumed(processes, tmp_path)


def test_a_full_disk_stops_the_group_and_others_say_why(processes: Any, tmp_path: Path) -> None:
    """The second set of one process does not fit, with an optimiser's state: the first one is kept."""
    said = failing(processes, tmp_path, parallel.small_disk, 1, 60_000)
    assert "File too large" in said
    assert "process 1 failed" in said  # whoever can still reach the first process tells it
    assert json.loads((tmp_path / "parts/complete.json").read_text())[0].startswith("stage0-epoch0")
    resumed(processes, tmp_path)


def test_a_process_that_hangs_is_given_up(processes: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = {"checkpoint": folder / "parts", "epochs": 4, "patience": 6.0}
    options |= {"setup": parallel.hang, "arguments": (1, 6)}
    started = start(processes, parallel.one, 3, folder, **options)
    started[0].join(120)
    started[2].join(LIMIT)
    assert (started[0].exitcode, started[1].exitcode, started[2].exitcode) == (1, None, 1)
    assert "process 1 has given no sign for 6 s" in errors(folder)
    started[1].kill()  # a launcher would
    started[1].join()
    resumed(processes, folder)


class Proxy:
    """Stands between processes and the place where they meet, until it is cut."""

    def __init__(self, port: int) -> None:
        self.target, self.ends = port, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self.ends += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def cut(self) -> None:
        self.listener.close()
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def test_a_proxy_that_drops_the_connection_stops_the_group(processes: Any, tmp_path: Path) -> None:
    """The last process reaches the others' meeting place through it, and is cut off in the second epoch."""
    port = parallel.free_port()
    proxy = Proxy(port)
    settings = {"checkpoint": tmp_path / "parts", "epochs": 4, "setup": parallel.slow}
    started = [
        processes.Process(
            target=parallel.one,
            args=(rank, 3, proxy.port if rank == 2 else port, tmp_path),
            kwargs=settings,
        )
        for rank in range(3)
    ]
    for process in started:
        process.start()
    end = time.monotonic() + 120
    while not list(tmp_path.glob("parts/stage0-epoch1*")) and time.monotonic() < end:
        time.sleep(0.05)
    proxy.cut()
    found = codes(started, LIMIT)
    assert found == [1, 1, 1], errors(tmp_path)
    assert "meeting place was lost" in errors(tmp_path)
    resumed(processes, tmp_path)


def test_half_a_set_is_never_used(tmp_path: Path) -> None:
    """One part of the second set is there, the other is not: the list still names the first."""
    group = Alone(2)
    first = GroupCheckpoint(tmp_path, {}, False, group)
    first.save({"stage": 0, "epoch": 1, "value": 1})
    save_whole(
        {"settings": {}, "stage": 0, "epoch": 2, "value": 2}, tmp_path / "stage0-epoch2-process1.pt"
    )
    state = GroupCheckpoint(tmp_path, {}, True, group).load()
    assert state is not None
    assert state["value"] == 1
    with pytest.raises(ValueError, match="resume=True"):
        GroupCheckpoint(tmp_path, {}, False, group)
    with pytest.raises(ValueError, match="written by 2 processes, not 3"):
        GroupCheckpoint(tmp_path, {}, True, Alone(3)).load()
    with pytest.raises(ValueError, match="seed"):
        GroupCheckpoint(tmp_path, {"seed": 1}, True, group).load()
    (tmp_path / "stage0-epoch1-process0.pt").unlink()
    with pytest.raises(ValueError, match="is missing"):
        GroupCheckpoint(tmp_path, {}, True, group).load()
    (tmp_path / "complete.json").write_text("[")
    with pytest.raises(ValueError, match="damaged"):
        GroupCheckpoint(tmp_path, {}, True, group).load()


class Alone(Group):
    """The first process of a group whose others always say what it says."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size

    def share(self, value: Any = None) -> Any:
        return value


# --- the command ----------------------------------------------------------------------------------


def test_torchrun_trains_by_a_recipe(tmp_path: Path) -> None:
    """The same history as one process has, and one record."""
    command = ["-m", "modlib", "run", "cifar10-dgl-k3", "--quiet", "--device", "cpu"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    ways = {"one": [], "three": [*launcher, "--no-python", sys.executable]}
    records = []
    for way, how in ways.items():
        folders = ["--results", str(tmp_path / way), "--runs", str(tmp_path / f"{way}-runs")]
        parallel_option = ["--parallel", "modules"] if how else []
        run = subprocess.run(
            [sys.executable, *how, *command, *folders, *parallel_option],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("test accuracy") == 1
        (record,) = (tmp_path / way).rglob("*.json")
        records.append(json.loads(record.read_text()))
    one, three = records
    assert three["parallel"] == {"processes": 3, "replay": 0}
    assert three["final"] == one["final"]
    for a, b in zip(one["history"], three["history"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


LONG = """
import parallel, time
from modlib.parallel import ModuleParallel
with ModuleParallel(patience=6.0) as group:
    parallel.slow(group.rank)
    parallel.train("greedy", group.size, parallel=group, epochs=1000, checkpoint=CHECKPOINT)
"""


def children(pid: int) -> list[int]:
    """The processes that this one has started, and those of these."""
    table = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            table[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = [child for child, parent in table.items() if parent == pid]
    return [*found, *(below for child in found for below in children(child))]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_no_process_outlives_a_launcher_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LONG.replace("CHECKPOINT", repr(str(tmp_path / "parts"))))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    started = subprocess.Popen(
        [*launcher, str(script)], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 240
    while not list(tmp_path.glob("parts/stage0-epoch1-*")) and time.monotonic() < end:
        time.sleep(0.2)
    workers = children(started.pid)
    assert len(workers) >= 2
    started.kill()
    started.wait()
    end = time.monotonic() + LIMIT
    while any(map(lives, workers)) and time.monotonic() < end:
        time.sleep(0.2)
    left = [pid for pid in workers if lives(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


# --- what cannot be divided, before anything runs -------------------------------------------------


def refusal(method: Any, size: int = 2, replay: int = 0) -> str:
    net = partition(mlp([8, 6, 4], seed=0), 2)
    with pytest.raises(ValueError) as found:
        check_parts(net, method.stages(net, torch.zeros(4, 8)), size, replay)
    return str(found.value)


def test_what_cannot_be_divided_says_what_would_do() -> None:
    assert "--nproc-per-node 2" in refusal(LocalLearning(), size=3)
    for method in (E2EBP(), hsic_bottleneck()):
        assert "LocalLearning" in refusal(method)
    assert "replay=0" in refusal(FeaturesReplay(), replay=2)


def test_without_torchrun_the_command_says_how_to_start_it(capsys: Any, tmp_path: Path) -> None:
    names = ["run", "cifar10-dgl-k3", "--results", str(tmp_path), "--runs", str(tmp_path)]
    assert main([*names, "--parallel", "modules"]) == 1
    assert "torchrun --nproc-per-node K" in capsys.readouterr().err
    assert main([*names, "--replay", "2"]) == 1
    assert "--parallel modules" in capsys.readouterr().err


# --- messages and buffers -------------------------------------------------------------------------


def test_a_message_keeps_how_a_tensor_lies_in_memory() -> None:
    picture = torch.randn(2, 3, 4, 5)
    for tensor in (
        picture,
        picture.to(memory_format=torch.channels_last),
        picture.transpose(1, 3),
        picture[:, ::2],  # has holes, which are not sent
        torch.arange(4),
        torch.tensor(1.0),
    ):
        _, dims, *numbers = _layout(tensor)
        shape, strides = numbers[:dims], numbers[dims:]
        assert torch.equal(_flat(tensor).clone().as_strided(shape, strides), tensor)
    last = _layout(picture.to(memory_format=torch.channels_last))
    assert tuple(last[-4:]) == (60, 1, 15, 3)


def test_a_replay_buffer_drops_no_batch_that_was_never_used() -> None:
    buffer, taken = ReplayBuffer(3), []
    for step in range(9):
        assert buffer.has_room
        buffer.add(Message(step, ()))
        if step % 3 == 2:  # three come, then three are used, and once more one
            taken += [buffer.take().step for _ in range(4)]
    assert sorted(set(taken)) == list(range(9))
    assert taken[:4] == [0, 1, 2, 0]
    assert max(buffer.ages) == 2
