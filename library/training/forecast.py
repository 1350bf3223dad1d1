"""What a run will take, before anything of it is loaded: memory by component and phase, operations, transfers.

The step is taken without numbers (``trial``); so are the VAE's passes. What else there is, is added up.
"""

import contextlib
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
from library.memory.hollow import hollow
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
    step_config: RunConfig | None = None,
    other: "OtherPhases | None" = None,
) -> Forecast:
    """This foresees a run of one process.

    Args:
        config: The run.
        family: The model's parts.
        shape: Of the largest micro-batch.
        precision: Of the run.
        cuda: Whether it trains on a CUDA device, or on the host.
        denoiser: On the meta device, in the type that it is loaded in; by default from the model's files.
        step_config: Of the step, where it is another: without the text encoders' training.
        other: What is known of the other phases; by default they are foreseen too.
    """
    step_config = step_config or config
    job = job_of(step_config)
    if denoiser is None:
        denoiser = family.load_denoiser(device="meta", dtype=job.dtype(DENOISER, step_config, family, precision))
    text = family.text_shapes(shape.rows).to("meta", precision.frozen)
    step = try_step(step_config, family, denoiser, text, shape, precision, cuda=cuda)
    phases, unseen, host = {STEP: step.peak}, list[str](), dict[str, int]()
    if step.host:
        host["swapped weights and activations"] = step.host
    if config.ema.use_ema and config.ema.ema_device == "cpu":
        host["moving average"] = step.trained * (torch.float32.itemsize + precision.trained.itemsize)
    host["batches read ahead"] = step.batch * max(1, AHEAD * config.data.loader_workers)
    if getattr(family, "files", None) is not None:  # else there is nothing but a denoiser of random weights
        other = other or OtherPhases.of(config, family, shape, precision, cuda=cuda)
        phases, more, unseen = other.added_to(config, step)
        host |= more
    accumulation = config.training.gradient_accumulation_steps
    return Forecast(cuda, shape, accumulation, step, phases, host, tuple(unseen))


def largest_shape(
    config: RunConfig,
    latents: LatentFormat,
    samples: Sequence[Sample] = (),
    placements: Sequence[Placement] = (),
) -> MicroBatchShape:
    """The shape of the micro-batch with the most tokens, which needs the most memory.

    Args:
        config: The run.
        latents: Of the family.
        samples: What is trained on; without any, pictures of every shape and enough of them.
        placements: One per sample.
    """
    visits: dict[tuple[int, Resolution], int] = {}
    for sample, placement in zip(samples, placements):
        key = sample.dataset, placement.bucket
        visits[key] = visits.get(key, 0) + sample.num_repeats
    if not visits:
        for number, dataset in enumerate(config.datasets):
            if dataset.role != "validation":
                for bucket in _buckets(dataset, latents):
                    visits[number, bucket] = dataset.batch_size
    shapes = [
        MicroBatchShape(min(count, config.datasets[number].batch_size), bucket)
        for (number, bucket), count in visits.items()
    ]
    return max(shapes, key=lambda shape: (shape.rows * latents.tokens(shape.resolution), shape.rows))


def _buckets(dataset: DatasetConfig, latents: LatentFormat) -> set[Resolution]:
    return {place(size, dataset, latents.resolution_step).bucket for size in _ANY_SHAPE}


@dataclass(frozen=True)
class OtherPhases:
    """What happens beside the step, in bytes.

    Attributes:
        encoding: The peak of encoding pictures, the VAE included.
        decoding: The peak of drawing a picture from latents, the VAE included.
        vae: The VAE's weights.
        encoders: The text encoders' weights.
    """

    encoding: int
    decoding: int
    vae: int
    encoders: int

    @classmethod
    def of(
        cls, config: RunConfig, family: ModelFamily, shape: MicroBatchShape, precision: Precision, *, cuda: bool
    ) -> "OtherPhases":
        """What a run does beside its steps; see ``forecast``."""
        dtype = torch.float32 if config.caching.no_half_vae else precision.frozen
        batch = config.caching.vae_batch_size if config.caching.cache_latents else shape.rows
        vae = family.load_vae(device="meta", dtype=dtype)
        native, latents = family.description.native_resolution, family.latents.format
        with Allocations("cpu", hollow) as allocations, AsOnCuda() if cuda else contextlib.nullcontext():
            vae = vae.to_empty(device="cpu")
            resident = allocations.alive
            with torch.no_grad():
                pixels = torch.empty(batch, 3, shape.resolution.height, shape.resolution.width, dtype=dtype)
                family.latents.encode(vae, pixels)
                del pixels
                encoding = allocations.peak
                if config.sampling.sample_prompts:
                    allocations.start("")
                    family.latents.decode(vae, torch.empty(1, latents.channels, *latents.latent_size(native)))
            encoders = sum(family.encoder_numbers().values()) * precision.frozen.itemsize
            return cls(encoding, allocations.peak, resident, encoders)

    def added_to(self, config: RunConfig, step: Trial) -> tuple[dict[str, int], dict[str, int], list[str]]:
        """The peaks of all phases on the device, what waits on the host, and what isn't seen."""
        caches_text, caches_latents = config.caching.cache_text_encoder_outputs, config.caching.cache_latents
        beside = (0 if caches_text else self.encoders) + (0 if caches_latents else self.vae)
        phases = {STEP: step.peak + beside}
        phases[PICTURES] = self.encoding + (0 if caches_latents else step.resident + beside - self.vae)
        if caches_text:
            phases[CAPTIONS] = self.encoders
        host, unseen = {}, []
        if config.sampling.sample_prompts:
            phases[DECODING] = step.resident + beside - (0 if caches_latents else self.vae) + self.decoding
            if caches_latents:
                host["the VAE, for samples"] = self.vae
        if config.trains_text_encoders:
            unseen.append("the gradients, activations and optimizer state of text encoders that are trained")
        return phases, host, unseen
