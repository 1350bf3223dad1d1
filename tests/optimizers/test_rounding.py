"""Stochastic rounding is unbiased, a function of its seed, and never hides what is not finite."""

import pytest
import torch

from library.optimizers.rounding import Rounding, round_stochastically


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("number", [1.001, -1.001, 1 + 2**-9, 3e-5, -7.77e12, 1e-40])
def test_the_mean_is_the_number(number):
    numbers = torch.full((200_000,), number)
    rounded = round_stochastically(numbers, generator()).double()
    low, high = rounded.aminmax()
    assert low <= numbers[0].double() <= high
    assert len(rounded.unique()) == 2, "the two nearest bf16 numbers"
    assert abs(rounded.mean() - numbers[0].double()) < 4 * rounded.std() / len(rounded) ** 0.5


def test_what_bf16_has_stays():
    numbers = torch.randn(1000, generator=generator()).bfloat16()
    assert torch.equal(round_stochastically(numbers.float(), generator()), numbers)


def test_what_is_not_finite_stays():
    # a GPU's nan has every bit set, and adding to it would carry into the sign
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for seed in range(20):
        assert round_stochastically(nan, generator(seed)).isnan().all()
        infinite = round_stochastically(torch.tensor([torch.inf, -torch.inf]), generator(seed))
        assert infinite.tolist() == [torch.inf, -torch.inf]


def test_a_rounding_is_a_function_of_seed_step_and_number():
    weight = torch.randn(500, generator=generator())
    first = Rounding(7).rounded(weight, step=3, number=5)
    assert torch.equal(Rounding(7).rounded(weight, step=3, number=5), first)
    others = [(8, 3, 5), (7, 4, 5), (7, 3, 6)]
    for seed, step, number in others:
        assert not torch.equal(Rounding(seed).rounded(weight, step=step, number=number), first)
