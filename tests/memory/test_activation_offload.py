import copy
import weakref

import pytest
import torch
from torch import nn

from library.memory.activation_offload import ActivationOffload
from library.memory.checkpointing import enable_checkpointing, recompute_all, recompute_all_but_attention

DEPTH, TOKENS, WIDTH = 5, 128, 64


class HostStash:
    """``Stash`` that keeps copies, and says in which order it was asked for them."""

    def __init__(self):
        self.kept, self.asked, self.taken = [], [], []

    def put(self, tensor):
        self.kept.append(tensor.clone())
        return len(self.kept) - 1

    def send_for(self, key):
        self.asked.append(key)

    def take(self, key):
        self.taken.append((key, key in self.asked))
        return self.kept[key]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x, *, shared, scale):
        return x + self.outer(self.dropout(torch.tanh(self.inner(x + shared)))) * scale


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.inputs = []

    def forward(self, x):
        x = self.first(x)
        shared = x * 2
        for block in self.blocks:
            self.inputs.append(weakref.ref(x))
            x = block(x, shared=shared, scale=0.5)
        return x


def step(model):
    torch.manual_seed(3)
    model.zero_grad()
    answer = model(torch.rand(1, TOKENS, WIDTH))
    alive = sum(ref() is not None for ref in model.inputs)
    answer.sum().backward()
    return [answer.detach(), *(parameter.grad.clone() for parameter in model.parameters())], alive


@pytest.mark.parametrize("checkpoint", [recompute_all, recompute_all_but_attention])
@pytest.mark.parametrize("interval", [1, 2])
def test_gradients_are_those_of_checkpointing_and_inputs_leave(interval, checkpoint):
    plain = Tower()
    model = copy.deepcopy(plain)
    enable_checkpointing(list(plain.blocks), interval)
    stash = HostStash()
    enable_checkpointing(list(model.blocks), interval, ActivationOffload(stash, checkpoint).run)
    for _ in range(2):
        (expected, kept), (own, alive) = step(plain), step(model)
        assert all(map(torch.equal, own, expected))
        assert alive < kept
        plain.inputs.clear()
        model.inputs.clear()
    wrapped = -(-DEPTH // interval)
    shared_once = 1
    assert len(stash.kept) == 2 * (wrapped + shared_once)
    last = 2 * (wrapped + shared_once)
    assert [asked for _, asked in stash.taken[:last]].count(False) <= 2, "only the turn is not sent for ahead"


def test_looking_alone_keeps_nothing():
    model, stash = Tower(), HostStash()
    enable_checkpointing(list(model.blocks), 1, ActivationOffload(stash, recompute_all).run)
    with torch.no_grad():
        model(torch.rand(1, TOKENS, WIDTH))
    assert not stash.kept


def test_a_pass_without_backward_is_forgotten():
    model, stash = Tower(), HostStash()
    plain = copy.deepcopy(model)
    offload = ActivationOffload(stash, recompute_all)
    enable_checkpointing(list(model.blocks), 1, offload.run)
    model(torch.rand(1, TOKENS, WIDTH))
    assert all(map(torch.equal, step(model)[0], step(plain)[0]))
    assert not offload._waiting
