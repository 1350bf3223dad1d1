"""One parameter's optimizer step at a time: for gradients that come one by one, and for weights widened in passing."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Narrowing(Protocol):
    """How a weight in bf16 becomes one in fp32 for its step, and bf16 again."""

    def widened(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        """This makes the fp32 weight; the optimizer will find in ``state`` what this leaves there."""
        ...

    def narrow(self, wide: Tensor, weight: Tensor, state: dict[str, Any], *, step: int, number: int) -> None:
        """This puts what the step made of it into the ``weight``.

        Args:
            wide: fp32.
            weight: bf16.
            state: The optimizer's for this weight; what is put there is saved with it.
            step: The optimizer step.
            number: The weight's place among the optimizer's.
        """
        ...


class StateHome(Protocol):
    """Where the optimizer's state lies between the steps of a parameter."""

    def bring(self, parameter: Tensor) -> None:
        """This makes the parameter's state usable by what is computed from now on."""
        ...

    def send_home(self, parameter: Tensor) -> None:
        """This lets the state go again, as the step left it."""
        ...

    def finish(self) -> None:
        """This ends an optimizer step."""
        ...

    def settle(self) -> None:
        """This waits until the state can be read where it lies."""
        ...


class OneByOne:
    """Lets an optimizer step single parameters; its state stays as if it had stepped them together.

    This suits optimizers that treat each parameter by itself. ``steps_apart`` finds out.

    Args:
        optimizer: The optimizer; afterwards it may still be saved, loaded and scheduled as ever.
        rounding: How parameters in bf16 are rounded after a step in fp32; None leaves them to the optimizer.
        home: Where the state waits between steps; None leaves it where the optimizer put it.
    """

    def __init__(self, optimizer: Optimizer, rounding: Narrowing | None = None, home: StateHome | None = None):
        self.optimizer, self.rounding, self.home = optimizer, rounding, home
        places = [
            (parameter, index) for index, group in enumerate(optimizer.param_groups) for parameter in group["params"]
        ]
        self._places = {parameter: (number, index) for number, (parameter, index) in enumerate(places)}
        self._stepped_groups: dict[int, dict[str, Any]] = {}
        # bitsandbytes moves a loaded state to the device at its first step, which would see one parameter only
        if hasattr(optimizer, "to_gpu"):
            optimizer.to_gpu()

    @torch.no_grad()
    def step(self, parameter: nn.Parameter, gradient: Tensor, step: int) -> None:
        """Step one parameter.

        Args:
            parameter: One of the optimizer's.
            gradient: Of this optimizer step; ``parameter.grad`` is not looked at and None afterwards.
            step: The optimizer step, for the random bits of the rounding.
        """
        parameter.grad = None
        if self.home is not None:
            self.home.bring(parameter)
        if self.rounding is None or parameter.dtype != torch.bfloat16:
            parameter.grad = gradient
            self._step_alone(parameter, parameter)
            parameter.grad = None
        else:
            self._step_wide(self.rounding, parameter, gradient, step)
        if self.home is not None:
            self.home.send_home(parameter)

    def finish(self) -> None:
        """End an optimizer step: what the optimizer counts per group moves on once."""
        for index, values in self._stepped_groups.items():
            self.optimizer.param_groups[index].update(values)
        self._stepped_groups.clear()
        if self.home is not None:
            self.home.finish()

    def settle(self) -> None:
        """Wait until the optimizer's state can be read."""
        if self.home is not None:
            self.home.settle()

    def _step_wide(self, rounding: Narrowing, parameter: nn.Parameter, gradient: Tensor, step: int) -> None:
        number, _ = self._places[parameter]
        wide = nn.Parameter(rounding.widened(parameter, self.optimizer.state.get(parameter, {})))
        wide.grad = gradient.float()
        self._step_alone(parameter, wide)
        state = self.optimizer.state[parameter]
        rounding.narrow(wide.detach(), parameter, state, step=step, number=number)

    def _step_alone(self, parameter: nn.Parameter, stand_in: nn.Parameter) -> None:
        """The optimizer's step over ``stand_in``, with the state of ``parameter``."""
        _, index = self._places[parameter]
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        view = {**groups[index], "params": [stand_in]}
        state = optimizer.state.pop(parameter, None)
        if state is not None:
            optimizer.state[stand_in] = state
        optimizer.param_groups = [view]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
            state = optimizer.state.pop(stand_in, None)
            if state is not None:
                optimizer.state[parameter] = state
        self._stepped_groups[index] = {key: value for key, value in view.items() if key != "params"}


def steps_apart(optimizer: Optimizer, same: Optimizer) -> bool:
    """This tries whether an optimizer that steps its parameters one by one does what it does to all of them.

    Args:
        optimizer: Over a few small parameters, which this changes.
        same: The same over copies of them.
    """
    apart = OneByOne(optimizer)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for group, same_group in zip(optimizer.param_groups, same.param_groups):
            for parameter, copy in zip(group["params"], same_group["params"]):
                copy.grad = torch.randn(copy.shape, generator=generator)
                apart.step(parameter, copy.grad.clone(), step)
        apart.finish()
        same.step()
    return all(_equal_values(group, same_group) for group, same_group in zip(optimizer.param_groups, same.param_groups))


def _equal_values(group: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two parameter groups hold equal weights, and equal numbers beside them."""
    values = [(value, other[key]) for key, value in group.items() if key != "params"]
    return all(
        torch.equal(value, same) if isinstance(value, Tensor) else bool(value == same)
        for value, same in [*values, *zip(group["params"], other["params"])]
    )
