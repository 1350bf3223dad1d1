import torch

from library.nn.attention import AttentionShape
from library.nn.attention_speed import fastest, measure_kernels


def measured(**changes):
    shape = AttentionShape(heads=2, head_dim=8, queries=5, keys=7, masked=False)._replace(**changes)
    return measure_kernels(shape, batch_size=2, device=torch.device("cpu"), dtype=torch.float32)


def test_kernels_that_can_are_timed_and_the_others_left_out():
    for masked in (False, True):
        taken = measured(masked=masked)
        assert list(taken) == ["torch-flash"]  # a CPU has no other
        assert 0 < taken["torch-flash"] < 1


def test_the_shortest_time_wins():
    assert fastest({"torch-cudnn": 0.2, "torch-flash": 0.1}) == "torch-flash"
    assert fastest({}) is None
