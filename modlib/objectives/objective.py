"""What every objective has in common: a scalar from a module's output and the labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Self, cast

from torch import Tensor, nn

Term = Callable[[Tensor, Tensor, Tensor], Tensor]  # (h, y, x) -> scalar


class Objective(nn.Module):
    """A local objective: ``objective(h, y)`` is a scalar to be minimised.

    h is a module's output: (N, d), (N, C, H, W), or the tokens (N, T, d) of a transformer, of which the
    mean is taken (``modlib.tokens``). y are labels (N,). An objective may own trainable parameters (an
    auxiliary network); they are trained with the module and dropped afterwards.

    >>> import torch
    >>> class Margin(Objective):    # an objective of your own
    ...     def forward(self, h, y):
    ...         return nn.functional.multi_margin_loss(h, y)
    >>> Margin()(torch.zeros(2, 4), torch.tensor([0, 3]))    # three of four classes are 1 too near
    tensor(0.7500)
    """

    @property
    def pairs(self) -> bool:
        """Does it compare images of the same class with images of others?

        ``modlib.fit`` then fills batches so that no class is alone in them, where there is room.
        """
        return False

    def accepts(self, y: Tensor) -> bool:
        """Can it be computed on a batch with these labels (N,)? ``modlib.fit`` skips the others."""
        return True

    def for_module(self, shape: Sequence[int], classes: int) -> Self:
        """This objective made ready for one module; methods call it once for each.

        Args:
            shape: of the module's output, without the batch dimension.
            classes: number of classes of the task.
        """
        return copy.deepcopy(self)

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Be told what each channel of the network's input was normalised with.

        ``modlib.fit`` calls it once, before training. Only an objective that looks at the input's own
        scale needs to know.
        """

    def local(self, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """The objective while a network trains, where its input x (N, ...) is at hand.

        An objective that compares h with the network's input defines this; for all others the input
        makes no difference. On stored features of frozen modules x is those features.
        """
        return cast(Tensor, self(h, y))

    def terms(self) -> Sequence[Term]:
        """Functions of (h, y, x) whose sum is ``local(h, y, x)``, so that each may go back before the next.

        Autograd then holds what one of them needs at a time. All of them but the last must depend on a
        module through h alone, and no parameter may be in two of them.
        """
        return (self.local,)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(h, y) -> scalar.")
