"""Numbers that are none never reach a file: what is looked at before weights or a state are written."""

import math
from collections.abc import Iterator
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from library.config.errors import ConfigError
from library.io.safetensors import is_finite
from library.training.run import Run


def refuse_non_finite(run: Run, done: int, numbers: Iterator[tuple[str, Tensor | float]]) -> None:
    """Stop, on all processes, before anything is written when a number of any process isn't finite.

    Args:
        run: The run.
        done: Optimizer steps.
        numbers: What is looked at, by a name for people.

    Raises:
        ConfigError: One isn't, naming it.
    """
    own = next((name for name, value in numbers if not _is_finite(value)), None)
    found = next((name for name in gather_object([own]) if name is not None), None)
    if found is not None:
        raise ConfigError(
            f"after step {done} {found} has numbers that are not finite, so nothing is saved; lower --learning_rate"
        )


def weight_numbers(run: Run) -> Iterator[tuple[str, Tensor | float]]:
    """What becomes a file for use: the trained weights, and their average; a schedule-free optimizer makes its own."""
    yield from _weights(run)
    if hasattr(getattr(run.optimizer, "optimizer", run.optimizer), "eval"):
        yield from _optimizer_numbers(run)


def state_numbers(run: Run) -> Iterator[tuple[str, Tensor | float]]:
    """What becomes a run state: the weights, their average, and all that the optimizer keeps."""
    yield from _weights(run)
    yield from _optimizer_numbers(run)


def _weights(run: Run) -> Iterator[tuple[str, Tensor | float]]:
    yield from run.trainable.state_dict().items()
    if run.average is not None:
        for name, tensor in run.average.tensors().items():
            yield f"the average of {name}", tensor


def _optimizer_numbers(run: Run) -> Iterator[tuple[str, Tensor | float]]:
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    names = {parameter: name for name, parameter in run.trainable.named_parameters()}
    for parameter, state in inner.state.items():
        yield from _entries(state, f"of {names.get(parameter, 'a weight')} in the optimizer's state")
    for number, group in enumerate(inner.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        yield from _entries(settings, f"of the optimizer's group {group.get('name', number)}")


def _entries(state: dict[str, Any], of: str) -> Iterator[tuple[str, Tensor | float]]:
    return ((f"{key} {of}", value) for key, value in state.items() if isinstance(value, Tensor | float))


def _is_finite(value: Tensor | float) -> bool:
    if isinstance(value, Tensor):
        value = value.to_local() if hasattr(value, "to_local") else value  # sharded: each process has its own part
        return is_finite(value)
    return not math.isnan(value)  # optimizers start counts of the least and the greatest at infinity
