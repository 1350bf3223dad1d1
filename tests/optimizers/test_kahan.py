"""A weight in bf16 and what is kept beside it are the weight in fp32."""

import pytest
import torch
from torch import nn

from library.optimizers.kahan import REST, KahanSummation, forget_rests
from library.optimizers.one_by_one import OneByOne
from library.training.optimizers import create_optimizer

KAHAN = KahanSummation()


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(name, weight, rate):
    groups = [{"params": [weight], "lr": rate}]
    arguments = ["weight_decay=0.1"]
    return create_optimizer(name, arguments, groups, learning_rate=1.0, device=torch.device("cpu")).optimizer


def together(one_by_one, weight):
    return KAHAN.widened(weight, dict(one_by_one.optimizer.state[weight]))


def test_a_weight_and_its_rest_are_the_fp32_number():
    bits = torch.arange(-(2**31), 2**31 - 1, 65521 // 7, dtype=torch.int64).to(torch.int32)
    extremes = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4028234e38, -3.4028234e38, torch.inf, -torch.inf])
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])
    for wide in (bits.view(torch.float32), extremes, ties):
        wide = wide[~wide.isnan()]
        weight, state = torch.empty_like(wide, dtype=torch.bfloat16), {}
        KAHAN.narrow(wide, weight, state, step=0, number=0)
        assert state[REST].nbytes == weight.nbytes
        assert torch.equal(KAHAN.widened(weight, state).view(torch.int32), wide.view(torch.int32))
        assert not state
        if wide is not ties:  # which nearest is chosen there doesn't matter
            off = (weight.float() - wide).abs() - (wide.bfloat16().float() - wide).abs()
            assert off.nan_to_num().max() == 0


def test_what_is_not_a_number_stays():
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    weight, state = torch.zeros(3, dtype=torch.bfloat16), {}
    KAHAN.narrow(nan, weight, state, step=0, number=0)
    assert weight.isnan().all()


@pytest.mark.parametrize(("rounding", "total"), [(None, 0.0), (KAHAN, 1000 * 2**-20)], ids=["nearest", "kahan"])
def test_updates_that_bf16_swallows_add_up(rounding, total):
    # each is a 2048th of what bf16's last bit of 1 is worth
    weight = nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
    one_by_one = OneByOne(torch.optim.SGD([weight], lr=2**-20), rounding)
    for step in range(1000):
        one_by_one.step(weight, torch.ones_like(weight), step)
        one_by_one.finish()
    assert (1 - together(one_by_one, weight) == total).all()
    assert (weight == torch.tensor(1 - total).bfloat16()).all()


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "CAME", "CAME8bit", "Lion", "AdamW8bit"])
def test_a_trajectory_is_that_of_fp32(name):
    rate = 1e-6
    start = numbers(96, 192).bfloat16()
    weight, plain, wide = nn.Parameter(start.clone()), nn.Parameter(start.clone()), nn.Parameter(start.float())
    kahan = OneByOne(made(name, weight, rate), KAHAN)
    others = [(plain, made(name, plain, rate)), (wide, made(name, wide, rate))]
    for step in range(12):
        gradient = (numbers(96, 192, seed=step) + numbers(96, 192, seed=99)).bfloat16()
        kahan.step(weight, gradient, step)
        kahan.finish()
        for other, optimizer in others:
            other.grad = gradient.to(other.dtype)
            optimizer.step()
    assert torch.equal(together(kahan, weight), wide)
    moved = (wide - start.float()).norm()
    assert (plain.float() - wide).norm() > 0.8 * moved > 0  # rounding to the nearest loses most of the way


def test_a_rest_is_dropped_by_a_run_that_goes_on_without():
    weight = nn.Parameter(numbers(8, 8).bfloat16())
    one_by_one = OneByOne(made("AdamW", weight, 1e-5), KAHAN)
    one_by_one.step(weight, torch.ones_like(weight), 0)
    state = one_by_one.optimizer.state[weight]
    names = set(state)
    forget_rests(one_by_one.optimizer)
    assert set(state) == names - {REST} != names
