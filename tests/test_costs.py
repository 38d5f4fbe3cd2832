"""Operations and parameters against counts by hand."""

from modlib import networks, partition
from modlib.data import Dataset, Loader
from modlib.measure.costs import costs
from modlib.methods import E2EBP, LocalLearning
from modlib.objectives import AuxiliaryClassifier


def test_operations_are_those_of_the_layers(digits: Dataset) -> None:
    batch = Loader(digits).sample(32)
    net = partition(networks.mlp([64, 32, 16, 10]), modules=3)
    first, rest = 2 * 64 * 32, 2 * (32 * 16 + 16 * 10)
    end_to_end = costs(E2EBP(), net, batch, repeats=1)
    # backward: twice the forward, but nobody asks for the gradient of the images
    assert end_to_end["network_flops"] == first + rest
    assert end_to_end["step_flops"] == 2 * first + 3 * rest
    assert end_to_end["auxiliary_parameters"] == 0
    local = costs(LocalLearning(AuxiliaryClassifier("linear")), net, batch, repeats=1)
    heads = 2 * (32 * 10 + 16 * 10)
    inner = 2 * 32 * 16 + 2 * 16 * 10  # modules 2 and 3 send no gradient to their inputs
    assert local["step_flops"] == 2 * first + 2 * inner + 3 * heads
    assert local["auxiliary_parameters"] == (32 + 1) * 10 + (16 + 1) * 10


def test_in_turn_every_stage_counts(digits: Dataset) -> None:
    batch = Loader(digits).sample(32)
    net = partition(networks.mlp([64, 32, 16, 10]), modules=3)
    objective = AuxiliaryClassifier("linear")
    together, in_turn = (
        costs(LocalLearning(objective, in_turn=turn), net, batch, repeats=1)
        for turn in (False, True)
    )
    again = 2 * 64 * 32 + (2 * 64 * 32 + 2 * 32 * 16)  # frozen modules run once more in each stage
    assert in_turn["step_flops"] == together["step_flops"] + again
    assert in_turn["step_time"] > 0
