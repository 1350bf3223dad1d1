import copy

import pytest
import torch
from torch import nn

from library.memory.block_swap import BlockSwap
from library.memory.checkpointing import enable_checkpointing
from library.memory.modulation import StreamedModulation
from tests.memory.late_transfers import LateTransfers

DEPTH, WIDTH = 6, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, c):
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        return x + torch.tanh(self.inner(x * (1 + scale) + shift))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.embed = nn.Linear(4, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH)).requires_grad_(False)

    def forward(self, x, t):
        c, x = self.embed(t), self.first(x)
        for block in self.blocks:
            x = block(x, c)
        return x


def pair(*, swap=0, checkpointed=False):
    plain, transfers = Tower(), LateTransfers()
    model = copy.deepcopy(plain)
    layers = [block.modulation for block in model.blocks]
    weights = [tensor for layer in layers for tensor in layer.parameters()]
    streamed = StreamedModulation(layers, transfers)
    swap = BlockSwap(
        list(model.blocks), swap, LateTransfers(), checkpointed=range(DEPTH) if checkpointed else (), elsewhere=weights
    )
    if checkpointed:
        enable_checkpointing(list(model.blocks), 1)
    return model, plain, streamed, transfers, swap


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("swap", [0, 3])
def test_answers_and_gradients_are_the_same_bits_and_weights_travel_once_a_pass(swap, checkpointed):
    model, plain, _, transfers, _ = pair(swap=swap, checkpointed=checkpointed)
    for number in (1, 2):
        x, t = torch.rand(3, WIDTH), torch.rand(3, 4)
        for one in (model, plain):
            one.zero_grad()
            one(x, t).square().sum().backward()
        assert torch.equal(model.first.weight.grad, plain.first.weight.grad)
        assert [transfers.turn_of(master) for master in transfers.fetched] == [*range(DEPTH)] * number
        with torch.no_grad():
            assert torch.equal(model(x, t), plain(x, t))
        del transfers.fetched[-DEPTH:]


def test_the_device_holds_three_layers_of_it_and_swapped_blocks_leave_them_out():
    _, plain, streamed, _, swap = pair(swap=2)
    layer = sum(tensor.nbytes for tensor in plain.blocks[0].modulation.parameters())
    inner = sum(tensor.nbytes for tensor in plain.blocks[0].inner.parameters())
    assert streamed.host_bytes == DEPTH * (layer + (-layer) % 256)
    assert streamed.device_bytes == streamed.host_bytes // DEPTH * 3
    assert swap.host_bytes == 5 * (inner + (-inner) % 256)


def test_the_vector_may_change_and_must_not_be_trained():
    model, plain, _, _, _ = pair()
    t = torch.rand(3, 4)
    for vector in (t, t + 1, t):
        assert torch.equal(model(torch.ones(3, WIDTH), vector), plain(torch.ones(3, WIDTH), vector))
    with pytest.raises(ValueError, match="the conditioning is trained"):
        model(torch.ones(3, WIDTH), t.clone().requires_grad_())
