import copy

import pytest
import torch
from torch import nn

from library.memory.block_swap import AHEAD, BlockSwap, slot_count, swapped_blocks
from library.memory.checkpointing import enable_checkpointing
from tests.memory.late_transfers import LateTransfers

DEPTH = 7


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 32), nn.Linear(32, 8)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x, *, shift):
        return x + self.outer(torch.tanh(self.inner(self.norm(x) * self.scale + shift)))


class Adapted(nn.Module):
    """A frozen tower with a trained layer before, between and after its blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH)).requires_grad_(False)
        self.adapters = nn.ModuleList(nn.Linear(8, 8) for _ in range(DEPTH + 1))

    def forward(self, x, shift):
        for adapter, block in zip(self.adapters, self.blocks):
            x = block(x + adapter(x), shift=shift)
        return self.adapters[-1](x)


def step(model, seed=1):
    """The answer and the gradients of a step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 8, generator=generator, requires_grad=True)
    model.zero_grad()
    answer = model(x, torch.randn(8, generator=generator))
    answer.square().sum().backward()
    return [answer.detach(), x.grad, *(parameter.grad for parameter in model.adapters.parameters())]


def swapped(count, interval=None):
    """A model with swapped blocks, its twin without, the swap and its transfers."""
    plain, transfers = Adapted(), LateTransfers()
    model = copy.deepcopy(plain)
    checkpointed = range(0, DEPTH, interval) if interval else ()
    swap = BlockSwap(list(model.blocks), count, transfers, checkpointed=checkpointed)
    if interval:
        enable_checkpointing(list(model.blocks), interval)
    return model, plain, swap, transfers


@pytest.mark.parametrize("interval", [None, 1, 2])
@pytest.mark.parametrize("count", range(DEPTH + 1))
def test_answers_and_gradients_are_the_same_bits(count, interval):
    model, plain, _, _ = swapped(count, interval)
    for seed in (1, 2):
        assert all(map(torch.equal, step(model, seed), step(plain, seed)))
        with torch.no_grad():
            for _ in range(2):
                x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
                assert torch.equal(model(x, x[0]), plain(x, x[0]))


def test_gradients_of_several_answers_that_wait_for_their_backward_pass():
    model, plain, _, _ = swapped(4)
    for one in (model, plain):
        answers = [one(torch.full((2, 8), value), torch.ones(8)).sum() for value in (0.5, 2.0)]
        one.zero_grad()
        for answer in answers:
            answer.backward()
    for own, other in zip(model.adapters.parameters(), plain.adapters.parameters()):
        assert torch.equal(own.grad, other.grad)


@pytest.mark.parametrize("count", [1, 3, DEPTH - 2, DEPTH])
def test_the_device_is_relieved_of_what_was_asked_for(count):
    _, plain, swap, transfers = swapped(count)
    block = sum(tensor.nbytes for tensor in plain.blocks[0].state_dict().values())
    slots = swap.device_bytes / (swap.host_bytes / len(swapped_blocks(count, DEPTH)))
    on_device = DEPTH - len(swapped_blocks(count, DEPTH)) + slots
    assert on_device == (DEPTH - count if count <= DEPTH - 2 else 2)
    assert block <= transfers.device_size / slots <= block + 6 * 256
    assert slot_count(count, DEPTH) == slots


@pytest.mark.parametrize("interval", [None, 1])
def test_blocks_come_ahead_and_what_is_there_at_the_turn_stays(interval):
    model, _, swap, transfers = swapped(4, interval)
    assert swapped_blocks(4, DEPTH) == list(range(DEPTH))
    step(model)
    transfers.fetched.clear()
    transfers.ahead.clear()
    step(model)
    names = [transfers.turn_of(master) for master in transfers.fetched]
    assert names == [3, 4, 5, 6, 3, 2, 1, 0], "three are there at either end of the pass"
    assert transfers.ahead == [AHEAD] * len(names), "copies run beside the two blocks before"
    assert swap.resident == (0, 1, 2)


def test_looking_alone_begins_again_at_the_start():
    model, _, _, transfers = swapped(4)
    with torch.no_grad():
        for _ in range(2):
            model(torch.ones(1, 8), torch.ones(8))
    assert [transfers.turn_of(master) for master in transfers.fetched] == [*range(DEPTH)] * 2 + [0, 1]


def test_the_host_copy_is_what_a_state_dict_has():
    model, plain, _, _ = swapped(5)
    step(model)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_nothing_is_swapped_beyond_the_model():
    with pytest.raises(ValueError, match="8 of 7 blocks"):
        swapped(DEPTH + 1)
    assert swapped_blocks(0, DEPTH) == [] and swapped_blocks(1, 24) == [3, 9, 15, 21]
