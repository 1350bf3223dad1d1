"""Whether the host has room for what waits there, found out before anything is loaded."""

import logging
import os

import psutil  # accelerate needs it, too
import torch

from library.config.errors import ConfigError
from library.config.memory import MemoryConfig
from library.config.run import RunConfig
from library.data.report_lines import amount
from library.families.protocols import ModelFamily
from library.training.before_start import NotForeseen, foresee
from library.training.forecast import largest_shape
from library.training.precision import Precision

log = logging.getLogger(__name__)


def check_host_memory(
    config: RunConfig, family: ModelFamily, precision: Precision, device: torch.device, *, available: int | None = None
) -> None:
    """Find out whether weights, activations and optimizer state that wait in page-locked memory fit into it.

    What the system would swap to disk for other memory, it can't for this: without room it stops processes.

    Args:
        config: The run.
        family: The model's parts.
        precision: Of the run.
        device: Where it trains; on the host nothing waits.
        available: Bytes; by default what this machine has.

    Raises:
        ConfigError: They don't fit.
    """
    asking = waiting_options(config.memory)
    if device.type != "cuda" or not asking:
        return
    try:
        needed = foresee(config, family, largest_shape(config, family.latents.format), precision, cuda=True).step.host
    except NotForeseen as told:
        log.info("whether host memory suffices for %s can't be foreseen (%s)", " and ".join(asking), told)
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = psutil.virtual_memory().available if available is None else available
    if needed * processes > available:
        of_all = f" in each of {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"{' and '.join(asking)} would keep {amount(needed)} in host memory{of_all}, and {amount(available)} are "
            "free; swap fewer blocks, store weights in fewer bits (--base_model_precision), or close other programs"
        )


def waiting_options(memory: MemoryConfig) -> list[str]:
    """The given options that let something wait in page-locked memory."""
    given = {
        "--blocks_to_swap": memory.blocks_to_swap,
        "--stream_modulation": memory.stream_modulation,
        "--cpu_offload_checkpointing": memory.cpu_offload_checkpointing,
        "--offload_optimizer_device cpu": memory.optimizer_state_on_host,
    }
    return [name for name, value in given.items() if value]
