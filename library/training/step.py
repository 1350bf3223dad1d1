"""One micro-batch to its share of the optimizer step's loss: training's and validation's."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.randomness import Draws, seed_for
from library.records import Batch, TensorRecord
from library.training.run import Run


@dataclass(frozen=True)
class MicroBatchLoss:
    """What one micro-batch contributes.

    Attributes:
        loss: Its share of the step's loss, for ``backward``: ().
        per_sample: Weighted loss of each sample (B,), detached.
    """

    loss: Tensor
    per_sample: Tensor


def training_loss(run: Run, batch: Batch, *, step_samples: int) -> MicroBatchLoss:
    """The loss of a training micro-batch, as its share of a step over ``step_samples`` samples.

    The shares of all micro-batches of a step sum to the mean over its samples, however it is split.
    """
    draws = Draws(run.seed, batch.keys, batch.visits)
    # What torch draws inside the step (adapter dropout) follows the samples, not how often a generator was called.
    torch.manual_seed(seed_for(run.seed, "step", batch.keys[0], batch.visits[0]))
    return _loss(run, batch, draws, draws.uniform("sigma"), step_samples=step_samples, training=True)


@torch.no_grad()
def validation_loss(run: Run, batch: Batch, quantile: float, *, seed: int) -> Tensor:
    """Loss per sample (B,) at one fixed quantile of the training noise levels, with fixed noise and no augmentation."""
    draws = Draws(seed, batch.keys, batch.visits)
    uniform = torch.full((len(batch),), quantile, dtype=torch.float64)
    return _loss(run, batch, draws, uniform, step_samples=len(batch), training=False).per_sample


def _loss(
    run: Run, batch: Batch, draws: Draws, uniform: Tensor, *, step_samples: int, training: bool
) -> MicroBatchLoss:
    family, latent_format = run.family, run.family.latents.format
    batch = batch.to(run.device)
    x_0 = clean_latents(run, batch)  # (B, C, h, w)
    text = conditioning(run, batch, training=training)
    if training:
        text = family.augment(text, draws, latent_format.latent_size(batch.resolution))
    tokens = latent_format.tokens(batch.resolution)
    sigma = family.objective.sigmas(uniform, tokens=tokens).to(run.device)  # (B,)
    noised = family.objective.add_noise(x_0, batch.noise, sigma)
    with run.accelerator.autocast():
        prediction = family.predict(run.denoiser, noised, text)  # (B, C, h, w)
    per_element = family.objective.loss(prediction.float(), noised)
    if batch.mask is not None:
        per_element = per_element * batch.mask
    per_sample = per_element.mean(dim=(1, 2, 3)) * batch.loss_weight
    return MicroBatchLoss(per_sample.sum() / step_samples, per_sample.detach())


def clean_latents(run: Run, batch: Batch) -> Tensor:
    """Normalised latents (B, C, h, w), fp32; this is the only place where latents are normalised."""
    raw = batch.latents
    if raw is None:
        assert run.vae is not None and batch.pixels is not None
        with torch.no_grad():
            vae_dtype = next(run.vae.parameters()).dtype
            raw = run.family.latents.encode(run.vae, batch.pixels.to(vae_dtype))
    return run.family.latents.format.normalise(raw.float())


def conditioning(run: Run, batch: Batch, *, training: bool) -> TensorRecord:
    """Text features of the batch: cached, or from the encoders; dropped captions are unconditional."""
    text = batch.text
    if text is None:
        assert batch.tokens is not None
        gradients: Any = contextlib.nullcontext() if training and run.trains_text_encoders else torch.no_grad()
        with gradients, run.accelerator.autocast():
            text = run.text.encode(run.text_encoders, batch.tokens)
    return run.text.drop(text, batch.dropped)
