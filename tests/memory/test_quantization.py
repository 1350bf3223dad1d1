import copy

import pytest
import torch
from torch import nn

from library.memory.block_swap import BlockSwap
from library.memory.checkpointing import enable_checkpointing
from library.memory.quantization import FORMATS, GROUP, can_quantize, quantize_blocks, quantize_layer
from tests.memory.late_transfers import LateTransfers

# Root mean square error of a normal matrix, relative to its own; what the formats' steps allow
ERRORS = {"int8": 0.011, "fp8": 0.03, "int4": 0.135, "nf4": 0.11}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_comes_back_as_near_as_its_bits_allow(name):
    weight, chosen = normal(48, 4 * GROUP) * torch.linspace(0.01, 10, 48)[:, None], FORMATS[name]
    codes, scales = chosen.quantize(weight)
    again = chosen.dequantize(codes, scales, torch.float32)
    error = (again - weight).square().mean(1).sqrt() / weight.square().mean(1).sqrt()
    assert ERRORS[name] / 3 < error.max() < ERRORS[name]
    assert codes.nbytes == weight.numel() * chosen.bits // 8
    zeros = chosen.dequantize(*chosen.quantize(torch.zeros(2, GROUP)), torch.float32)
    assert torch.equal(zeros, torch.zeros(2, GROUP))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_numbers_are_rounded_once_from_fp32_products(name, dtype):
    codes, scales = FORMATS[name].quantize(normal(48, GROUP) * torch.logspace(-3, 1, 48)[:, None])
    expected = (codes.float() * scales).to(dtype)
    assert torch.equal(FORMATS[name].dequantize(codes, scales, dtype), expected)


@pytest.mark.reference
def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(32, 3 * GROUP)
    codes, scales = FORMATS["nf4"].quantize(weight)
    theirs, state = functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    assert torch.equal(codes.flatten(), theirs.flatten())
    assert torch.equal(scales.flatten(), state.absmax.flatten())
    back = functional.dequantize_4bit(theirs, state)
    assert torch.allclose(FORMATS["nf4"].dequantize(codes, scales, torch.float32), back, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_layer_computes_with_the_matrix_it_stands_for(name, kind):
    torch.manual_seed(0)
    layer = nn.Linear(GROUP, 24) if kind == "linear" else nn.Conv2d(GROUP, 24, 1)
    plain = copy.deepcopy(layer)
    quantize_layer(layer, FORMATS[name])
    matrix = FORMATS[name].dequantize(layer.weight_codes, layer.weight_scales, torch.float32)
    plain.weight.data = matrix.view_as(plain.weight)
    x = normal(3, 5, GROUP) if kind == "linear" else normal(3, GROUP, 5, 2)
    answers = []
    for one in (layer, plain):
        own = x.clone().requires_grad_()
        answer = one(own)
        (answer * normal(*answer.shape, seed=1)).sum().backward()
        answers.append((answer.detach(), own.grad))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*answers))
    assert layer.state_dict().keys() == {"bias"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_autograd_keeps_the_codes_and_not_the_matrix():
    layer, kept = nn.Linear(GROUP, 64, bias=False), []
    quantize_layer(layer, FORMATS["nf4"])
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda x: x):
        layer(normal(2, GROUP).requires_grad_())
    assert sum(kept) == layer.weight_codes.nbytes + layer.weight_scales.nbytes == 64 * GROUP // 2 + 64 * 4


def test_what_is_no_matrix_is_left_alone():
    block = nn.Sequential(
        nn.Linear(GROUP, 8),
        nn.Linear(GROUP + 2, 8),
        nn.LayerNorm(8),
        nn.Conv2d(GROUP, 8, 3),
        nn.Conv2d(8, 8, 1, groups=8),
    )
    assert [can_quantize(layer, FORMATS["nf4"]) for layer in block] == [True, False, False, False, False]
    assert [can_quantize(layer, FORMATS["int8"]) for layer in block] == [True, True, False, False, False]
    assert quantize_blocks([block], FORMATS["int8"]) == (2, 0)
    assert hasattr(block[3], "weight") and not hasattr(block[1], "weight")


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.LayerNorm(GROUP), nn.Linear(GROUP, GROUP), nn.Tanh()) for _ in range(6)]
        self.first, self.blocks = nn.Linear(GROUP, GROUP), nn.ModuleList(layers).requires_grad_(False)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("interval", [None, 1])
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_blocks_are_swapped_with_the_same_bits(name, interval):
    model = Tower()
    quantize_blocks(list(model.blocks), FORMATS[name])
    plain = copy.deepcopy(model)
    BlockSwap(list(model.blocks), 4, LateTransfers(), checkpointed=range(6) if interval else ())
    if interval:
        enable_checkpointing(list(model.blocks), interval)
    x = normal(3, GROUP)
    for one in (model, plain):
        one(x).square().sum().backward()
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model.first.weight.grad, plain.first.weight.grad)
