"""Block swap of weights that are trained."""

import copy

import pytest
import torch
from torch import nn

from library.memory.block_swap import AHEAD, TRAINED_SLOTS, BlockSwap, slot_count, swapped_blocks
from library.memory.checkpointing import enable_checkpointing
from library.optimizers.one_by_one import OneByOne
from library.training.fused_backward import FusedBackward
from tests.memory.late_transfers import LateTransfers

DEPTH = 7


class Block(nn.Module):
    """Its last weight has its gradient before anything that the block has kept is asked for."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 32), nn.Linear(32, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Parameter(torch.randn(8))
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x, *, shift):
        return x + self.outer(torch.tanh(self.inner(self.norm(x) * self.scale + shift))) + self.last


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x, shift):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, shift=shift)
        return x


class Training:
    """A tower whose weights step in the backward pass, with or without swapped blocks."""

    def __init__(self, count=None, interval=None, transfers=None):
        self.model, self.transfers, self.swap = Tower(), transfers or LateTransfers(), None
        blocks = list(self.model.blocks)
        if count is not None:
            checkpointed = range(0, DEPTH, interval) if interval else ()
            self.swap = BlockSwap(blocks, count, self.transfers, checkpointed=checkpointed)
        if interval:
            enable_checkpointing(blocks, interval)
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        names = [name for name, _ in self.model.named_parameters()]
        stepped = self.swap.changed if self.swap is not None else None
        self.fused = FusedBackward(OneByOne(self.optimizer), parameters, names, stepped)
        if self.swap is not None:
            self.swap.settle = self.fused.settle

    def step(self, number, batch=4):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(batch, 8, generator=generator)
        loss = self.model(x, torch.randn(8, generator=generator)).square().mean()
        self.fused.start(number, loss, ["a"])
        loss.backward()
        return loss.detach(), self.fused.finish()

    def look(self):
        with torch.no_grad():
            return self.model(torch.ones(2, 8), torch.ones(8))

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def turns(self, copies):
        return [self.transfers.turn_of(master) for master in copies]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("interval", [None, 1, 2])
@pytest.mark.parametrize("count", range(1, DEPTH + 1))
def test_weights_losses_and_answers_are_the_same_bits(count, interval):
    swapped, plain = Training(count, interval), Training(None, interval)
    for number in range(3):
        assert all(map(torch.equal, swapped.step(number), plain.step(number)))
        if number == 1:
            for _ in range(2):
                assert torch.equal(swapped.look(), plain.look())
    assert equal(swapped.weights(), plain.weights())
    assert equal(swapped.weights(), plain.weights()), "and once more"


def test_each_block_goes_home_once_a_step_and_only_when_it_has_changed():
    training = Training(3)
    assert swapped_blocks(3, DEPTH, TRAINED_SLOTS) == list(range(DEPTH))
    training.step(0)
    assert training.turns(training.transfers.sent) == [6, 5, 4, 3, 2, 1, 0]
    training.look()
    training.look()
    assert len(training.transfers.sent) == DEPTH, "looking changes nothing"
    training.weights()
    assert len(training.transfers.sent) == DEPTH, "what has gone home already doesn't go again"


@pytest.mark.parametrize("interval", [None, 1])
def test_blocks_come_ahead_and_what_is_there_at_the_turn_stays(interval):
    training = Training(3, interval)
    training.step(0)
    training.transfers.fetched.clear()
    training.transfers.ahead.clear()
    training.step(1)
    assert training.turns(training.transfers.fetched) == [4, 5, 6, 2, 1, 0], "four are there at either end of the pass"
    assert training.transfers.ahead == [AHEAD] * 6
    assert training.swap.resident == (0, 1, 2, 3)


def test_a_block_settles_before_it_leaves_and_no_sooner():
    training = Training(3)
    left = []
    settle, fused = training.swap.settle, training.fused

    def watched(weights):
        left.append(fused.waiting_bytes)
        settle(weights)
        assert fused.waiting_bytes == left[-1], "with four slots its gradients were used long ago"

    training.swap.settle = watched
    training.step(0)
    assert any(left)
    few = Training(DEPTH)
    assert slot_count(DEPTH, DEPTH, TRAINED_SLOTS) == 2
    settle = few.swap.settle
    used = []

    def used_up(weights):
        before = few.fused.waiting_bytes
        settle(weights)
        used.append(before - few.fused.waiting_bytes)

    few.swap.settle = used_up
    few.step(0)
    assert any(used), "with two slots the last gradients step a block when it is about to leave"


@pytest.mark.parametrize("count", [1, 3, DEPTH - 2, DEPTH])
def test_the_device_is_relieved_of_what_was_asked_for(count):
    swap = Training(count).swap
    slots = swap.device_bytes / (swap.host_bytes / len(swap.numbers))
    assert slots == slot_count(count, DEPTH, TRAINED_SLOTS)
    assert DEPTH - len(swap.numbers) + slots == (DEPTH - count if count <= DEPTH - 2 else 2)


def test_what_is_written_at_home_is_what_the_next_pass_uses():
    swapped, plain = Training(5), Training()
    other = Tower()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    for training in (swapped, plain):
        training.step(0)
        training.model.load_state_dict(other.state_dict())
    assert torch.equal(swapped.look(), plain.look())
    swapped.swap.come_home()
    assert swapped.swap.resident == ()
    for training in (swapped, plain):
        with torch.no_grad():
            training.model.blocks[3].inner.weight.zero_()
    assert torch.equal(swapped.look(), plain.look())


def test_a_weight_without_a_gradient_doesnt_keep_the_others_from_going_home():
    swapped, plain = Training(5), Training()
    for training in (swapped, plain):
        training.model.blocks[2].last.requires_grad_(False)
        training.step(0)
        training.step(1)
    assert equal(swapped.weights(), plain.weights())


def test_state_is_loaded_to_where_the_weights_step():
    training = Training(5)
    training.step(0)
    before = training.weights()
    with training.swap.stand_ins():
        for block in training.model.blocks:
            assert block.inner.weight.shape == (32, 8) and block.inner.weight.dtype == torch.float32
            assert block.inner.weight.untyped_storage().nbytes() == 4, "it takes no room"
        training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    assert equal(training.weights(), before)
    with pytest.raises(AssertionError, match="isn't on the device"):
        training.swap.changed(training.model.blocks[0].inner.weight)


def test_a_block_that_has_left_comes_again_whatever_came_between():
    swap, settled, last = Training(3).swap, [], DEPTH - 1
    swap.enter(last)
    swap.come_home()
    swap.enter(last)
    assert last in swap.resident
    for turn in range(DEPTH):
        swap.enter(turn)

    def refuse_the_second(weights):
        settled.append(weights)
        if len(settled) == 2:
            raise ValueError("a gradient is no number")

    swap.settle = refuse_the_second
    with pytest.raises(ValueError, match="no number"):
        swap.enter(0)
    assert last not in swap.resident
    swap.enter(last)
    assert last in swap.resident


class MetaTransfers(LateTransfers):
    """Nothing has numbers, and every address is 0."""

    def host_buffer(self, size):
        return torch.empty(size, dtype=torch.uint8, device="meta")

    device_buffer = host_buffer

    def fetch(self, source, target, slot):
        pass

    wait = send_home = wait_home = lambda *_: None


def test_without_numbers_a_slot_is_still_told_from_other_memory():
    model = Tower().to("meta")
    swap = BlockSwap(list(model.blocks), 3, MetaTransfers())
    swap.enter(0)
    activation = torch.empty(8, device="meta")
    assert swap.pack(0, activation) is activation
    assert not isinstance(swap.pack(0, model.blocks[0].inner.weight.T), torch.Tensor)
    loss = model(torch.empty(4, 8, device="meta"), torch.empty(8, device="meta")).sum()
    loss.backward()
    assert model.blocks[2].inner.weight.grad.shape == (32, 8)


@pytest.mark.parametrize("interval", [None, 1])
def test_autocast_keeps_no_casts_of_blocks(interval):
    swapped, plain = Training(5, interval), Training(None, interval)
    cached = []
    swapped.model.blocks[3].inner.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    for number in range(2):
        losses = []
        for training in (swapped, plain):
            with torch.autocast("cpu", torch.bfloat16):
                training.look()
                assert torch.is_autocast_cache_enabled()
                losses.append(training.step(number))
        assert all(map(torch.equal, *losses))
    assert equal(swapped.weights(), plain.weights())
    assert cached and not any(cached)
