"""The small reference networks of the book."""

from modlib.networks.cnn import cnn
from modlib.networks.mlp import mlp
from modlib.networks.patches import JoinPatches, Patches, patch_cnn
from modlib.networks.residual import ResidualUnit, resnet
from modlib.networks.vgg import VGGUnit, vgg8b

__all__ = [
    "JoinPatches",
    "Patches",
    "ResidualUnit",
    "VGGUnit",
    "cnn",
    "mlp",
    "patch_cnn",
    "resnet",
    "vgg8b",
]
