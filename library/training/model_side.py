"""The model side of a run: everything that is loaded and trained, apart from the data."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.config.memory import MemoryConfig
from library.config.run import RunConfig
from library.families.protocols import ModelFamily
from library.families.stored_fp8 import stored_codes
from library.memory.block_swap import BlockSwap
from library.memory.compiling import Compiling
from library.memory.eight_bit import Matmul
from library.training.encoders import merge_base_weights
from library.training.full_model import DENOISER
from library.training.jobs import Job
from library.training.optimizers import CreatedOptimizer, create_optimizer
from library.training.placing import Carriers, load_device, place, place_trained, save_activations
from library.training.precision import Precision
from library.training.quantized_matmul import decide_matmul, rows_of
from library.training.sharding import offloads, shard
from library.training.sharding_settings import ShardingSettings
from library.training.stored_fp8 import log_fp8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSide:
    """What is trained and what trains it.

    Attributes:
        denoiser: Frozen, unless it is what is trained.
        trainable: See ``Run``.
        created: The optimizer over its parameters.
        swap: What takes trained weights to and fro between host and device; None: they stay.
        matmul: How products with eight-bit matrices are computed; None: there are none.
        compiling: Compiles the denoiser's blocks when they are first used; None: nothing does.
    """

    denoiser: nn.Module
    trainable: Any
    created: CreatedOptimizer
    swap: BlockSwap | None = None
    matmul: Matmul | None = None
    compiling: Compiling | None = None


def component_types(
    config: RunConfig, family: ModelFamily, job: Job, precision: Precision
) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """What the denoiser's weights are kept in, and those of each text encoder that is trained."""
    components = job.check(config, family)
    trained = {name: job.dtype(name, config, family, precision) for name in components if name != DENOISER}
    return job.dtype(DENOISER, config, family, precision), trained


def load_model_side(
    config: RunConfig,
    family: ModelFamily,
    job: Job,
    encoders: Mapping[str, nn.Module],
    device: torch.device,
    precision: Precision,
    *,
    seed: int,
    sharding: ShardingSettings | None = None,
    matmul: Matmul | None = None,
) -> ModelSide:
    """This loads the denoiser, and makes what is trained and its optimizer.

    Args:
        config: The run.
        family: The model's parts.
        job: What kind of training it is.
        encoders: The text encoders that the step needs, loaded already.
        device: Where the model goes.
        precision: Of the weights.
        seed: Of the run.
        sharding: How the trained weights are spread over the processes; None: each has all of them.
        matmul: How products with eight-bit matrices were computed in the run that goes on; None: it begins.
    """
    dtype, _ = component_types(config, family, job, precision)
    # the whole of a sharded model need not fit on the device
    home = load_device(config.memory, device) if sharding is None else torch.device("cpu")
    denoiser = family.load_denoiser(device=home, dtype=dtype)
    log_fp8(config, family, DENOISER, dtype, trained=True)
    merge_base_weights(config, family, {DENOISER: denoiser})
    beside = job.load(config, family, device=device, precision=precision, seed=seed)
    return assemble(
        config,
        family,
        job,
        denoiser,
        {**encoders, **beside},
        device,
        precision,
        seed=seed,
        sharding=sharding,
        optimizer_device=home if sharding is not None and offloads(sharding, device) else device,
        matmul=matmul,
    )


def assemble(
    config: RunConfig,
    family: ModelFamily,
    job: Job,
    denoiser: nn.Module,
    encoders: Mapping[str, nn.Module],
    device: torch.device,
    precision: Precision,
    *,
    seed: int,
    optimizer_device: torch.device,
    sharding: ShardingSettings | None = None,
    matmul: Matmul | None = None,
    carriers: Carriers | None = None,
) -> ModelSide:
    """This makes what is trained and its optimizer around a denoiser that is loaded.

    Args:
        config: See ``load_model_side``, as for all that isn't said here.
        family: See there.
        job: See there.
        denoiser: As it was loaded.
        encoders: See there; and what ``Job.load`` gave.
        device: See there.
        precision: See there.
        seed: See there.
        optimizer_device: The kind of device for which the optimizer is made.
        sharding: See there.
        matmul: See there.
        carriers: Take the place of the device's own.
    """
    assert config.optimizer.learning_rate is not None
    memory = config.memory
    compiling = compile_blocks(memory, family, denoiser)  # inside whatever moves weights and activations
    notes: list[str] = []
    if config.full is None:
        stored = stored_codes(family, DENOISER, denoiser) if carriers is None else None
        notes += place(memory, family, denoiser, device, carriers, stored=stored)
    rows = rows_of(config, family)
    decided = decide_matmul(memory, family, denoiser, device, rows=rows, before=matmul)
    notes += decided.notes
    trainable = job.prepare(config, family, {DENOISER: denoiser, **encoders}, seed=seed, precision=precision)
    swap = None
    if config.full is not None:
        swap, told = place_trained(memory, family, denoiser, device, precision, carriers)
        notes += told
    for blocks in (family.blocks(denoiser), job.blocks(family, trainable)):
        notes += save_activations(memory, list(blocks), device, carriers)
    if sharding is not None:
        shard(family, trainable, sharding, device)
    created = create_optimizer(
        config.optimizer.name,
        config.optimizer.optimizer_args,
        trainable.parameter_groups(config.optimizer),
        learning_rate=config.optimizer.learning_rate,
        device=optimizer_device,
    )
    for line in dict.fromkeys((*notes, *created.notes)):
        log.info(line)
    return ModelSide(denoiser, trainable, created, swap, decided.matmul, compiling)


def compile_blocks(memory: MemoryConfig, family: ModelFamily, denoiser: nn.Module) -> Compiling | None:
    """Have the denoiser's blocks compiled, if the options say so. Nothing has wrapped their ``forward`` yet."""
    if not memory.torch_compile:
        return None
    compiling = Compiling(memory.dynamo_backend, dynamic=memory.compile_dynamic, warn=log.warning)
    compiling.compile(family.blocks(denoiser))
    return compiling
