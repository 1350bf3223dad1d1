"""Optimizers by the names people know, each from the library that keeps it."""

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from library.config.errors import ConfigError, nearest_name
from library.config.optimizer import parse_key_values

# Name as typed (without case) -> module, class, the arguments that the name stands for.
OPTIMIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("torch.optim", "AdamW", {}),
    "sgdnesterov": ("torch.optim", "SGD", {"nesterov": True, "momentum": 0.9}),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    "pagedadamw": ("bitsandbytes.optim", "PagedAdamW", {}),
    "pagedadamw8bit": ("bitsandbytes.optim", "PagedAdamW8bit", {}),
    "pagedadamw32bit": ("bitsandbytes.optim", "PagedAdamW32bit", {}),
    "lion8bit": ("bitsandbytes.optim", "Lion8bit", {}),
    "pagedlion8bit": ("bitsandbytes.optim", "PagedLion8bit", {}),
    "sgdnesterov8bit": ("bitsandbytes.optim", "SGD8bit", {"nesterov": True, "momentum": 0.9}),
    "lion": ("lion_pytorch", "Lion", {}),
    "adafactor": ("transformers.optimization", "Adafactor", {"relative_step": False, "scale_parameter": False}),
    "prodigy": ("prodigyopt", "Prodigy", {}),
    "dadaptation": ("dadaptation", "DAdaptAdam", {}),
    "dadaptadam": ("dadaptation", "DAdaptAdam", {}),
    "dadaptadagrad": ("dadaptation", "DAdaptAdaGrad", {}),
    "dadaptadan": ("dadaptation", "DAdaptAdan", {}),
    "dadaptlion": ("dadaptation", "DAdaptLion", {}),
    "dadaptsgd": ("dadaptation", "DAdaptSGD", {}),
    "adamwschedulefree": ("schedulefree", "AdamWScheduleFree", {}),
    "sgdschedulefree": ("schedulefree", "SGDScheduleFree", {}),
    "radamschedulefree": ("schedulefree", "RAdamScheduleFree", {}),
    "came": ("library.optimizers.came", "CAME", {}),
    "came8bit": ("library.optimizers.came", "CAME8bit", {}),
    "stableadamw": ("pytorch_optimizer", "StableAdamW", {}),
}
# What bitsandbytes keeps in paged memory.
_PAGED = ("state1", "state2")
_PACKAGES = {
    "lion_pytorch": "lion-pytorch",
    "came_pytorch": "came-pytorch",
    "pytorch_optimizer": "pytorch-optimizer",
}


@dataclass(frozen=True)
class CreatedOptimizer:
    """An optimizer and how to name it.

    Attributes:
        optimizer: The optimizer.
        label: ``module.Class(key=value,...)`` for the metadata.
        notes: What the user should know, one line each.
    """

    optimizer: Optimizer
    label: str
    notes: tuple[str, ...] = ()


def create_optimizer(
    name: str, arguments: Sequence[str], groups: list[dict[str, Any]], *, learning_rate: float, device: torch.device
) -> CreatedOptimizer:
    """This makes the optimizer called ``name`` over the parameter ``groups``.

    Args:
        name: A name of ``OPTIMIZERS`` in any case, or a dotted class path.
        arguments: ``key=value`` texts; the values are Python literals.
        groups: Torch parameter groups, each with its ``lr``.
        learning_rate: For groups that carry none.
        device: Where the parameters are.

    Raises:
        ConfigError: Its package is missing, or it doesn't know an argument.
    """
    optimizer_class, preset = _find_class(name)
    given = parse_key_values(arguments, "optimizer_args")
    settings = {**preset, **given}
    _check_arguments(optimizer_class, settings)
    notes: list[str] = []
    if optimizer_class is torch.optim.AdamW and device.type == "cuda":
        settings.setdefault("fused", True)
    if optimizer_class.__module__.startswith("bitsandbytes") and device.type == "cpu":
        notes.append(f"no accelerator: {optimizer_class.__name__} runs bitsandbytes' CPU code; nothing is paged")
    if optimizer_class.__module__.startswith("bitsandbytes") and settings.get("nesterov"):
        notes.append(f"bitsandbytes' {optimizer_class.__name__} takes nesterov and ignores it: its momentum is plain")
    rate: float | None = learning_rate
    if settings.get("relative_step") is True:
        notes.append("Adafactor with relative_step sets the learning rate by itself; --learning_rate is not used")
        rate = None
        for group in groups:
            group["lr"] = None
    try:
        optimizer = optimizer_class(groups, lr=rate, **settings)
    except (TypeError, ValueError, AssertionError) as error:  # each library has its own for a value it can't use
        raise ConfigError(f"--optimizer_args: {optimizer_class.__name__} says: {error}") from error
    listed = ",".join(f"{key}={value}" for key, value in settings.items())
    label = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    return CreatedOptimizer(optimizer, f"{label}({listed})" if listed else label, tuple(notes))


def _find_class(name: str) -> tuple[Any, dict[str, Any]]:
    if name.lower() in OPTIMIZERS:
        module_name, class_name, preset = OPTIMIZERS[name.lower()]
    else:
        module_name, _, class_name = name.rpartition(".")
        preset = {}
    found = load_class(module_name, class_name, "--optimizer_type")
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ConfigError(f"--optimizer_type: {module_name}.{class_name} is no optimizer")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"--optimizer_type: {class_name} asks for the loss several times per step, which is not done; use another"
        )
    return found, preset


def load_class(module_name: str, class_name: str, option: str) -> Any:
    """This imports ``module_name.class_name``.

    Raises:
        ConfigError: The package or the class is missing, naming ``option`` and the package to install.
    """
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = module_name.split(".")[0]
        package = _PACKAGES.get(package, package)
        raise ConfigError(
            f"{option}: {class_name} needs the package {package} ({error}); pip install {package}"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ConfigError(f"{option}: {module_name} has no class {class_name}")
    return found


def _check_arguments(optimizer_class: Any, settings: dict[str, Any]) -> None:
    parameters = inspect.signature(optimizer_class.__init__).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = set(parameters) - {"self", "params", "lr"}
    for key in settings:
        if key == "lr":
            raise ConfigError("--optimizer_args: give the learning rate by --learning_rate, not lr=")
        if key not in known:
            near = nearest_name(key, known)
            hint = f"; did you mean {near}?" if near else f"; it knows {', '.join(sorted(known))}"
            raise ConfigError(f"--optimizer_args: {optimizer_class.__name__} has no argument {key!r}{hint}")


def set_training_mode(optimizer: Optimizer, training: bool) -> None:
    """This puts schedule-free optimizers into training or evaluation mode; other optimizers have no modes."""
    inner = getattr(optimizer, "optimizer", optimizer)
    switch = getattr(inner, "train" if training else "eval", None)
    if switch is not None:
        switch()


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any], *, smallest_on_host: int | None = None) -> None:
    """This loads what ``state_dict`` gave, each tensor in the type it had.

    torch gives floating-point state the type of its parameter, and so rounds what an optimizer keeps in fp32 beside
    parameters in bf16.

    Args:
        optimizer: Takes the state.
        state: On the host.
        smallest_on_host: Tensors of so many bytes and more stay there; None: all come to their parameter's device.

    Raises:
        ValueError: The state is another optimizer's, or of other parameters.
    """
    saved = {number: _unwrapped(optimizer, values) for number, values in state["state"].items()}
    paged = getattr(optimizer, "is_paged", False)
    staying = {
        number: {
            name: value
            for name, value in values.items()
            if (paged and name in _PAGED) or _is_as_large(value, smallest_on_host)
        }
        for number, values in saved.items()
    }
    moving = {
        number: {name: value for name, value in values.items() if name not in staying[number]}
        for number, values in saved.items()
    }
    optimizer.load_state_dict({**state, "state": moving})
    # bitsandbytes leaves the state where it was read, and moves it at its first step only
    if hasattr(optimizer, "to_gpu"):
        optimizer.to_gpu()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers):
        own = optimizer.state.get(parameter, {})
        for name, value in moving.get(number, {}).items():
            loaded = own.get(name)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                own[name] = value.to(loaded.device)
        for name, value in staying.get(number, {}).items():
            own[name] = _paged_again(optimizer, parameter, value) if paged else value


def _paged_again(optimizer: Any, parameter: Tensor, value: Tensor) -> Tensor:
    """A loaded tensor where the optimizer would have made it; bitsandbytes would leave it on the device for good."""
    buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)
    return buffer.copy_(value)


def _unwrapped(optimizer: Optimizer, values: dict[str, Any]) -> dict[str, Any]:
    """One parameter's saved state; bitsandbytes hides its tensors from FSDP in a dictionary of their own."""
    wrapped = getattr(optimizer, "_FSDP_WRAPPED_QUANT_STATE_KEY", None)
    if wrapped not in values:
        return values
    return {**{name: value for name, value in values.items() if name != wrapped}, **values[wrapped]}


def _is_as_large(value: Any, smallest: int | None) -> bool:
    return smallest is not None and isinstance(value, Tensor) and value.nbytes >= smallest
