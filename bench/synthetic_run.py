"""A training run on random weights and random caches, set up like a real one but for the files."""

import itertools
import os
import tempfile
from dataclasses import dataclass
from importlib import import_module

import torch
from accelerate import Accelerator

from library.config.caching import CachingConfig
from library.config.captions import CaptionConfig
from library.config.data import DataConfig
from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.ema import EmaConfig
from library.config.full import FullConfig
from library.config.logging import LoggingConfig
from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.config.pictures import PictureConfig
from library.config.run import RunConfig
from library.config.sampling import SamplingConfig
from library.config.saving import SavingConfig
from library.config.training import TrainingConfig
from library.config.validation import ValidationConfig
from library.data.buckets import place
from library.data.plan import BatchPlan
from library.families import FAMILIES, family_options
from library.families.protocols import ModelFamily
from library.memory.checkpointing import enable_checkpointing
from library.records import Batch, NoisedLatents, Resolution, Sample, TensorRecord
from library.training.jobs import job_of
from library.training.losses import LossHistory
from library.training.optimizers import create_optimizer
from library.training.precision import resolve_precision
from library.training.run import Run
from library.training.schedules import create_schedule
from library.training.setup import has_accelerator
from library.training.trackers import Trackers

MANY_STEPS = 1_000_000


@dataclass
class SyntheticRun:
    """The run and a bare loop over the same model.

    Attributes:
        run: As the trainer's loop wants it.
        batch_size: Samples per step.
        tokens: Image tokens per sample.
        parameters: Of the denoiser.
        batch: What every step sees.
        plain_optimizer: The bare loop's own.
    """

    run: Run
    batch_size: int
    tokens: int
    parameters: int
    batch: Batch
    plain_optimizer: torch.optim.Optimizer

    def plain_step(self) -> None:
        """Forward, backward and AdamW, with nothing of the trainer around."""
        run, batch = self.run, self.batch
        assert batch.latents is not None and batch.text is not None
        x_0 = run.family.latents.format.normalise(batch.latents.float())
        sigma = torch.rand(len(batch), device=run.device)
        mix = sigma.view(-1, 1, 1, 1)
        noised = NoisedLatents(x_t=(1 - mix) * x_0 + mix * batch.noise, sigma=sigma)
        with run.accelerator.autocast():
            prediction = run.family.predict(run.denoiser, noised, batch.text)
        loss = ((prediction.float() - (batch.noise - x_0)) ** 2).mean()
        loss.backward()
        self.plain_optimizer.step()
        self.plain_optimizer.zero_grad(set_to_none=True)


def family_of(size: str) -> str:
    """The family that has a published size of this name.

    Raises:
        ValueError: None has it, or every one: ``tiny``.
    """
    having = {name: import_module(f"{module}.synthetic").SIZES for name, module in FAMILIES.items()}
    found = [name for name, sizes in having.items() if size in sizes]
    if len(found) != 1:
        known = ", ".join(size for sizes in having.values() for size in sizes)
        raise ValueError(f"--size {size} needs --family" if found else f"no size {size}; there are: {known}")
    return found[0]


def make_run(
    family_name: str,
    size: str,
    *,
    resolution: int,
    batch_size: int,
    rank: int,
    precision: str,
    checkpointing: bool,
    full: bool = False,
) -> SyntheticRun:
    """An adapter run, or with ``full`` a run of all weights, at a published size (or ``tiny``) of a family."""
    synthetic = import_module(f"{FAMILIES[family_name]}.synthetic")
    folder = tempfile.mkdtemp(prefix="bench-")
    config = _config(family_name, folder, resolution, batch_size, None if full else rank, precision, checkpointing)
    resolved = resolve_precision(config, accelerator_available=has_accelerator())
    accelerator = Accelerator(mixed_precision=resolved.mixed)
    device = accelerator.device
    family = synthetic.synthetic_family(size)
    job = job_of(config)
    dtype = job.dtype("denoiser", config, family, resolved)
    denoiser = synthetic.synthetic_denoiser(size, device=device, dtype=dtype)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    trainable = job.prepare(config, family, {"denoiser": denoiser}, seed=0, precision=resolved)
    trainable.to(device)
    if checkpointing:
        enable_checkpointing(list(family.blocks(denoiser)), 1)
    picture = Resolution(resolution, resolution)
    samples = [
        Sample(key=f"{row}", path="", content="", captions=("",), size=picture, dataset=0, subset=0)
        for row in range(batch_size)
    ]
    placements = [place(picture, config.datasets[0], family.latents.format.resolution_step) for _ in samples]
    groups = trainable.parameter_groups(config.optimizer)
    created = create_optimizer("AdamW", (), groups, learning_rate=1e-4, device=device)
    plain_groups = [{key: group[key] for key in ("params", "lr")} for group in groups]
    batch = _batch(family, synthetic.synthetic_text(size, batch_size, device="cpu", dtype=resolved.frozen), samples)
    run = Run(
        config=config,
        seed=0,
        job=job,
        family=family,
        accelerator=accelerator,
        plan=BatchPlan(samples, placements, config.datasets, seed=0, micro_batches_per_step=1),
        batches=(batch for _ in itertools.count()),
        denoiser=denoiser,
        trainable=trainable,
        text=synthetic.synthetic_strategy(family),
        text_encoders={},
        vae=None,
        optimizer=accelerator.prepare(created.optimizer),
        schedule=create_schedule(config.optimizer, created.optimizer, max_steps=MANY_STEPS),
        max_steps=MANY_STEPS,
        first_step=0,
        weight_dtype=resolved.frozen,
        trackers=Trackers(accelerator, os.path.join(folder, "log.jsonl"), first_step=0),
        history=LossHistory(),
        metadata={},
    )
    trainable.train()
    return SyntheticRun(
        run=run,
        batch_size=batch_size,
        tokens=family.latents.format.tokens(picture),
        parameters=parameters,
        batch=batch.to(device),
        plain_optimizer=create_optimizer("AdamW", (), plain_groups, learning_rate=1e-4, device=device).optimizer,
    )


def _batch(family: ModelFamily, text: TensorRecord, samples: list[Sample]) -> Batch:
    latent_format = family.latents.format
    shape = (len(samples), latent_format.channels, *latent_format.latent_size(samples[0].size))
    generator = torch.Generator().manual_seed(0)
    return Batch(
        keys=tuple(sample.key for sample in samples),
        visits=(0,) * len(samples),
        captions=("",) * len(samples),
        dropped=torch.zeros(len(samples), dtype=torch.bool),
        loss_weight=torch.ones(len(samples)),
        resolution=samples[0].size,
        noise=torch.randn(shape, generator=generator),
        latents=torch.randn(shape, generator=generator),
        text=text,
    )


def _config(
    family_name: str,
    folder: str,
    resolution: int,
    batch_size: int,
    rank: int | None,
    precision: str,
    checkpointing: bool,
) -> RunConfig:
    options = family_options(family_name)
    dataset = DatasetConfig(
        resolution=Resolution(resolution, resolution),
        batch_size=batch_size,
        enable_bucket=False,
        subsets=(SubsetConfig(image_dir=folder),),
    )
    return RunConfig(
        family_name=family_name,
        script="bench",
        provenance={},
        model=ModelConfig(),
        family=options.OPTIONS(),
        data=DataConfig(),
        pictures=PictureConfig(),
        captions=CaptionConfig(),
        datasets=(dataset,),
        caching=CachingConfig(cache_latents=True, cache_text_encoder_outputs=True),
        network=NetworkConfig(network_dim=rank, network_alpha=rank, network_train_unet_only=True) if rank else None,
        full=None if rank else FullConfig(),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        training=TrainingConfig(mixed_precision=precision),
        ema=EmaConfig(),
        memory=MemoryConfig(gradient_checkpointing=checkpointing),
        validation=ValidationConfig(),
        sampling=SamplingConfig(),
        saving=SavingConfig(output_dir=folder),
        logging=LoggingConfig(),
        **{name: group() for name, group in options.OBJECTIVE_GROUPS.items()},
    )
