"""Cutting a network: nothing is lost, nothing is copied, and the balanced cut is the best one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from modlib import networks
from modlib.data import Dataset
from modlib.methods import E2EBP
from modlib.network import ModularNetwork, layer_names, partition
from modlib.training import fit


class Plain(nn.Module):
    """A chain as people write it: functions between layers, one activation used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(4, 4, 3, stride=2)
        self.act = nn.ReLU()
        self.hidden = nn.Linear(4 * 2 * 2, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(self.features(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.hidden(x), inplace=True).mul(2.0)
        return self.head(self.act(x))


class Skip(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(self.hidden((self.conv(x) + self.conv(x)).flatten(1)))


class Doubled(nn.Sequential):
    """An nn.Sequential that does more than its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def shared_activation() -> nn.Sequential:
    act = nn.ReLU()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 3))


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "cnn": lambda: networks.cnn((4, 8), 3, channels=1, size=8, stride=1, kernel="relu", seed=0),
    "mlp": lambda: networks.mlp([64, 8, 8, 8, 3], kernel="tanh", seed=0),
    "own class": Plain,
    "activation used twice": shared_activation,
    "nested": lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 3), nn.Sequential())),
    "own forward": lambda: Doubled(nn.Flatten(), nn.Linear(64, 3)),
}


def assert_same_network(whole: nn.Module, cut: ModularNetwork, x: Tensor) -> None:
    """Equal outputs in eval and in training mode, and the very same parameters in the same order."""
    assert [id(p) for p in cut.parameters()] == [id(p) for p in whole.parameters()]
    for mode in (False, True):
        outputs = []
        for net in (whole, cut):
            net.train(mode)
            torch.manual_seed(0)  # for dropout
            outputs.append(net(x.clone()))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert torch.equal(cut.outputs(x)[-1].detach(), outputs[1].detach()) or has_dropout(whole)


def has_dropout(net: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) for m in net.modules())


@pytest.mark.parametrize("name", CHAINS)
def test_any_cut_of_a_chain_is_the_same_network(name: str) -> None:
    whole = CHAINS[name]()
    x = torch.randn(4, 1, 8, 8)
    layers = layer_names(whole)
    for count in range(1, len(layers) + 1):
        cut = partition(whole, count)
        assert len(cut) == count
        assert [n for names in cut.names for n in names] == layers
        assert_same_network(whole, cut, x)
        assert partition(whole, [names[0] for names in cut.names[1:]]).names == cut.names


# torchvision's VGGs carry a classifier of 100 million weights: a small one in its place
def vgg(name: str) -> nn.Module:
    with torch.device("meta"):
        net = getattr(torchvision.models, name)(num_classes=10)
        net.classifier = nn.Sequential(
            nn.Linear(512 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10)
        )
    net = net.to_empty(device="cpu")
    for tensor in (*net.parameters(), *net.buffers()):
        nn.init.uniform_(tensor, 0.0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    return net


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("resnet18", ["layer1.1", "layer3.0", "avgpool"]),
        ("resnet50", ["bn1", "layer2.0", "layer4.2"]),
        ("vgg11", ["features.1", "features.8", "classifier.1"]),
        ("vgg16_bn", ["features.2", "features.24", "flatten"]),
    ],
)
def test_torchvision_networks_can_be_cut(name: str, cuts: list[str]) -> None:
    torch.manual_seed(0)
    whole = vgg(name) if "vgg" in name else getattr(torchvision.models, name)(num_classes=10)
    cut = partition(whole, cuts)
    assert [names[0] for names in cut.names[1:]] == cuts
    assert_same_network(whole, cut, torch.rand(2, 3, 32, 32))


def test_training_the_modules_trains_the_network() -> None:
    whole = Plain()
    cut = partition(whole, 3)
    with torch.no_grad():
        next(cut[2].parameters()).add_(1.0)
    assert torch.equal(whole.eval()(torch.ones(2, 1, 8, 8)), cut.eval()(torch.ones(2, 1, 8, 8)))


def test_the_side_of_the_relu_on_which_modules_end_leaves_the_network_as_it_is() -> None:
    x = torch.randn(2, 3, 32, 32)
    before, after = (networks.cnn((4, 8), seed=0, boundary=b) for b in ("before", "after"))
    torch.testing.assert_close(before(x), after(x))
    assert bool((after[0](x) >= 0).all()) and bool((before[0](x) < 0).any())
    with pytest.raises(ValueError, match="choose 'before' or 'after'"):
        networks.cnn(boundary="middle")


def test_no_module_overwrites_another_modules_output() -> None:
    """A module that begins with an activation in place is handed somebody else's tensor."""
    for cuts in (["features.2", "relu"], ["features.2", "hidden", "relu"]):
        cut = partition(Plain(), cuts).eval()
        given = torch.randn(4, 1, 8, 8)
        outputs = cut.outputs(given)
        again = given
        for module, output in zip(cut, outputs, strict=True):
            again = module(again).detach().clone()
            assert torch.equal(output, again)


def test_some_of_the_modules_are_a_network_too() -> None:
    cut = partition(Plain(), 3).eval()
    x = torch.randn(4, 1, 8, 8)
    first = cut[:2]
    assert isinstance(first, ModularNetwork)
    assert first.names == cut.names[:2]
    assert torch.equal(cut[2](first(x)), cut(x))
    assert [id(p) for p in cut[-1].parameters()] == [id(p) for p in cut[2:].parameters()]


def test_a_cut_network_can_be_cut_anew() -> None:
    whole = Plain()
    cut = partition(partition(whole, 3), ["conv", "head"])
    assert [names[0] for names in cut.names] == ["features.0", "conv", "head"]
    assert_same_network(whole, cut, torch.randn(4, 1, 8, 8))


# --- what is no chain of layers becomes one -------------------------------------------------------


def late_skip(net: Plain, x: Tensor) -> Tensor:
    a = net.act(x)
    return net.head(net.act(2 * a + 1) + a)


def in_halves(net: Plain, x: Tensor) -> Tensor:
    a, b = net.act(x).chunk(2, dim=1)
    return net.head(torch.cat([b, a], 1))


def sized(net: Plain, x: Tensor) -> Tensor:
    return net.head(net.act(x).view(x.size(0), -1))


BETWEEN: dict[str, tuple[Callable[[Plain, Tensor], object], list[str]]] = {
    "skip": (lambda net, x: net.head(x + net.act(x)), ["act", "head"]),
    "late skip": (late_skip, ["act", "act_1", "head"]),
    "halves": (in_halves, ["act", "cat", "head"]),  # no cut where a tuple is passed on
    "size": (lambda net, x: net.head(x.view(x.size(0), -1)), ["view", "head"]),
    "early size": (sized, ["act", "head"]),
    "square": (lambda net, x: net.head(x * x), ["mul", "head"]),
    "weight": (lambda net, x: net.head(x * net.head.weight[0]), ["mul", "head"]),
    "keyword": (lambda net, x: net.head(input=x), ["head"]),
    "unused layer": (lambda net, x: (net.head(x), net.act(x))[0], ["head"]),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_what_lies_between_two_single_tensors_is_one_layer(case: str) -> None:
    forward, names = BETWEEN[case]
    whole, x = Broken(forward), torch.randn(4, 8)
    assert layer_names(whole) == names
    for count in range(1, len(names) + (case != "weight")):  # which two layers share
        assert torch.equal(partition(whole, count)(x), whole(x))


class Block(nn.Module):
    """Pre-norm attention and perceptron, as in timm's vision transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TimmLike(nn.Module):
    """The attributes, the optional argument and the forward pass of timm's ``VisionTransformer``."""

    def __init__(self, listed: type[nn.Module] = nn.ModuleList) -> None:
        super().__init__()
        blocks = [Block(8) for _ in range(3)]
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 8))
        self.patch_embed = nn.Conv2d(1, 8, 2, 2)
        self.blocks = nn.Sequential(*blocks) if listed is nn.Sequential else nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x.add_(self.pos_embed)
        if isinstance(self.blocks, nn.Sequential) and mask is None:
            return self.norm(self.blocks(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.forward_features(x, mask)[:, 0])


class Inside(nn.Module):
    """A transformer that another network holds."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.more = TimmLike(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.backbone(x))


def torchvision_vit() -> nn.Module:
    net = torchvision.models.VisionTransformer(8, 2, 3, 2, 8, 16, dropout=0.1, num_classes=3)
    net.conv_proj = nn.Conv2d(1, 8, 2, 2)
    nn.init.normal_(net.heads.head.weight)  # drawn as zeros
    return net


TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torchvision": (torchvision_vit, "encoder.layers.encoder_layer_"),
    "timm's": (lambda: TimmLike(nn.Sequential), "blocks."),
    "in a loop": (TimmLike, "blocks."),
    "inside": (Inside, "backbone.blocks."),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_vision_transformers_are_cut_between_their_blocks(name: str) -> None:
    build, blocks = TRANSFORMERS[name]
    torch.manual_seed(0)
    whole, x = build(), torch.randn(4, 1, 8, 8)
    by_name = [f"{blocks}1", f"{blocks}2"]
    counted = [partition(whole, k) for k in range(2, len(layer_names(whole)) + 1)]
    for cut in (partition(whole, by_name), partition(whole, 3, sample=x), *counted):
        for mode in (False, True):
            outputs = []
            for net in (whole, cut):
                torch.manual_seed(0)  # for dropout
                outputs.append(net.train(mode)(x))
            assert torch.equal(*outputs)
        assert {id(p) for p in cut.parameters()} == {id(p) for p in whole.parameters()}
    cut = partition(whole, by_name).eval()
    assert [names[0] for names in cut.names[1:]] == by_name
    assert cut.shapes(x) == [(17, 8), (17, 8), (3,)]
    assert torch.equal(copy.deepcopy(cut)(x), cut(x)) and partition(cut, 2).names[0]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_step_of_the_modules_is_a_step_of_the_transformer(name: str) -> None:
    build, blocks = TRANSFORMERS[name]
    torch.manual_seed(0)
    whole, x = build().eval(), torch.randn(4, 1, 8, 8)
    before = whole(x).detach()
    cut = partition(whole, [f"{blocks}1"]).eval()
    optimizer = torch.optim.SGD(cut.parameters(), 0.1)
    for module in cut:  # no gradient crosses, and the class token and positions are trained too
        x = module(x.detach())
        x.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in cut[0].parameters())
    optimizer.step()
    again = torch.randn(4, 1, 8, 8)
    assert torch.equal(cut(again), whole(again))
    assert not torch.allclose(whole(again), before, atol=1e-3)


def test_images_of_another_size_are_told_before_a_transformer_trains(digits: Dataset) -> None:
    net = torchvision.models.VisionTransformer(16, 4, 1, 2, 8, 16, num_classes=10)
    net.conv_proj = nn.Conv2d(1, 8, 4, 4)
    with pytest.raises(ValueError, match=r"cannot run on images of shape .*Wrong image height"):
        fit(partition(net, 2), E2EBP(), digits, epochs=1, progress=False)


def test_a_module_that_begins_by_adding_in_place_keeps_its_input() -> None:
    cut = partition(TimmLike(), ["add_"])
    given = torch.randn(2, 17, 8)
    kept = given.clone()
    cut[1](given)
    assert torch.equal(given, kept)


def test_layers_of_torch_and_blocks_that_cannot_be_followed_stay_whole() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    net = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)})

    class Net(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x).mean(1))

    class Choosy(TimmLike):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    whole = Net()
    whole.encoder = net["encoder"]
    assert layer_names(whole) == ["encoder", "mean", "head"]
    inside = Inside()
    inside.backbone = Choosy()
    assert layer_names(inside) == ["backbone", "more"]


def test_a_container_stands_for_its_first_layer() -> None:
    cut = partition(torchvision.models.resnet18(num_classes=10), ["layer2", "layer4"])
    assert [names[0] for names in cut.names] == ["conv1", "layer2.0", "layer4.0"]


# --- balanced by memory ---------------------------------------------------------------------------


def held_by(module: nn.Module, x: Tensor) -> int:
    """Bytes of all the storages that a forward pass of one module saves, its weights excluded."""
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(x.detach())
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    assert out is not None  # the graph is alive until here
    return sum(t.untyped_storage().nbytes() for a, t in saved.items() if a not in own)


def unevenness(net: ModularNetwork, x: Tensor) -> tuple[int, int]:
    """The largest module's bytes; for those that are equal in it, the squares of all, summed."""
    costs = []
    for module in net.train():
        costs.append(held_by(module, x))
        x = module(x).detach()
    return max(costs), sum(cost**2 for cost in costs)


def uneven() -> nn.Sequential:
    """Layers that save what their neighbours save, or nothing when a module begins with them."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 12, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(),
        nn.Flatten(), nn.Linear(12 * 64, 24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip


@pytest.mark.parametrize("modules", [2, 3, 4])
@pytest.mark.parametrize(
    "build", [uneven, lambda: networks.cnn((4, 8), 5, stride=1, kernel="relu", seed=0)]
)
def test_balanced_cut_has_the_least_largest_module(
    build: Callable[[], nn.Module], modules: int
) -> None:
    net, x = build(), torch.randn(3, 3, 32, 32)
    layers = layer_names(net)
    best = min(
        unevenness(partition(net, list(cuts)), x) for cuts in combinations(layers[1:], modules - 1)
    )
    assert unevenness(partition(net, modules, sample=x), x) == best


def test_balanced_cut_of_a_resnet_beats_the_even_one() -> None:
    net = torchvision.models.resnet18(num_classes=10)
    x = torch.randn(2, 3, 32, 32)
    balanced, even = partition(net, 3, sample=x), partition(net, 3)
    assert unevenness(balanced, x)[0] < unevenness(even, x)[0]


def test_measuring_changes_nothing() -> None:
    net = uneven()
    net[1].eval()  # somebody's frozen batch norm
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    cut = partition(net, 3, sample=torch.randn(4, 3, 32, 32, generator=torch.Generator()))
    cut.shapes(torch.zeros(4, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [layer.training for layer in net] == [i != 1 for i in range(len(net))]


def test_shapes_are_the_outputs_shapes() -> None:
    cut = partition(uneven(), ["4", "9"])
    x = torch.zeros(2, 3, 32, 32)
    assert cut.shapes(x) == [tuple(h.shape[1:]) for h in cut.outputs(x)]
    assert cut.shapes(x) == [(6, 16, 16), (768,), (5,)]


# --- what cannot be cut ---------------------------------------------------------------------------


class Broken(Plain):
    """A chain whose forward is replaced by each test."""

    def __init__(self, forward: Callable[[Plain, Tensor], object]) -> None:
        super().__init__()
        self._forward = forward

    def forward(self, x: Tensor) -> object:  # type: ignore[override]
        return self._forward(self, x)


def branch(net: Plain, x: Tensor) -> Tensor:
    return net.conv(x) if x.sum() > 0 else net.features(x)


NO_CHAIN: dict[str, tuple[Callable[[Plain, Tensor], object], str]] = {
    "two outputs": (lambda net, x: (net.head(x), x), "not a chain at 'output'"),
    "given back": (lambda net, x: x, "not a chain at 'output'"),
    "branch": (branch, "cannot be followed"),
    "dropout": (lambda net, x: net.head(F.dropout(x, 0.5, net.training)), "nn.Dropout"),
    "mode": (
        lambda net, x: net.head(x if net.training else 2 * x),
        "in training than in evaluation",
    ),
}


@pytest.mark.parametrize("case", NO_CHAIN)
def test_what_is_no_chain_is_refused(case: str) -> None:
    forward, message = NO_CHAIN[case]
    with pytest.raises(ValueError, match=message):
        partition(Broken(forward), 1)


class TwoInputs(Plain):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(x + self.act(other))


def test_a_second_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not a chain at 'add', which uses .* first input"):
        partition(TwoInputs(), 1)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["nowhere"], "cannot be cut at 'nowhere'; it can be cut before any of layer2, head"),
        (["layer1"], "name its first layer 'layer1'"),
        (["head", "layer2"], "not in the network's order"),
        (["head", "head"], "not in the network's order"),
        (4, "modules=4, but the network has 3 layers"),
        (0, "choose between 1 and 3"),
        (-1, "choose between 1 and 3"),
    ],
)
def test_impossible_cuts_are_refused(modules: int | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(networks.mlp([4, 4, 4, 2]), modules)


@pytest.mark.parametrize("modules", ["layer2", 2.0, [1], None])
def test_cuts_of_a_wrong_type_are_refused(modules: object) -> None:
    with pytest.raises(TypeError, match="give a number of modules, or a list"):
        partition(networks.mlp([4, 4, 4, 2]), modules)  # type: ignore[arg-type]


def test_modules_that_would_share_weights_are_refused() -> None:
    tied = nn.Linear(4, 4)
    norm = nn.BatchNorm1d(4, affine=False)
    for layer in (tied, norm):
        net = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 4), layer, nn.Linear(4, 2))
        with pytest.raises(ValueError, match="'0' and '3' share weights"):
            partition(net, ["2"])
        whole, x = partition(net, ["4"]).eval(), torch.randn(3, 4)  # within a module they may
        assert torch.equal(whole(x), net.eval()(x))


def test_nothing_can_be_cut_out_of_nothing() -> None:
    with pytest.raises(ValueError, match="empty network"):
        partition(nn.Sequential(), 1)


def test_a_sample_of_the_wrong_shape_is_explained() -> None:
    with pytest.raises(ValueError, match=r"sample: ConvUnit cannot train on .* \(2, 1, 32, 32\)"):
        partition(networks.cnn(), 2, sample=torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"\(2, 1, 16, 16\) \(Wrong image height! Expected 8"):
        partition(torchvision_vit(), 2, sample=torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        partition(torchvision.models.resnet18(), 2, sample=torch.zeros(1, 3, 32, 32))


def test_cuts_cover_the_chain_in_order() -> None:
    for modules in range(1, 8):
        cut = partition(networks.cnn(stride=1), modules, sample=torch.zeros(2, 3, 32, 32))
        layers = layer_names(networks.cnn())
        starts = [layers.index(names[0]) for names in cut.names]
        assert starts[0] == 0
        assert all(a < b for a, b in pairwise(starts))
