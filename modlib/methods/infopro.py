r"""Information propagation: local learning whose balance of image and label shifts with depth.

.. math:: L_k = \lambda_{1,k}\, \mathrm{BCE}(\mathrm{dec}_k(h_k), \tilde x) + \lambda_{2,k}\, L_y(h_k),
          \quad k < K

Source: Wang et al. 2021 (arXiv 2101.10832), section 3. Category measured by the audit: weakly
modular.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from modlib.methods.local import LocalLearning
from modlib.methods.method import Optimizers
from modlib.network import ModularNetwork
from modlib.objectives import CrossEntropy, Objective
from modlib.objectives.infopro import InfoPro, infopro_weights


class InformationPropagation(LocalLearning):
    """Train all modules in each step, hidden ones on ``InfoPro`` with weights of their own.

    Args:
        first: (λ1, λ2) of the first module; between it and the last hidden one they change linearly.
        last: of the last hidden module; as ``first`` if None.
        form, mean, std: as in ``InfoPro``.
        in_turn: train one module after another.
        smoothing: of the labels, as in ``InfoPro``; an ``output`` that is given has its own.
        optimizer: makes one module's optimiser, or a list with one for each module.
        output: the last module's objective; cross-entropy if None.

    Raises:
        ValueError: a weight or form is none; (when training starts) the input is no batch of images,
            or a hidden module's output no map (C, H, W).

    >>> import modlib
    >>> data = modlib.data.load("digits").subset(n_train=256, n_test=64)
    >>> net = modlib.networks.cnn((4, 8), channels=1, size=8, stride=1, kernel="relu")
    >>> method = InformationPropagation((1, 0), (0, 1), mean=data.mean, std=data.std)
    >>> history = modlib.fit(modlib.partition(net, 3), method, data, epochs=1, progress=False)
    >>> len(history.rows[0]["losses"])
    3
    """

    def __init__(
        self,
        first: tuple[float, float] = (5.0, 0.5),
        last: tuple[float, float] | None = None,
        form: str = "softmax",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        in_turn: bool = False,
        smoothing: float = 0.0,
        optimizer: Optimizers = None,
        output: Objective | None = None,
    ) -> None:
        self.first, self.last = first, first if last is None else last
        self.form = form
        self._objective = partial(InfoPro, form=form, mean=mean, std=std, smoothing=smoothing)
        for weights in (self.first, self.last):  # refuses what it cannot be
            self._objective(*weights, channels=3 if mean is None else len(mean))
        output = output or CrossEntropy(smoothing)
        super().__init__(in_turn=in_turn, optimizer=optimizer, output=output)

    def objectives(self, net: ModularNetwork, x: Tensor) -> list[Objective]:
        if x.dim() != 4:
            raise ValueError(f"x has shape {tuple(x.shape)}; InfoPro needs images (N, C, H, W).")
        return super().objectives(net, x)

    def hidden_objectives(
        self, net: ModularNetwork, x: Tensor, shapes: Sequence[tuple[int, ...]], classes: int
    ) -> list[Objective]:
        weights = infopro_weights(len(net), self.first, self.last)
        return [
            self._objective(*pair, channels=x.shape[1]).for_module(shape, classes)
            for pair, shape in zip(weights, shapes, strict=True)
        ]


def infopro(
    first: tuple[float, float] = (5.0, 0.5),
    last: tuple[float, float] | None = None,
    form: str = "contrast",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    smoothing: float = 0.0,
    optimizer: Optimizers = None,
) -> InformationPropagation:
    """InfoPro: hidden modules also keep what rebuilds the image.

    Published: CIFAR-10, ResNet-110, batches of 1024, 160 epochs; first and last weights (5, 0.5) with two
    modules, (1, 0) and (0, 1) with four, (5, 0) and (0, 1) with eight, (5, 0) and (0.5, 1) with 16.

    Args:
        first, last, form, mean, std, smoothing: as in ``InformationPropagation``.
        optimizer: the library's SGD if None.

    Source: Wang et al. 2021 (arXiv 2101.10832).

    >>> infopro(first=(1, 0), last=(0, 1)).form
    'contrast'
    """
    return InformationPropagation(
        first, last, form, mean, std, smoothing=smoothing, optimizer=optimizer
    )
