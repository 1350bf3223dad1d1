"""Memory of weights, gradients and optimizer state is what arithmetic says."""

import pytest
import torch

from bench.optimizers import CHOICES, Choice, measure, sana_shapes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "choice",
    [
        choice
        for choice in CHOICES
        if choice.optimizer in ("AdamW", "CAME", "CAME8bit") and not (choice.fused or choice.on_host)
    ],
    ids=lambda choice: choice.title,
)
def test_a_large_matrix_takes_the_bytes_of_the_arithmetic(choice):
    found = measure(choice, [(2240, 5600)], CPU)
    assert found.weights == found.gradients == choice.dtype.itemsize
    assert found.state == pytest.approx(choice.state, rel=0.05)
    assert found.total == pytest.approx(choice.expected, rel=0.05)


def test_fused_gradients_are_few():
    shapes = sana_shapes(64, blocks=6)
    whole = measure(Choice("CAME", torch.float32, 4), shapes, CPU)
    fused = measure(Choice("CAME", torch.float32, 4, fused=True), shapes, CPU)
    assert fused.state == whole.state
    assert fused.gradients < 0.3 * whole.gradients


def test_state_on_the_host_leaves_four_places_on_the_device():
    shapes = [(128, 256)] * 20
    found = measure(Choice("AdamW", torch.float32, 8, on_host=True), shapes, CPU)
    assert found.host == 8
    assert found.state == pytest.approx(8 * 4 / 20, rel=0.01)
    assert found.total == pytest.approx(8 + 8 * 4 / 20, rel=0.01)


def test_the_shapes_are_those_of_sana():
    assert sum(torch.Size(shape).numel() for shape in sana_shapes(2240, blocks=20)) == pytest.approx(1.6e9, rel=0.05)
