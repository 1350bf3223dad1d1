"""Stepping weights singly is stepping them together; in bf16, small updates survive."""

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from library.config.optimizer import OPTIMIZER_NAMES, OptimizerConfig
from library.optimizers.kahan import KahanSummation
from library.optimizers.one_by_one import OneByOne, steps_apart
from library.optimizers.rounding import Rounding
from library.training.optimizers import create_optimizer, load_optimizer_state

SINGLE = [name for name in OPTIMIZER_NAMES if not OptimizerConfig(optimizer_type=name).over_all_parameters]


def made(name, dtype=torch.float32, learning_rate=1e-2):
    generator = torch.Generator().manual_seed(1)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((64, 80), (80,), (9, 7))]
    groups = [{"params": weights[:2], "lr": learning_rate}, {"params": weights[2:], "lr": learning_rate / 2}]
    return weights, create_optimizer(name, (), groups, learning_rate=1.0, device=torch.device("cpu")).optimizer


def gradient(weight, number):
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)).to(weight.dtype)


def step_singly(one_by_one, weights, step):
    for weight in reversed(weights):
        one_by_one.step(weight, gradient(weight, step), step)
    one_by_one.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SINGLE)
def test_steps_of_single_weights_are_steps_of_all(name, dtype):
    together, whole = made(name, dtype)
    apart, optimizer = made(name, dtype)
    one_by_one = OneByOne(optimizer)
    for step in range(4):
        for weight in together:
            weight.grad = gradient(weight, step)
        whole.step()
        step_singly(one_by_one, apart, step)
        assert all(torch.equal(first, second) for first, second in zip(together, apart)), step
    assert all(weight.grad is None for weight in apart)
    saved, expected = optimizer.state_dict(), whole.state_dict()
    assert saved["param_groups"] == expected["param_groups"]  # what is counted per group too
    assert saved["state"].keys() == expected["state"].keys()


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptLion"])
def test_an_optimizer_over_all_weights_is_found_out(name):
    def problem():
        weights, _ = made("AdamW")
        groups = [{"params": weights, "lr": 1.0}]
        return create_optimizer(name, (), groups, learning_rate=1.0, device=torch.device("cpu")).optimizer

    assert not steps_apart(problem(), problem())


@pytest.mark.parametrize("name", SINGLE)
def test_the_others_are_found_able(name):
    assert steps_apart(made(name)[1], made(name)[1])


class ByTotalNorm(Optimizer):
    """Divides by the norm of all gradients together."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        weights = [weight for group in self.param_groups for weight in group["params"]]
        norm = torch.stack([weight.grad.norm() for weight in weights]).norm()
        for weight in weights:
            weight.sub_(weight.grad / norm)


def test_so_is_one_whose_step_needs_every_gradient():
    problems = [ByTotalNorm([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))], lr=1) for _ in range(2)]
    assert not steps_apart(*problems)


def trained(name, dtype, rounding):
    """How far 20 steps along noisy gradients move weights of 1 on average, with what Kahan summation keeps of them."""
    weight = nn.Parameter(torch.ones(200, 100, dtype=dtype))
    rate = 1e-6 if name.startswith("CAME") else 1e-4  # its confidence makes large first steps
    settings = ["weight_decay=0"] + ["kahan_sum=False"] * (name == "StableAdamW")  # kahan_sum is its own remedy
    groups = [{"params": [weight], "lr": rate}]
    optimizer = create_optimizer(name, settings, groups, learning_rate=1.0, device=torch.device("cpu")).optimizer
    one_by_one = OneByOne(optimizer, rounding)
    for step in range(20):
        one_by_one.step(weight, 1 + 0.5 * gradient(weight, step), step)
        one_by_one.finish()
    return 1 - KahanSummation().widened(weight, optimizer.state[weight]).mean().item()


@pytest.mark.parametrize("name", ["AdamW", "CAME", "CAME8bit", "Lion", "Adafactor", "StableAdamW", "AdamW8bit"])
def test_small_updates_survive_in_bf16_on_average(name):
    expected = trained(name, torch.float32, None)
    assert expected > 1e-4
    assert trained(name, torch.bfloat16, None) < 0.1 * expected, "rounding to the nearest should lose this update"
    assert trained(name, torch.bfloat16, Rounding(0)) == pytest.approx(expected, rel=0.1)
    assert trained(name, torch.bfloat16, KahanSummation()) == pytest.approx(expected, rel=0.01)  # bf16 gradients


@pytest.mark.parametrize("rounding", [Rounding(3), KahanSummation()], ids=["stochastic", "kahan"])
@pytest.mark.parametrize("name", ["AdamW", "CAME8bit", "AdamW8bit", "StableAdamW", "PagedLion8bit"])
def test_a_loaded_state_goes_on_exactly_with_rounding(name, rounding, tmp_path):
    weights, optimizer = made(name, torch.bfloat16)
    one_by_one = OneByOne(optimizer, rounding)
    for step in range(3):
        step_singly(one_by_one, weights, step)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again, fresh = made(name, torch.bfloat16)
    for weight, other in zip(again, weights):
        weight.data.copy_(other.data)
    load_optimizer_state(fresh, torch.load(tmp_path / "state.pt", weights_only=True))
    resumed = OneByOne(fresh, rounding)
    for step in range(3, 6):
        step_singly(one_by_one, weights, step)
        step_singly(resumed, again, step)
    assert all(torch.equal(first, second) for first, second in zip(weights, again))


def test_weights_in_fp32_are_not_rounded():
    plain, rounded = made("AdamW"), made("AdamW")
    for (weights, optimizer), rounding in ((plain, None), (rounded, Rounding(0))):
        step_singly(OneByOne(optimizer, rounding), weights, 0)
    assert all(torch.equal(first, second) for first, second in zip(plain[0], rounded[0]))
