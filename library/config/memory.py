"""What trades time for memory."""

from dataclasses import dataclass

from library.config.errors import ConfigError
from library.config.options import option


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory and speed."""

    gradient_checkpointing: bool = option(
        False,
        "Keep only each block's input and compute the rest again in the backward pass: far less memory, about a third "
        "more time.",
        metadata_key="ss_gradient_checkpointing",
    )
    gradient_checkpointing_interval: int = option(
        1, "Checkpoint every n-th block only: a higher n takes more memory and less time.", minimum=1
    )
    fused_backward_pass: bool = option(
        False,
        "Step each weight as soon as its gradient is there and free the gradient, so that only a few exist at a time: "
        "saves about the memory of the trained weights. The results are the same; it needs --max_grad_norm 0, no "
        "accumulation, no fp16 and one process.",
        metadata_key="ss_fused_backward_pass",
    )
    blocks_to_swap: int | None = option(
        None,
        "Keep this many blocks of the denoiser off the device and bring each when it is needed. By default none. Not "
        "available yet; use --gradient_checkpointing.",
        minimum=0,
    )
    sdpa: bool = option(False, "Attention by torch's scaled_dot_product_attention, which is also the default.")
    xformers: bool = option(False, "Attention by xformers, which must be installed. By default torch's own.")

    def __post_init__(self) -> None:
        problems = []
        if self.sdpa and self.xformers:
            problems.append("--sdpa and --xformers exclude each other; keep one")
        if self.gradient_checkpointing_interval != 1 and not self.gradient_checkpointing:
            problems.append("--gradient_checkpointing_interval does nothing without --gradient_checkpointing; add it")
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def attention_backend(self) -> str:
        """The name that ``library.nn.attention`` knows: ``sdpa`` or ``xformers``."""
        return "xformers" if self.xformers else "sdpa"
