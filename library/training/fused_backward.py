"""Fused backward: each weight steps while the backward pass goes on, and its gradient leaves memory."""

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.optimizers.one_by_one import OneByOne
from library.training.non_finite import NonFiniteLoss

# A gradient waits until so many others have arrived: its norm has reached the host by then, and nothing stands still.
WAITING = 2


@dataclass(frozen=True)
class _Arrived:
    number: int
    gradient: Tensor
    norm_copied: torch.cuda.Event | None


class FusedBackward:
    """Takes gradients as they arrive (Lv et al. 2023, arXiv:2306.09782), looks at them, and steps their parameters.

    Args:
        one_by_one: Steps single parameters.
        parameters: What the optimizer changes.
        names: Of the parameters, for messages.
        stepped: Told of each parameter when it has stepped.
    """

    def __init__(
        self,
        one_by_one: OneByOne,
        parameters: Sequence[nn.Parameter],
        names: Sequence[str],
        stepped: Callable[[Tensor], None] | None = None,
    ):
        self.one_by_one, self.parameters, self.names, self._stepped = one_by_one, parameters, names, stepped
        # pinned, so that a GPU's norms arrive without holding anything up
        self._norms = torch.zeros(len(parameters), pin_memory=any(parameter.is_cuda for parameter in parameters))
        self._waiting: deque[_Arrived] = deque()
        self._step = 0
        self._samples: tuple[str, ...] = ()
        for number, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(functools.partial(self._arrive, number))

    @property
    def waiting_bytes(self) -> int:
        """Memory of the gradients that have arrived and not been used yet."""
        return sum(arrived.gradient.nbytes for arrived in self._waiting)

    def start(self, step: int, loss: Tensor, samples: Sequence[str]) -> None:
        """Begin an optimizer step, before its backward pass.

        Raises:
            NonFiniteLoss: The loss is no number.
        """
        self._step, self._samples = step, tuple(samples)
        self._norms.zero_()
        if not math.isfinite(value := loss.item()):
            raise self._refusal(f"loss is {value}", "Nothing of this step was applied or saved", value)

    def finish(self) -> Tensor:
        """End the step after its backward pass; returns the norm of all gradients together, on the host."""
        while self._waiting:
            self._use_oldest()
        self.one_by_one.finish()
        return torch.linalg.vector_norm(self._norms)

    def settle(self, weights: Sequence[Tensor]) -> None:
        """Step those of these weights whose gradients still wait: they are about to leave the device."""
        leaving = {id(weight) for weight in weights}
        while any(id(self.parameters[arrived.number]) in leaving for arrived in self._waiting):
            self._use_oldest()

    def _arrive(self, number: int, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._norms[number].copy_(norm, non_blocking=True)
        copied = None
        if gradient.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._waiting.append(_Arrived(number, gradient, copied))
        del gradient
        while len(self._waiting) > WAITING:
            self._use_oldest()

    def _use_oldest(self) -> None:
        arrived = self._waiting.popleft()
        if arrived.norm_copied is not None:
            arrived.norm_copied.synchronize()
        if not math.isfinite(norm := self._norms[arrived.number].item()):
            self._waiting.clear()
            self.one_by_one.finish()
            raise self._refusal(
                f"gradient of {self.names[arrived.number]} is {norm}",
                "It was not applied; weights whose gradients came before it have stepped, and nothing is saved",
                norm,
                self.names[arrived.number],
            )
        parameter = self.parameters[arrived.number]
        self.one_by_one.step(parameter, arrived.gradient, self._step)
        if self._stepped is not None:
            self._stepped(parameter)

    def _refusal(self, what: str, state: str, value: float, parameter: str | None = None) -> NonFiniteLoss:
        message = (
            f"step {self._step + 1}: the {what}; samples: {', '.join(self._samples)}. {state}. Lower --learning_rate, "
            "or look at these pictures"
        )
        return NonFiniteLoss(message, value, parameter)


def refuse_processes(processes: int) -> None:
    """Stop when several processes would train with fused backward.

    Raises:
        ConfigError: There are several.
    """
    if processes > 1:
        raise ConfigError(
            f"--fused_backward_pass works in one process, and there are {processes}: gradients are summed over "
            "processes when all are there; remove it, or start one process"
        )
