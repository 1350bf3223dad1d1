"""Numbers that are none never reach a file: what is looked at of the optimizer before something of it is written."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from library.config.errors import ConfigError
from library.io.safetensors import is_finite
from library.training.run import Run


def refuse_non_finite_optimizer(run: Run, done: int) -> None:
    """Stop before anything is written when a number that the optimizer keeps is none.

    Raises:
        ConfigError: One is, naming it.
    """
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    names = {parameter: name for name, parameter in run.trainable.named_parameters()}
    for name, value in _numbers(inner, names):
        if not _is_number(value):
            raise ConfigError(
                f"after step {done} {name} has numbers that are not finite, so nothing is saved; lower --learning_rate"
            )


def refuse_non_finite_average(run: Run, done: int) -> None:
    """The same where the optimizer's state becomes part of saved weights: schedule-free ones average by themselves.

    Raises:
        ConfigError: A number is none.
    """
    if hasattr(getattr(run.optimizer, "optimizer", run.optimizer), "eval"):
        refuse_non_finite_optimizer(run, done)


def _numbers(optimizer: Optimizer, names: dict[Any, str]) -> Iterator[tuple[str, Tensor | float]]:
    """All tensors and numbers that it keeps, by names for people."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            yield f"{key} of {names.get(parameter, 'a weight')} in the optimizer's state", value
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            yield f"{key} of the optimizer's group {group.get('name', number)}", value


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return is_finite(value.to_local() if hasattr(value, "to_local") else value)  # sharded: its own part
    return not (isinstance(value, float) and math.isnan(value))  # optimizers begin a minimum at infinity
