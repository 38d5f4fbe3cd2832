"""Data sets as tensors: prepared caches on disk, whole batches augmented on the device.

Classification only: images, vectors or tokens, and for each the number of its class.

>>> import modlib.data
>>> digits = modlib.data.load("digits")          # embedded: needs no network
>>> digits.shape, len(digits.train_labels), digits.classes[:3]
((1, 8, 8), 1437, ('0', '1', '2'))
>>> loader = modlib.data.Loader(digits, "train", batch_size=100)
>>> x, y = next(iter(loader.epoch(seed=0, epoch=0)))
>>> tuple(x.shape), x.dtype, tuple(y.shape)
((100, 1, 8, 8), torch.float32, (100,))
"""

from modlib.data.augment import Augment, default_augment
from modlib.data.catalogue import counts, explain, load, names, prepare, stand_in
from modlib.data.dataset import Dataset
from modlib.data.loader import Loader

__all__ = [
    "Augment",
    "Dataset",
    "Loader",
    "counts",
    "default_augment",
    "explain",
    "load",
    "names",
    "prepare",
    "stand_in",
]
