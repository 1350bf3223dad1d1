"""One micro-batch to its share of the optimizer step's loss: training's and validation's."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.diffusion.loss import masked_mean
from library.randomness import Draws, seed_for
from library.records import Batch, NoisedLatents, TensorRecord
from library.training.step_run import StepRun


@dataclass(frozen=True)
class MicroBatchLoss:
    """What one micro-batch contributes.

    Attributes:
        loss: Its share of the step's loss, for ``backward``: ().
        per_sample: Loss of each sample before it is weighted (B,), detached.
    """

    loss: Tensor
    per_sample: Tensor


def training_loss(run: StepRun, batch: Batch, *, step_samples: int) -> MicroBatchLoss:
    """The loss of a training micro-batch, as its share of a step over ``step_samples`` samples.

    The shares of all micro-batches of a step sum to the mean over its samples, however it is split.
    """
    # What torch draws inside the step (adapter dropout) follows the samples, not how often a generator was called.
    torch.manual_seed(seed_for(run.seed, "step", batch.keys[0], batch.visits[0]))
    taught = taught_rows(batch)
    batch = encoded(run, batch).to(run.device)
    teacher = base_answer(run, batch if len(taught) == len(batch) else batch.rows(taught)) if taught else None
    noised, text = _question(run, batch)
    target = None
    if teacher is not None:
        rows = torch.tensor(taught).to(teacher.device, non_blocking=True)
        target = run.family.objective.target(noised).index_copy(0, rows, teacher)
    per_sample = _per_sample(run, batch, noised, text, target)
    return MicroBatchLoss((per_sample * batch.loss_weight).sum() / step_samples, per_sample.detach())


@torch.no_grad()
def validation_loss(run: StepRun, batch: Batch, quantiles: Tensor) -> Tensor:
    """The loss of each sample at fixed noise levels (L, B), unweighted, against the pictures themselves.

    Args:
        run: The run.
        batch: Pictures with their fixed noise.
        quantiles: Where in the training's noise levels each measurement lies (L, B), in 0..1, fp64.
    """
    batch = encoded(run, batch).to(run.device)
    text = conditioning(run, batch)
    return torch.stack([_per_sample(run, batch, _noised(run, batch, level), text, None) for level in quantiles])


@torch.no_grad()
def base_answer(run: StepRun, batch: Batch) -> Tensor:
    """What the base model answers to the question that the batch is to be trained on (B, C, h, w), fp32.

    The adapter is off in the denoiser and in the text encoders; noise, noise level and conditioning are the same.
    """
    with run.trainable.disabled():
        return _answer(run, *_question(run, batch))


def taught_rows(batch: Batch) -> Sequence[int]:
    """The rows whose target is the base model's own answer. The batch must be on the host, or this waits for it."""
    return [] if batch.taught is None else batch.taught.nonzero()[:, 0].tolist()


def encoded(run: StepRun, batch: Batch) -> Batch:
    """The batch with latents for its pictures; and with text features, unless a text encoder is trained.

    Nothing here depends on what is trained, so it may be done at any time before the step.
    """
    latents, text = batch.latents, batch.text
    with torch.no_grad():
        if latents is None:
            assert run.vae is not None and batch.pixels is not None
            vae_dtype = next(run.vae.parameters()).dtype
            pixels = batch.pixels.to(run.device, non_blocking=True)
            latents = run.family.latents.encode(run.vae, pixels.to(vae_dtype))
        if text is None and not run.trains_text_encoders:
            text = _encoded_text(run, batch)
    return dataclasses.replace(
        batch, latents=latents, pixels=None, text=text, tokens=batch.tokens if text is None else None
    )


def clean_latents(run: StepRun, batch: Batch) -> Tensor:
    """Normalised latents (B, C, h, w), fp32; this is the only place where latents are normalised."""
    assert batch.latents is not None
    return run.family.latents.format.normalise(batch.latents.float())


def conditioning(run: StepRun, batch: Batch) -> TensorRecord:
    """Text features of the batch, from the encoders where they are trained; dropped captions are unconditional."""
    text = _encoded_text(run, batch) if batch.text is None else batch.text
    return run.text.drop(text, batch.dropped)


def _encoded_text(run: StepRun, batch: Batch) -> TensorRecord:
    assert batch.tokens is not None
    with run.accelerator.autocast():
        return run.text.encode(run.text_encoders, batch.tokens.to(run.device))


def _question(run: StepRun, batch: Batch) -> tuple[NoisedLatents, TensorRecord]:
    """What a training batch asks the denoiser. All that is random in it follows from the samples and their visits."""
    draws = Draws(run.seed, batch.keys, batch.visits)
    latent_size = run.family.latents.format.latent_size(batch.resolution)
    text = run.family.augment(conditioning(run, batch), draws, latent_size)
    return _noised(run, batch, draws.uniform("sigma"), draws), text


def _noised(run: StepRun, batch: Batch, uniform: Tensor, draws: Draws | None = None) -> NoisedLatents:
    """The noised latents at the quantiles ``uniform`` (B,) of the noise levels; without ``draws``, of plain noise."""
    objective, tokens = run.family.objective, run.family.latents.format.tokens(batch.resolution)
    sigma = objective.sigmas(uniform, tokens=tokens).to(run.device, non_blocking=True)  # (B,)
    noised = objective.add_noise(clean_latents(run, batch), batch.noise, sigma, draws)
    return dataclasses.replace(noised, control=batch.control)


def _answer(run: StepRun, noised: NoisedLatents, text: TensorRecord) -> Tensor:
    """The denoiser's answer (B, C, h, w), fp32."""
    with run.accelerator.autocast():
        prediction = run.family.predict(run.denoiser, noised, text)
    return prediction.float()


def _per_sample(run: StepRun, batch: Batch, noised: NoisedLatents, text: TensorRecord, target: Tensor | None) -> Tensor:
    """The loss of each sample (B,), with its mask."""
    per_element = run.family.objective.loss(_answer(run, noised, text), noised, target)
    return masked_mean(per_element, batch.mask, normalize=run.config.data.masked_loss_normalize)
