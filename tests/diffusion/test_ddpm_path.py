"""The levels and timesteps of paths against diffusers' schedulers."""

import math

import pytest
import torch

from library.config.samplers import DDPM_SAMPLERS
from library.diffusion.ddpm_path import ddpm_path, level_table, nearest_timestep, spaced_timesteps

PUBLISHED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
ENDING = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
THEIRS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
}


def path_of(sampler, steps, *, zero_terminal_snr=False):
    return ddpm_path(sampler, steps, v_parameterization=zero_terminal_snr, zero_terminal_snr=zero_terminal_snr)


def asked_timesteps(path):
    x = torch.zeros(1, 1, 1, 1)
    return [round(float(path.asked(x, level).sigma) * 1000) - 1 for level in path.levels[:-1].tolist()]


@pytest.mark.reference
@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize("steps", [2, 7, 20, 28, 30, 50, 250])
@pytest.mark.parametrize("sampler", THEIRS)
def test_levels_and_timesteps_are_those_of_diffusers(sampler, steps, ending):
    diffusers = pytest.importorskip("diffusers")
    name, own = THEIRS[sampler]
    theirs = getattr(diffusers, name)(**{**PUBLISHED, **own, **(ENDING if ending else {})})
    theirs.set_timesteps(steps)
    path = path_of(sampler, steps, zero_terminal_snr=ending)
    torch.testing.assert_close(path.levels, theirs.sigmas.double(), rtol=1e-3 if ending else 1e-4, atol=0)
    assert asked_timesteps(path) == theirs.timesteps.tolist()


@pytest.mark.reference
@pytest.mark.parametrize("steps", [2, 7, 20, 30, 50, 250])
def test_the_timesteps_of_ddim_are_those_of_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(**PUBLISHED, clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(steps)
    path = path_of("ddim", steps)
    assert asked_timesteps(path) == theirs.timesteps.tolist()
    last = theirs.final_alpha_cumprod.item()
    assert path.levels[-1].item() == pytest.approx(math.sqrt((1 - last) / last), rel=1e-4)


@pytest.mark.parametrize("sampler", DDPM_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 501, 667, 999, 1000])
@pytest.mark.parametrize("ending", [False, True])
def test_every_number_of_steps_falls_to_the_end(sampler, steps, ending):
    levels = path_of(sampler, steps, zero_terminal_snr=ending).levels
    assert levels.shape == (steps + 1,) and (levels.diff() < 0).all()
    assert levels[0] > (14 if steps in (1, 1000) or sampler in ("dpmpp_2m", "unipc") else 1)
    assert levels[-1] == 0 or (sampler == "ddim" and levels[-1] < 0.03)


def test_one_step_begins_in_noise():
    assert spaced_timesteps(1, from_the_end=False) == [999]
    assert spaced_timesteps(2, from_the_end=False) == [501, 1]
    assert spaced_timesteps(4, from_the_end=True) == [999, 749, 499, 249]


@pytest.mark.parametrize("ending", [False, True])
def test_a_level_of_the_schedule_is_its_own_timestep(ending):
    table = level_table(zero_terminal_snr=ending)
    assert [nearest_timestep(level, zero_terminal_snr=ending) for level in table.tolist()] == list(range(1000))
    assert nearest_timestep(float(table[-1]) * 2, zero_terminal_snr=ending) == 999
    assert nearest_timestep(float(table[0]) / 2, zero_terminal_snr=ending) == 0
    between = math.sqrt(float(table[10] * table[11]))
    assert nearest_timestep(between * 1.001, zero_terminal_snr=ending) == 11
    assert nearest_timestep(between * 0.999, zero_terminal_snr=ending) == 10


def test_a_schedule_without_an_end_keeps_a_finite_level():
    assert float(level_table(zero_terminal_snr=True)[-1]) == pytest.approx(4096, rel=1e-6)
    assert float(level_table(zero_terminal_snr=False)[-1]) == pytest.approx(14.6146, rel=1e-4)
