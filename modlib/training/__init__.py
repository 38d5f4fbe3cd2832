"""The loop: train a network by a method, and say how it does."""

from modlib.device import pick_device
from modlib.training.arguments import Schedule
from modlib.training.evaluation import Evaluation, evaluate
from modlib.training.history import History
from modlib.training.loop import fit

__all__ = ["Evaluation", "History", "Schedule", "evaluate", "fit", "pick_device"]
