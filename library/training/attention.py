"""The attention of a run whose options leave the choice to a measurement."""

import dataclasses
import logging

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.families.protocols import ModelFamily
from library.nn.attention import attention_function
from library.nn.attention_speed import fastest, measure_kernels
from library.training.resume_from import Resumed

log = logging.getLogger(__name__)

AUTO, TORCH = "auto", "torch"
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_attention(config: RunConfig, *, accelerator_available: bool) -> None:
    """Find out whether the attention that was chosen is there and can do what the run needs.

    Raises:
        ConfigError: It isn't, or can't.
    """
    name = config.memory.attention_backend
    attention_function(name)
    if name == "flash":
        if not accelerator_available:
            raise ConfigError("--attn_mode flash: flash-attn runs on GPUs only, and there is none; remove it")
        if config.training.mixed_precision == "no":
            raise ConfigError("--attn_mode flash computes in half precision; add --mixed_precision bf16, or remove it")


def settle_attention(
    config: RunConfig, family: ModelFamily, resumed: Resumed | None, accelerator: Accelerator
) -> RunConfig:
    """The configuration with ``--attn_mode auto`` replaced by what is fastest here.

    The choice stands in the resolved configuration and in states like a typed one, and a resumed run takes the state's:
    another kernel would compute other last digits.

    Args:
        config: Of the run.
        family: Made from it.
        resumed: The state that the run goes on from.
        accelerator: Where, and in what type.
    """
    if config.memory.attn_mode != AUTO:
        return config
    chosen = None if resumed is None else resumed.progress["settings"].get("attn_mode")
    if chosen is None:
        chosen = _measured(config, family, accelerator)
        if accelerator.num_processes > 1:
            chosen = broadcast_object_list([chosen], from_process=0)[0]
    else:
        log.info("--attn_mode auto: %s, as the state has it", chosen)
    return dataclasses.replace(config, memory=dataclasses.replace(config.memory, attn_mode=chosen))


def _measured(config: RunConfig, family: ModelFamily, accelerator: Accelerator) -> str:
    if accelerator.device.type != "cuda":
        log.info("--attn_mode auto: no accelerator, torch's own order it is")
        return TORCH
    resolution = max((dataset.resolution for dataset in config.datasets), key=lambda resolution: resolution.area)
    shape = family.attention_shape(resolution)
    taken = measure_kernels(
        shape,
        batch_size=max(dataset.batch_size for dataset in config.datasets),
        device=accelerator.device,
        dtype=_DTYPES[accelerator.mixed_precision],
    )
    chosen = fastest(taken) or TORCH
    times = ", ".join(
        f"{name} {seconds * 1000:.2f} ms" for name, seconds in sorted(taken.items(), key=lambda at: at[1])
    )
    log.info("--attn_mode auto: %s (forward and backward of one attention, %s: %s)", chosen, shape, times)
    return chosen
