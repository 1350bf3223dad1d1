"""The validation loss: held-out pictures, fixed noise levels, fixed noise, no augmentation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from library.data.loader import BatchReader
from library.data.plan import MicroBatch
from library.training.losses import mean
from library.training.run import Run
from library.training.step import validation_loss

QUANTILES = (0.2, 0.4, 0.6, 0.8)
"""Quantiles of the training noise levels at which every validation batch is measured."""


@dataclass(frozen=True)
class ValidationResult:
    """The loss over the validation set.

    Attributes:
        mean: Over samples and noise levels.
        standard_error: Of the mean, over samples.
    """

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Validation:
    """A validation set and how to measure it.

    Attributes:
        reader: Makes batches of validation samples.
        micro_batches: The whole set, once.
        seed: Of the fixed noise.
    """

    reader: BatchReader
    micro_batches: Sequence[MicroBatch]
    seed: int

    def measure(self, run: Run) -> ValidationResult:
        """The loss now; the processes share the batches."""
        own: list[float] = []
        for index, micro_batch in enumerate(self.micro_batches):
            if index % run.accelerator.num_processes != run.accelerator.process_index:
                continue
            batch = self.reader(micro_batch)
            levels = torch.stack([validation_loss(run, batch, quantile, seed=self.seed) for quantile in QUANTILES])
            own.extend(levels.mean(dim=0).tolist())
        losses = gather(own, run)
        average = mean(losses)
        spread = math.fsum((loss - average) ** 2 for loss in losses)
        return ValidationResult(average, math.sqrt(spread / max(1, len(losses) - 1) / len(losses)))


def gather(values: list[float], run: Run) -> list[float]:
    """The values of all processes."""
    if run.accelerator.num_processes == 1:
        return values
    parts: list[list[float]] = [[] for _ in range(run.accelerator.num_processes)]
    torch.distributed.all_gather_object(parts, values)
    return [value for part in parts for value in part]
