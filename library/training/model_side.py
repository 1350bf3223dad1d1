"""The model side of a run: everything that is loaded and trained, apart from the data."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.config.run import RunConfig
from library.families.protocols import ModelFamily
from library.families.stored_fp8 import stored_codes
from library.memory.eight_bit import Matmul
from library.training.encoders import merge_base_weights
from library.training.full_model import DENOISER
from library.training.jobs import Job
from library.training.optimizers import CreatedOptimizer, create_optimizer
from library.training.placing import load_device, place, save_activations
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
        matmul: How products with eight-bit matrices are computed; None: there are none.
    """

    denoiser: nn.Module
    trainable: Any
    created: CreatedOptimizer
    matmul: Matmul | None = None


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
    assert config.optimizer.learning_rate is not None
    dtype, _ = component_types(config, family, job, precision)
    # the whole of a sharded model need not fit on the device
    home = load_device(config.memory, device) if sharding is None else torch.device("cpu")
    denoiser = family.load_denoiser(device=home, dtype=dtype)
    log_fp8(config, family, DENOISER, dtype, trained=True)
    merge_base_weights(config, family, {DENOISER: denoiser})
    notes = place(config.memory, family, denoiser, device, stored=stored_codes(family, DENOISER, denoiser))
    rows = rows_of(config, family)
    decided = decide_matmul(config.memory, family, denoiser, device, rows=rows, before=matmul)
    notes += decided.notes
    trainable = job.prepare(config, family, {DENOISER: denoiser, **encoders}, seed=seed, precision=precision)
    notes += save_activations(config.memory, list(family.blocks(denoiser)), device)
    if sharding is not None:
        shard(family, trainable, sharding, device)
    created = create_optimizer(
        config.optimizer.name,
        config.optimizer.optimizer_args,
        trainable.parameter_groups(config.optimizer),
        learning_rate=config.optimizer.learning_rate,
        device=home if sharding is not None and offloads(sharding, device) else device,
    )
    for line in (*notes, *created.notes):
        log.info(line)
    return ModelSide(denoiser, trainable, created, decided.matmul)
