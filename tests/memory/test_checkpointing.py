import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.memory.checkpointing import enable_checkpointing, recompute_all, recompute_all_but_attention

DEPTH = 6


class Block(nn.Module):
    """Two streams, keyword and dropout: what a block may bring along."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 32)
        self.outer = nn.Linear(32, 8)
        self.dropout = nn.Dropout(0.3)

    def forward(self, context, x, c, *, scale=1.0):
        x = x + self.outer(self.dropout(torch.tanh(self.inner(x + c)))) * scale
        return context * 2 + x.mean(), x


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, context, x, c):
        for block in self.blocks:
            context, x = block(context, x, c, scale=0.5)
        return context, x


def inputs(requires_grad=False):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 8, generator=generator).requires_grad_(requires_grad) for _ in range(3)]


def step(tower, arguments):
    torch.manual_seed(2)
    context, x = tower(*arguments)
    (context.square().sum() + x.square().sum()).backward()
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
    return gradients | {str(i): argument.grad for i, argument in enumerate(arguments)}


def patch_in_adapter(layer):
    """Adds a trained low-rank update to a frozen layer, as an adapter network does: no submodule, a wrapped forward."""
    torch.manual_seed(3)
    down, up = nn.Parameter(torch.randn(2, layer.in_features)), nn.Parameter(torch.randn(layer.out_features, 2))
    plain = layer.forward
    layer.forward = lambda x: plain(x) + x @ down.T @ up.T
    return down, up


def saved_bytes(run):
    """What autograd keeps for the backward pass."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return total


@pytest.mark.parametrize("interval", [1, 2, 4, DEPTH + 1])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_gradients_are_bit_equal(interval, requires_grad):
    expected = step(Tower(), inputs(requires_grad))
    tower = Tower()
    keys = list(tower.state_dict())
    enable_checkpointing(tower.blocks, interval)
    assert list(tower.state_dict()) == keys
    actual = step(tower, inputs(requires_grad))
    for name, gradient in expected.items():
        assert gradient is actual[name] is None or torch.equal(gradient, actual[name]), name


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_adapters_in_a_frozen_model_get_the_same_gradients(interval, training):
    results = []
    for checkpointed in (False, True):
        tower = Tower().requires_grad_(False).train(training)
        adapters = [parameter for block in tower.blocks for parameter in patch_in_adapter(block.inner)]
        calls = []
        tower.blocks[0].inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointed:
            enable_checkpointing(tower.blocks, interval)
        step(tower, inputs())
        assert len(calls) == 1 + checkpointed
        results.append([parameter.grad for parameter in adapters])
    assert all(torch.equal(*pair) for pair in zip(*results))
    assert all(gradient.abs().sum() > 0 for gradient in results[0])


@pytest.mark.parametrize("frozen", [False, True])
def test_each_checkpointed_block_keeps_its_inputs_only(frozen):
    def measure(interval):
        tower = Tower().requires_grad_(not frozen)
        if frozen:
            for block in tower.blocks:
                patch_in_adapter(block.inner)
        if interval:
            enable_checkpointing(tower.blocks, interval)
        arguments = inputs(requires_grad=True)
        return saved_bytes(lambda: tower(*arguments))

    plain = measure(None)
    saving = (plain - measure(1)) / DEPTH
    assert saving > 0
    for interval in (2, 3, 4, DEPTH):
        assert plain - measure(interval) == saving * len(range(0, DEPTH, interval))
    three_inputs = 3 * 3 * 8 * 4
    assert measure(1) == DEPTH * three_inputs


def test_without_gradients_nothing_is_wrapped_around_the_block(monkeypatch):
    def refuse(*arguments, **named):
        raise NotImplementedError

    tower = Tower()
    monkeypatch.setattr("library.memory.checkpointing.checkpoint", refuse)
    enable_checkpointing(tower.blocks, 1)
    with torch.no_grad():
        tower(*inputs())
    with pytest.raises(NotImplementedError):
        tower(*inputs())


def test_hooks_of_a_block_run_once_and_its_backward_pre_hook_precedes_the_recomputation():
    tower = Tower()
    enable_checkpointing(tower.blocks, 1)
    events = []
    block = tower.blocks[1]
    block.register_forward_pre_hook(lambda *_: events.append("block"))
    block.register_full_backward_pre_hook(lambda *_: events.append("backward"))
    block.inner.register_forward_pre_hook(lambda *_: events.append("child"))
    step(tower, inputs())
    assert events == ["block", "child", "backward", "child"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_a_copy_runs_its_own_weights(copied):
    tower = Tower()
    enable_checkpointing(tower.blocks, 1)
    twin = copied(tower)
    step(twin, inputs())
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_autocast_is_the_same_in_the_recomputation():
    results = []
    for checkpointed in (False, True):
        tower = Tower().eval()
        dtypes = []
        tower.blocks[1].inner.register_forward_hook(lambda *args, dtypes=dtypes: dtypes.append(args[2].dtype))
        if checkpointed:
            enable_checkpointing(tower.blocks, 1)
        with torch.autocast("cpu", torch.bfloat16):
            context, x = tower(*inputs())
        (context.square().sum() + x.square().sum()).backward()
        assert dtypes == [torch.bfloat16] * (1 + checkpointed)
        results.append([parameter.grad for parameter in tower.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results))


class AttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).view(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Operators(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("trained", ["weights", "adapter"])
def test_kept_attention_is_computed_once_and_gradients_are_bit_equal(trained, masked):
    mask = torch.tensor([True, True, False, True, True]).expand(3, 1, 5, 5) if masked else None
    gradients, attentions, products = [], [], []
    for run in (None, recompute_all, recompute_all_but_attention):
        torch.manual_seed(0)
        blocks = nn.ModuleList(AttentionBlock() for _ in range(2))
        parameters = list(blocks.parameters())
        if trained == "adapter":
            blocks.requires_grad_(False)
            parameters = [parameter for block in blocks for parameter in patch_in_adapter(block.qkv)]
        if run is not None:
            enable_checkpointing(blocks, 1, run)
        x = torch.randn(3, 5, 8)
        with Operators() as operators:
            for block in blocks:
                x = block(x, mask)
            x.square().sum().backward()
        gradients.append([parameter.grad for parameter in parameters])
        attentions.append(sum("flash_attention_for_cpu" in name and "back" not in name for name in operators.names))
        products.append(sum(name == "aten::addmm" for name in operators.names))
    assert attentions == [2, 4, 2]
    assert products[0] < products[2] <= products[1]
    for own in gradients[1:]:
        assert all(torch.equal(*pair) and pair[0].any() for pair in zip(own, gradients[0]))


def test_an_interval_below_one_and_a_second_call_are_refused():
    tower = Tower()
    with pytest.raises(ValueError, match="interval of gradient checkpointing is 0"):
        enable_checkpointing(tower.blocks, 0)
    enable_checkpointing(tower.blocks, 2)
    with pytest.raises(ValueError, match="a Block is checkpointed already"):
        enable_checkpointing(tower.blocks, 1)
