"""Every option of the objective through a real step, against the formulas, which are written here once more."""

import copy
import dataclasses
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from library.cli import Script, checked_configuration, refused_options
from library.config.command_line import read_command_line
from library.families import create_family
from library.randomness import Draws
from library.training.step import encoded, training_loss, validation_loss
from tests.conftest import PHOTOS, Trainer

VELOCITY = {"v_parameterization": True}
CASES = [
    {},
    {"min_timestep": 300},
    {"max_timestep": 200},
    {"noise_offset": 0.3},
    {"noise_offset": 0.3, "noise_offset_random_strength": True},
    {"noise_offset": 0.1, "adaptive_noise_scale": 0.7},
    {"noise_offset": 0.1, "adaptive_noise_scale": -0.4},
    {"multires_noise_iterations": 6},
    {"multires_noise_iterations": 3, "multires_noise_discount": 0.9},
    {"ip_noise_gamma": 0.2},
    {"ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True},
    {"min_snr_gamma": 0.05},
    {"debiased_estimation_loss": True},
    {"v_pred_like_loss": 0.4},
    {"loss_type": "l1"},
    {"loss_type": "huber"},
    {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.2},
    {"loss_type": "smooth_l1", "huber_schedule": "snr", "huber_c": 0.3},
    {"loss_type": "smooth_l1", "huber_schedule": "constant", "huber_scale": 0.5},
    VELOCITY,
    {**VELOCITY, "zero_terminal_snr": True},
    {**VELOCITY, "scale_v_pred_loss_like_noise_pred": True},
    {**VELOCITY, "min_snr_gamma": 0.05},
    {**VELOCITY, "debiased_estimation_loss": True},
]
ALL_NOISE = {
    **{"noise_offset": 0.3, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.7},
    **{"multires_noise_iterations": 6, "ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True},
}


class Step:
    """A run that is set up once, and its step under other options."""

    def __init__(self, trainer, run):
        self.trainer, self.run = trainer, run
        batch = encoded(run, next(iter(run.batches)))
        bright = torch.tensor([-2.0, 1.0, -1.0, 3.0]).view(1, 4, 1, 1)  # the channels' means have both signs
        self.batch = dataclasses.replace(batch, latents=batch.latents + bright)
        self.plain = self.loss({})
        self.draws = Draws(run.seed, self.batch.keys, self.batch.visits)

    def under(self, options):
        """The run with the objective that the command line with these options makes."""
        script = Script("sd", "adapter")
        words = self.trainer.arguments("never", network_train_unet_only=True, **options)
        line = read_command_line(script.groups, words, refusals=refused_options("sd"))
        config, problems = checked_configuration(script, line)
        assert problems == []
        run = copy.copy(self.run)
        run.config, run.family = config, create_family("sd", config)
        return run

    def recorded(self, run, act):
        """What ``act`` gives, and what the denoiser was asked and answered meanwhile."""
        calls = []

        def record(module, asked, answer):
            calls.append(SimpleNamespace(x_t=asked[0], timesteps=asked[1].tolist(), answer=answer.detach()))

        handle = run.denoiser.register_forward_hook(record)
        try:
            with torch.no_grad():
                return act(), calls
        finally:
            handle.remove()

    def loss(self, options, batch=None):
        run, batch = self.under(options), self.batch if batch is None else batch
        made, calls = self.recorded(run, lambda: training_loss(run, batch, step_samples=len(self.batch)))
        return made, calls


@pytest.fixture(scope="module")
def step(tiny_sd_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("objective")
    photos = folder / "photos"
    photos.mkdir()
    for name in ("chelsea.png", "coffee.png"):
        shutil.copy(PHOTOS / name, photos)
        shutil.copy((PHOTOS / name).with_suffix(".txt"), photos)
    trainer = Trainer(tiny_sd_file, photos, folder, "sd")
    return trainer.with_run("out", lambda run: Step(trainer, run), network_train_unet_only=True)


def fractions_of_signal(options):
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    fractions = np.cumprod(1 - betas)
    if options.get("zero_terminal_snr"):
        roots = np.sqrt(fractions)
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        fractions = roots**2
    return fractions


def coarse(row_draws, shape, iterations, discount):
    """Noise of falling resolutions, each drawn and enlarged by itself."""
    total = torch.zeros(1, *shape)
    for level in range(iterations):
        ratio = row_draws.uniform(f"multires ratio {level}").item() * 2 + 2
        height, width = (max(1, int(side / ratio**level)) for side in shape[1:])
        small = row_draws.normal(f"multires noise {level}", (shape[0], height, width))
        total += torch.nn.functional.interpolate(small, shape[1:], mode="bilinear") * discount**level
        if 1 in (height, width):
            break
    return total[0].double().numpy()


def row_by_formula(step, options, row, answer, *, timestep=None, plain_noise=False):
    """x_t, the timestep and the loss of one sample, fp64."""
    draws = Draws(step.draws.run_seed, step.draws.keys[row : row + 1], step.draws.visits[row : row + 1])
    z = step.batch.latents[row].double().numpy() * 0.18215
    noise = step.batch.noise[row].double().numpy()
    if timestep is None:
        low, high = options.get("min_timestep", 0), options.get("max_timestep", 1000)
        timestep = low + int(draws.uniform("sigma").item() * (high - low))
    perturbed = noise
    if not plain_noise:
        if "noise_offset" in options:
            strength = options["noise_offset"]
            if options.get("noise_offset_random_strength"):
                strength = strength * draws.uniform("noise offset strength").item()
            strength = strength + options.get("adaptive_noise_scale", 0) * np.abs(z.mean(axis=(1, 2), keepdims=True))
            strength = np.maximum(strength, 0)
            noise = noise + strength * draws.normal("noise offset", (4, 1, 1))[0].double().numpy()
        if "multires_noise_iterations" in options:
            discount = options.get("multires_noise_discount", 0.3)
            noise = noise + coarse(draws, noise.shape, options["multires_noise_iterations"], discount)
            noise = noise / noise.std(ddof=1)
        perturbed = noise
        if "ip_noise_gamma" in options:
            strength = options["ip_noise_gamma"]
            if options.get("ip_noise_gamma_random_strength"):
                strength = strength * draws.uniform("input perturbation strength").item()
            perturbed = noise + strength * draws.normal("input perturbation", noise.shape)[0].double().numpy()
    a = fractions_of_signal(options)[timestep]
    x_t = math.sqrt(a) * z + math.sqrt(1 - a) * perturbed
    velocity = options.get("v_parameterization", False)
    target = math.sqrt(a) * noise - math.sqrt(1 - a) * z if velocity else noise
    loss = elementwise(options, answer.double().numpy() - target, a, timestep).mean()
    snr = a / (1 - a)
    if "min_snr_gamma" in options:
        loss *= min(snr, options["min_snr_gamma"]) / (snr + 1 if velocity else snr)
    if options.get("scale_v_pred_loss_like_noise_pred"):
        loss *= snr / (snr + 1)
    if "v_pred_like_loss" in options:
        loss += loss / (snr / (snr + 1)) * options["v_pred_like_loss"]
    if options.get("debiased_estimation_loss"):
        loss *= 1 / (snr + 1) if velocity else 1 / math.sqrt(snr)
    return x_t, timestep, loss


def elementwise(options, difference, a, timestep):
    kind, least = options.get("loss_type", "l2"), options.get("huber_c", 0.1)
    if kind in ("l2", "l1"):
        return difference**2 if kind == "l2" else np.abs(difference)
    schedule = options.get("huber_schedule", "snr")
    c = {
        "constant": least,
        "exponential": math.exp(math.log(least) / 1000 * timestep),
        "snr": (1 - least) / (1 + math.sqrt((1 - a) / a)) ** 2 + least,
    }[schedule] * options.get("huber_scale", 1.0)
    root = np.sqrt(difference**2 + c**2) - c
    return 2 * c * root if kind == "huber" else 2 * root


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(options) or "plain")
def test_the_loss_of_a_step_is_that_of_the_formula(step, options):
    made, (call,) = step.loss(options)
    plain, (plain_call,) = step.plain
    for row in range(len(step.batch)):
        x_t, timestep, loss = row_by_formula(step, options, row, call.answer[row])
        assert call.timesteps[row] == timestep
        np.testing.assert_allclose(call.x_t[row].numpy(), x_t, rtol=1e-4, atol=1e-5)
        assert made.per_sample[row].item() == pytest.approx(loss, rel=1e-4)
    assert made.loss.item() == pytest.approx(made.per_sample.mean().item(), rel=1e-6)
    if options:
        assert not torch.allclose(made.per_sample, plain.per_sample, rtol=1e-4), "the option does nothing"
    if set(options) & {"min_snr_gamma", "debiased_estimation_loss", "v_pred_like_loss", "loss_type"}:
        assert torch.equal(call.x_t, plain_call.x_t), "what weighs a loss leaves the question alone"


def test_a_sample_draws_the_same_in_every_batch(step):
    together, _ = step.loss(ALL_NOISE)
    shares = [step.loss(ALL_NOISE, step.batch.rows([row]))[0] for row in range(len(step.batch))]
    torch.testing.assert_close(sum(share.loss for share in shares), together.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.cat([share.per_sample for share in shares]), together.per_sample, rtol=1e-5, atol=0
    )
    assert torch.equal(step.loss(ALL_NOISE)[0].per_sample, together.per_sample)


def test_validation_takes_plain_noise_and_the_weights(step):
    options = {**ALL_NOISE, "min_snr_gamma": 0.05}
    run, quantiles = step.under(options), torch.tensor([[0.1, 0.2], [0.7, 0.9]], dtype=torch.float64)
    losses, calls = step.recorded(run, lambda: validation_loss(run, step.batch, quantiles))
    assert losses.shape == (2, 2)
    for level, call in enumerate(calls):
        for row in range(2):
            timestep = int(quantiles[level, row] * 1000)
            x_t, _, loss = row_by_formula(step, options, row, call.answer[row], timestep=timestep, plain_noise=True)
            assert call.timesteps[row] == timestep
            np.testing.assert_allclose(call.x_t[row].numpy(), x_t, rtol=1e-4, atol=1e-5)
            assert losses[level, row].item() == pytest.approx(loss, rel=1e-4)


def test_the_base_model_is_asked_the_same_question_and_teaches(step):
    """``is_regularisation_data``: its own answer to the perturbed question is the target."""
    parameters = list(step.run.trainable.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    batch = step.batch.rows([0, 1])
    batch = dataclasses.replace(batch, taught=torch.tensor([False, True]))
    try:
        untouched, (_, base) = step.loss(ALL_NOISE, batch)
        assert untouched.per_sample[1] < 1e-9 < 0.1 < untouched.per_sample[0]
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.1)
        made, (teacher, learner) = step.loss(ALL_NOISE, batch)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before):
                parameter.copy_(value)
    assert torch.equal(teacher.x_t[0], learner.x_t[1]) and teacher.timesteps == learner.timesteps[1:]
    torch.testing.assert_close(teacher.answer[0], base.answer[1], rtol=1e-4, atol=1e-5)
    assert (learner.answer[1] - base.answer[1]).abs().max() > 1e-2
    expected = (learner.answer[1] - teacher.answer[0]).square().mean()
    torch.testing.assert_close(made.per_sample[1], expected, rtol=1e-5, atol=0)


def test_bf16_gives_the_same_loss_up_to_its_rounding(step):
    """Weights and activations of 8 bits of precision; the formula itself stays in fp32."""
    expected, _ = step.loss(VELOCITY)
    run = step.under(VELOCITY)
    run.denoiser = copy.deepcopy(run.denoiser).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        made = training_loss(run, step.batch, step_samples=2)
    assert made.loss.dtype == torch.float32
    torch.testing.assert_close(made.per_sample, expected.per_sample, rtol=2e-2, atol=0)
    assert not torch.equal(made.per_sample, expected.per_sample)
