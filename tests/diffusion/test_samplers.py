import math
from itertools import pairwise

import pytest
import torch

from library.config.samplers import FLOW_SAMPLERS
from library.diffusion.samplers import SAMPLERS, dpmpp_2m, euler, heun

MEAN, SPREAD = 0.3, 0.6


def shifted(steps: int, *, shift: float = 3.0, first: float = 1.0, last: float = 0.0) -> torch.Tensor:
    t = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


def width(sigma: float) -> float:
    return math.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2)


def gaussian_denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The best estimate of x_0 when x_0 is normal with MEAN and SPREAD."""
    return MEAN + (1 - sigma) * SPREAD**2 / width(sigma) ** 2 * (x - (1 - sigma) * MEAN)


def gaussian_path(z: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where the probability-flow ODE takes z: the exact solution."""
    return (1 - sigma) * MEAN + width(sigma) * z


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_exact_for_a_constant_estimate(name, steps):
    target = torch.randn(2, 3, 4, 4)
    x = torch.randn(2, 3, 4, 4)
    result = SAMPLERS[name](lambda x_t, sigma: target, x, shifted(steps))
    assert torch.allclose(result, target, atol=1e-5)
    part = SAMPLERS[name](lambda x_t, sigma: target, x, torch.tensor([1.0, 0.7, 0.4]))
    assert torch.allclose(part, 0.4 * x + 0.6 * target, atol=1e-5)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
@pytest.mark.parametrize("first", [0.95, 1.0])
def test_order_of_convergence(sampler, order, first):
    z = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    errors = []
    for steps in (16, 32, 64):
        sigmas = shifted(steps, shift=1.0, first=first, last=0.05)
        x = gaussian_path(z, float(sigmas[0]))
        errors.append((sampler(gaussian_denoise, x, sigmas) - gaussian_path(z, 0.05)).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.35), (errors, orders)


def test_second_order_beats_first_order_down_to_zero():
    z = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    sigmas = shifted(20)
    errors = {
        name: (sampler(gaussian_denoise, z, sigmas) - gaussian_path(z, 0.0)).abs().max().item()
        for name, sampler in SAMPLERS.items()
    }
    assert errors["dpmpp_2m"] < errors["euler"] / 3
    assert errors["heun"] < errors["euler"] / 3


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_x_is_fp32_and_the_callback_sees_every_step(name):
    seen = []

    def denoise(x, sigma):
        assert x.dtype == torch.float32
        return gaussian_denoise(x, sigma).bfloat16()

    x = torch.randn(1, 2, 3, 3).bfloat16()
    result = SAMPLERS[name](denoise, x, shifted(5).float(), callback=lambda step, x_0: seen.append((step, x_0.shape)))
    assert result.dtype == torch.float32
    assert seen == [(step, x.shape) for step in range(5)]


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.5, 0.5], [0.5, 1.0], [1.1, 0.5], [0.5, -0.1]])
def test_sigmas_must_fall_within_one_and_zero(sigmas):
    with pytest.raises(ValueError, match="sigmas must fall"):
        euler(gaussian_denoise, torch.zeros(1, 1, 2, 2), torch.tensor(sigmas))


def peer(scheduler, x, sigmas):
    for sigma, timestep in zip(sigmas, scheduler.timesteps):
        velocity = (x - gaussian_denoise(x, float(sigma))) / float(sigma)
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    return x


@pytest.mark.reference
def test_euler_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = peer(scheduler, x, scheduler.sigmas)
    assert torch.allclose(euler(gaussian_denoise, x, scheduler.sigmas), expected, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("steps", [2, 3, 12, 25])
def test_dpmpp_2m_is_that_of_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = peer(scheduler, x, scheduler.sigmas)
    assert expected.isfinite().all()
    assert torch.allclose(dpmpp_2m(gaussian_denoise, x, scheduler.sigmas), expected, atol=2e-5)
