"""What the machine makes of the precision and memory options: decided once, said in the log."""

from dataclasses import dataclass

import torch

from library.config.errors import ConfigError
from library.config.run import RunConfig


@dataclass(frozen=True)
class Precision:
    """How numbers are kept and computed.

    Attributes:
        mixed: accelerate's ``mixed_precision``: ``no``, ``fp16`` or ``bf16``.
        frozen: Type of the frozen weights.
        trained: Type of the trained weights.
        notes: What was decided for the user, one line each.
    """

    mixed: str
    frozen: torch.dtype
    trained: torch.dtype
    notes: tuple[str, ...] = ()


def resolve_precision(config: RunConfig, *, accelerator_available: bool) -> Precision:
    """Precision for this machine.

    Raises:
        ConfigError: The machine lacks what was asked for.
    """
    asked, notes = config.training.mixed_precision, []
    mixed = asked
    if not accelerator_available and asked == "fp16":
        mixed = "no"
        notes.append("no accelerator: --mixed_precision fp16 computes in fp32 here; CPUs have no fast fp16")
    if accelerator_available and asked == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError("--mixed_precision bf16: this GPU has no bf16; use --mixed_precision fp16")
    dtypes = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    trained = torch.float32
    if config.training.full_bf16:
        trained = torch.bfloat16
    elif config.training.full_fp16 and mixed == "fp16":
        trained = torch.float16
    elif config.training.full_fp16:
        notes.append("no accelerator: --full_fp16 keeps the trained weights in fp32 here")
    return Precision(mixed, dtypes[mixed], trained, tuple(notes))
