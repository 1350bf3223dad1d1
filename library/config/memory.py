"""What trades time for memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.config.errors import ConfigError
from library.config.options import option
from library.config.sizes import AUTO, parse_count_or_auto, parse_size

_FORMATS = (
    "int8",
    "int8-quanto",
    "int8-torchao",
    "int8-bnb",
    "fp8",
    "fp8-quanto",
    "fp8-torchao",
    "int4",
    "int4-quanto",
    "int4-torchao",
    "nf4",
    "nf4-bnb",
)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory and speed."""

    fit: str | None = option(
        None,
        "Find the fastest settings whose forecast fits into this much memory of a GPU (12GiB, 11.5GiB, 24GB), or with "
        "auto into what is free of this machine's GPU; print them as options to paste, and stop without training. "
        "Options that are given stay as they are; the batch stays too.",
        metavar="SIZE",
        parse=parse_size,
    )
    gradient_checkpointing: bool = option(
        False,
        "Keep only each block's input and compute the rest again in the backward pass: far less memory, about a third "
        "more time.",
        metadata_key="ss_gradient_checkpointing",
    )
    gradient_checkpointing_interval: int = option(
        1, "Checkpoint every n-th block only: a higher n takes more memory and less time.", minimum=1
    )
    gradient_checkpointing_keep_attention: bool = option(
        False,
        "With --gradient_checkpointing: keep what attention answers, and compute only the rest again. Attention is the "
        "dear part of many tokens; a block keeps one more tensor for it. The results are the same.",
    )
    fused_backward_pass: bool = option(
        False,
        "Step each weight as soon as its gradient is there and free the gradient, so that only a few exist at a time: "
        "saves about the memory of the trained weights. The results are the same; it needs --max_grad_norm 0, no "
        "accumulation, no fp16 and one process.",
        metadata_key="ss_fused_backward_pass",
    )
    cpu_offload_checkpointing: bool = option(
        False,
        "With --gradient_checkpointing: the inputs of the blocks wait in host memory for the backward pass, and come "
        "back ahead of their turn. The results are the same.",
    )
    blocks_to_swap: int | str | None = option(
        None,
        "Relieve the device of the weights of this many blocks, up to all of them. They stay in host memory and come "
        "two blocks ahead of their turn; the results are the same. A full fine-tune needs --fused_backward_pass with "
        "it. auto takes the fewest with which the forecast fits into the GPU's free memory. By default none.",
        metavar="N",
        parse=parse_count_or_auto,
    )
    stream_modulation: bool = option(
        False,
        "For adapters on SD3 that leave modulation layers alone: compute the modulation of all blocks at the start of "
        "a pass from weights that stay in host memory, a third of the model. The results are the same.",
    )
    base_model_precision: str = option(
        "no_change",
        "For adapters: store the matrices of the frozen denoiser's blocks in 8 or 4 bits, with a scale per output or "
        "per 64 weights; norms, embeddings and what comes first and last stay as they are. What comes after a dash, as "
        "other tools write it, doesn't matter.",
        choices=("no_change", *_FORMATS),
        metadata_key="ss_base_model_precision",
    )
    quantize_via: str = option(
        "accelerator",
        "Where --base_model_precision is computed: block by block on the device, or on the host, which is slower.",
        choices=("accelerator", "cpu"),
    )
    sdpa: bool = option(False, "Attention by torch's scaled_dot_product_attention, which is also the default.")
    xformers: bool = option(False, "Attention by xformers, which must be installed. By default torch's own.")

    def __post_init__(self) -> None:
        problems = []
        if self.sdpa and self.xformers:
            problems.append("--sdpa and --xformers exclude each other; keep one")
        if self.cpu_offload_checkpointing and not self.gradient_checkpointing:
            problems.append("--cpu_offload_checkpointing does nothing without --gradient_checkpointing; add it")
        if self.quantize_via != "accelerator" and self.base_format is None:
            problems.append("--quantize_via does nothing without --base_model_precision; add it, or remove this")
        if self.gradient_checkpointing_interval != 1 and not self.gradient_checkpointing:
            problems.append("--gradient_checkpointing_interval does nothing without --gradient_checkpointing; add it")
        if self.gradient_checkpointing_keep_attention and not self.gradient_checkpointing:
            problems.append(
                "--gradient_checkpointing_keep_attention does nothing without --gradient_checkpointing; add it"
            )
        if problems:
            raise ConfigError("\n".join(problems))

    def full_model_problems(self) -> Iterator[str]:
        """What can't be done with weights that are trained, one line each."""
        asked = {"stream_modulation": self.stream_modulation, "base_model_precision": self.base_format}
        for name in (name for name, value in asked.items() if value):
            yield (
                f"--{name} is for weights that stay as they are, and a full fine-tune trains them; remove it, and see "
                "--blocks_to_swap, --fused_backward_pass and --optimizer_type CAME8bit"
            )
        if self.blocks_to_swap and not self.fused_backward_pass:
            yield (
                f"--blocks_to_swap {self.blocks_to_swap} in a full fine-tune needs --fused_backward_pass, or all "
                "gradients would wait on the device until the blocks come back to step; add --fused_backward_pass "
                "--max_grad_norm 0"
            )

    @property
    def base_format(self) -> str | None:
        """How the frozen denoiser's matrices are stored: int8, fp8, int4 or nf4; None: as they are loaded."""
        return None if self.base_model_precision == "no_change" else self.base_model_precision.split("-")[0]

    @property
    def swaps_automatically(self) -> bool:
        """Whether ``blocks_to_swap`` is still to be found."""
        return self.blocks_to_swap == AUTO

    @property
    def changes_placement(self) -> bool:
        """Whether the denoiser's weights lie elsewhere than on the device, or in fewer bits."""
        return bool(self.blocks_to_swap or self.stream_modulation or self.base_format)

    @property
    def attention_backend(self) -> str:
        """The name that ``library.nn.attention`` knows: ``sdpa`` or ``xformers``."""
        return "xformers" if self.xformers else "sdpa"
