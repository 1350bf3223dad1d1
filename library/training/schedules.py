"""Learning-rate schedules: a multiplier of each group's learning rate as a function of the optimizer step."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library.config.errors import ConfigError
from library.config.optimizer import OptimizerConfig, parse_key_values
from library.training.optimizers import load_class

Multiplier = Callable[[int], float]


def create_schedule(config: OptimizerConfig, optimizer: Optimizer, *, max_steps: int) -> Any:
    """This makes the learning-rate schedule that ``config`` asks for.

    Returns:
        An object with ``step``, ``state_dict`` and ``load_state_dict``; step it once per optimizer step.

    Raises:
        ConfigError: The schedule is unknown, or can't be used with its arguments or with this optimizer.
    """
    if any(group["lr"] is None for group in optimizer.param_groups):
        if config.lr_scheduler_type or config.lr_scheduler not in ("constant", "adafactor"):
            raise ConfigError(
                f"--lr_scheduler {config.lr_scheduler_type or config.lr_scheduler} does nothing: "
                f"{config.optimizer_type} sets the learning rate by itself here (relative_step=True); remove one"
            )
        return _NoSchedule()
    if config.lr_scheduler_type:
        arguments = parse_key_values(config.lr_scheduler_args, "lr_scheduler_args")
        module_name, _, class_name = config.lr_scheduler_type.rpartition(".")
        schedule_class = load_class(module_name or "torch.optim.lr_scheduler", class_name, "--lr_scheduler_type")
        if "metrics" in inspect.signature(schedule_class.step).parameters:
            raise ConfigError(
                f"--lr_scheduler_type {class_name} follows a measurement, and none is handed to it; choose one that "
                "follows the step"
            )
        try:
            return schedule_class(optimizer, **arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"--lr_scheduler_args: {class_name} says: {error}") from error
    return LambdaLR(optimizer, learning_rate_multiplier(config, max_steps=max_steps))


def learning_rate_multiplier(config: OptimizerConfig, *, max_steps: int) -> Multiplier:
    """The schedule ``config.lr_scheduler`` as a function of the number of optimizer steps already done."""
    arguments = parse_key_values(config.lr_scheduler_args, "lr_scheduler_args")
    warmup = resolve_steps(config.lr_warmup_steps, max_steps)
    decay = resolve_steps(config.lr_decay_steps, max_steps)
    cycles, floor = config.lr_scheduler_num_cycles, config.lr_scheduler_min_lr_ratio
    base = config.learning_rate or 1.0
    schedules: dict[str, Callable[[], Multiplier]] = {
        "adafactor": lambda: _constant,  # Adafactor sets its own rate, the schedule only reports it
        "constant": lambda: _constant,
        "constant_with_warmup": lambda: functools.partial(_after_warmup, warmup, _constant),
        "linear": lambda: functools.partial(_after_warmup, warmup, _Progress(warmup, max_steps, _linear)),
        "cosine": lambda: functools.partial(_after_warmup, warmup, _Progress(warmup, max_steps, _cosine(0.5))),
        "cosine_with_restarts": lambda: functools.partial(
            _after_warmup, warmup, _Progress(warmup, max_steps, _restarting_cosine(cycles))
        ),
        "polynomial": lambda: functools.partial(
            _after_warmup,
            warmup,
            _Progress(warmup, max_steps, _polynomial(_end_rate(arguments) / base, config.lr_scheduler_power)),
        ),
        "inverse_sqrt": lambda: functools.partial(
            _after_warmup, warmup, _inverse_square_root(warmup, config.lr_scheduler_timescale)
        ),
        "cosine_with_min_lr": lambda: functools.partial(
            _after_warmup, warmup, _Progress(warmup, max_steps, _raised(_cosine(cycles / 2), floor or 0.0))
        ),
        "warmup_stable_decay": lambda: _warmup_stable_decay(warmup, decay, max_steps, cycles / 2, floor or 0.0),
        "piecewise_constant": lambda: _piecewise_constant(str(arguments.pop("step_rules", ""))),
    }
    multiplier = schedules[config.lr_scheduler]()
    if arguments:
        raise ConfigError(f"--lr_scheduler_args: {config.lr_scheduler} has no argument {sorted(arguments)[0]!r}")
    return multiplier


def resolve_steps(value: int | float, max_steps: int) -> int:
    """Optimizer steps from a count, or from a fraction of the whole run (below 1)."""
    return int(value * max_steps) if isinstance(value, float) and value < 1 else int(value)


class _NoSchedule:
    """Leaves the learning rate to the optimizer."""

    def step(self) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """There is nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``state_dict``."""


class _Progress:
    """A shape over the part of the run after the warm-up, as a function of the step."""

    def __init__(self, warmup: int, max_steps: int, shape: Callable[[float], float]):
        self.warmup, self.length, self.shape = warmup, max(1, max_steps - warmup), shape

    def __call__(self, step: int) -> float:
        return self.shape((step - self.warmup) / self.length)


def _end_rate(arguments: dict[str, Any]) -> float:
    rate = arguments.pop("lr_end", 1e-7)
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise ConfigError(f"--lr_scheduler_args: lr_end must be a number, got {rate!r}")
    return float(rate)


def _constant(step: int) -> float:
    return 1.0


def _after_warmup(warmup: int, then: Multiplier, step: int) -> float:
    return step / max(1, warmup) if step < warmup else then(step)


def _linear(progress: float) -> float:
    return max(0.0, 1.0 - progress)


def _cosine(cycles: float) -> Callable[[float], float]:
    return lambda progress: max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * cycles * progress)))


def _restarting_cosine(cycles: int) -> Callable[[float], float]:
    def shape(progress: float) -> float:
        if progress >= 1.0:
            return 0.0
        return 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0)))

    return shape


def _polynomial(end: float, power: float) -> Callable[[float], float]:
    return lambda progress: end if progress >= 1.0 else (1.0 - end) * (1.0 - progress) ** power + end


def _raised(shape: Callable[[float], float], floor: float) -> Callable[[float], float]:
    return lambda progress: max(0.0, shape(progress) * (1.0 - floor) + floor)


def _inverse_square_root(warmup: int, timescale: int | None) -> Multiplier:
    scale = timescale or warmup or 10_000
    shift = scale - warmup
    return lambda step: 1.0 / math.sqrt((step + shift) / scale)


def _warmup_stable_decay(warmup: int, decay: int, max_steps: int, cycles: float, floor: float) -> Multiplier:
    stable_end = max(warmup, max_steps - decay)

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step / max(1, warmup)) * (1.0 - floor) + floor
        if step < stable_end:
            return 1.0
        if step < stable_end + decay:
            progress = (step - stable_end) / max(1, decay)
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress)) * (1.0 - floor) + floor)
        return floor

    return multiplier


def _piecewise_constant(rules: str) -> Multiplier:
    """``1:10,0.1:20,0.005``: multiplier 1 before step 10, 0.1 before step 20, then 0.005."""
    try:
        *pieces, last = rules.split(",")
        bounds = [(int(steps), float(value)) for value, steps in (piece.split(":") for piece in pieces)]
        final = float(last)
    except ValueError as error:
        raise ConfigError(
            f"--lr_scheduler_args: piecewise_constant needs step_rules=1:10,0.1:20,0.005 "
            f"(multiplier:until step, ..., last multiplier), not {rules!r}"
        ) from error

    def multiplier(step: int) -> float:
        return next((value for until, value in bounds if step < until), final)

    return multiplier


def current_learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Learning rates by the groups' names; adaptive optimizers report what they arrived at."""
    rates: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        rate = group.get("lr")
        if "d" in group and rate is not None:  # Prodigy and D-Adaptation multiply by their estimate
            estimate = group["d"]
            rate = rate * float(estimate.item() if isinstance(estimate, torch.Tensor) else estimate)
        if rate is not None:
            rates[group.get("name", f"group{index}")] = float(rate)
    return rates
