"""CAME against its stock package where they agree, and what is published for Sana where they don't."""

import pytest
import torch
from torch import nn

from library.optimizers.blockwise import BLOCK, blockwise
from library.optimizers.came import CAME, CAME8bit


def gradients(weights, number):
    generator = torch.Generator().manual_seed(number)
    return [
        torch.randn(weight.shape, generator=generator) * 10.0 ** -(1 + index) for index, weight in enumerate(weights)
    ]


def steps(optimizer, weights, count=8):
    for number in range(count):
        for weight, gradient in zip(weights, gradients(weights, number)):
            weight.grad = gradient.to(weight.dtype)
        optimizer.step()


def made(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


@pytest.mark.reference
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95, 0.99), "clip_threshold": 0.5}])
def test_linear_layers_are_those_of_the_stock_package(settings):
    from came_pytorch import CAME as Stock

    shapes = ((24, 40), (40, 24), (40,))
    ours, theirs = made(*shapes), made(*shapes)
    steps(CAME(ours, lr=1e-3, **settings), ours, count=6)
    steps(Stock(theirs, lr=1e-3, **settings), theirs, count=6)
    for our, their in zip(ours, theirs):
        assert (our - their).abs().max() <= 2e-7 * max(1, their.abs().max())


@pytest.mark.parametrize("optimizer_class", [CAME, CAME8bit])
def test_pointwise_convolutions_are_matrices_and_others_are_not(optimizer_class):
    (matrix,) = made((160, 128))
    pointwise = nn.Parameter(matrix.detach().clone()[:, :, None, None])
    depthwise, bias = made((16, 1, 3, 3), (16,))
    for weights in ([matrix], [pointwise], [depthwise], [bias]):
        optimizer = optimizer_class(weights, lr=1e-2)
        steps(optimizer, weights)
        names = {name for name in optimizer.state[weights[0]] if name.startswith("exp_avg_")}
        if weights[0] is depthwise or weights[0] is bias:
            assert names == {"exp_avg_sq"}  # no factors, no confidence
        else:
            assert {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col"} <= names
    assert torch.equal(pointwise[:, :, 0, 0], matrix)


def test_a_depthwise_convolution_follows_the_equations():
    (weight,) = made((6, 1, 3, 3))
    expected, second, momentum = weight.detach().double(), 0.0, 0.0
    for number in range(3):
        gradient = gradients([weight], number)[0].double()
        second = 0.999 * second + 0.001 * (gradient**2 + 1e-30)
        update = gradient / second**0.5
        update = update / max(1.0, update.square().mean().sqrt().item())
        momentum = 0.9 * momentum + 0.1 * update
        expected = expected - 1e-2 * momentum
    steps(CAME([weight], lr=1e-2), [weight], count=3)
    assert torch.allclose(weight.double(), expected, atol=1e-6)


def test_8_bits_stay_near_fp32():
    whole, coarse = made((160, 128), (16,)), made((160, 128), (16,))
    start = whole[0].detach().clone()
    steps(CAME(whole, lr=1e-2), whole, count=20)
    steps(CAME8bit(coarse, lr=1e-2), coarse, count=20)
    moved = (whole[0] - start).norm()
    assert 0 < (whole[0] - coarse[0]).norm() < 0.02 * moved
    assert torch.equal(whole[1], coarse[1])  # a vector keeps its fp32 momentum


@pytest.mark.parametrize(("shape", "dtype"), [((128, 128), torch.uint8), ((128, 127), torch.float32)])
def test_only_large_matrices_are_in_8_bits(shape, dtype):
    weights = made(shape)
    optimizer = CAME8bit(weights, lr=1e-2)
    steps(optimizer, weights, count=1)
    state = optimizer.state[weights[0]]
    assert state["exp_avg"].dtype == dtype
    assert all(value.dtype == torch.float32 for name, value in state.items() if name != "exp_avg")


@pytest.mark.parametrize("optimizer_class", [CAME, CAME8bit])
def test_the_state_of_bf16_weights_is_fp32(optimizer_class):
    weights = made((8, 8), (8,), dtype=torch.bfloat16)
    optimizer = optimizer_class(weights, lr=1e-2)
    steps(optimizer, weights)
    for weight in weights:
        assert weight.dtype == torch.bfloat16
        assert all(value.dtype == torch.float32 for value in optimizer.state[weight].values())


@pytest.mark.parametrize("count", [1, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
def test_blocks_come_back_within_half_a_step(count):
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(0))
    numbers[:BLOCK] *= 1000  # a block of large numbers leaves the others as fine as they were
    stored = blockwise(numbers)
    back = stored.numbers(numbers.shape)
    half = stored.scale.repeat_interleave(BLOCK)[:count] / 2
    assert ((back - numbers).abs() <= half * 1.001 + 1e-6).all()
    assert stored.codes.dtype == torch.uint8 and len(stored.codes) == count


def test_equal_numbers_come_back_exactly():
    numbers = torch.full((3, 700), 0.1)
    assert torch.equal(blockwise(numbers).numbers(numbers.shape), numbers)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"betas": (0.9, 0.99)}, "betas takes three numbers"),
        ({"betas": (0.9, 0.99, 1.0)}, "betas takes three numbers"),
        ({"eps": 1e-8}, "eps takes two numbers"),
        ({"clip_threshold": 0}, "clip_threshold must be above 0"),
        ({"weight_decay": -1}, "weight_decay must not be below 0"),
    ],
)
@pytest.mark.parametrize("optimizer_class", [CAME, CAME8bit])
def test_settings_that_cannot_be_are_refused(optimizer_class, settings, problem):
    with pytest.raises(ValueError, match=problem):
        optimizer_class(made((2, 2)), lr=1e-2, **settings)
