import dataclasses
import math

import pytest
import torch

from library.config.ddpm import DdpmConfig, ddpm_problems
from library.config.errors import ConfigError
from library.config.loss import LossConfig
from library.diffusion import ddpm
from library.diffusion.ddpm import Ddpm, signal_fractions, timestep_of
from library.memory.hollow import Hollow
from library.randomness import Draws

SHAPE = (4, 8, 16)
KEYS = ("a", "b", "c")
DRAWS = Draws(7, KEYS, (0, 1, 0))
TIMESTEPS = [3, 480, 999]


def objective(loss=None, **options):
    return Ddpm(DdpmConfig(**options), loss or LossConfig())


def numbers(*shape, seed=0):
    return torch.randn(len(KEYS), *(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


def sigma_of(timesteps):
    return (torch.tensor(timesteps) + 1) / 1000


def noised(chosen, draws=None):
    return chosen.add_noise(numbers(), numbers(seed=1), sigma_of(TIMESTEPS), draws)


def scheduler(**options):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, **options
    )


@pytest.mark.reference
@pytest.mark.parametrize("zero", [False, True])
def test_noising_and_velocity_are_those_of_diffusers(zero):
    theirs = scheduler(rescale_betas_zero_snr=zero)
    ours = objective(v_parameterization=True, zero_terminal_snr=zero)
    made, timesteps = noised(ours), torch.tensor(TIMESTEPS)
    x_0, noise = numbers(), numbers(seed=1)
    assert torch.allclose(made.x_t, theirs.add_noise(x_0, noise, timesteps), atol=2e-5)
    assert torch.allclose(ours.target(made), theirs.get_velocity(x_0, noise, timesteps), atol=2e-5)
    assert torch.equal(objective().target(made), noise)
    if zero:
        assert torch.equal(made.x_t[2], noise[2])


def test_a_step_that_is_foreseen_leaves_the_schedule_its_numbers():
    before = signal_fractions().tolist()
    ddpm._fractions.cache_clear()
    with Hollow():
        signal_fractions()
    assert signal_fractions().tolist() == before


@pytest.mark.reference
def test_the_schedule_is_that_of_diffusers():
    assert torch.allclose(signal_fractions(), scheduler().alphas_cumprod.double(), rtol=1e-4)
    zero = signal_fractions(zero_terminal_snr=True)
    assert zero[-1] == 0 and zero[0] == pytest.approx(signal_fractions()[0].item())
    assert torch.allclose(zero, scheduler(rescale_betas_zero_snr=True).alphas_cumprod.double(), atol=1e-4)


def test_timesteps_are_equally_likely_within_the_range():
    uniform = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    for low, high in ((None, None), (100, 400), (999, None)):
        sigmas = objective(min_timestep=low, max_timestep=high).sigmas(uniform, tokens=5)
        counts = timestep_of(sigmas).bincount(minlength=1000)
        wanted = torch.zeros(1000)
        wanted[low or 0 : high or 1000] = 1
        assert torch.equal(counts.bool(), wanted.bool())
        present = counts[wanted.bool()]
        assert present.max() == present.min() == 3000 // len(present)
    assert torch.equal(timestep_of(sigma_of(range(1000))), torch.arange(1000))


def snr(timestep):
    signal = signal_fractions()[timestep].item()
    return signal / (1 - signal)


WEIGHTS = [
    ({}, lambda r: 1.0),
    ({"min_snr_gamma": 5.0}, lambda r: min(r, 5) / r),
    ({"min_snr_gamma": 5.0, "v_parameterization": True}, lambda r: min(r, 5) / (r + 1)),
    ({"scale_v_pred_loss_like_noise_pred": True, "v_parameterization": True}, lambda r: r / (r + 1)),
    ({"v_pred_like_loss": 0.2}, lambda r: 1 + 0.2 * (r + 1) / r),
    ({"debiased_estimation_loss": True}, lambda r: 1 / math.sqrt(min(r, 1000))),
    ({"debiased_estimation_loss": True, "v_parameterization": True}, lambda r: 1 / (min(r, 1000) + 1)),
    ({"debiased_estimation_loss": True, "min_snr_gamma": 1.0}, lambda r: min(r, 1) / r / math.sqrt(min(r, 1000))),
]


@pytest.mark.parametrize(
    ("options", "weight"), WEIGHTS, ids=lambda value: "-".join(value) if type(value) is dict else ""
)
def test_weights_follow_their_formulas(options, weight):
    chosen = objective(**options)
    made, answer = noised(chosen), numbers(seed=2)
    plain = (answer - chosen.target(made)) ** 2
    loss = chosen.loss(answer, made)
    for row, timestep in enumerate(TIMESTEPS):
        assert torch.allclose(loss[row], plain[row] * weight(snr(timestep)), rtol=1e-4, atol=1e-7)
    other = numbers(seed=3)
    assert torch.allclose(chosen.loss(answer, made, other), loss / plain * (answer - other) ** 2, rtol=1e-3)


def test_a_schedule_without_signal_at_its_end_gives_numbers():
    options = {"v_parameterization": True, "zero_terminal_snr": True}
    for more in ({}, {"min_snr_gamma": 5.0}, {"debiased_estimation_loss": True}):
        chosen = objective(**options, **more)
        assert chosen.loss(numbers(seed=2), noised(chosen)).isfinite().all()


@pytest.mark.parametrize("schedule", [None, "snr", "constant", "exponential"])
def test_huber_schedules(schedule):
    loss = LossConfig(loss_type="huber", huber_c=0.1, huber_scale=1.5, huber_schedule=schedule)
    chosen = objective(loss)
    made, answer = noised(chosen), numbers(seed=2)
    difference, result = answer - chosen.target(made), chosen.loss(answer, made)
    for row, timestep in enumerate(TIMESTEPS):
        c = {
            "constant": 0.1,
            "exponential": math.exp(math.log(0.1) * timestep / 1000),
            "snr": 0.9 / (1 + math.sqrt(1 / snr(timestep))) ** 2 + 0.1,
        }[schedule or "snr"] * 1.5
        expected = 2 * c * ((difference[row] ** 2 + c * c).sqrt() - c)
        assert torch.allclose(result[row], expected, rtol=1e-3, atol=1e-5)


def test_an_offset_is_the_same_at_all_positions_and_drawn_for_the_sample():
    plain, offset = noised(objective(), DRAWS), noised(objective(noise_offset=0.1), DRAWS)
    added = offset.noise - plain.noise
    assert torch.allclose(added, added.mean(dim=(2, 3), keepdim=True).expand_as(added), atol=1e-6)
    drawn = DRAWS.normal("noise offset", (4, 1, 1))
    assert torch.allclose(added[..., :1, :1], 0.1 * drawn, atol=1e-6)
    random = noised(objective(noise_offset=0.1, noise_offset_random_strength=True), DRAWS).noise - plain.noise
    share = (random / added).mean(dim=(1, 2, 3))
    assert torch.allclose(share, DRAWS.uniform("noise offset strength").float(), atol=1e-4)
    adaptive = noised(objective(noise_offset=0.1, adaptive_noise_scale=-2.0), DRAWS).noise - plain.noise
    strength = (0.1 - 2 * numbers().mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)
    assert torch.allclose(adaptive, (strength * drawn).expand_as(adaptive), atol=1e-6)
    assert 0 < strength.eq(0).sum() < strength.numel()


def test_noise_of_several_resolutions_has_deviation_one_and_coarse_parts():
    made = noised(objective(multires_noise_iterations=4, multires_noise_discount=0.8), DRAWS).noise
    assert torch.allclose(made.std(dim=(1, 2, 3)), torch.ones(3), atol=1e-5)
    plain = numbers(seed=1)
    neighbours = [(one[..., 1:] * one[..., :-1]).mean() / one.square().mean() for one in (made, plain)]
    assert neighbours[0] > 0.2 > neighbours[1]
    once = noised(objective(multires_noise_iterations=1, multires_noise_discount=0.8), DRAWS).noise
    finest = plain + DRAWS.normal("multires noise 0", SHAPE)
    assert torch.allclose(once, finest / finest.std(dim=(1, 2, 3), keepdim=True), atol=1e-5)


def test_input_perturbation_is_in_the_question_only():
    plain, perturbed = noised(objective(), DRAWS), noised(objective(ip_noise_gamma=0.1), DRAWS)
    assert torch.equal(perturbed.noise, plain.noise)
    rest = (1 - signal_fractions()[TIMESTEPS]).sqrt().float().view(-1, 1, 1, 1)
    drawn = DRAWS.normal("input perturbation", SHAPE)
    assert torch.allclose(perturbed.x_t - plain.x_t, rest * 0.1 * drawn, atol=1e-5)
    random = noised(objective(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True), DRAWS)
    strength = 0.1 * DRAWS.uniform("input perturbation strength").float().view(-1, 1, 1, 1)
    assert torch.allclose(random.x_t - plain.x_t, rest * strength * drawn, atol=1e-5)


def test_what_is_drawn_belongs_to_the_sample():
    options = {"noise_offset": 0.1, "noise_offset_random_strength": True, "multires_noise_iterations": 5}
    chosen = objective(**options, ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True)
    together = noised(chosen, DRAWS)
    for row in range(len(KEYS)):
        alone = chosen.add_noise(
            numbers()[row : row + 1],
            numbers(seed=1)[row : row + 1],
            sigma_of(TIMESTEPS[row : row + 1]),
            dataclasses.replace(DRAWS, keys=KEYS[row : row + 1], visits=DRAWS.visits[row : row + 1]),
        )
        assert torch.allclose(alone.x_t[0], together.x_t[row], atol=1e-6)
    assert torch.equal(noised(chosen).noise, numbers(seed=1)), "validation's noise is fixed"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"adaptive_noise_scale": 0.1}, "--adaptive_noise_scale changes --noise_offset and does nothing without it"),
        ({"noise_offset_random_strength": True}, "--noise_offset_random_strength changes --noise_offset"),
        ({"multires_noise_discount": 0.8}, "--multires_noise_discount changes --multires_noise_iterations"),
        ({"ip_noise_gamma_random_strength": True}, "--ip_noise_gamma_random_strength changes --ip_noise_gamma"),
        ({"min_timestep": 500, "max_timestep": 400}, "--min_timestep 500 must be below --max_timestep 400"),
        ({"min_snr_gamma": 0}, "--min_snr_gamma 0 weighs every loss by 0"),
        ({"v_pred_like_loss": 0}, "--v_pred_like_loss 0 does nothing"),
        ({"ip_noise_gamma": 0}, "--ip_noise_gamma 0 does nothing"),
        ({"noise_offset": 0}, "--noise_offset 0 does nothing without --adaptive_noise_scale"),
    ],
)
def test_options_that_do_nothing_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        DdpmConfig(**options)


@pytest.mark.parametrize(
    ("options", "velocity", "told"),
    [
        ({"scale_v_pred_loss_like_noise_pred": True}, (None, False), "--scale_v_pred_loss_like_noise_pred is for"),
        ({"v_pred_like_loss": 0.1}, (True,), "--v_pred_like_loss 0.1 is for models that predict the noise"),
        ({"zero_terminal_snr": True}, (None, False), "--zero_terminal_snr makes the last timestep pure noise"),
    ],
)
def test_options_that_do_not_fit_what_the_model_predicts_are_refused(options, velocity, told):
    for value in (None, False, True):
        problems = ddpm_problems(DdpmConfig(**options, v_parameterization=value))
        assert [problem.startswith(told) for problem in problems] == [True] * (value in velocity)


def test_idle_options_are_named():
    switches = {"noise_offset_random_strength", "scale_v_pred_loss_like_noise_pred"}
    switches |= {"ip_noise_gamma_random_strength", "debiased_estimation_loss"}
    assert set(DdpmConfig(noise_offset=0.1).idle_options) == {"multires_noise_discount", *switches}
    off = {"v_parameterization": False, "zero_terminal_snr": False}
    said = DdpmConfig(noise_offset=0.1, **off, noise_offset_random_strength=True).idle_options
    assert set(said) == {"multires_noise_discount", *off, *switches - {"noise_offset_random_strength"}}
