"""Blocks that torch compiles compute what they compute uncompiled, and blocks that are alike share graphs."""

import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from library.config.errors import ConfigError
from library.memory import compiling
from library.memory.block_swap import BlockSwap
from library.memory.checkpointing import enable_checkpointing
from library.memory.compiling import Compiling, check_compiler
from library.memory.modulation import StreamedModulation
from library.memory.quantization import FORMATS, quantize_blocks
from library.nn.skipping import skipped_blocks
from networks.lora_layer import LoraLayer
from tests.memory.late_transfers import LateTransfers

DEPTH, WIDTH = 5, 64


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.inner = nn.Linear(WIDTH, 2 * WIDTH)
        self.outer = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, c):
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        return x + self.outer(F.silu(self.inner(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return x


def adapters(tower):
    torch.manual_seed(1)
    made = []
    for block in tower.blocks:
        made.append(LoraLayer(block.inner, component="denoiser", rank=2, alpha=1))
        for parameter in made[-1].parameters():
            nn.init.normal_(parameter, std=0.1)
    return nn.ModuleList(made)


def question(batch=2, tokens=6):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, tokens, WIDTH, generator=generator), torch.randn(batch, WIDTH, generator=generator)


def step(tower, trained, **sizes):
    answer = tower(*question(**sizes))
    answer.square().mean().backward()
    gradients = [parameter.grad for parameter in trained.parameters() if parameter.requires_grad]
    trained.zero_grad()
    return [answer.detach(), *gradients]


def same(one, other, **tolerances):
    assert len(one) == len(other) > 1
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, **(tolerances or {"rtol": 0, "atol": 0}))


def compiled(tower, backend="aot_eager", *, dynamic=True, warn=print):
    made = Compiling(backend, dynamic=dynamic, warn=warn)
    made.compile(tower.blocks)
    return made


def quantise(name, tower):
    quantize_blocks(list(tower.blocks), FORMATS[name])


def swap(tower, checkpointed=()):
    BlockSwap(tower.blocks, 3, LateTransfers(), checkpointed=checkpointed)


def swap_and_checkpoint(tower):
    swap(tower, range(DEPTH))
    enable_checkpointing(tower.blocks, 1)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tower: None, id="plain"),
        pytest.param(lambda tower: enable_checkpointing(tower.blocks, 2), id="every second checkpointed"),
        pytest.param(swap, id="swapped"),
        pytest.param(swap_and_checkpoint, id="swapped and checkpointed"),
        pytest.param(partial(quantise, "int8"), id="int8"),
        pytest.param(partial(quantise, "nf4"), id="nf4"),
    ],
)
def test_adapters_on_compiled_blocks_get_the_same_gradients_from_two_graphs(change):
    results = []
    for compile in (lambda tower: None, compiled):
        tower = Tower().requires_grad_(False)
        counted = compile(tower)
        change(tower)
        trained = adapters(tower)
        results.append([step(tower, trained), step(tower, trained)])
    assert counted.graphs == 2  # only the first block's tokens have no gradient
    for plain, ours in zip(*results):
        same(ours, plain)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_trained_blocks_share_one_graph(checkpointed):
    results = []
    for compile in (lambda tower: None, compiled):
        tower = Tower()
        counted = compile(tower)
        if checkpointed:
            enable_checkpointing(tower.blocks, 1)
        x, c = question()
        tower(x.requires_grad_(), c).square().mean().backward()
        results.append([parameter.grad for parameter in tower.parameters()])
    assert counted.graphs == 1
    same(*results)


SIZES = ({}, {"tokens": 4}, {"tokens": 9, "batch": 3}, {"tokens": 5, "batch": 4})


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (False, 4)])
def test_sizes_share_a_graph_or_have_their_own(dynamic, graphs):
    plain, tower = Tower(), Tower()
    counted = compiled(tower, dynamic=dynamic)
    for _ in range(2):
        for sizes in SIZES:
            x, c = question(**sizes)
            same(tower(x.requires_grad_(), c), plain(x, c))
    assert counted.graphs == graphs


def test_modes_are_compiled_once_each_and_switching_costs_nothing():
    plain, tower = (Tower().requires_grad_(False) for _ in range(2))
    counted = compiled(tower)
    pairs = [(model, adapters(model)) for model in (plain, tower)]
    graphs = []
    for _ in range(2):
        same(step(*pairs[1]), step(*pairs[0]))
        for training, enabled in ((False, True), (True, False)):  # a sample, and the base model's answer
            answers = []
            for model, trained in pairs:
                trained.train(training)
                for layer in trained:
                    layer.enabled = enabled
                with torch.no_grad():
                    answers.append(model(*question()))
                for layer in trained.train():
                    layer.enabled = True
            assert torch.equal(*answers)
        graphs.append(counted.graphs)
    assert graphs == [4, 4]


def test_streamed_modulation_is_left_alone_and_its_layers_are_not_told_apart():
    plain, tower = (Tower().requires_grad_(False) for _ in range(2))
    counted = compiled(tower)
    StreamedModulation([block.modulation for block in tower.blocks], LateTransfers())
    same(step(tower, adapters(tower)), step(plain, adapters(plain)))
    graphs = counted.graphs
    assert 0 < graphs < DEPTH
    same(step(tower, adapters_of(tower)), step(tower, adapters_of(tower)))
    assert counted.graphs == graphs


def adapters_of(tower):
    return nn.ModuleList(block.inner.forward.__self__ for block in tower.blocks)


def test_skipped_blocks_are_skipped_and_come_back():
    plain, tower = Tower(), Tower()
    compiled(tower)
    for layers in ([1, 3], []):
        with torch.no_grad(), skipped_blocks(tower.blocks, layers, instead=lambda x, c: x):
            ours = tower(*question())
        with torch.no_grad(), skipped_blocks(plain.blocks, layers, instead=lambda x, c: x):
            assert torch.equal(ours, plain(*question()))


def test_shapes_alone_compile_nothing():
    tower = Tower().to("meta")
    counted = compiled(tower)
    assert tower(*(tensor.to("meta") for tensor in question())).shape == (2, 6, WIDTH)
    assert counted.graphs == 0


def test_many_graphs_are_told_of(monkeypatch):
    monkeypatch.setattr(compiling, "MANY", 2)
    told, tower = [], Tower()
    compiled(tower, "eager", dynamic=False, warn=told.append)
    for tokens in range(2, 11):
        tower(*question(tokens=tokens))
    assert len(told) == 4  # at 2, 4, 8 and 16: none fell back to uncompiled code, in silence
    assert all("remove --no-compile_dynamic" in line for line in told)


def test_a_wrapped_block_is_refused():
    tower = Tower()
    enable_checkpointing(tower.blocks, 1)
    with pytest.raises(ValueError, match="a Block is wrapped already"):
        compiled(tower)


@pytest.mark.slow
def test_generated_code_is_near():
    results = []
    for compile in (lambda tower: None, partial(compiled, backend="inductor")):
        tower = Tower().requires_grad_(False)
        counted = compile(tower)
        swap_and_checkpoint(tower)
        trained = adapters(tower)
        results.append([step(tower, trained), step(tower, trained, tokens=9)])
    assert counted.graphs == 2 and counted.seconds > 0
    for plain, ours in zip(*results):
        same(ours, plain, rtol=1e-4, atol=1e-6)


def test_a_missing_compiler_is_said(monkeypatch):
    check_compiler("inductor", "cpu")
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        with pytest.raises(ConfigError, match=r"there is no no-such-compiler; install it \(`apt install g\+\+`\)"):
            check_compiler("inductor", "cpu")
        check_compiler("aot_eager", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="needs triton, which is missing; run `pip install triton`"):
            check_compiler("inductor", "cuda")
        check_compiler("inductor", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: name)
        patch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
        with pytest.raises(ConfigError, match=r"needs Python\.h"):
            check_compiler("inductor", "cpu")
