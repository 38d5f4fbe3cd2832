"""Transformers: every method takes tokens where its mathematics does, and says so where it does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from modlib import kernels, methods, networks, objectives
from modlib.data import Dataset, Loader, load
from modlib.kernels import FeatureMap, Gaussian
from modlib.measure.audit import audit
from modlib.methods import (
    E2EBP,
    AugLocal,
    InformationPropagation,
    KeepHeads,
    LocalLearning,
    Method,
    Only,
    ProxyObjective,
    TransportRegularised,
)
from modlib.methods.transport import residual_branches
from modlib.network import ModularNetwork, partition
from modlib.networks.seeding import redraw
from modlib.networks.vit import Attention, Block
from modlib.objectives import AuxiliaryClassifier, Objective, SupCon
from modlib.reuse.diagnosis import _dead
from modlib.tokens import as_maps, pooled
from modlib.training import evaluate, fit

CLASSES = 3
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def tokens(count: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(8, count, width, generator=torch.Generator().manual_seed(seed))


# --- one rule: the mean over tokens ---------------------------------------------------------------


POOLING: dict[str, Callable[[], Objective]] = {
    **{
        name: kind
        for name, kind in vars(objectives).items()
        if isinstance(kind, type) and issubclass(kind, Objective) and not name.startswith("Info")
    },
    **{
        f"classifier {kind}": partial(AuxiliaryClassifier, kind)
        for kind in ("linear", "mlp", "mlp-sr", "pred", "flat")
    },
    "learned projection": partial(objectives.SimilarityMatching, projection="learned"),
    "Gaussian": lambda: SupCon(1.0, Gaussian(2.0)),
}
for name in ("Objective", "ProxyLoss", "CrossEntropy"):  # no objectives, or of logits
    del POOLING[name]


@pytest.mark.parametrize("name", POOLING)
def test_objectives_see_the_mean_of_tokens(name: str) -> None:
    h, x = tokens(5), tokens(1, 4)
    values = []
    for outputs in (h, h.mean(1)):
        torch.manual_seed(0)
        ready = POOLING[name]().for_module(tuple(outputs.shape[1:]), CLASSES)
        for p in ready.parameters():
            nn.init.normal_(p)  # "pred" begins with zeros
        values.append(ready.local(outputs, LABELS, x))
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("kernel", ["relu", "tanh", "sigmoid", "cosine", Gaussian(2.0)])
def test_kernels_see_the_mean_of_tokens(kernel: str | kernels.Kernel) -> None:
    h = tokens(5)
    torch.testing.assert_close(kernels.gram(h, kernel), kernels.gram(h.mean(1), kernel))
    if isinstance(kernel, str):
        torch.testing.assert_close(FeatureMap(kernel)(h), FeatureMap(kernel)(h.mean(1)))
    with pytest.raises(ValueError, match="use kernel 'relu' there"):
        FeatureMap("relu-pool")(h)


@pytest.mark.parametrize("form", ["softmax", "contrast"])
@pytest.mark.parametrize("class_token", [False, True])
def test_infopro_sees_patches_on_their_grid(form: str, class_token: bool) -> None:
    """Row by row, as the embedding of patches gives them, and without the class token."""
    maps = torch.randn(8, 6, 4, 4)
    h = torch.stack([maps[:, :, i // 4, i % 4] for i in range(16)], 1)
    if class_token:
        h = torch.cat([torch.full((8, 1, 6), 100.0), h], 1)
    assert torch.equal(as_maps(h), maps)
    values = []
    for outputs in (h, maps):
        torch.manual_seed(0)
        ready = objectives.InfoPro(form=form).for_module(tuple(outputs.shape[1:]), CLASSES)
        values.append(ready.local(outputs, LABELS, torch.ones(8, 3, 8, 8)))
    torch.testing.assert_close(values[0], values[1])


def test_what_is_no_grid_of_tokens_stays_as_it_is() -> None:
    for h in (tokens(15), tokens(18), torch.zeros(2, 16), torch.zeros(2, 3, 4, 4)):
        assert as_maps(h) is h
    for h in (torch.zeros(2, 16), torch.zeros(2, 3, 4, 4)):
        assert pooled(h) is h


def test_a_network_of_ones_own_sees_the_tokens() -> None:
    own = AuxiliaryClassifier(nn.Sequential(nn.Flatten(), nn.Linear(30, CLASSES)))
    assert own.for_module((5, 6), CLASSES)(tokens(5), LABELS).isfinite()


# --- the reference network ------------------------------------------------------------------------


def small(kernel: str | None = None, **options: str) -> nn.Sequential:
    return networks.vit(
        16, 3, heads=2, patch=2, channels=1, size=8, kernel=kernel, seed=0, **options
    )


def test_layers_of_the_reference_network() -> None:
    x = torch.randn(2, 1, 8, 8)
    mean, modular = small(), small("relu")
    assert [name for name, _ in mean.named_children()] == [
        "embed", "block1", "block2", "block3", "head",
    ]  # fmt: skip
    assert [name for name, _ in modular.named_children()][-2:] == ["features", "head"]
    for net, count in ((mean, 16), (modular, 16), (small(pool="class"), 17)):
        assert partition(net, ["block2", "block3"]).shapes(x) == [(count, 16), (count, 16), (10,)]
    torch.testing.assert_close(modular[:-1](x).norm(dim=1), torch.ones(2))
    assert torch.equal(small()(x), mean(x))  # the seed's weights


def test_the_head_reads_the_token_it_says() -> None:
    h = tokens(5, 16)
    for pool, read in (("mean", lambda u: u.mean(1)), ("class", lambda u: u[:, 0])):
        norm, _, linear = head = small(pool=pool).head
        torch.testing.assert_close(head(h), linear(read(norm(h))))


def test_attention_is_torchs() -> None:
    ours, theirs = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    h = tokens(5, 16)
    torch.testing.assert_close(ours(h), theirs(h, h, h)[0])


def test_a_block_is_two_residual_branches() -> None:
    block, h = Block(16, 4, 32), tokens(5, 16)
    first, second = block
    between = h + first.branch[1](first.branch[0](h))
    norm, up, act, down = second.branch
    torch.testing.assert_close(block(h), between + down(act(up(norm(between)))))
    assert len(residual_branches(small())) == 6


def test_patches_are_embedded_with_their_places() -> None:
    embed, x = small(pool="class").embed, torch.randn(2, 1, 8, 8)
    patch = x[:, :, 2:4, 4:6].flatten(1)  # row 1, column 2 of the 4×4 grid, behind the class token
    expected = patch @ embed.patches.weight.flatten(1).T + embed.patches.bias + embed.place[7]
    torch.testing.assert_close(embed(x)[:, 7], expected)
    torch.testing.assert_close(embed(x)[:, 0], (embed.class_token + embed.place[0]).expand(2, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, "size=32, patch=3"),
        ({"patch": 0}, "patch=0"),
        ({"patch": 64}, "size=32, patch=64"),
        ({"heads": 3}, "width=64, heads=3"),
        ({"depth": 0}, "depth=0"),
        ({"pool": "max"}, "pool='max': choose"),
        ({"pool": "class", "kernel": "relu"}, "a feature map takes the mean"),
    ],
)
def test_transformers_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        networks.vit(**options)  # type: ignore[arg-type]


# --- every method ---------------------------------------------------------------------------------


TRAINED: dict[str, Callable[[], Method]] = {
    "E2EBP": E2EBP,
    "AlternatingMinimisation": methods.AlternatingMinimisation,
    "AugLocal": partial(AugLocal, 2),
    "DelayedGradients": methods.DelayedGradients,
    "FeaturesReplay": methods.FeaturesReplay,
    "InformationPropagation": InformationPropagation,
    "KeepHeads": lambda: KeepHeads(LocalLearning()),
    "LocalLearning": LocalLearning,
    "Only": lambda: Only(LocalLearning(in_turn=True), [1]),
    "ProxyObjective": lambda: ProxyObjective(SupCon(kernel="relu")),
    "SyntheticGradients": methods.SyntheticGradients,
    "TransportRegularised": TransportRegularised,
    "cascade": methods.cascade,
    "decoupled_greedy": methods.decoupled_greedy,
    "hsic_bottleneck": methods.hsic_bottleneck,
    "infopro": methods.infopro,
    "local_error_signals": methods.local_error_signals,
    "mono_forward": methods.mono_forward,
    "random_classifiers": methods.random_classifiers,
    "transport": methods.transport,
}
REFUSED: dict[str, tuple[Callable[[], Method], str]] = {
    **{
        name: (getattr(methods, name), r"net: module 0 is \[.*solves for linear layers")
        for name in ("ADMM", "BlockCoordinateDescent", "LiftedNetwork")
    },
    "MAC": (methods.MAC, r"net: module 0 .*codes of vectors"),
    "DifferenceTargetPropagation": (
        methods.DifferenceTargetPropagation,
        r"needs at least three modules whose outputs are vectors.*\(16, 16\)",
    ),
    "TargetPropagation": (
        methods.TargetPropagation,
        r"needs at least three modules whose outputs are vectors.*\(16, 16\)",
    ),
    **{
        name: (
            getattr(methods, name),
            r"needs at least two modules whose outputs are vectors.*\(16, 16\)",
        )
        for name in ("ddtp", "dtp_drl", "l_drl")
    },
    "greedy_infomax": (
        methods.greedy_infomax,
        r"needs outputs \(C,\) .* of every patch.*\(16, 16\)",
    ),
    "layerwise_greedy": (
        methods.layerwise_greedy,
        r"needs maps \(C, H, W\).*use 'mlp' or 'linear'",
    ),
}


def cut(kernel: str | None = None) -> ModularNetwork:
    last = "head" if kernel is None else "features"
    return partition(small(kernel), ["block2", "block3", last])


def test_every_method_is_told_here_whether_it_takes_tokens() -> None:
    other = {"Ensemble", "ExactGradient", "Method", "Stage", "adamw", "sgd", "unformatted_accuracy"}
    assert TRAINED.keys() | REFUSED.keys() == set(methods.__all__) - other


@pytest.mark.parametrize(
    ("name", "kernel"),
    [(name, k) for name in TRAINED for k in (None, "relu") if k or name != "ProxyObjective"],
)
def test_methods_train_a_transformer(name: str, kernel: str | None, digits: Dataset) -> None:
    net = cut(kernel)
    before = [next(module.parameters()).clone() for module in net if [*module.parameters()]]
    history = fit(net, TRAINED[name](), digits, epochs=1, batch_size=64, progress=False)
    assert np.isfinite([loss for row in history.rows for loss in row["losses"]]).all()
    assert all(p.isfinite().all() for p in net.parameters())
    moved = [not torch.equal(a, next(m.parameters())) for a, m in zip(before, net, strict=True)]
    assert moved == ([k == 1 for k in range(4)] if name == "Only" else [True] * 4)
    assert np.isfinite(evaluate(net, digits).loss)


@pytest.mark.parametrize("name", REFUSED)
def test_methods_whose_mathematics_has_no_tokens_say_so(name: str, digits: Dataset) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        fit(cut(), make(), digits, epochs=1, progress=False)


def test_infopro_refuses_tokens_that_are_no_grid() -> None:
    with pytest.raises(ValueError, match=r"square grid of patches, not \(15, 6\)"):
        objectives.InfoPro().for_module((15, 6), CLASSES)


@pytest.mark.parametrize(
    ("method", "category"),
    [
        (E2EBP(), "end-to-end"),
        (LocalLearning(), "weakly modular"),
        (ProxyObjective(SupCon(kernel="relu")), "modular"),
    ],
)
def test_categories_of_a_transformer(method: Method, category: str, digits: Dataset) -> None:
    assert audit(method, cut("relu"), Loader(digits).sample(64)).category == category


def test_a_transformer_learns() -> None:
    data = load("digits")
    net = networks.vit(32, 3, patch=2, channels=1, size=8, seed=0)
    adam = partial(torch.optim.AdamW, lr=3e-3)
    fit(net, E2EBP(optimizer=adam), data, epochs=8, batch_size=32, progress=False)
    assert evaluate(net, data).accuracy > 0.6  # 0.92 when this was written; chance is 0.1


def test_dead_channels_of_tokens_are_their_numbers() -> None:
    net = cut()
    with torch.no_grad():  # four numbers that are below zero in every token
        net[0].embed.patches.bias[:4] = -1000.0
    shares = _dead(net, 0, torch.randn(8, 1, 8, 8), torch.relu)
    assert shares["embed"] == 4 / 16


# --- AugLocal: copies of later blocks -------------------------------------------------------------


def test_auglocal_copies_later_blocks_with_weights_of_their_own() -> None:
    net = partition(small(), ["block1", "block2", "block3"])
    heads = AugLocal(depth=2).objectives(net, torch.zeros(2, 1, 8, 8))[:-1]
    built = [[type(part).__name__ for part in head.network] for head in heads]
    end = ["LayerNorm", "MeanToken", "Linear"]
    assert built == [["Block", "Block", *end], ["Block", "Block", *end], ["Block", *end]]
    ours = {id(p) for p in net.parameters()}
    drawn = [p for head in heads for p in head.parameters()]
    assert not ours & {id(p) for p in drawn}
    weight = net[3].block3[0].branch[1].qkv.weight
    assert not torch.equal(heads[0].network[1][0].branch[1].qkv.weight, weight)


def test_auglocal_copies_torchvisions_blocks() -> None:
    vit = torchvision.models.VisionTransformer(8, 2, 3, 2, 8, 16, num_classes=4)
    net = partition(vit, [f"encoder.layers.encoder_layer_{k}" for k in (1, 2)])
    heads = AugLocal(depth=1).objectives(net, torch.zeros(2, 3, 8, 8))[:-1]
    assert [type(head.network[0]).__name__ for head in heads] == ["EncoderBlock"] * 2
    copied, last = heads[1].network[0], vit.encoder.layers[2]
    for name, tensor in copied.named_parameters():
        if name.endswith("weight") and "ln" not in name:
            assert not torch.equal(tensor, last.get_parameter(name)), name


def test_redrawn_attention_begins_as_torchs_does() -> None:
    layer = nn.MultiheadAttention(8, 2)
    for p in layer.parameters():
        nn.init.constant_(p, 7.0)
    redraw(layer, seed=0)
    assert not layer.in_proj_bias.any() and not layer.out_proj.bias.any()
    assert layer.in_proj_weight.abs().max() < 1 and layer.in_proj_weight.std() > 0


def test_auglocal_refuses_blocks_that_change_the_tokens() -> None:
    class Halve(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, h: Tensor) -> Tensor:
            return self.linear(h[:, ::2])

    layers = [networks.vit(16, 1, heads=2, patch=2, channels=1, size=8).embed, Halve(), Halve()]
    end = [nn.Flatten(), nn.Linear(64, 10)]
    net = partition(nn.Sequential(*layers, *end), ["1", "2"])
    with pytest.raises(ValueError, match="cannot copy layer '2', a Halve; it can copy"):
        AugLocal(depth=1).stages(net, torch.zeros(2, 1, 8, 8))
