"""Every error of training and of methods says what would do, and that is done here: it has to work.

One case for each ``raise``; the last test counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from advice import Call, Case, unreached
from returning import Returning
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import modlib
from modlib import methods, networks
from modlib.data import Augment, Dataset, load
from modlib.kernels import Gaussian
from modlib.methods import (
    E2EBP,
    AugLocal,
    DifferenceTargetPropagation,
    Ensemble,
    InformationPropagation,
    KeepHeads,
    LocalLearning,
    Method,
    Only,
    ProxyObjective,
    TransportRegularised,
    auxiliary_variables,
    sgd,
    synthetic_gradients,
    target_propagation,
)
from modlib.network import ModularNetwork, partition
from modlib.networks.cnn import ConvUnit
from modlib.objectives import CrossEntropy, InfoNCE, SupCon
from modlib.training import (
    History,
    arguments,
    checkpoints,
    evaluate,
    evaluation,
    fit,
    loop,
    pick_device,
    rehearsal,
)

FILES = [
    *(
        Path(str(module.__file__))
        for module in (loop, arguments, evaluation, checkpoints, rehearsal)
    ),
    *sorted(Path(methods.__file__).parent.glob("*.py")),
]
DATA = load("digits").subset(n_train=64, n_test=40)
VECTORS = Dataset("vectors", DATA.train_images.reshape(64, 64) / 16.0, DATA.train_labels,
                  DATA.test_images.reshape(40, 64) / 16.0, DATA.test_labels)  # fmt: skip


def dense(*sizes: int, modules: int = 2, **options: Any) -> ModularNetwork:
    return partition(networks.mlp([64, *(sizes or (16,)), 10], seed=0, **options), modules)


def conv() -> ModularNetwork:
    net = networks.cnn((4, 8), channels=1, size=8, stride=1, kernel="relu", seed=0)
    return partition(net, ["conv3", "features"])


def fitted(
    net: Callable[[], nn.Module] = dense, method: Callable[[], Any] = E2EBP, **options: Any
) -> Call:
    """A call of fit on a network and a method made anew, for an epoch of the small digits."""
    settings: dict[str, Any] = {"data": DATA, "epochs": 1, "batch_size": 32, "progress": False}
    return lambda: fit(net(), method(), **(settings | options))


def staged(net: Callable[[], ModularNetwork], method: Callable[[], Method]) -> Call:
    return fitted(net, method)


def own(share: Callable[[Tensor], Any]) -> Call:
    return fitted(method=lambda: E2EBP(Returning(share)))


def with_feature_map(kernel: str) -> ModularNetwork:
    """As the sentence on feature maps says."""
    hidden, last = [nn.Flatten(), nn.Linear(64, 16)], nn.Linear(16, 10)
    net = nn.Sequential(*hidden, modlib.kernels.FeatureMap(kernel), last)
    return modlib.partition(net, [str(len(hidden))])


def diverged() -> ModularNetwork:
    net = dense()
    nn.init.constant_(next(net.parameters()), float("nan"))
    return net


def resized(scale: float, cut: str) -> ModularNetwork:
    layers = [ConvUnit(1, 4, 1, True), nn.Upsample(scale_factor=scale), ConvUnit(4, 10, 1, False)]
    return partition(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), [cut])


def ensemble(heads: int, **options: Any) -> Call:
    return lambda: Ensemble(dense(), [CrossEntropy()] * heads, **options)


def kept(trained: bool) -> Ensemble:
    net, method = dense(), KeepHeads(methods.mono_forward())
    if trained:
        fitted(lambda: net, lambda: method)()
    return method.ensemble(net)


def half_frozen(trained: bool) -> ModularNetwork:
    net = relus()
    next(net.parameters()).requires_grad_(trained)
    return net


def plain_conv() -> ModularNetwork:
    layers = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)]
    return partition(nn.Sequential(*layers), ["2"])


one_module = partial(dense, modules=1)
relus = partial(dense, boundary="after")
threefold = partial(dense, 16, 16, modules=3)
proxy = partial(ProxyObjective, SupCon(kernel="relu"))
normed = partial(dense, norm=True)
kernelled = partial(dense, kernel="relu", modules=["features"])  # type: ignore[arg-type]
in_turn = partial(LocalLearning, in_turn=True)
patched = partial(
    partition, networks.patch_cnn((4, 4), channels=1, size=8, patch=4, stride=2, seed=0), 3
)
infonce = InfoNCE(steps=1, negatives=4, grid=3, gap=0)
EVERY_SCHEDULE = [
    fitted(schedule=s) for s in ("constant", "one-cycle", "cosine", lambda progress: 1 - progress)
]
OPTIMISERS = [
    fitted(method=lambda: E2EBP(optimizer=modlib.methods.sgd(0.1))),
    fitted(method=lambda: E2EBP(optimizer=partial(torch.optim.AdamW, lr=0.001))),
]
PLAIN: dict[str, Case] = {
    "empty history": (lambda: History().final, [lambda: fitted()().final]),
    "after_epoch": (fitted(after_epoch=3), [fitted(after_epoch=lambda net, row: None)]),
    "learning rate": (
        fitted(method=lambda: E2EBP(optimizer=sgd(1e38)), schedule="constant"),
        [fitted(method=lambda: E2EBP(optimizer=sgd(0.1)))],
    ),
    "diverged": (lambda: evaluate(diverged(), DATA), [lambda: evaluate(dense(), DATA), fitted()]),
    "device": (lambda: pick_device("gpu"), [fitted(device=name) for name in ("auto", "cpu")]),
    "augment": (
        fitted(augment="flip"),
        [fitted(augment=a) for a in ("auto", None, Augment(pad=1, flip=False))],
    ),
    "precision": (
        fitted(precision="half"),
        [fitted(precision=p) for p in ("auto", "float32", "bfloat16", "float16")],
    ),
    "recompute": (
        fitted(recompute="most"),
        [fitted(recompute=budget) for budget in (10**9, "least", None)],
    ),
    "schedule": (fitted(schedule="linear"), EVERY_SCHEDULE),
    "scheduler": (fitted(schedule=CosineAnnealingLR), EVERY_SCHEDULE),
    "schedule fails": (fitted(schedule=lambda: 1.0), EVERY_SCHEDULE),
    "schedule gives": (fitted(schedule=lambda progress: "0.1"), EVERY_SCHEDULE),
    "epochs": (
        fitted(epochs=[1, 2, 3], method=in_turn),
        [fitted(epochs=e, method=in_turn) for e in (1, [1, 2])],
    ),
    "kind": (
        lambda: fit("resnet", "adam", "cifar"),  # type: ignore[arg-type]
        [
            lambda: fit(
                modlib.networks.mlp([64, 10]),
                modlib.methods.E2EBP(),
                modlib.data.load("digits"),
                epochs=1,
                progress=False,
            )
        ],
    ),
    "whole": (fitted(seed=-1), [fitted(seed=0)]),
    "shape": (fitted(partial(networks.cnn, channels=3)), [fitted(conv)]),
    # --- rehearsal
    "no pairs": (
        fitted(kernelled, proxy, batch_size=1),
        [fitted(kernelled, proxy, batch_size=32)],
    ),
    "one class": (
        fitted(kernelled, proxy, data=replace(DATA, train_labels=np.zeros(64, np.int64))),
        [fitted(kernelled, proxy)],
    ),
    "single image": (fitted(normed, batch_size=1), [fitted(normed, batch_size=2)]),
    "a vector": (own(lambda losses: losses), [own(lambda losses: losses.mean())]),
    "detached": (own(lambda losses: losses.mean().detach()), [own(lambda losses: losses.mean())]),
    # --- methods
    "depth": (lambda: AugLocal(depth=0), [fitted(conv, partial(AugLocal, depth=1))]),
    "shrink": (
        lambda: AugLocal(shrink=2),
        [fitted(conv, partial(AugLocal, shrink=share)) for share in (0, 1)],
    ),
    "no maps": (fitted(dense, AugLocal), [fitted(conv, AugLocal)]),
    "no copies": (
        lambda: AugLocal().stages(
            partition(
                nn.Sequential(
                    nn.Conv2d(1, 4, 3, 1, 1),
                    nn.ReLU(),
                    nn.Conv2d(4, 10, 3, 1, 1),
                    nn.AdaptiveAvgPool2d(1),
                    nn.Flatten(),
                ),
                ["2"],
            ),
            torch.zeros(2, 1, 8, 8),
        ),
        [
            fitted(conv, AugLocal),
            fitted(
                lambda: partition(networks.resnet((2, 4), 1, size=16, seed=0), 3),
                AugLocal,
                data=load("digits", size=16).subset(n_train=64, n_test=40),
            ),
        ],
    ),
    "no stride": (
        fitted(partial(resized, 0.75, "1"), AugLocal),
        [fitted(partial(resized, 0.75, "2"), AugLocal)],
    ),
    "views": (
        fitted(conv, partial(proxy, cache_features=True), augment=Augment(pad=1, flip=False)),
        [
            fitted(
                conv, partial(proxy, cache_features=True, views=2), augment=Augment(1, flip=False)
            ),
            fitted(conv, partial(proxy, cache_features=True), augment=None),
        ],
    ),
    "patches": (
        fitted(patched, partial(in_turn, infonce, cache_features=True), augment=None),
        [fitted(patched, partial(in_turn, infonce), augment=None)],
    ),
    "ensemble of none": (
        lambda: KeepHeads("dgl"),  # type: ignore[arg-type]
        [fitted(method=lambda: KeepHeads(LocalLearning()))],
    ),
    "untrained heads": (lambda: kept(trained=False), [lambda: kept(trained=True)]),
    "heads": (ensemble(3), [lambda: kept(trained=True)]),
    "weights": (
        ensemble(2, weights=[0, 1]),
        [lambda: Ensemble(kept(True).net, kept(True).heads, [1, 2])],
    ),
    "no logits": (ensemble(2), [lambda: kept(trained=True)]),
    "assigned": (
        lambda: methods.unformatted_accuracy(networks.mlp([64, 9]), DATA),
        [lambda: methods.unformatted_accuracy(networks.mlp([64, 10]), DATA)],
    ),
    "not assigned": (
        lambda: methods.unformatted_accuracy(diverged(), DATA),
        [lambda: methods.unformatted_accuracy(dense(), DATA)],
    ),
    "images": (
        fitted(method=InformationPropagation, data=VECTORS),
        [fitted(conv, InformationPropagation)],
    ),
    "cache": (
        lambda: LocalLearning(cache_features=True),
        [fitted(conv, partial(in_turn, cache_features=True), augment=None)],
    ),
    "number of views": (
        lambda: LocalLearning(in_turn=True, views=1),
        [fitted(conv, partial(in_turn, cache_features=True, views=1))],
    ),
    "objective": (
        lambda: E2EBP(nn.CrossEntropyLoss()),  # type: ignore[arg-type]
        [
            fitted(method=lambda: E2EBP(modlib.objectives.CrossEntropy())),
            own(lambda losses: losses.mean()),
        ],
    ),
    "function": (
        lambda: E2EBP(nn.functional.cross_entropy),  # type: ignore[arg-type]
        [own(lambda losses: losses.mean())],
    ),
    "logits": (fitted(lambda: networks.mlp([64, 9])), [fitted(lambda: networks.mlp([64, 10]))]),
    "stages": (fitted(method=Method), [fitted(method=E2EBP)]),
    "nothing to train": (
        fitted(lambda: dense().requires_grad_(False)),
        [fitted(dense), fitted(method=in_turn)],
    ),
    "optimizers": (
        fitted(conv, lambda: in_turn(optimizer=[sgd()] * 2)),
        [fitted(conv, partial(in_turn, optimizer=o)) for o in (sgd(), [sgd()] * 3)],
    ),
    "optimizer": (fitted(method=lambda: E2EBP(optimizer="adamw")), OPTIMISERS),  # type: ignore[arg-type]
    "layers": (
        lambda: methods.layerwise_greedy(4),
        [fitted(conv, partial(methods.layerwise_greedy, k)) for k in (1, 2, 3)],
    ),
    "loss": (
        lambda: methods.local_error_signals("both"),
        [
            fitted(conv, partial(methods.local_error_signals, loss))
            for loss in ("pred", "sim", "predsim")
        ],
    ),
    "only a method": (
        lambda: Only("proxy", [0]),  # type: ignore[arg-type]
        [fitted(conv, lambda: Only(proxy(), [0]))],
    ),
    "only with others": (
        fitted(conv, lambda: Only(LocalLearning(), [0])),
        [fitted(conv, lambda: Only(in_turn(), [0]))],
    ),
    "only not by itself": (
        fitted(conv, lambda: Only(E2EBP(), [0])),
        [fitted(conv, lambda: Only(in_turn(), [0])), fitted(conv, lambda: Only(proxy(), [0]))],
    ),
    "only which": (
        fitted(conv, lambda: Only(in_turn(), [3])),
        [fitted(conv, partial(Only, in_turn(), [k])) for k in (0, 2, -1)],
    ),
    "only none": (
        fitted(conv, lambda: Only(in_turn(), [])),
        [fitted(conv, lambda: Only(in_turn(), [1]))],
    ),
    "feature map": (
        fitted(dense, proxy),
        [
            fitted(partial(with_feature_map, "relu"), proxy),
            fitted(
                lambda: partition(modlib.networks.cnn(), ["features"]),
                ProxyObjective,
                data=load("digits", size=32).subset(n_train=64, n_test=40),
            ),
        ],
    ),
    "kernel": (
        fitted(kernelled, lambda: ProxyObjective(SupCon(kernel=Gaussian(1.0)))),
        [fitted(kernelled, lambda: ProxyObjective(SupCon(kernel="relu")))],
    ),
    "target propagation": (
        fitted(dense, DifferenceTargetPropagation),
        [fitted(partial(dense, 16, 16, modules=3), DifferenceTargetPropagation)],
    ),
    "inverses": (
        lambda: DifferenceTargetPropagation(inverses="true"),
        [
            partial(DifferenceTargetPropagation, inverses=inverses)
            for inverses in ("learned", "exact")
        ],
    ),
    "noise": (
        fitted(threefold, partial(DifferenceTargetPropagation, noise=[0.1, 0.1])),
        [
            fitted(threefold, partial(DifferenceTargetPropagation, noise=noise))
            for noise in (0.1, [0.1])
        ],
    ),
    "loss of inverses": (
        lambda: DifferenceTargetPropagation(loss="squares"),
        [partial(DifferenceTargetPropagation, loss=loss) for loss in target_propagation.LOSSES],
    ),
    "direct": (
        lambda: DifferenceTargetPropagation(direct=True),
        [
            fitted(
                threefold,
                partial(DifferenceTargetPropagation, direct=True, loss="difference"),
            )
        ],
    ),
    "step size": (
        lambda: DifferenceTargetPropagation(step_size=0),
        [partial(DifferenceTargetPropagation, step_size=0.1)],
    ),
    "synthesiser": (
        lambda: methods.SyntheticGradients("deep"),
        [
            fitted(dense, partial(methods.SyntheticGradients, synthesiser))
            for synthesiser in (*synthetic_gradients.HIDDEN, methods.ExactGradient)
        ],
    ),
    "synthesiser's kind": (
        lambda: methods.SyntheticGradients(3),  # type: ignore[arg-type]
        [partial(methods.SyntheticGradients, synthesiser) for synthesiser in ("linear", "mlp")],
    ),
    "nothing to synthesise": (
        fitted(one_module, methods.SyntheticGradients),
        [fitted(dense, methods.SyntheticGradients)],
    ),
    "no codes": (
        fitted(one_module, methods.AlternatingMinimisation),
        [fitted(dense, methods.AlternatingMinimisation)],
    ),
    "codes of images": (
        fitted(relus, methods.ADMM, augment=Augment(pad=1, flip=False)),
        [fitted(relus, methods.ADMM, augment=None)],
    ),
    "layers of blocks": (
        fitted(partial(dense, activation=nn.Tanh), methods.BlockCoordinateDescent),
        [
            fitted(
                lambda: partition(modlib.networks.mlp([64, 300, 10], boundary="after"), 2),
                methods.BlockCoordinateDescent,
            )
        ],
    ),
    "frozen layer": (
        fitted(lambda: half_frozen(False), methods.BlockCoordinateDescent),
        [fitted(lambda: half_frozen(True), methods.BlockCoordinateDescent)],
    ),
    "penalty": (
        lambda: methods.BlockCoordinateDescent(gamma=0),
        [partial(methods.BlockCoordinateDescent, gamma=0.1)],
    ),
    "decay": (
        lambda: methods.BlockCoordinateDescent(weight_decay=-1),
        [partial(methods.BlockCoordinateDescent, weight_decay=share) for share in (0, 0.1)],
    ),
    "no solution": (
        lambda: auxiliary_variables.solve(torch.zeros(2, 2), torch.ones(2, 1), "inputs"),
        [lambda: auxiliary_variables.solve(5 * torch.eye(2), torch.ones(2, 1), "inputs")],
    ),
    "codes of vectors": (fitted(plain_conv, methods.MAC), [fitted(dense, methods.MAC)]),
    "unsteady": (
        fitted(normed, methods.MAC),
        [fitted(dense, methods.MAC)],
    ),
    "mirror": (
        lambda: evaluate(modlib.networks.mlp([64, 10]), VECTORS, flip=True),
        [lambda: evaluate(modlib.networks.mlp([64, 10]), VECTORS)],
    ),
    "tau": (
        lambda: TransportRegularised(tau=0),
        [lambda: TransportRegularised(tau=0.1), lambda: TransportRegularised(tau=1e9)],
    ),
    "smoothing": (
        lambda: TransportRegularised(smoothing=1),
        [partial(TransportRegularised, smoothing=share) for share in (0, 0.9)],
    ),
    "transport": (
        fitted(dense, TransportRegularised),
        [
            fitted(
                lambda: partition(modlib.networks.resnet((2, 4), 1, size=16), 2),
                TransportRegularised,
                data=load("digits", size=16).subset(n_train=64, n_test=40),
            )
        ],
    ),
}


def another_run(path: Path) -> Case:
    saved = {"checkpoint": path / "run.pt", "resume": True}
    fitted(**saved)()
    again = [fitted(**saved), fitted(checkpoint=path / "other.pt", seed=3)]
    return fitted(seed=3, **saved), again


def exists(path: Path) -> Case:
    saved = {"checkpoint": path / "run.pt"}
    fitted(**saved)()
    return fitted(**saved), [fitted(resume=True, **saved), fitted(checkpoint=path / "other.pt")]


def no_checkpoint(path: Path) -> Case:
    return fitted(resume=True), [fitted(resume=True, checkpoint=path / "run.pt")]


def another_network(path: Path) -> Case:
    saved = {"checkpoint": path / "run.pt", "resume": True}
    fitted(**saved)()
    wider = partial(dense, 20)
    return fitted(wider, **saved), [fitted(**saved), fitted(wider, checkpoint=path / "other.pt")]


def more_epochs(path: Path) -> Case:
    saved, constant = (
        {"checkpoint": path / name, "resume": True} for name in ("run.pt", "constant.pt")
    )
    fitted(**saved)()
    return fitted(epochs=2, **saved), [
        fitted(epochs=[1], **saved),
        fitted(epochs=2, checkpoint=path / "other.pt"),
        fitted(schedule="constant", **constant),
        fitted(schedule="constant", epochs=2, **constant),
    ]


def damaged(path: Path) -> Case:
    saved = {"checkpoint": path / "run.pt", "resume": True}
    fitted(**saved)()
    whole = bytearray((path / "run.pt").read_bytes())
    whole[len(whole) // 2] ^= 16
    (path / "run.pt").write_bytes(whole)

    def move_away() -> None:
        (path / "run.pt").rename(path / "damaged.pt")

    return fitted(**saved), [move_away, fitted(**saved)]


def not_plain(path: Path) -> Case:
    def measuring(value: Any) -> Call:
        name = path / f"{type(value).__name__}.pt"
        return fitted(checkpoint=name, after_epoch=lambda net, row: row.update(share=value))

    plain = (0.5, "half", [0.5], {"share": 0.5}, torch.tensor(0.5))
    return measuring(np.float64(0.5)), [measuring(value) for value in plain]


ON_DISK = [another_run, exists, no_checkpoint, another_network, more_epochs, damaged, not_plain]


def test_every_piece_of_advice_works(tmp_path: Path) -> None:
    assert unreached(FILES, PLAIN.values(), ON_DISK, tmp_path) == []
