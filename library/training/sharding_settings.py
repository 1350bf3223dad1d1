"""How accelerate's configuration asks for the model to be spread over processes.

accelerate's own FSDP and DeepSpeed ignore a CPU and a model that they didn't prepare. So their settings are read here,
and ``library.training.sharding`` does the work with torch alone.
"""

import json
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.training.optimizers import OPTIMIZERS

ELEMENTWISE = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
"""Optimizers of ``torch.optim`` that change each number by itself: a part of a weight is as good as the whole."""

_STRATEGIES = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD", "5": "HYBRID_SHARD_ZERO2"}
_UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


@dataclass(frozen=True)
class ShardingSettings:
    """How a model is spread over processes.

    Attributes:
        asked_by: What asks for it, for messages.
        reshard_after_forward: Whether weights are gathered again for the backward pass, or kept from the forward pass.
        offload: Whether weights, gradients and the optimizer wait in host memory.
        notes: What the user should know, one line each.
    """

    asked_by: str
    reshard_after_forward: bool
    offload: bool
    notes: tuple[str, ...] = ()


def asked_sharding(config: RunConfig, environment: Mapping[str, str]) -> ShardingSettings | None:
    """What accelerate's configuration, which its launcher puts into the environment, asks for; None: whole models.

    Raises:
        ConfigError: It can't be done, or not with this run's options: all that is wrong, one line each.
    """
    for variable, name in _UNSUPPORTED.items():
        if _is_true(environment.get(variable)):
            raise ConfigError(f"accelerate's configuration asks for {name}, which is not supported; use FSDP")
    if _is_true(environment.get("ACCELERATE_USE_FSDP")):
        settings, problems = _fsdp(environment)
    elif _is_true(environment.get("ACCELERATE_USE_DEEPSPEED")):
        settings, problems = _deepspeed(config, environment)
    else:
        return None
    problems += _misfits(config, settings.asked_by)
    if problems:
        raise ConfigError("\n".join(problems))
    return settings


def forget_plugins(environment: MutableMapping[str, str]) -> None:
    """Keep accelerate from acting on what was read here.

    It would import DeepSpeed, and divide each loss by the accumulation that DeepSpeed's configuration names.
    """
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        environment.pop(name, None)


def _misfits(config: RunConfig, asked_by: str) -> list[str]:
    """What of a run's options a sharded model can't do."""
    if config.full is None:
        what = "an adapter is small" if config.network is not None else "a ControlNet is half a model"
        return [
            f"accelerate's configuration asks for {asked_by}, but {what} and its base model isn't "
            "trained: use plain data parallelism (accelerate launch --multi_gpu, or torchrun)"
        ]
    problems = []
    module, _, name = config.optimizer.name.rpartition(".")
    if name.lower() in OPTIMIZERS and not module:
        module, name, _ = OPTIMIZERS[name.lower()]
    if module != "torch.optim" or name not in ELEMENTWISE:
        problems.append(
            f"--optimizer_type {config.optimizer.name}: with {asked_by} each process has a part of every weight, and "
            "this optimizer may need the whole; use AdamW, or plain data parallelism"
        )
    if config.memory.fused_backward_pass:
        problems.append(f"--fused_backward_pass works in one process; {asked_by} shares gradients anyway; remove it")
    if config.training.stochastic_rounding:
        problems.append(
            f"--stochastic_rounding draws for whole weights, and with {asked_by} each process has a part of them; "
            "remove it"
        )
    if config.training.kahan_summation:
        problems.append(
            f"--kahan_summation keeps the rests of whole weights, and with {asked_by} each process has a part of them; "
            "remove it"
        )
    if config.memory.optimizer_state_on_host:
        problems.append(
            f"--offload_optimizer_device cpu moves whole states, and with {asked_by} each process has a part of them; "
            "remove it, and let accelerate's configuration offload"
        )
    if config.sampling.preview_every is not None:
        problems.append(
            f"--preview_every writes while a picture is made, and with {asked_by} the others would wait forever "
            "if that failed; remove it"
        )
    if config.training.mixed_precision == "fp16":
        problems.append(f"--mixed_precision fp16 scales the loss, which {asked_by} doesn't do; use bf16")
    return problems


def _fsdp(environment: Mapping[str, str]) -> tuple[ShardingSettings, list[str]]:
    version, notes, problems = environment.get("FSDP_VERSION", "1"), [], []
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "")
    if version == "2":
        gathers_again = reshard.lower() not in ("false", "0", "no")
    else:
        notes.append("accelerate's configuration asks for FSDP version 1; version 2 is used, which computes the same")
        strategy = environment.get("FSDP_SHARDING_STRATEGY") or reshard
        strategy = _STRATEGIES.get(strategy, strategy).upper()
        gathers_again = strategy != "SHARD_GRAD_OP"
        if strategy == "NO_SHARD":
            problems.append("FSDP's NO_SHARD is plain data parallelism; use accelerate launch --multi_gpu, or torchrun")
        elif strategy.startswith("HYBRID"):
            problems.append(f"FSDP's {strategy} is not supported; use FULL_SHARD or SHARD_GRAD_OP")
    if _is_true(environment.get("FSDP_ACTIVATION_CHECKPOINTING")):
        problems.append("FSDP's activation checkpointing is this program's --gradient_checkpointing; turn it off there")
    if ignored := environment.get("FSDP_IGNORED_MODULES"):
        problems.append(f"FSDP's ignored modules ({ignored}) are not supported; remove them")
    offload = _is_true(environment.get("FSDP_OFFLOAD_PARAMS"))
    return ShardingSettings("FSDP", gathers_again, offload, tuple(notes)), problems


def _deepspeed(config: RunConfig, environment: Mapping[str, str]) -> tuple[ShardingSettings, list[str]]:
    written = _deepspeed_file(environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""))
    zero = written.get("zero_optimization", {})
    stage = str(zero.get("stage", environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    problems = []
    if stage not in ("1", "2", "3"):
        problems.append(f"DeepSpeed's ZeRO stage {stage} spreads nothing; use stage 2, or plain --multi_gpu")
    offload = False
    for part in ("optimizer", "param"):
        device = zero.get(f"offload_{part}", {}).get("device") or environment.get(
            f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none"
        )
        offload = offload or device == "cpu"
        if device not in ("none", "cpu"):
            problems.append(f"DeepSpeed's offload_{part} to {device} is not supported; use cpu or none")
    problems += _disagreements(config, environment, written)
    name = f"DeepSpeed ZeRO-{stage}"
    honoured = f"weights {'gathered again for' if stage == '3' else 'kept until'} the backward pass"
    honoured += ", offload to the CPU" if offload else ""
    note = f"{name}: torch's fully_shard does this work, DeepSpeed isn't needed; honoured are the stage ({honoured}), "
    note += "gradient clipping and accumulation, which must agree with this program's options"
    return ShardingSettings(name, stage == "3", offload, (note,)), problems


def _deepspeed_file(path: str) -> dict[str, Any]:
    if not path or path == "none":
        return {}
    try:
        written = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed's configuration {path} can't be read ({error}); give a JSON file") from None
    if not isinstance(written, dict) or not isinstance(written.get("zero_optimization", {}), dict):
        raise ConfigError(f"DeepSpeed's configuration {path} is no table of settings; give DeepSpeed's JSON file")
    return written


def _disagreements(config: RunConfig, environment: Mapping[str, str], written: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed's configuration says otherwise than this run's options."""
    agreed = (
        ("gradient_clipping", "ACCELERATE_GRADIENT_CLIPPING", "max_grad_norm", config.optimizer.max_grad_norm),
        (
            "gradient_accumulation_steps",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "gradient_accumulation_steps",
            config.training.gradient_accumulation_steps,
        ),
    )
    for key, variable, option, own in agreed:
        theirs = str(written.get(key, environment.get(variable, "auto")))
        if theirs.lower() not in ("auto", "none", "") and not _equal_numbers(theirs, own):
            yield f"DeepSpeed's {key} is {theirs} and --{option} is {own}; let them agree, or write auto"
    sizes = {dataset.batch_size for dataset in config.datasets}
    size = written.get("train_micro_batch_size_per_gpu", "auto")
    if size != "auto" and sizes != {size}:
        listed = ", ".join(map(str, sorted(sizes)))
        yield f"DeepSpeed's train_micro_batch_size_per_gpu is {size}, the datasets' batch_size {listed}; write auto"
    for section, option in (("optimizer", "--optimizer_type"), ("scheduler", "--lr_scheduler")):
        if section in written:
            yield f"DeepSpeed's {section} is not used: {option} decides; remove the section {section}"


def _equal_numbers(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False


def _is_true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "y", "on")
