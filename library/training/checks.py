"""What can be wrong with a run that only torch can see: found before any weight is loaded, and told all at once."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.families.protocols import ModelFamily
from library.memory.compiling import check_compiler
from library.training.attention import check_attention
from library.training.encoder_precision import check_encoder_precision
from library.training.jobs import job_of
from library.training.optimizers import create_optimizer
from library.training.precision import resolve_precision
from library.training.quantized_matmul import check_instruction, gpu_capability
from library.training.schedules import create_schedule
from library.training.sharding_settings import asked_sharding
from library.training.trackers import check_packages
from library.training.updates import check_updates


def check_run(config: RunConfig, family: ModelFamily, *, accelerator_available: bool) -> tuple[str, ...]:
    """This tries everything that needs no weights, on modules without any.

    Args:
        config: The run.
        family: Made from it.
        accelerator_available: Whether training runs on a GPU.

    Returns:
        The components that are trained.

    Raises:
        ConfigError: All that is wrong, one line each.
    """
    job = job_of(config)
    checks: tuple[Callable[[], Any], ...] = (
        lambda: resolve_precision(config, accelerator_available=accelerator_available),
        lambda: check_packages(config.logging),
        lambda: check_attention(config, accelerator_available=accelerator_available),
        lambda: _check_compiling(config, accelerator_available=accelerator_available),
        lambda: _try_optimizer(config),
        lambda: check_updates(config),
        lambda: asked_sharding(config, os.environ),
        lambda: job.check(config, family),
        lambda: check_instruction(config.memory, gpu_capability() if accelerator_available else None),
        lambda: check_encoder_precision(config.memory, family, job.check(config, family)),
        lambda: _rehearse(config, family),
    )
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return job.check(config, family)


def _check_compiling(config: RunConfig, *, accelerator_available: bool) -> None:
    if not config.memory.torch_compile:
        return
    check_compiler(config.memory.dynamo_backend, "cuda" if accelerator_available else "cpu")
    if asked_sharding(config, os.environ) is not None:
        raise ConfigError("--torch_compile doesn't go with weights that are spread over processes; remove one of them")


def _try_optimizer(config: RunConfig) -> None:
    """Make the optimizer and its schedule for a single number."""
    rate = config.optimizer.learning_rate
    assert rate is not None
    created = create_optimizer(
        config.optimizer.name,
        config.optimizer.optimizer_args,
        [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate}],
        learning_rate=rate,
        device=torch.device("cpu"),
    )
    create_schedule(config.optimizer, created.optimizer, max_steps=config.training.max_train_steps)


def _rehearse(config: RunConfig, family: ModelFamily) -> None:
    """Make what is trained on the meta device."""
    job_of(config).rehearse(config, family)
