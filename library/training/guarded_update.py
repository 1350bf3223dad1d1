"""Updates that the device itself drops when the step's numbers are none, so that the host needn't know them first."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class GuardedUpdate:
    """Lets an optimizer step unless a number on the device says that the step has failed.

    torch's fused optimizers look at ``found_inf``, which is there for the loss scaler of fp16, before they write
    anything: a dropped update moves no weight, no moment and no count of steps.

    Args:
        optimizer: Steps.
        inner: The same without what accelerate wraps around it; ``takes_guard`` holds for it.
    """

    def __init__(self, optimizer: Any, inner: Optimizer):
        self._optimizer, self._inner = optimizer, inner
        self._without_state: list[Tensor] = []

    def step(self, failed: Tensor) -> None:
        """Step.

        Args:
            failed: 1 if the update is to be dropped, else 0: (), fp32, on the device.
        """
        parameters = (parameter for group in self._inner.param_groups for parameter in group["params"])
        self._without_state = [parameter for parameter in parameters if parameter not in self._inner.state]
        self._inner.found_inf = failed  # type: ignore[attr-defined]
        try:
            self._optimizer.step()
        finally:
            del self._inner.found_inf  # type: ignore[attr-defined]

    def forget(self) -> None:
        """Take away the state that the latest update, which was dropped, has made: what it holds was never filled."""
        for parameter in self._without_state:
            self._inner.state.pop(parameter, None)


def takes_guard(optimizer: Optimizer) -> bool:
    """Whether the optimizer looks at ``found_inf``: those of torch do where they are fused."""
    own = type(optimizer).__module__.startswith("torch.optim.")
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return own and fused and getattr(optimizer, "_step_supports_amp_scaling", False)
