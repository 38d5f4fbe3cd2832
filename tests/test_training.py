"""The training loop: exact resume from kills, reproducibility, precision, and clear refusals."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import CASES, train, train_and_die
from returning import Returning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import modlib
from modlib import networks, zoo
from modlib.data import Augment, Dataset, Loader
from modlib.methods import E2EBP, LocalLearning, ProxyObjective, Stage, sgd
from modlib.network import ModularNetwork, partition
from modlib.objectives import NMSE, Objective, SupCon
from modlib.training import History, evaluate, fit, loop, pick_device
from modlib.training.checkpoints import Checkpoint, read_whole, save_whole

quiet_fit = partial(fit, progress=False)


def small_net(seed: int = 0, modules: int = 2) -> ModularNetwork:
    return partition(networks.mlp([64, 16, 16, 10], kernel="relu", seed=seed), modules)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# --- kill -9 --------------------------------------------------------------------------------------

LOSING_AN_EPOCH = ["step", "half", "written"]  # see interrupted.train_and_die


def killed(processes: Any, case: str, path: Path, event: str, count: int) -> bool:
    """Go on with a run until it is killed at the event; False if it came to its end before."""
    process = processes.Process(target=train_and_die, args=(case, path, event, count))
    process.start()
    process.join()
    assert process.exitcode in (0, -9)
    return bool(process.exitcode == -9)


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    case: str, processes: Any, tmp_path: Path
) -> None:
    """Killed twice an epoch: in a step, with half a checkpoint written or before it is in its place,
    and once it is. The rows and the weights come out bit for bit as in one go."""
    expected, whole = train(case)
    path = tmp_path / "run.pt"
    rng = random.Random(case)
    kills = 0
    while True:
        event = "replaced" if kills % 2 else LOSING_AN_EPOCH[kills // 2 % 3]
        count = rng.randint(1, 4) if event == "step" else 1  # of an epoch's four steps
        if not killed(processes, case, path, event, count):
            break
        kills += 1
        assert kills < 40, "the run does not get on"
        assert path.exists()
    assert kills >= 2 * len(expected)
    rows, net = train(case, path)  # nothing is left to do
    assert rows == expected
    assert states_equal(net, whole)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("case", ["end to end", "in turn"])
def test_a_run_killed_at_any_moment_goes_on(case: str, processes: Any, tmp_path: Path) -> None:
    """By the clock instead of at chosen events."""
    expected, whole = train(case)
    path = tmp_path / "run.pt"
    rng = random.Random(7)
    for _ in range(4):
        process = processes.Process(target=train, args=(case, path))
        process.start()
        while not path.exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.4))
        process.kill()
        process.join()
    rows, net = train(case, path)
    assert rows == expected
    assert states_equal(net, whole)


def test_a_run_resumes_from_ctrl_c(digits: Dataset, tmp_path: Path) -> None:
    expected = quiet_fit(small_net(), LocalLearning(), digits, epochs=3)

    def interrupt(_: nn.Module, row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    run = partial(quiet_fit, small_net(), LocalLearning(), digits, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path / "run.pt", after_epoch=interrupt)
    assert run(checkpoint=tmp_path / "run.pt", resume=True) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_an_interrupted_save_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "run.pt", {}, resume=False)
    checkpoint.save({"epoch": 1})

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"epoch": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert Checkpoint(tmp_path / "run.pt", {}, resume=True).load() == {"epoch": 1}


# --- checkpoints that cannot be gone on from ------------------------------------------------------


@pytest.fixture
def checkpoint(digits: Dataset, tmp_path: Path) -> Path:
    path = tmp_path / "run.pt"
    quiet_fit(small_net(), LocalLearning(), digits, epochs=1, checkpoint=path)
    return path


def refused(path: Path, message: str, *arguments: Any, **options: Any) -> None:
    """fit raises the message, and neither the file nor the network has changed."""
    before = path.read_bytes()
    net = arguments[0]
    weights = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=message):
        quiet_fit(*arguments, checkpoint=path, **options)
    assert path.read_bytes() == before
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_checkpoint_is_not_overwritten(checkpoint: Path, digits: Dataset) -> None:
    message = "exists; give resume=True to go on from it, or another path"
    refused(checkpoint, message, small_net(), LocalLearning(), digits, epochs=1)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(share: float, checkpoint: Path, digits: Dataset) -> None:
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(share * len(whole))])
    net, learner = small_net(), LocalLearning()
    refused(
        checkpoint, "is damaged and cannot be read", net, learner, digits, epochs=1, resume=True
    )


def test_a_checkpoint_with_a_changed_bit_is_refused(tmp_path: Path) -> None:
    """torch.load itself would go on with other weights."""
    path = tmp_path / "run.pt"
    weights = torch.arange(1000.0)
    Checkpoint(path, {}, resume=False).save({"net": weights})
    whole = path.read_bytes()
    place = whole.index(weights[100:900].numpy().tobytes()) + 1001
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
    assert not torch.equal(torch.load(path)["net"], weights)
    with pytest.raises(ValueError, match="is damaged"):
        Checkpoint(path, {}, resume=True).load()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04.", b"hello", bytes(5000)])
def test_what_is_no_checkpoint_is_refused(content: bytes, digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    refused(path, "is damaged", small_net(), LocalLearning(), digits, epochs=1, resume=True)
    torch.save([1, 2], path)
    refused(path, "is damaged", small_net(), LocalLearning(), digits, epochs=1, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 2}, r"epochs=\[2\]: .* run with \[1\], and schedule='one-cycle' spreads"),
        ({"seed": 5}, "seed=0, not 5"),
        ({"batch_size": 64}, "batch_size=128, not 64"),
        ({"schedule": "cosine"}, "schedule='one-cycle', not 'cosine'"),
        ({"augment": Augment(pad=1)}, "augment="),
        ({"precision": "bfloat16"}, "precision='float32', not 'bfloat16'"),
        ({"channels_last": True}, "channels_last=False, not True"),
        ({"method": LocalLearning(in_turn=True)}, "method=.*in 1 stages.*in 2 stages"),
        ({"method": E2EBP()}, 'not "E2EBP'),
        ({"method": LocalLearning(SupCon(kernel="relu"))}, "objectives=.*AuxiliaryClassifier"),
        ({"method": LocalLearning(optimizer=sgd(0.3))}, "optimizers=.*'lr': 0.3"),
        ({"net": small_net(modules=3)}, "method=.*2 modules.*3 modules"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused(
    change: dict[str, Any], message: str, checkpoint: Path, digits: Dataset
) -> None:
    run: dict[str, Any] = {"net": small_net(), "method": LocalLearning(), "epochs": 1} | change
    net, learner = run.pop("net"), run.pop("method")
    refused(checkpoint, message, net, learner, digits, resume=True, **run)


def test_a_checkpoint_of_an_older_version_is_refused(checkpoint: Path, digits: Dataset) -> None:
    state = read_whole(checkpoint)
    state["settings"]["epochs"] = state.pop("epochs")  # where they once stood
    save_whole(state, checkpoint)
    message = r"belongs to a run with epochs=\(1,\), not None"
    refused(checkpoint, message, small_net(), LocalLearning(), digits, epochs=1, resume=True)


def test_a_checkpoint_of_other_data_or_another_network_is_refused(
    checkpoint: Path, digits: Dataset
) -> None:
    run = partial(refused, checkpoint, epochs=1, resume=True)
    less, others = digits.subset(n_train=300), digits.subset(n_train=512, seed=9)
    for data in (less, replace(digits, train_images=others.train_images)):
        run(r"data='digits \(512 images, checksum", small_net(), LocalLearning(), data)
    wider = partition(networks.mlp([64, 16, 20, 10], kernel="relu"), 2)
    run("weights of another network", wider, LocalLearning(), digits)


def test_resuming_needs_a_checkpoint(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume=True needs a checkpoint"):
        quiet_fit(small_net(), E2EBP(), digits, resume=True)
    history = quiet_fit(
        small_net(), E2EBP(), digits, epochs=1, checkpoint=tmp_path / "a" / "new.pt", resume=True
    )
    assert len(history.rows) == 1
    assert (tmp_path / "a" / "new.pt").exists()


# --- a finished run goes on -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learner", "first", "then"),
    [
        (E2EBP, 1, 3),
        (E2EBP, 3, 3),
        (partial(LocalLearning, in_turn=True), [1, 1], [1, 3]),
    ],
)
def test_a_finished_run_is_extended(
    learner: Callable[[], Any], first: Any, then: Any, digits: Dataset, tmp_path: Path
) -> None:
    """Bit for bit as in one go: with the constant schedule epochs do not depend on their number."""
    run = partial(quiet_fit, data=digits, schedule="constant")
    whole, parts = small_net(), small_net()
    expected = run(whole, learner(), epochs=then)
    resumed = partial(run, method=learner(), checkpoint=tmp_path / "run.pt", resume=True)
    resumed(parts, epochs=first)
    again = small_net(seed=1)
    assert resumed(again, epochs=then) == expected
    assert states_equal(again, whole)


def test_stages_that_have_not_begun_may_change(digits: Dataset, tmp_path: Path) -> None:
    """Whatever the schedule: the stage that was trained is as it would have been."""

    def interrupt(_: nn.Module, row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    run = partial(quiet_fit, method=LocalLearning(in_turn=True), data=digits)
    resumed = partial(run, checkpoint=tmp_path / "run.pt", resume=True)
    with pytest.raises(KeyboardInterrupt):
        resumed(small_net(), epochs=[1, 1], after_epoch=interrupt)
    assert resumed(small_net(), epochs=[2, 1]) == run(small_net(), epochs=[2, 1])
    with pytest.raises(
        ValueError, match=r"stage 1 has been trained for 1 epochs, and earlier ones"
    ):
        resumed(small_net(), epochs=[1, 1])


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", lambda progress: 1.0])
def test_what_extending_a_run_would_change_is_said(
    schedule: Any, digits: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    quiet_fit(small_net(), E2EBP(), digits, epochs=1, schedule=schedule, checkpoint=path)
    message = r"epochs=\[2\]: .* with \[1\], and schedule=.* spreads the learning rates over the"
    options = {"epochs": 2, "schedule": schedule, "resume": True}
    refused(path, message, small_net(), E2EBP(), digits, **options)


# --- reproducibility ------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", [E2EBP, LocalLearning])
def test_the_same_seed_gives_the_same_history(learner: Callable[[], Any], digits: Dataset) -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(random.randrange(1000))  # the caller's state must not matter
        net = small_net()
        runs.append((quiet_fit(net, learner(), digits, epochs=2, seed=seed), net))
    assert runs[0][0] == runs[1][0]
    assert states_equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_auxiliary_weights_come_from_the_seed(digits: Dataset) -> None:
    losses = [
        quiet_fit(
            small_net(),
            LocalLearning(optimizer=sgd(0.0)),
            digits,
            epochs=1,
            seed=seed,
            augment=None,
        ).final["losses"]
        for seed in (0, 1)
    ]
    assert losses[0][0] != losses[1][0]  # by auxiliary weights: nothing else differs
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-5)


def test_the_callers_random_state_is_left_alone(digits: Dataset) -> None:
    net = partition(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10)), 1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    quiet_fit(net, LocalLearning(), digits, epochs=1)
    evaluate(net, digits)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


# --- what a run does ------------------------------------------------------------------------------


def test_history_has_a_row_for_every_epoch_of_every_stage(digits: Dataset) -> None:
    seen: list[dict[str, Any]] = []
    learner = ProxyObjective(SupCon(kernel="relu"))
    net = partition(networks.mlp([64, 16, 16, 10], kernel="relu", seed=0), ["layer2", "features"])
    history = quiet_fit(
        net, learner, digits, epochs=[1, 3, 2], after_epoch=lambda n, row: seen.append(row)
    )
    where = [(row["stage"], row["epoch"]) for row in history.rows]
    assert where == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert seen == history.rows
    assert [row["test_accuracy"] is None for row in history.rows] == [True] * 4 + [False] * 2
    assert all(len(row["losses"]) == 1 for row in history.rows)
    assert history.final == history.rows[-1]
    assert len(history.seconds) == 6
    assert min(history.seconds) > 0
    assert history.final["test_accuracy"] == evaluate(net, digits).accuracy
    assert not any(module.training for module in net.modules())


def test_watching_a_network_does_not_change_its_training(digits: Dataset) -> None:
    """Batch norm's statistics would move if what watches found the network in training mode."""
    nets = [partition(networks.mlp([64, 16, 10], norm=True, seed=0), 2) for _ in range(2)]
    x = torch.randn(8, 64)

    def look(net: nn.Module, row: dict[str, Any]) -> None:
        net(x)

    for net, watch in zip(nets, (None, look), strict=True):
        quiet_fit(net, LocalLearning(), digits, epochs=2, after_epoch=watch)
    assert states_equal(*nets)


def test_measurements_can_be_added_to_a_row(digits: Dataset, tmp_path: Path) -> None:
    def measure(net: nn.Module, row: dict[str, Any]) -> None:
        row["weights"] = sum(p.numel() for p in net.parameters())

    path = tmp_path / "run.pt"
    run = partial(quiet_fit, small_net(), E2EBP(), digits, epochs=1, after_epoch=measure)
    history = run(checkpoint=path)
    assert history.final["weights"] == 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    assert run(checkpoint=path, resume=True) == history


def test_a_measurement_that_no_checkpoint_could_give_back_is_refused(
    digits: Dataset, tmp_path: Path
) -> None:
    def measure(_: nn.Module, row: dict[str, Any]) -> None:
        row["share"] = np.float64(0.5)

    path = tmp_path / "run.pt"
    run = partial(quiet_fit, small_net(), E2EBP(), digits, epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match=r"rows\.share holds .* of type float64, which a file"):
        run(after_epoch=measure)
    assert len(run(resume=True).rows) == 1


def test_an_empty_history_has_no_end() -> None:
    with pytest.raises(ValueError, match="train at least one epoch"):
        _ = History().final


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda p: 1.0),
        ("cosine", lambda p: 0.5 * (1 + np.cos(np.pi * p))),
        ("one-cycle", lambda p: p / 0.2 if p < 0.2 else (1 - p) / 0.8),
        (lambda p: p * p, lambda p: p * p),
    ],
)
def test_learning_rates_follow_the_schedule_in_every_stage(
    schedule: Any,
    factor: Callable[[float], float],
    digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    step = Stage.step

    def watched(stage: Stage, x: Tensor, y: Tensor) -> Tensor:
        optimizers = [o for o in stage.optimizers if isinstance(o, torch.optim.Optimizer)]
        rates.extend(
            group["lr"] for o in optimizers for group in o.param_groups
        )  # not in rehearsal
        return step(stage, x, y)

    monkeypatch.setattr(Stage, "step", watched)
    learner = LocalLearning(in_turn=True, optimizer=[sgd(0.1), sgd(0.01)])
    quiet_fit(small_net(), learner, digits, epochs=[1, 2], schedule=schedule)
    expected = [0.1 * factor(step / 4) for step in range(4)]
    expected += [0.01 * factor(step / 8) for step in range(8)]
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-12)


def tiny_net() -> ModularNetwork:
    return partition(networks.mlp([64, 32, 10], kernel="relu", seed=0), ["features"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "learner", [E2EBP, LocalLearning, partial(ProxyObjective, SupCon(0.1, "relu"))]
)
def test_mixed_precision_learns_the_same(
    precision: str, learner: Callable[..., Any], digits: Dataset
) -> None:
    output = sgd(5.0, weight_decay=0.0)  # a linear layer on unit vectors
    optimizer = sgd(0.5) if learner is E2EBP else [sgd(0.1), output]
    accuracy = {}
    for kind in ("float32", precision):
        net, types = tiny_net(), set()
        net[0].register_forward_hook(lambda *args, types=types: types.add(args[2].dtype))
        history = quiet_fit(
            net, learner(optimizer=optimizer), digits, epochs=5, batch_size=32, precision=kind
        )
        accuracy[kind] = history.final["test_accuracy"]
        assert getattr(torch, kind) in types
        assert all(p.dtype == torch.float32 for p in net.parameters())
    assert accuracy[precision] > 0.7
    assert accuracy[precision] == pytest.approx(accuracy["float32"], abs=0.05)


def test_float16_steps_are_scaled(digits: Dataset) -> None:
    """Gradients as small as these are zero in float16, unless the loss is scaled."""

    class Faint(Objective):
        def forward(self, h: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(h, y) * 1e-6

    moved = {}
    for precision in ("float32", "float16"):
        net = small_net(modules=1)
        before = net[0][0][1].weight.detach().clone()
        optimizer = sgd(1e5, momentum=0.0, weight_decay=0.0)
        quiet_fit(net, E2EBP(Faint(), optimizer), digits, epochs=1, precision=precision)
        moved[precision] = (net[0][0][1].weight.detach() - before).flatten()
    assert torch.cosine_similarity(*moved.values(), dim=0) > 0.99


def test_channels_last_changes_the_layout_alone(digits: Dataset) -> None:
    histories = []
    for channels_last in (False, True):
        net = partition(
            networks.cnn((4, 8), 10, channels=1, size=8, stride=1, kernel="relu", seed=0), 2
        )
        histories.append(
            quiet_fit(net, E2EBP(), digits, epochs=2, batch_size=64, channels_last=channels_last)
        )
        weight = net.state_dict()["0.conv2.1.weight"]
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    first, second = histories
    for a, b in zip(first.rows, second.rows, strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-3)


def test_a_network_read_back_lies_in_memory_as_it_was_trained(
    digits: Dataset, tmp_path: Path
) -> None:
    """In another layout convolutions sum in another order: on some processors other last bits."""

    def build(seed: int) -> ModularNetwork:
        net = networks.cnn((4, 8), channels=1, size=8, stride=1, kernel="relu", seed=seed)
        return partition(net, ["conv3", "features"])

    trained = build(0)
    quiet_fit(trained, E2EBP(), digits, epochs=1, channels_last=True)
    zoo.save(trained, tmp_path / "net.pt", name="net", input_shape=(1, 8, 8))
    zoo.shelve(trained, tmp_path, name="net", input_shape=(1, 8, 8))
    loaded, taken = build(1), build(2)
    zoo.load(tmp_path / "net.pt", loaded)
    zoo.take(taken, tmp_path, "net")
    for net in (loaded, taken):
        weights = [(p.stride(), p.detach()) for p in net.state_dict().values()]
        for (stride, weight), ours in zip(weights, trained.state_dict().values(), strict=True):
            assert stride == ours.stride() and torch.equal(weight, ours)
        assert evaluate(net, digits) == evaluate(trained, digits)


def test_any_module_counts_as_one(digits: Dataset) -> None:
    """Even one that cannot be cut."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.head(x + self.inner(x).relu())

    net = Residual()
    history = quiet_fit(net, E2EBP(), digits, epochs=3, batch_size=32)
    assert history.final["test_accuracy"] > 0.7
    assert history.final["test_accuracy"] == evaluate(net, digits).accuracy
    assert not net.training


@pytest.mark.parametrize("cached", [False, True])
def test_fewer_images_than_a_batch_just_work(cached: bool, digits: Dataset) -> None:
    """One batch of all of them, which the history tells."""
    few = digits.subset(n_train=120, n_test=50)
    learner = ProxyObjective(SupCon(kernel="relu"), cache_features=cached)
    histories = [quiet_fit(tiny_net(), learner, few, epochs=2, batch_size=b) for b in (128, 120)]
    assert histories[0] == histories[1]
    assert [history.batch_size for history in histories] == [120, 120]
    assert quiet_fit(tiny_net(), learner, few, epochs=1, batch_size=50).batch_size == 50


# --- classes that are rare ------------------------------------------------------------------------


def imbalanced(positives: int = 25, n: int = 500) -> Dataset:
    """Two blobs, of which one is rare."""
    rng = np.random.default_rng(0)
    labels = (np.arange(n) < positives).astype(np.int64)
    images = (rng.normal(size=(n, 4)) + 2 * labels[:, None]).astype(np.float32)
    return Dataset("blobs", images, labels, images, labels, ("common", "rare"))


def blob_net(seed: int) -> ModularNetwork:
    return partition(networks.mlp([4, 16, 2], kernel="relu", seed=seed), ["features"])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_rare_classes_come_in_pairs(
    seed: int, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 % positives and batches of 16: five of five runs used to end at a batch without a pair."""
    positives: list[int] = []
    step = Stage.step

    def watched(stage: Stage, x: Tensor, y: Tensor) -> Tensor:
        if stage.pairs and isinstance(stage.optimizers[0], torch.optim.Optimizer):
            positives.append(int(y.sum()))
        return step(stage, x, y)

    monkeypatch.setattr(Stage, "step", watched)
    learner = ProxyObjective(SupCon(kernel="relu"), cache_features=cached)
    net = partition(networks.mlp([4, 16, 16, 2], kernel="relu", seed=seed), ["layer2", "features"])
    history = quiet_fit(net, learner, imbalanced(), epochs=2, batch_size=16, seed=seed)
    assert set(positives) == {2}
    assert len(positives) == 2 * 2 * 31
    assert not any("skipped" in row for row in history.rows)
    assert history.final["test_accuracy"] > 0.95


def test_batches_without_pairs_are_skipped_and_counted(digits: Dataset) -> None:
    """Batches of 2 have no room for a pair and another; those of one class teach nothing."""
    data = imbalanced(positives=250, n=510)
    history = quiet_fit(blob_net(0), ProxyObjective(NMSE("relu")), data, epochs=1, batch_size=2)
    labels = [y for _, y in Loader(data, batch_size=2).epoch(0, 0)]
    alone = sum(len(set(y.tolist())) == 1 for y in labels)
    assert [row.get("skipped") for row in history.rows] == [alone, None]  # the head takes them all
    assert 0 < alone < len(labels)


def test_an_epoch_may_have_no_batch_with_a_pair() -> None:
    """The one image of its class may be left out as the remainder; the run goes on."""
    data, seed = imbalanced(positives=1, n=5), 1
    loader = Loader(data, batch_size=2)
    there = [any(bool(y.any()) for _, y in loader.epoch(seed, e)) for e in range(20)]
    assert there[0] and not all(there)
    learner = ProxyObjective(NMSE("relu"))
    history = quiet_fit(
        blob_net(0), learner, data, epochs=20, batch_size=2, seed=seed, schedule="constant"
    )
    rows = [row for row in history.rows if row["stage"] == 0]
    assert [row["losses"] != [None] for row in rows] == there
    assert [row["skipped"] for row in rows] == [1 if pair else 2 for pair in there]


@pytest.mark.parametrize("batch_size", [3, 4, 6])
def test_batches_smaller_than_two_of_each_class_have_pairs(
    digits: Dataset, batch_size: int
) -> None:
    few = digits.subset(n_train=30)
    for seed in range(3):
        learner = ProxyObjective(SupCon(kernel="relu"))
        history = quiet_fit(tiny_net(), learner, few, epochs=3, batch_size=batch_size, seed=seed)
        assert not any("skipped" in row for row in history.rows)


def test_data_without_any_pair_are_refused_before_training(digits: Dataset) -> None:
    learner = ProxyObjective(SupCon(kernel="relu"))
    with pytest.raises(ValueError, match=r"batch_size: no batch .* SupCon needs; give a larger"):
        quiet_fit(tiny_net(), learner, digits, batch_size=1)
    one_class = replace(digits, train_labels=np.zeros_like(digits.train_labels))
    with pytest.raises(ValueError, match="or data of two classes or more"):
        quiet_fit(tiny_net(), learner, one_class)


def test_balanced_classes_are_dealt_out_as_ever(digits: Dataset) -> None:
    loader = Loader(digits, batch_size=64)
    assert loader.paired().sampler == "uniform"


# --- rehearsal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_rehearsal_leaves_no_trace(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, net = train(case)
    monkeypatch.setattr(loop, "rehearse", lambda *_: None)
    expected, other = train(case)
    assert rows == expected
    assert states_equal(net, other)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda losses: losses, r"it returned shape \(128,\), but a scalar tensor is minimised"),
        (lambda losses: losses.mean().detach(), "it returned a value without a gradient"),
        (lambda losses: losses.mean().item(), r"it returned \d.* but a scalar tensor"),
        (lambda losses: None, "it returned None, but a scalar tensor"),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_what_an_objective_may_return_is_told_before_any_training(
    returned: Callable[[Tensor], Any], message: str, last: bool, digits: Dataset, tmp_path: Path
) -> None:
    """Of the last stage's objective too, before the first stage has been trained."""
    net = partition(networks.cnn((4, 8), channels=1, size=8, stride=1, kernel="relu", seed=0), 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    learner = (
        LocalLearning(in_turn=True, output=Returning(returned))
        if last
        else E2EBP(Returning(returned))
    )
    with pytest.raises((TypeError, ValueError), match=f"objective: {message}"):
        quiet_fit(net, learner, digits, checkpoint=tmp_path / "run.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not list(tmp_path.iterdir())


# --- evaluation -----------------------------------------------------------------------------------


def test_evaluation_is_over_every_image_of_the_split(digits: Dataset) -> None:
    net = networks.cnn((4,), 10, channels=1, size=8, stride=1, kernel="relu", seed=0)
    for split in ("test", "train"):
        loader = Loader(digits, split, 1000, shuffle=False, drop_last=False)
        ((x, y),) = loader.epoch(0, 0)
        logits = net.eval()(x).detach().double().numpy()
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        measured = evaluate(net, digits, split, batch_size=33)
        assert measured.n == len(y)
        assert measured.accuracy == pytest.approx((logits.argmax(1) == y.numpy()).mean())
        picked = share[np.arange(len(y)), y.numpy()]
        assert measured.loss == pytest.approx(-np.log(picked).mean(), rel=1e-5)


def test_evaluation_needs_a_logit_for_each_class(digits: Dataset) -> None:
    for net in (networks.mlp([64, 5]), networks.cnn((4,), channels=1, size=8, stride=1)[:2]):
        with pytest.raises(
            ValueError, match=r"net: its output has shape .* the data have 10 classes"
        ):
            evaluate(net, digits)


def test_evaluation_leaves_every_layer_in_its_mode(digits: Dataset) -> None:
    """Batch norm that somebody has frozen stays frozen."""
    net = networks.cnn((4,), 10, channels=1, size=8, stride=1, kernel="relu", seed=0).train()
    net[0].eval()
    modes = [module.training for module in net.modules()]
    statistics = net[1][2].running_mean.clone()
    evaluate(net, digits)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(net[1][2].running_mean, statistics)


# --- refusals, before anything is trained or written ----------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 0}, "epochs=0: give a whole number of at least 1"),
    ({"epochs": 2.5}, "epochs=2.5: give a whole number"),
    ({"epochs": [1, 2, 3]}, r"epochs=\[1, 2, 3\] has 3 numbers, but the method trains in 1 stages"),
    ({"epochs": [0]}, "epochs=0"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 16.0}, "batch_size=16.0"),
    ({"seed": -1}, "seed=-1: give a whole number of at least 0"),
    ({"seed": "a"}, "seed='a'"),
    ({"device": "gpu"}, "device='gpu' cannot be used here"),
    ({"precision": "half"}, "precision='half': choose from auto, float32"),
    ({"schedule": "linear"}, "schedule='linear': choose from constant, one-cycle, cosine"),
    ({"schedule": [1.0]}, r"schedule=\[1.0\]: choose from"),
    ({"augment": "flip"}, "augment='flip': give 'auto', None or a data.Augment"),
    ({"augment": Augment(pad=9)}, "reflect fewer than 8"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:24])
def test_wrong_arguments_are_refused(
    options: dict[str, Any], message: str, digits: Dataset, tmp_path: Path
) -> None:
    net = small_net()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=message):
        quiet_fit(net, E2EBP(), digits, checkpoint=tmp_path / "run.pt", **options)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": "resnet18"}, r"net: 'resnet18' is no Module; give one, such as modlib.networks"),
        ({"method": E2EBP}, r"method: the class E2EBP is no Method; give one, such as .*E2EBP\(\)"),
        ({"data": "digits"}, r"data: 'digits' is no Dataset; give one, such as modlib.data.load"),
        ({"after_epoch": 3}, "after_epoch=3: give a function"),
        (
            {"schedule": CosineAnnealingLR},
            "schedule: CosineAnnealingLR is torch's and steps an opt",
        ),
        (
            {"schedule": CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], 0.1), 10)},
            "schedule: CosineAnnealingLR is torch's .* choose from constant, one-cycle, cosine or",
        ),
        ({"schedule": lambda: 1.0}, "schedule=<function .* fails at progress 0"),
        ({"schedule": lambda progress: None}, "schedule=<function .* gives None at progress 0"),
        ({"method": E2EBP(optimizer=3)}, "optimizer=3 makes no optimiser"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_a_wrong_kind_are_refused(
    change: dict[str, Any], message: str, digits: Dataset
) -> None:
    with pytest.raises(TypeError, match=message):
        quiet_fit(**{"net": small_net(), "method": E2EBP(), "data": digits} | change)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: networks.mlp([64, 9]), r"output has shape \(9,\), but the data have 10 classes"),
        (lambda: nn.Conv2d(1, 10, 3), r"output has shape \(10, 6, 6\)"),
        (lambda: networks.mlp([100, 10]), r"cannot run on images of shape \(1, 8, 8\) of 'digits'"),
        (lambda: nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10)), "expected 2D or 3D input"),
        (lambda: networks.cnn(channels=1), "build it for that shape"),
    ],
)
def test_networks_that_do_not_fit_the_data_are_refused(
    net: Callable[[], nn.Module], message: str, digits: Dataset
) -> None:
    with pytest.raises(ValueError, match=message):
        quiet_fit(net(), E2EBP(), digits)


def test_data_that_cannot_be_learned_from_is_refused() -> None:
    x, y = np.zeros((40, 4), np.float32), np.arange(40) % 2
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        Dataset("bad", x, y, x, y, ("a", "b"))
    x[3, 2] = 0.0
    y[7] = 2
    with pytest.raises(ValueError, match="number them 0 to 1"):
        Dataset("bad", x, y, x, y, ("a", "b"))


def test_an_objective_that_becomes_nan_ends_the_run(digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    net = small_net()
    run = partial(quiet_fit, net, E2EBP(optimizer=sgd(0.1)), digits, epochs=3, checkpoint=path)

    def schedule(progress: float) -> float:
        return 1.0 if progress < 0.5 else float("inf")

    with pytest.raises(
        FloatingPointError, match=r"the network's objective became nan; lower the learning rate"
    ):
        run(schedule=schedule)
    state = torch.load(path, weights_only=True)
    assert len(state["rows"]) == 1
    assert all(tensor.isfinite().all() for tensor in state["net"].values())


@pytest.mark.parametrize(
    "learner",
    [E2EBP, LocalLearning, partial(LocalLearning, in_turn=True)],
)
def test_weights_that_blow_up_in_the_last_step_end_the_run(
    learner: Callable[..., Any], digits: Dataset, tmp_path: Path
) -> None:
    """The objectives are computed before each step: those of the epoch are all finite."""
    path, net = tmp_path / "run.pt", small_net()

    def schedule(progress: float) -> float:
        return 1.0 if progress < 7 / 8 else float("inf")  # the last of two epochs' eight steps

    run = partial(quiet_fit, net, learner(), digits, epochs=2, schedule=schedule)
    with pytest.raises(
        FloatingPointError,
        match=r"epoch 1: (module \d|the network)'s weights became infinite or NaN",
    ):
        run(checkpoint=path)
    state = torch.load(path, weights_only=True)
    assert len(state["rows"]) == 1
    assert all(tensor.isfinite().all() for tensor in state["net"].values())


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
def test_a_network_that_has_diverged_has_no_accuracy(number: float, digits: Dataset) -> None:
    net = small_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(number)
    with pytest.raises(
        FloatingPointError, match="net: its cross-entropy on the test images of 'digits'"
    ):
        evaluate(net, digits)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("cpu")) == torch.device("cpu")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert pick_device() == torch.device("cpu")
        with pytest.raises(ValueError, match=r"device='cuda' cannot be used here \(.*use 'auto'"):
            pick_device("cuda")


def test_five_lines_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    net = modlib.partition(modlib.networks.mlp([64, 32, 10], kernel="relu", seed=0), ["features"])
    method = modlib.methods.ProxyObjective(
        modlib.objectives.SupCon(kernel="relu"), optimizer=sgd(0.5)
    )
    data = modlib.data.load("digits")
    history = modlib.fit(net, method, data, epochs=2)
    assert history.final["test_accuracy"] > 0.2  # chance is 0.1
    assert "stage 2/2, epoch 2/2" in capsys.readouterr().err
