"""The small reference networks of the book."""

from modlib.networks.cnn import cnn
from modlib.networks.mlp import mlp

__all__ = ["cnn", "mlp"]
