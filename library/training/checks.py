"""What can be wrong with a run that only torch can see: found before any weight is loaded, and told all at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.families.protocols import ModelFamily
from library.nn.attention import attention_function
from library.training.checkpoints import refuse_other_adapter
from library.training.optimizers import create_optimizer
from library.training.precision import resolve_block_swap, resolve_precision
from library.training.schedules import create_schedule
from library.training.trackers import check_packages
from library.training.updates import check_updates
from networks.loading import (
    adapter_components,
    check_network,
    create_network,
    layers_by_name,
    match_layers,
    read_adapter,
)
from networks.targeting import DENOISER


def check_run(config: RunConfig, family: ModelFamily, *, accelerator_available: bool) -> tuple[str, ...]:
    """This tries everything that needs no weights, on modules without any.

    Args:
        config: The run.
        family: Made from it.
        accelerator_available: Whether training runs on a GPU.

    Returns:
        The components that get an adapter.

    Raises:
        ConfigError: All that is wrong, one line each.
    """
    assert config.network is not None
    network = config.network
    checks: tuple[Callable[[], Any], ...] = (
        lambda: resolve_precision(config, accelerator_available=accelerator_available),
        lambda: check_packages(config.logging),
        lambda: attention_function(config.memory.attention_backend),
        lambda: _try_optimizer(config),
        lambda: check_updates(config),
        lambda: check_network(network, config.optimizer, family.adapter_targets),
        lambda: _try_adapter(config, family, accelerator_available=accelerator_available),
    )
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return check_network(network, config.optimizer, family.adapter_targets)


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


def _try_adapter(config: RunConfig, family: ModelFamily, *, accelerator_available: bool) -> None:
    """Merge and inject the adapters on the meta device, where modules have shapes and no weights."""
    assert config.network is not None
    targets = family.adapter_targets
    denoiser = family.load_denoiser(device="meta", dtype=torch.float32)
    changed = set(check_network(config.network, config.optimizer, targets))
    changed = changed.union(*(adapter_components(path, targets) for path in config.network.base_weights))
    roots = {DENOISER: denoiser}
    if changed - {DENOISER}:  # transformers' modules take seconds to import
        roots |= family.load_text_encoders(device="meta", dtype=torch.float32)
    resolve_block_swap(config, len(family.blocks(denoiser)), accelerator_available=accelerator_available)
    for path in config.network.base_weights:
        match_layers(read_adapter(path, targets), layers_by_name(roots, targets), roots, targets, path, partial=True)
    network = create_network(config, roots, targets, run_seed=0)
    if config.training.resume:
        refuse_other_adapter(config.training.resume, network)
