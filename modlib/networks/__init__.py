"""The small reference networks of the book.

Each is a chain of layers, to be cut by ``modlib.partition``::

    mlp        a multilayer perceptron
    cnn        a plain convolutional network
    resnet     a residual network of 6n + 2 layers
    vit        a vision transformer
    vgg8b      on which local error signals were published
    patch_cnn  an encoder of patches, for Greedy InfoMax
    whitened_cnn  of the fast CIFAR-10 recipes, whose first convolution whitens

Their layers, for networks of your own: ``ResidualUnit``, ``VGGUnit``, ``Patches``, ``JoinPatches``.
What sends targets back through a module: ``learned_inverse`` (behind ``ELUSlope`` or ``TanhSlope``),
``ExactInverse``.
"""

from modlib.networks.cnn import cnn as cnn
from modlib.networks.inverses import ELUSlope as ELUSlope
from modlib.networks.inverses import ExactInverse as ExactInverse
from modlib.networks.inverses import TanhSlope as TanhSlope
from modlib.networks.inverses import learned_inverse as learned_inverse
from modlib.networks.mlp import mlp as mlp
from modlib.networks.patches import JoinPatches as JoinPatches
from modlib.networks.patches import Patches as Patches
from modlib.networks.patches import patch_cnn as patch_cnn
from modlib.networks.residual import ResidualUnit as ResidualUnit
from modlib.networks.residual import resnet as resnet
from modlib.networks.vgg import VGGUnit as VGGUnit
from modlib.networks.vgg import vgg8b as vgg8b
from modlib.networks.vit import vit as vit
from modlib.networks.whitened import whitened_cnn as whitened_cnn

# There is no __all__: help() would print every member that each layer inherits from torch.
