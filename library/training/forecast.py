"""What a run will take, before anything of it is loaded: memory by component and phase, operations, transfers.

The step is taken without numbers (``trial``); so are the VAE's passes. What else there is, is added up.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from library.config.dataset import DatasetConfig
from library.config.run import RunConfig
from library.data.buckets import Placement, place
from library.data.loader import AHEAD
from library.families.protocols import ModelFamily
from library.memory.allocations import Allocations
from library.memory.as_on_cuda import AsOnCuda
from library.memory.hollow import Hollow
from library.records import LatentFormat, Resolution, Sample
from library.training.full_model import DENOISER
from library.training.jobs import job_of
from library.training.precision import Precision
from library.training.trial import MicroBatchShape, Trial, try_step

CONTEXT = 1 << 29
"""Bytes for what a CUDA process takes beside tensors: its context, kernels and the libraries' workspaces."""

STEP, PICTURES, CAPTIONS, DECODING = "the step", "encoding pictures", "encoding captions", "drawing samples"
_ANY_SHAPE = tuple(Resolution(2**12 * side // 12, 2**12) for side in range(4, 37))
"""Large pictures from 1:3 to 3:1, to find the largest bucket of a dataset."""


@dataclass(frozen=True)
class Forecast:
    """What a run takes.

    Attributes:
        cuda: Whether that is of a CUDA device, or of the host.
        shape: Of the largest micro-batch.
        accumulation: Micro-batches per optimizer step.
        step: What an optimizer step takes.
        phases: What the device holds at the peak of each phase of the run, in bytes, ``CONTEXT`` apart.
        host: What waits on the host, by name, in bytes.
        unseen: What is left out, one line each.
    """

    cuda: bool
    shape: MicroBatchShape
    accumulation: int
    step: Trial
    phases: Mapping[str, int]
    host: Mapping[str, int]
    unseen: tuple[str, ...] = ()

    @property
    def context(self) -> int:
        """Bytes that are taken beside tensors."""
        return CONTEXT if self.cuda else 0

    @property
    def largest_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def peak(self) -> int:
        """The most bytes of the device that the run needs at once."""
        return self.phases[self.largest_phase] + self.context

    @property
    def rows(self) -> int:
        """Pictures per optimizer step."""
        return self.shape.rows * self.accumulation


def forecast(
    config: RunConfig,
    family: ModelFamily,
    shape: MicroBatchShape,
    precision: Precision,
    *,
    cuda: bool,
    denoiser: nn.Module | None = None,
) -> Forecast:
    """This foresees a run of one process.

    Args:
        config: The run.
        family: The model's parts.
        shape: Of the largest micro-batch.
        precision: Of the run.
        cuda: Whether it trains on a CUDA device, or on the host.
        denoiser: On the meta device, in the type that it is loaded in; by default from the model's files.
    """
    job = job_of(config)
    if denoiser is None:
        denoiser = family.load_denoiser(device="meta", dtype=job.dtype(DENOISER, config, family, precision))
    text = family.text_shapes(shape.rows).to("meta", precision.frozen)
    step = try_step(config, family, denoiser, text, shape, precision, cuda=cuda)
    phases, unseen, host = {STEP: step.peak}, [], {}
    if step.host:
        host["swapped weights and activations"] = step.host
    average = step.trained * 4 + step.trained * precision.trained.itemsize
    if config.ema.use_ema and config.ema.ema_device == "cpu":
        host["moving average"] = average
    batch = step.components.get("batch", 0) or _batch_bytes(family, text_bytes(text), shape)
    host["batches read ahead"] = batch * max(1, AHEAD * config.data.loader_workers)
    resident = step.resident
    if family_has_files(family):
        encoders = sum(family.encoder_numbers().values()) * precision.frozen.itemsize
        vae_dtype = torch.float32 if config.caching.no_half_vae else precision.frozen
        encoding, decoding, vae = _vae_peaks(config, family, shape, vae_dtype, cuda=cuda)
        if config.caching.cache_latents:
            phases[PICTURES] = encoding
            if config.sampling.sample_prompts:
                host["the VAE, for samples"] = vae
        else:
            phases = {name: size + vae for name, size in phases.items()}
            phases[PICTURES] = resident + encoding
        if config.caching.cache_text_encoder_outputs:
            phases[CAPTIONS] = encoders
        else:
            phases = {name: size + encoders for name, size in phases.items()}
            if config.trains_text_encoders:
                unseen.append("what training text encoders keeps for its backward pass, and its gradients and state")
        if config.sampling.sample_prompts:
            own = 0 if config.caching.cache_text_encoder_outputs else encoders
            phases[DECODING] = resident + own + decoding
    accumulation = config.training.gradient_accumulation_steps
    return Forecast(cuda, shape, accumulation, step, phases, host, tuple(unseen))


def family_has_files(family: ModelFamily) -> bool:
    """Whether there is more than a denoiser: a family of random weights has no files."""
    return getattr(family, "files", None) is not None
