"""The options of memory and speed as benches take them: any of them, by name."""

from collections.abc import Sequence
from typing import Any

from library.config.errors import ConfigError
from library.config.memory import MemoryConfig
from library.config.options import options_of


def given(words: Sequence[str]) -> dict[str, Any]:
    """The options that ``name=value`` words give.

    Raises:
        ConfigError: One is unknown, or its value is.
    """
    declared = {one.name: one for one in options_of(MemoryConfig)}
    values = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in declared:
            raise ConfigError(f"--memory {word}: no such option; there are {', '.join(declared)}")
        option = declared[name]
        if option.is_switch:
            if text.lower() not in ("", "true", "false"):
                raise ConfigError(f"--memory {word}: expected true or false")
            values[name] = text.lower() != "false"
            continue
        try:
            values[name] = option.from_words([text])
        except ValueError as error:
            raise ConfigError(f"--memory {word}: {error}") from None
    return values


def described(memory: MemoryConfig) -> str:
    """What isn't at its default."""
    values = ((one.name, getattr(memory, one.name), one.default) for one in options_of(MemoryConfig))
    return " ".join(f"{name}={value}" for name, value, default in values if value != default) or "plain"


def table(blocks: int, *, full: bool) -> list[dict[str, Any]]:
    """The rows of the documentation's table.

    Args:
        blocks: Of the model.
        full: Whether all weights are trained.
    """
    recompute = {"gradient_checkpointing": True}
    fused = {"fused_backward_pass": True} if full else {}
    rows: list[dict[str, Any]] = [
        {},
        recompute,
        {**recompute, "gradient_checkpointing_interval": 2},
        {**recompute, "cpu_offload_checkpointing": True},
        {**recompute, "gradient_checkpointing_keep_attention": True},
        {**fused, "blocks_to_swap": blocks // 2},
        {**fused, "blocks_to_swap": blocks},
        {**recompute, **fused, "blocks_to_swap": blocks // 2},
        {**recompute, **fused, "blocks_to_swap": blocks},
    ]
    if not full:
        rows += [{"base_model_precision": name} for name in ("int8", "fp8", "nf4")]
    rows += [{"torch_compile": True}, {**recompute, "torch_compile": True}]
    return rows
