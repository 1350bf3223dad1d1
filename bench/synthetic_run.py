"""A training run on random weights and random caches, set up like a real one but for the files."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator

from library.config.caching import CachingConfig
from library.config.captions import CaptionConfig
from library.config.data import DataConfig
from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.ema import EmaConfig
from library.config.errors import ConfigError
from library.config.full import FullConfig
from library.config.logging import LoggingConfig
from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.config.options import DEFAULT, option_values
from library.config.pictures import PictureConfig
from library.config.run import RunConfig
from library.config.sampling import SamplingConfig
from library.config.saving import SavingConfig
from library.config.training import TrainingConfig
from library.config.validation import ValidationConfig
from library.families import FAMILIES, family_options
from library.memory.allocations import Allocations
from library.memory.plain_transfers import Traffic
from library.records import Batch, NoisedLatents, Resolution, TensorRecord
from library.training.jobs import job_of
from library.training.model_side import assemble
from library.training.optimizers import create_optimizer
from library.training.placing import load_device
from library.training.precision import resolve_precision
from library.training.run import Run
from library.training.setup import has_accelerator
from library.training.trial import (
    MicroBatchShape,
    Trial,
    batch_tensors,
    hollow_batch,
    plain_carriers,
    trial_run,
    try_step,
)
from library.training.updates import prepare_updates

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
        forecast: What the trainer foresees for a step.
    """

    run: Run
    batch_size: int
    tokens: int
    parameters: int
    batch: Batch
    plain_optimizer: torch.optim.Optimizer
    forecast: Trial

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


def block_count(family: str, size: str) -> int:
    """How many blocks a family's model of this size has."""
    synthetic = import_module(f"{FAMILIES[family]}.synthetic")
    return len(synthetic.synthetic_family(size).blocks(synthetic.meta_denoiser(synthetic.SIZES[size])))


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        family: Its name.
        size: A published size of it, or ``tiny``.
        resolution: Pixels per side.
        batch_size: Samples per step.
        rank: Of the adapter; None: all weights are trained.
        precision: ``--mixed_precision``.
        memory: The options of memory and speed.
        training: The options of training.
        optimizer: ``--optimizer_type``.
        optimizer_args: ``--optimizer_args``.
        network_args: ``--network_args``.
    """

    family: str
    size: str
    resolution: int
    batch_size: int
    rank: int | None
    precision: str
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: str = "AdamW"
    optimizer_args: Sequence[str] = ()
    network_args: Sequence[str] = ()

    @property
    def config(self) -> RunConfig:
        """The trainer's configuration.

        Raises:
            ConfigError: Options exclude each other.
        """
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:  # there while it is checked; nothing is written
            config = _config(self, folder)
            config = replace(config, provenance={declared.name: DEFAULT for declared, _ in option_values(config)})
            if problems := config.problems():
                raise ConfigError("\n".join(problems))
        return config

    @property
    def shape(self) -> MicroBatchShape:
        """Of the micro-batch."""
        return MicroBatchShape(self.batch_size, Resolution(self.resolution, self.resolution))


def foresee(setting: Setting, *, cuda: bool, moves: bool | None = None) -> Trial:
    """What the trainer foresees for a step; see ``try_step``."""
    config = setting.config
    synthetic = import_module(f"{FAMILIES[setting.family]}.synthetic")
    precision = resolve_precision(config, accelerator_available=cuda)
    family = synthetic.synthetic_family(setting.size)
    dtype = job_of(config).dtype("denoiser", config, family, precision)
    denoiser = synthetic.meta_denoiser(synthetic.SIZES[setting.size]).to(dtype)
    text = synthetic.synthetic_text(setting.size, setting.batch_size, device="cpu", dtype=precision.frozen)
    return try_step(config, family, denoiser, text, setting.shape, precision, cuda=cuda, moves=moves)


def make_run(setting: Setting, allocations: Allocations, traffic: Traffic) -> SyntheticRun:
    """A run placed as the trainer places it.

    On the host, weights and activations travel by plain copies between memory that counts as the device's and memory
    that doesn't.

    Args:
        setting: What is run.
        allocations: Counts what is made here.
        traffic: Counts what travels on the host.
    """
    config = setting.config
    synthetic = import_module(f"{FAMILIES[setting.family]}.synthetic")
    resolved = resolve_precision(config, accelerator_available=has_accelerator())
    accelerator = Accelerator(mixed_precision=resolved.mixed)
    device, on_host = accelerator.device, accelerator.device.type == "cpu"
    forecast = foresee(setting, cuda=not on_host, moves=True)
    family = synthetic.synthetic_family(setting.size)
    job = job_of(config)
    dtype = job.dtype("denoiser", config, family, resolved)
    text = synthetic.synthetic_text(setting.size, setting.batch_size, device="cpu", dtype=resolved.frozen)
    carriers = plain_carriers(allocations, traffic) if on_host else None
    with allocations:
        home = load_device(config.memory, device)
        denoiser = synthetic.synthetic_denoiser(setting.size, device=home, dtype=dtype)
        parameters = sum(parameter.numel() for parameter in denoiser.parameters())
        side = assemble(
            config,
            family,
            job,
            denoiser,
            {},
            device,
            resolved,
            seed=0,
            optimizer_device=device,
            carriers=carriers,
        )
        batch = _random_batch(hollow_batch(family, text, setting.shape), text).to(device)
        allocations.add(batch_tensors(batch))
        run = trial_run(config, family, side, accelerator, setting.shape, batch, resolved)
        run.optimizer = accelerator.prepare(side.created.optimizer)
        prepare_updates(run, carriers)
    run.trainable.train()
    plain_groups = [
        {key: group[key] for key in ("params", "lr")} for group in side.trainable.parameter_groups(config.optimizer)
    ]
    return SyntheticRun(
        run=run,
        batch_size=setting.batch_size,
        tokens=family.latents.format.tokens(setting.shape.resolution),
        parameters=parameters,
        batch=batch,
        plain_optimizer=create_optimizer("AdamW", (), plain_groups, learning_rate=1e-4, device=device).optimizer,
        forecast=forecast,
    )


def _random_batch(batch: Batch, text: TensorRecord) -> Batch:
    generator = torch.Generator().manual_seed(0)
    noise, latents = (torch.randn(batch.noise.shape, generator=generator) for _ in range(2))
    return replace(batch, noise=noise, latents=latents, text=text)


def _config(setting: Setting, folder: str) -> RunConfig:
    options = family_options(setting.family)
    dataset = DatasetConfig(
        resolution=setting.shape.resolution,
        batch_size=setting.batch_size,
        enable_bucket=False,
        subsets=(SubsetConfig(image_dir=folder),),
    )
    clipping: dict[str, Any] = {"max_grad_norm": 0.0} if setting.memory.fused_backward_pass else {}
    rank = setting.rank
    network = None
    if rank is not None:
        network = NetworkConfig(
            network_dim=rank,
            network_alpha=rank,
            network_train_unet_only=True,
            network_args=tuple(setting.network_args),
        )
    return RunConfig(
        family_name=setting.family,
        script="bench",
        provenance={},
        model=ModelConfig(),
        family=options.OPTIONS(),
        data=DataConfig(),
        pictures=PictureConfig(),
        captions=CaptionConfig(),
        datasets=(dataset,),
        caching=CachingConfig(cache_latents=True, cache_text_encoder_outputs=True),
        network=network,
        full=None if rank is not None else FullConfig(),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            optimizer_type=setting.optimizer,
            optimizer_args=tuple(setting.optimizer_args),
            **clipping,
        ),
        training=replace(setting.training, mixed_precision=setting.precision, max_train_steps=MANY_STEPS),
        ema=EmaConfig(),
        memory=setting.memory,
        validation=ValidationConfig(),
        sampling=SamplingConfig(),
        saving=SavingConfig(output_dir=folder),
        logging=LoggingConfig(),
        **{name: group() for name, group in options.OBJECTIVE_GROUPS.items()},
    )
