"""An optimizer step whose numbers are on their way from the device to the host."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from library.records import Batch
from library.training.non_finite import NonFiniteLoss


class ComputedStep(NamedTuple):
    """A step whose gradients are there.

    Attributes:
        step: Counted from 0.
        batches: This process's micro-batches.
        step_samples: How many samples the whole step has.
        sums: What this process's micro-batches add to the step's numbers (5,), on the device.
        norm: Of all gradients together, before clipping: (). Fused backward has it on the host.
        refused: What fused backward met, or None.
    """

    step: int
    batches: Sequence[Batch]
    step_samples: int
    sums: Tensor
    norm: Tensor
    refused: NonFiniteLoss | None


class PendingStep(NamedTuple):
    """A computed step, and how it went as far as the device knows.

    Attributes:
        computed: The step. Its batches are kept until it is known whether the numbers are finite.
        rates: The learning rates of its update, by name.
        failed: 1 where the loss, or any process's norm, isn't finite, else 0: (), on the device.
        numbers: The step's numbers, on the host once they have ``arrived``.
        arrived: Comes when they have; None: they are there.
    """

    computed: ComputedStep
    rates: Mapping[str, float]
    failed: Tensor
    numbers: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> list[float]:
        """The numbers. If they are still on their way, this waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.tolist()


def sent(computed: ComputedStep, rates: Mapping[str, float], numbers: Tensor) -> PendingStep:
    """This sends a step's numbers to the host and doesn't wait for them.

    Args:
        computed: The step.
        rates: The learning rates of its update, by name.
        numbers: On the device: first the loss, last how many norms aren't finite and this process's norm.
    """
    failed = (~numbers[0].isfinite() | (numbers[-2] > 0)).float()
    return PendingStep(computed, rates, failed, *_to_host(numbers))


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and what comes when it is filled; other devices than CUDA's fill it at once."""
    if not numbers.is_cuda:
        return numbers.cpu(), None
    on_host = numbers.to("cpu", non_blocking=True)  # torch page-locks it, or this would wait
    arrived = torch.cuda.Event()
    arrived.record()
    return on_host, arrived
