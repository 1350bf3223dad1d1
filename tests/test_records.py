"""Records that travel: what has a rule of its own."""

import pytest
import torch

from library.records import stack_rows


def test_rows_that_lie_one_after_the_other_are_not_copied():
    block = torch.arange(24.0).view(4, 2, 3)
    for first, count in ((0, 4), (1, 2), (3, 1)):
        stacked = stack_rows([block[row] for row in range(first, first + count)])
        assert torch.equal(stacked, block[first : first + count])
        assert stacked.data_ptr() == block[first].data_ptr()


@pytest.mark.parametrize("order", [(1, 0), (0, 2), (0, 0), (0, 1, 3)])
def test_other_rows_are_stacked(order):
    block = torch.arange(24.0).view(4, 2, 3)
    stacked = stack_rows([block[row] for row in order])
    assert torch.equal(stacked, block[list(order)]) and stacked.is_contiguous()


def test_rows_of_other_tensors_are_stacked():
    block = torch.arange(12.0).view(2, 6)
    rows = [block[0], torch.arange(6.0, 12.0)]
    assert torch.equal(stack_rows(rows), block)
    columns = [block[:, 0], block[:, 1]]
    assert torch.equal(stack_rows(columns), block.T[:2])
    learned = block.clone().requires_grad_()
    stack_rows([learned[0], learned[1]]).sum().backward()
    assert torch.equal(learned.grad, torch.ones_like(block))
    assert stack_rows([torch.empty(0), torch.empty(0)]).shape == (2, 0)
    with pytest.raises(RuntimeError):
        stack_rows([block[0, :3], block[0, 3:5]])
