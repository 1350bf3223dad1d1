import copy

import pytest
import torch
from torch import nn

from library.memory.eight_bit import DEQUANTIZE, EIGHT_BIT, FP8, INT8, Matmul, fits, scaled_mm
from library.memory.quantization import FORMATS, compute_by, quantize_blocks, quantized_layers

# Root mean square error of a product of normal numbers with a plain matrix, relative to the product
ERRORS = {"int8": 0.015, "fp8": 0.045}
BOTH = Matmul(EIGHT_BIT, EIGHT_BIT)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found, exact):
    return ((found.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def pair(name, layer, matmul=BOTH):
    """The layer as it was, and stored in a format."""
    plain = copy.deepcopy(layer)
    quantize_blocks([layer], FORMATS[name])
    compute_by(layer, matmul)
    return plain, layer


def answers(layer, x):
    own = x.clone().requires_grad_()
    out = layer(own)
    out.backward(normal(*out.shape, seed=5).to(out.dtype))
    return out.detach(), own.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_answer_and_gradient_are_as_near_as_eight_bits_allow(name, kind, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(256, 192) if kind == "linear" else nn.Conv2d(256, 192, 1)
    plain, stored = pair(name, nn.Sequential(layer))
    x = normal(2, 40, 256) if kind == "linear" else normal(2, 256, 8, 5)
    exact = answers(plain, x)
    found = answers(stored.to(dtype), x.to(dtype))
    dequantised = answers(pair(name, plain, Matmul())[1].to(dtype), x.to(dtype))
    assert all(tensor.dtype == dtype and tensor.shape == other.shape for tensor, other in zip(found, exact))
    for own, other, from_matrix in zip(found, exact, dequantised):
        assert ERRORS[name] / 3 < error(own, other) < ERRORS[name]
        assert error(own, other) > error(from_matrix, other)  # it isn't the dequantised product


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_rows_and_outputs_of_any_size_keep_their_precision(name):
    plain, stored = pair(name, nn.Sequential(nn.Linear(128, 64, bias=False)))
    x = normal(32, 128) * torch.logspace(-6, 6, 32)[:, None]
    exact, _ = answers(plain, x)
    found, _ = answers(stored, x)
    assert max(error(own, other) for own, other in zip(found, exact)) < 2 * ERRORS[name]
    found, gradient = answers(stored, torch.zeros(32, 128))
    assert not found.any() and gradient.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_what_is_not_finite_stays_so(name, bad):
    _, stored = pair(name, nn.Sequential(nn.Linear(64, 32)))
    x = normal(20, 64)
    x[3, 7] = bad
    found = stored(x)
    assert not found[3].isfinite().any() and found[4].isfinite().all()


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(16, 64, 64), (32, 72, 64), (32, 64, 72)], ids=["few rows", "outputs", "inputs"]
)
def test_shapes_that_the_instruction_refuses_are_dequantised(name, rows, outputs, inputs):
    layer = nn.Sequential(nn.Linear(inputs, outputs))
    _, by_matrix = pair(name, copy.deepcopy(layer), Matmul())
    _, by_codes = pair(name, layer)
    assert not fits(rows, torch.empty(outputs, inputs))
    x = normal(rows, inputs)
    assert all(torch.equal(one, other) for one, other in zip(answers(by_matrix, x), answers(by_codes, x)))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_each_direction_goes_its_own_way(name):
    layer = nn.Sequential(nn.Linear(64, 64))
    x, made = normal(2, 30, 64), {}
    for forward in (DEQUANTIZE, EIGHT_BIT):
        for backward in (DEQUANTIZE, EIGHT_BIT):
            made[forward, backward] = answers(pair(name, copy.deepcopy(layer), Matmul(forward, backward))[1], x)
    assert torch.equal(made[EIGHT_BIT, DEQUANTIZE][0], made[EIGHT_BIT, EIGHT_BIT][0])
    assert torch.equal(made[DEQUANTIZE, EIGHT_BIT][1], made[EIGHT_BIT, EIGHT_BIT][1])
    assert torch.equal(made[EIGHT_BIT, DEQUANTIZE][1], made[DEQUANTIZE, DEQUANTIZE][1])
    assert not torch.equal(made[EIGHT_BIT, DEQUANTIZE][0], made[DEQUANTIZE, DEQUANTIZE][0])


def test_four_bits_are_always_dequantised():
    layer = nn.Sequential(nn.Linear(64, 64))
    one, other = (pair("nf4", copy.deepcopy(layer), matmul)[1] for matmul in (Matmul(), BOTH))
    assert torch.equal(one(normal(32, 64)), other(normal(32, 64)))
    assert list(quantized_layers(one)) == ["0"]


@pytest.mark.parametrize("transposed", [False, True])
def test_torch_s_instruction_sums_the_same_products(transposed):
    a, b = normal(32, 64).to(torch.float8_e4m3fn), normal(64, 48).to(torch.float8_e4m3fn)
    b = b.t().contiguous().t() if transposed else b
    try:
        found = scaled_mm(a, b)
    except (RuntimeError, NotImplementedError):
        pytest.skip("this torch has no fp8 products on a CPU")
    assert torch.allclose(found, FP8.multiply(a, b), rtol=1e-5, atol=1e-4)
    codes = torch.randint(-127, 128, (2, 32, 64)).to(torch.int8)
    assert torch.equal(INT8.multiply(codes[0], codes[1].t()), codes[0].int() @ codes[1].t().int())


def test_under_autocast_the_answer_has_its_type():
    _, stored = pair("int8", nn.Sequential(nn.Linear(64, 64)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stored(normal(32, 64)).dtype == torch.bfloat16
