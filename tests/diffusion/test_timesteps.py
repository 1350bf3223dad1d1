import math

import pytest
import torch

from library.config.flow import LARGEST_MODE_SCALE, FlowConfig
from library.config.loss import LossConfig
from library.diffusion import timesteps
from library.diffusion.flow_matching import FlowMatching
from library.randomness import Draws

DRAWS = 200_000
EVENLY = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS


def drawn(uniform: torch.Tensor = EVENLY, *, tokens: int = 1024, **options) -> torch.Tensor:
    return FlowMatching(FlowConfig(**options), LossConfig()).sigmas(uniform, tokens=tokens)


@pytest.mark.parametrize(
    ("options", "mean", "deciles"),
    [  # 200k random draws of the established trainer, cut to whole timesteps, which takes half a step off
        ({}, 499, (99, 500, 899)),
        ({"weighting_scheme": "sigma_sqrt"}, 499, (99, 500, 899)),
        ({"weighting_scheme": "cosmap"}, 499, (99, 500, 899)),
        ({"training_shift": 3.0}, 676, (247, 749, 964)),
        ({"weighting_scheme": "logit_normal"}, 499, (218, 500, 782)),
        ({"weighting_scheme": "logit_normal", "training_shift": 3.0}, 713, (452, 749, 915)),
        ({"weighting_scheme": "mode"}, 499, (193, 499, 804)),
        ({"timestep_sampling": "mode"}, 499, (193, 499, 804)),
        ({"timestep_sampling": "sigmoid"}, 499, (218, 500, 782)),
    ],
)
def test_distribution_is_that_of_the_established_trainer(options, mean, deciles):
    t = drawn(**options).double() * 1000
    assert t.mean().item() == pytest.approx(mean + 0.5, abs=1.0)
    expected = torch.tensor(deciles, dtype=torch.float64) + 0.5
    assert torch.allclose(
        t.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)), expected, atol=5
    )  # their own sampling error


def test_random_draws_of_samples_have_the_distribution():
    count = 20_000
    draws = Draws(7, tuple(f"set/{i}" for i in range(count)), (3,) * count)
    sigma = drawn(draws.uniform("sigma"), weighting_scheme="logit_normal", training_shift=3.0).double()
    assert sigma.mean().item() == pytest.approx(0.7135, abs=0.004)
    assert torch.allclose(
        sigma.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)),
        torch.tensor([0.4525, 0.7495, 0.9155], dtype=torch.float64),
        atol=0.01,
    )


@pytest.mark.parametrize("mean", [0.0, 0.7])
@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_logit_normal_by_its_distribution_function(mean, std):
    sigma = timesteps.logit_normal(EVENLY, mean, std)
    below = 0.5 * (1 + torch.erf((torch.logit(sigma) - mean) / (std * math.sqrt(2))))
    assert torch.allclose(below, EVENLY, atol=1e-9)


def test_sigmoid_scale_widens():
    narrow, wide = drawn(timestep_sampling="sigmoid", sigmoid_scale=0.5), drawn(timestep_sampling="sigmoid")
    assert narrow.std() < 0.7 * wide.std()


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, LARGEST_MODE_SCALE])
def test_mode_is_the_papers_function_with_its_argument_reversed(scale):
    r = 1 - EVENLY
    paper = 1 - r - scale * (torch.cos(math.pi * r / 2) ** 2 - 1 + r)
    sigma = timesteps.mode(EVENLY, scale)
    assert torch.allclose(sigma, paper, atol=1e-12)
    assert (sigma.diff() >= -1e-15).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weighting_scheme": "logit_normal", "logit_mean": -3.0, "logit_std": 4.0},
        {"weighting_scheme": "logit_normal", "logit_mean": 3.0, "logit_std": 4.0},
        {"weighting_scheme": "mode", "mode_scale": LARGEST_MODE_SCALE},
        {"weighting_scheme": "mode", "mode_scale": -1.0},
        {"timestep_sampling": "sigmoid", "sigmoid_scale": 20.0},
        {"training_shift": 10.0},
        {"training_shift": 0.1},
        {"flow_schedule_auto_shift": True},
    ],
)
def test_levels_stay_above_zero_and_at_most_one_at_the_ends(options):
    ends = torch.tensor([2.0**-53, 1e-12, 1e-6, 0.5, 1 - 1e-6, 1 - 2.0**-53], dtype=torch.float64)
    sigma = drawn(ends, tokens=16384, **options)
    assert sigma.dtype == torch.float32
    assert sigma.isfinite().all()
    assert (sigma > 0).all()
    assert (sigma <= 1).all()
    assert (sigma.diff() >= 0).all()


def test_timestep_range_is_affine_after_the_shift():
    free = drawn(training_shift=3.0).double()
    limited = drawn(training_shift=3.0, min_timestep=200, max_timestep=700).double()
    assert torch.allclose(limited, 0.2 + 0.5 * free, atol=1e-4)
    assert limited.min() >= 0.2
    assert limited.max() <= 0.7


@pytest.mark.parametrize(
    ("tokens", "shift"), [(256, math.exp(0.5)), (1024, 1.88), (4096, math.exp(1.15)), (16384, 2 * math.exp(1.15))]
)
def test_shift_for_tokens(tokens, shift):
    assert timesteps.shift_for_tokens(tokens) == pytest.approx(shift, rel=2e-3)


def test_shift_for_tokens_is_continuous_and_rises():
    assert timesteps.shift_for_tokens(4097) == pytest.approx(timesteps.shift_for_tokens(4096), rel=1e-3)
    shifts = [timesteps.shift_for_tokens(tokens) for tokens in (1, 64, 256, 1024, 4096, 5000, 9216, 16384, 65536)]
    assert shifts == sorted(shifts)
    with pytest.raises(ValueError, match="at least 1"):
        timesteps.shift_for_tokens(0)


def test_automatic_shift_depends_on_tokens_and_static_shift_does_not():
    automatic = {tokens: drawn(tokens=tokens, flow_schedule_auto_shift=True).median().item() for tokens in (1024, 4096)}
    assert automatic[1024] == pytest.approx(1.8776 / 2.8776, abs=1e-3)
    assert automatic[4096] == pytest.approx(3.1582 / 4.1582, abs=1e-3)
    assert torch.equal(drawn(tokens=64, training_shift=2.0), drawn(tokens=9999, training_shift=2.0))


def test_uniform_schedule_is_the_uniform_density():
    assert torch.equal(drawn(flow_use_uniform_schedule=True), drawn(timestep_sampling="uniform"))
    assert torch.equal(drawn(flow_use_uniform_schedule=True, weighting_scheme="cosmap"), drawn())


@pytest.mark.reference
@pytest.mark.parametrize(
    "options",
    [
        {"weighting_scheme": "none"},
        {"weighting_scheme": "logit_normal", "logit_mean": 0.3, "logit_std": 0.8},
        {"weighting_scheme": "mode", "mode_scale": 0.9},
    ],
)
def test_densities_are_those_of_diffusers(options):
    oracle = pytest.importorskip("diffusers.training_utils").compute_density_for_timestep_sampling
    u = oracle(batch_size=DRAWS, generator=torch.Generator().manual_seed(0), **options)
    probabilities = torch.linspace(0.02, 0.98, 25)
    assert torch.allclose(drawn(**options).quantile(probabilities), u.quantile(probabilities), atol=6e-3)
