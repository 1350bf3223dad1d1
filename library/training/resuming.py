"""Whether a configuration goes on with the run that a state was saved from."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from library.config.errors import ConfigError
from library.config.options import Option, option_values
from library.config.run import RunConfig
from library.training.data_summary import data_changes
from library.training.resume_from import Resumed

# What may change: it acts from here on, and what was done before is as if it had always been so.
_FREE_GROUPS = {"model", "validation", "sampling", "saving", "logging"}
_FREE_OPTIONS = {
    *("learning_rate", "unet_lr", "text_encoder_lr", "lr_decay_steps"),
    *("save_format", "save_parts", "network_weights", "controlnet_model_name_or_path"),
    *("max_train_steps", "max_train_epochs", "max_train_seconds", "ddp_timeout"),
    *("gradient_accumulation_steps", "resume", "resume_anyway", "seed"),  # steps and the seed are compared themselves
    *("ema_device", "ema_validation", "ema_save_raw"),
    *("max_data_loader_n_workers", "persistent_data_loader_workers"),
    *("skip_bad_images", "report_near_duplicates", "masked_loss"),
    *("dataset_config", "train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir"),
    *("clip_l", "clip_g", "t5xxl", "gemma", "base_weights"),  # files: what is in them is compared
}
_COMPARED_CACHING = {"caption_variants", "no_half_vae"}
_COMPARED_MEMORY = {
    *("base_model_precision", "quantized_matmul", "torch_compile", "dynamo_backend", "compile_dynamic"),
    *("text_encoder_1_precision", "text_encoder_2_precision", "text_encoder_3_precision"),
}
_COMPARED_TRAINING = {"mixed_precision", "full_fp16", "full_bf16", "stochastic_rounding", "kahan_summation"}
_STEP_TYPE_OPTIONS = ("full_bf16", "full_fp16", "stochastic_rounding", "kahan_summation")

# These describe data, and the datasets that come of them are compared; apart from what acts in the loss.
_DATA_GROUPS = {"data", "pictures", "captions"}
_LOSS_OPTIONS = {"prior_loss_weight", "masked_loss_normalize"}

_OPTIMIZER_NAMES = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}


def changes_since(
    config: RunConfig,
    resumed: Resumed,
    *,
    weights: Mapping[str, str] | None = None,
    data: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
) -> list[str]:
    """What differs from the run that the state was saved from and changes what comes out, each with both values.

    Args:
        config: Of the run that goes on.
        resumed: The state.
        weights: The identity of each part of the base model now; None: not known here.
        data: The summary of the data now; None: not known here.
        fingerprint: Of the plan now; None: not known here.

    Raises:
        ConfigError: Something differs that can't be gone on with, or something differs without ``--resume_anyway``.
    """
    progress = resumed.progress
    other_optimizer = [
        *_optimizer_change(config, progress["settings"]),
        *_state_type_change(config, progress["settings"]),
    ]
    changes = [*other_optimizer, *_option_changes(config, progress)]
    if config.training.seed is not None and config.training.seed != progress["seed"]:
        changes.append(f"--seed {config.training.seed} (the state: {progress['seed']})")
    if weights is not None and "weights" in progress:
        changes += _weight_changes(weights, progress["weights"])
    if data is not None and "data" in progress:
        changes += data_changes(data, progress["data"])
    if fingerprint is not None and fingerprint != progress["plan"] and not changes:
        changes.append(f"pictures, buckets or batches, with the hash {fingerprint} (the state: {progress['plan']})")
    if other_optimizer or (changes and not config.training.resume_anyway):
        advice = "Leave them as they were, start a new run from the saved weights, or add --resume_anyway"
        if other_optimizer:
            advice = "No optimizer goes on with such a state; leave it as it was, or start a new run"
        raise ConfigError(
            f"--resume {resumed.folder}: this is another run than the state's: {', '.join(changes)}. {advice}"
        )
    return changes


def _optimizer_change(config: RunConfig, saved: Mapping[str, Any]) -> Iterator[str]:
    before = next((name for option, name in _OPTIMIZER_NAMES.items() if saved.get(option)), saved["optimizer_type"])
    if config.optimizer.name != before:
        yield f"--optimizer_type {config.optimizer.name} (the state: {before})"


def _state_type_change(config: RunConfig, saved: Mapping[str, Any]) -> Iterator[str]:
    """Optimizers fail where their state is of another type than what they step."""
    training = config.training
    own = _step_type({name: getattr(training, name) for name in _STEP_TYPE_OPTIONS})
    before = _step_type(saved)
    if own != before:
        yield f"optimizer steps in {own} (the state: {before})"


def _step_type(settings: Mapping[str, Any]) -> str:
    """In which type the optimizer sees the weights."""
    if settings["full_bf16"] and not (settings["stochastic_rounding"] or settings.get("kahan_summation", False)):
        return "bf16"
    return "fp16" if settings["full_fp16"] else "fp32"


def _option_changes(config: RunConfig, progress: Mapping[str, Any]) -> Iterator[str]:
    saved = progress["settings"]
    for declared, value in option_values(config):
        if declared.secret or declared.name not in saved or not _is_compared(declared, "data" in progress):
            continue
        before, now = saved[declared.name], json.loads(json.dumps(value))
        if before != now:
            yield f"--{declared.name} {_shown(now)} (the state: {_shown(before)})"


def _is_compared(declared: Option, data_is_known: bool) -> bool:
    name, group = declared.name, declared.group
    if group in _FREE_GROUPS or name in _FREE_OPTIONS or name in ("optimizer_type", *_OPTIMIZER_NAMES):
        return False
    if group == "caching":
        return name in _COMPARED_CACHING
    if group == "memory":
        return name in _COMPARED_MEMORY
    if group == "training":
        return name in _COMPARED_TRAINING
    if group in _DATA_GROUPS and data_is_known:
        return name in _LOSS_OPTIONS
    return True


def _weight_changes(now: Mapping[str, str], before: Mapping[str, str]) -> Iterator[str]:
    for name in [*now, *(name for name in before if name not in now)]:
        own, other = now.get(name), before.get(name)
        if own != other:
            yield f"weights of {name}, with the hash {own or 'absent'} (the state: {other or 'absent'})"


def _shown(value: Any) -> str:
    return "unset" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
