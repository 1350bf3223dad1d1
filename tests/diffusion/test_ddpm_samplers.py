"""Samplers against diffusers' schedulers, which walk in other coordinates: x / sqrt(1 + level^2)."""

import math

import pytest
import torch

from library.diffusion import ddpm_samplers
from library.diffusion.ddpm import signal_fractions
from library.diffusion.ddpm_samplers import karras_levels

SHAPE = (2, 4, 8, 8)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def level_of(timestep):
    signal = signal_fractions().float()
    table = ((1 - signal) / signal).sqrt()
    return torch.tensor([table[int(one)].item() for one in timestep], dtype=torch.float64)


def model(x_t, timestep):
    """A made-up prediction of the noise from the latents in diffusers' coordinates."""
    return torch.tanh(x_t * (1.5 - timestep / 1000)) + 0.1 * x_t.roll(1, dims=-1)


def walk(scheduler, steps, noise):
    """What diffusers makes of the noise."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        answer = model(scheduler.scale_model_input(x, timestep), float(timestep))
        x = scheduler.step(answer, timestep, x).prev_sample
    return x


def denoiser(levels, timesteps):
    """The same model as an estimate of x_0 in the coordinates of the samplers."""
    times = {float(level): float(timestep) for level, timestep in zip(levels.double().tolist(), timesteps)}

    def denoise(x, level):
        answer = model(x / math.sqrt(1 + level**2), times[level])
        return x - level * answer

    return denoise


@pytest.mark.reference
@pytest.mark.parametrize("steps", [3, 10])
def test_euler_and_ddim_are_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1)
    expected = walk(theirs, steps, noise)
    levels = theirs.sigmas.double()
    ours = ddpm_samplers.euler(denoiser(levels, theirs.timesteps), noise * theirs.init_noise_sigma, levels)
    assert torch.allclose(ours, expected, atol=1e-4)

    theirs = diffusers.DDIMScheduler(**SCHEDULE, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    expected = walk(theirs, steps, noise)
    last = level_of([0])
    levels = torch.cat([level_of(theirs.timesteps), last])
    started = noise * math.sqrt(1 + levels[0] ** 2)
    ours = ddpm_samplers.euler(denoiser(levels, theirs.timesteps), started, levels)
    assert torch.allclose(ours / math.sqrt(1 + last.item() ** 2), expected, atol=1e-4)


@pytest.mark.reference
def test_euler_ancestral_is_diffusers(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    module = pytest.importorskip("diffusers.schedulers.scheduling_euler_ancestral_discrete")
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    fresh = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    drawn = iter(fresh)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))
    theirs = diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE)
    expected = walk(theirs, 6, noise)
    levels = theirs.sigmas.double()
    ours = ddpm_samplers.euler_ancestral(
        denoiser(levels, theirs.timesteps), noise * theirs.init_noise_sigma, levels, noise=lambda step: fresh[step]
    )
    assert torch.allclose(ours, expected, atol=1e-4)


@pytest.mark.reference
@pytest.mark.parametrize("steps", [2, 3, 10, 20])
@pytest.mark.parametrize(
    ("name", "ours"), [("DPMSolverMultistepScheduler", "dpmpp_2m"), ("UniPCMultistepScheduler", "unipc")]
)
def test_second_order_samplers_are_diffusers(name, ours, steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, name)(**SCHEDULE, use_karras_sigmas=True)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    expected = walk(theirs, steps, noise)
    levels = theirs.sigmas.double()
    started = noise * math.sqrt(1 + levels[0].item() ** 2)
    made = getattr(ddpm_samplers, ours)(denoiser(levels, theirs.timesteps), started, levels)
    assert torch.allclose(made, expected, atol=2e-3)


@pytest.mark.reference
def test_karras_levels_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EulerDiscreteScheduler(**SCHEDULE, use_karras_sigmas=True)
    theirs.set_timesteps(8)
    highest, lowest = level_of([999]).item(), level_of([0]).item()
    assert torch.allclose(karras_levels(highest, lowest, 8), theirs.sigmas.double(), rtol=1e-3)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc"])
def test_a_perfect_estimate_is_reached(name):
    x_0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    seen = []
    result = getattr(ddpm_samplers, name)(
        lambda x, level: x_0, x_0 + 14.0, karras_levels(14.0, 0.03, 5), callback=lambda step, _: seen.append(step)
    )
    assert torch.allclose(result, x_0, atol=1e-5) and seen == [0, 1, 2, 3, 4]


def test_levels_that_do_not_fall_are_refused():
    with pytest.raises(ValueError, match="fall strictly"):
        ddpm_samplers.euler(lambda x, level: x, torch.zeros(SHAPE), torch.tensor([1.0, 2.0, 0.0]))
