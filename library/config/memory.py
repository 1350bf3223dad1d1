"""What trades time for memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from library.config.errors import ConfigError
from library.config.options import option
from library.config.sizes import AUTO, parse_count_or_auto, parse_size

FORMAT_NAMES = (
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
"""Formats of frozen matrices, as typed; what comes after a dash doesn't matter."""


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
    offload_optimizer_device: str = option(
        "none",
        "cpu: the optimizer's state waits in host memory between steps. Each weight's part comes ahead of its turn and "
        "goes back after it, beside the computation; the results are the same. Needs an optimizer that can step one "
        "weight at a time, and no fp16.",
        choices=("none", "cpu"),
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
        "For adapters and ControlNets: store the matrices of the frozen denoiser's blocks in 8 or 4 bits, with a scale "
        "per output or per 64 weights; norms, embeddings and what comes first and last stay as they are. What comes "
        "after a dash, as other tools write it, doesn't matter.",
        choices=("no_change", *FORMAT_NAMES),
        metadata_key="ss_base_model_precision",
    )
    quantize_via: str = option(
        "accelerator",
        "Where --base_model_precision and --text_encoder_1_precision are computed: block by block on the device, or on "
        "the host, which is slower.",
        choices=("accelerator", "cpu"),
    )
    quantized_matmul: str = option(
        "auto",
        "How products with matrices in int8 or fp8 are computed: dequantize makes the matrix of its codes first, 8bit "
        "rounds activations and gradients to 8 bits too, which is faster on large batches. auto measures both at the "
        "start of a run on a GPU that has the instruction, takes the faster one for each direction and says so; a "
        "resumed run goes on as it began. Text encoders are always dequantised.",
        choices=("auto", "dequantize", "8bit"),
    )
    text_encoder_1_precision: str = option(
        "no_change",
        "Store the matrices of the first text encoder, CLIP-L or Gemma, as --base_model_precision stores the "
        "denoiser's, if it isn't trained. Cached text features follow it: they are encoded anew.",
        choices=("no_change", *FORMAT_NAMES),
        metadata_key="ss_text_encoder_1_precision",
    )
    text_encoder_2_precision: str = option(
        "no_change",
        "The same for the second text encoder, CLIP-G.",
        choices=("no_change", *FORMAT_NAMES),
        metadata_key="ss_text_encoder_2_precision",
    )
    text_encoder_3_precision: str = option(
        "no_change",
        "The same for the third text encoder, T5, which is larger than SD3.5 medium.",
        choices=("no_change", *FORMAT_NAMES),
        metadata_key="ss_text_encoder_3_precision",
    )
    torch_compile: bool = option(
        False,
        "Compile the denoiser's blocks by torch.compile: the first steps take minutes, later ones less time. The "
        "numbers differ from those without it in their last digits.",
        metadata_key="ss_torch_compile",
    )
    dynamo_backend: str = option(
        "inductor",
        "With --torch_compile: what makes code of the blocks. aot_eager and eager only trace them and run torch's own "
        "kernels, to find out whether a fault is the compiler's.",
        choices=("inductor", "aot_eager", "eager"),
    )
    compile_dynamic: bool = option(
        True,
        "With --torch_compile: what is compiled serves all sizes of pictures and batches. --no-compile_dynamic "
        "compiles again for each size, for data of one or a few sizes.",
    )
    attn_mode: str = option(
        "torch",
        "Attention: torch, with the kernel that torch prefers; torch-cudnn, torch-flash or torch-efficient, with this "
        "kernel wherever it can; auto, with the one that is fastest here, measured before the first step; or a "
        "package that must be installed: xformers, or flash (flash-attn).",
        choices=("torch", "auto", "torch-cudnn", "torch-flash", "torch-efficient", "xformers", "flash"),
    )
    sdpa: bool = option(False, "Attention by torch's scaled_dot_product_attention, which is also the default.")
    xformers: bool = option(False, "Attention by xformers, which must be installed. By default torch's own.")

    def __post_init__(self) -> None:
        problems = []
        if self.sdpa and self.xformers:
            problems.append("--sdpa and --xformers exclude each other; keep one")
        older = {"--sdpa": self.sdpa and "torch", "--xformers": self.xformers and "xformers"}
        for name, same in older.items():
            if same and self.attn_mode not in ("torch", same):
                problems.append(f"{name} is the same as --attn_mode {same}, not {self.attn_mode}; keep one")
        if self.cpu_offload_checkpointing and not self.gradient_checkpointing:
            problems.append("--cpu_offload_checkpointing does nothing without --gradient_checkpointing; add it")
        if self.quantize_via != "accelerator" and not (self.base_format or self.encoder_formats):
            problems.append("--quantize_via does nothing without --base_model_precision; add it, or remove this")
        if self.quantized_matmul == "dequantize" and self.base_format in ("int4", "nf4"):
            problems.append(f"--quantized_matmul dequantize: {self.base_format} is never computed otherwise; remove it")
        if self.quantized_matmul != "auto" and self.base_format is None:
            problems.append(
                "--quantized_matmul does nothing without --base_model_precision int8 or fp8; add it, or remove this"
            )
        if self.quantized_matmul == "8bit" and self.base_format in ("int4", "nf4"):
            problems.append(
                f"--quantized_matmul 8bit: {self.base_format} has no 8-bit arithmetic; use --base_model_precision int8 "
                "or fp8, or remove this"
            )
        if self.gradient_checkpointing_interval != 1 and not self.gradient_checkpointing:
            problems.append("--gradient_checkpointing_interval does nothing without --gradient_checkpointing; add it")
        if self.gradient_checkpointing_keep_attention and not self.gradient_checkpointing:
            problems.append(
                "--gradient_checkpointing_keep_attention does nothing without --gradient_checkpointing; add it"
            )
        if self.gradient_checkpointing_keep_attention and self.torch_compile:
            problems.append(
                "--gradient_checkpointing_keep_attention looks for attention among single operations, and "
                "--torch_compile makes few of many; remove one"
            )
        if not self.torch_compile:
            for name, default in (("dynamo_backend", "inductor"), ("compile_dynamic", True)):
                if getattr(self, name) != default:
                    problems.append(f"--{name} does nothing without --torch_compile; add it, or remove this")
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
    def optimizer_state_on_host(self) -> bool:
        """Whether the optimizer's state waits on the host between steps."""
        return self.offload_optimizer_device == "cpu"

    @property
    def base_format(self) -> str | None:
        """How the frozen denoiser's matrices are stored: int8, fp8, int4 or nf4; None: as they are loaded."""
        return _format(self.base_model_precision)

    @property
    def encoder_formats(self) -> dict[int, str]:
        """How frozen text encoders' matrices are stored, by their number from 1; those that stay are left out."""
        asked = (self.text_encoder_1_precision, self.text_encoder_2_precision, self.text_encoder_3_precision)
        return {number: name for number, typed in enumerate(asked, 1) if (name := _format(typed)) is not None}

    @property
    def idle_options(self) -> tuple[str, ...]:
        """Precisions of text encoders that stay as they are: a model may have fewer of them."""
        numbers = (number for number in (1, 2, 3) if number not in self.encoder_formats)
        return tuple(f"text_encoder_{number}_precision" for number in numbers)

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
        """The name that ``library.nn.attention`` knows; until ``auto`` is settled, that is torch's own."""
        if self.xformers:
            return "xformers"
        return "sdpa" if self.attn_mode in ("torch", "auto") else self.attn_mode


def encoder_problems(memory: MemoryConfig, names: Sequence[str]) -> list[str]:
    """Precisions of text encoders that there aren't, a line each; ``names`` are those that there are."""
    return [
        f"--text_encoder_{number}_precision does nothing: this model's text encoders are {', '.join(names)}; remove it"
        for number in memory.encoder_formats
        if number > len(names)
    ]


def _format(typed: str) -> str | None:
    return None if typed == "no_change" else typed.split("-")[0]
