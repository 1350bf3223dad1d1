"""Whether a configuration goes on with the run that a state was saved from."""

import json
from collections.abc import Mapping
from typing import Any

from library.config.errors import ConfigError
from library.config.options import option_values
from library.config.run import RunConfig

# What the optimizer's state and the adapter's tensors hold already, whatever is typed now.
_FIXED_GROUPS = ("network", "full", "optimizer")
_FREE_OPTIONS = {
    "max_grad_norm",
    "scale_weight_norms",
    "save_format",
    "save_parts",
    "network_weights",
    "lr_decay_steps",
}
# What may change the numbers that come, but can be changed on purpose.
_NOTED_GROUPS = ("family", "flow", "loss", "data", "pictures", "captions", "ema")
_NOTED_OPTIONS = {"mixed_precision", "full_fp16", "full_bf16", "stochastic_rounding", "caption_variants"}
_UNIMPORTANT_OPTIONS = {
    "max_data_loader_n_workers",
    "persistent_data_loader_workers",
    "skip_bad_images",
    "report_near_duplicates",
    "masked_loss",
    "dataset_config",
    "ema_device",
    "ema_validation",
    "ema_save_raw",
}


def changes_since(config: RunConfig, folder: str, progress: Mapping[str, Any], fingerprint: str) -> list[str]:
    """What differs from the run that the state was saved from and may change its further course, one line each.

    Args:
        config: Of the run that goes on.
        folder: The state, for messages.
        progress: Its light part.
        fingerprint: Of the plan now.

    Raises:
        ConfigError: Options differ that the state has settled.
    """
    saved = progress["settings"]
    fixed, noted = [], []
    for declared, value in option_values(config):
        if declared.secret or declared.name not in saved:
            continue
        before, now = saved[declared.name], json.loads(json.dumps(value))
        if before == now or declared.name in _FREE_OPTIONS | _UNIMPORTANT_OPTIONS:
            continue
        change = f"--{declared.name} {_shown(now)} (the state: {_shown(before)})"
        if declared.group in _FIXED_GROUPS:
            fixed.append(change)
        elif declared.group in _NOTED_GROUPS or declared.name in _NOTED_OPTIONS:
            noted.append(change)
    if fixed:
        raise ConfigError(
            f"--resume {folder}: the state has settled what these options say otherwise: {', '.join(fixed)}. Leave "
            "them as they were, or start a new run from the saved weights"
        )
    lines = [f"changed since the state was saved: {change}" for change in noted]
    if fingerprint != progress["plan"]:
        lines.append(
            "the pictures, their order or the batches are others than when the state was saved; the run goes on with "
            "the new ones from the same step, and won't end with the bytes of an uninterrupted one"
        )
    return lines


def _shown(value: Any) -> str:
    return "unset" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
