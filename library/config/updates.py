"""What contradicts stepping one weight at a time, which several options do."""

from collections.abc import Iterator

from library.config.memory import MemoryConfig
from library.config.optimizer import OptimizerConfig
from library.config.training import TrainingConfig


def single_step_options(training: TrainingConfig, memory: MemoryConfig) -> tuple[str, ...]:
    """The given options that step one weight at a time."""
    given = {
        "fused_backward_pass": memory.fused_backward_pass,
        "stochastic_rounding": training.stochastic_rounding,
        "kahan_summation": training.kahan_summation,
        "offload_optimizer_device": memory.optimizer_state_on_host,
    }
    return tuple(name for name, value in given.items() if value)


def update_problems(optimizer: OptimizerConfig, training: TrainingConfig, memory: MemoryConfig) -> Iterator[str]:
    """Every contradiction, one line each."""
    if optimizer.over_all_parameters is not None:
        for name in single_step_options(training, memory):
            yield (
                f"--{name} steps one weight at a time, but {optimizer.name} {optimizer.over_all_parameters}; remove "
                "it, or use an optimizer such as AdamW or CAME"
            )
    if memory.optimizer_state_on_host:
        yield from _offload_problems(optimizer, training)
    if memory.fused_backward_pass:
        yield from _fused_backward_problems(optimizer, training)


def _offload_problems(optimizer: OptimizerConfig, training: TrainingConfig) -> Iterator[str]:
    if optimizer.name.rpartition(".")[2].startswith("Paged"):
        yield (
            f"--offload_optimizer_device cpu does nothing with {optimizer.name}, whose paged state goes to the host by "
            "itself; remove one"
        )
    if training.mixed_precision == "fp16":
        yield (
            "--mixed_precision fp16 scales the loss and drops whole steps, but --offload_optimizer_device cpu steps "
            "one weight at a time; use --mixed_precision bf16, or remove one"
        )


def _fused_backward_problems(optimizer: OptimizerConfig, training: TrainingConfig) -> Iterator[str]:
    if training.gradient_accumulation_steps > 1:
        yield (
            "--fused_backward_pass uses up each gradient at once, so --gradient_accumulation_steps "
            f"{training.gradient_accumulation_steps} finds none to add to; remove one"
        )
    if optimizer.max_grad_norm:
        yield (
            f"--max_grad_norm {optimizer.max_grad_norm:g} needs the norm of all gradients before the first step, and "
            "--fused_backward_pass never has them together; add --max_grad_norm 0 (the norm is logged all the same)"
        )
    if training.mixed_precision == "fp16":
        yield (
            "--mixed_precision fp16 scales the loss and drops whole steps, but --fused_backward_pass has stepped the "
            "first weights when it finds out; use --mixed_precision bf16, or remove one"
        )
