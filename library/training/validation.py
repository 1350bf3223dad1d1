"""The validation loss: held-out pictures, fixed noise levels, fixed noise, no augmentation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.data.loader import BatchReader
from library.data.plan import MicroBatch
from library.randomness import Draws
from library.training.losses import mean
from library.training.run import Run
from library.training.sharding import padded
from library.training.step import validation_loss

LEVELS = 4
"""How many noise levels every picture is measured at, one in each equal share of the training's."""


@dataclass(frozen=True)
class ValidationResult:
    """The loss over the validation set.

    Attributes:
        mean: Over pictures and noise levels.
        standard_error: Of the mean, over pictures; 0 for a single one.
        levels: The mean at each noise level, from little noise to much.
    """

    mean: float
    standard_error: float
    levels: tuple[float, ...]

    @classmethod
    def of(cls, losses: Sequence[Sequence[float]]) -> "ValidationResult":
        """The result of measuring pictures, each at every noise level. Their order doesn't matter."""
        pictures = [mean(levels) for levels in losses]
        average = mean(pictures)
        spread = math.fsum((loss - average) ** 2 for loss in pictures)
        error = math.sqrt(spread / max(1, len(pictures) - 1) / len(pictures))
        return cls(average, error, tuple(mean(level) for level in zip(*losses)))


@dataclass(frozen=True)
class Validation:
    """A validation set and how to measure it.

    Attributes:
        reader: Makes batches of validation samples.
        micro_batches: The whole set, once.
        seed: Of the fixed noise levels; the reader has that of the noise.
    """

    reader: BatchReader
    micro_batches: Sequence[MicroBatch]
    seed: int

    def measure(self, run: Run) -> ValidationResult:
        """The loss now. The processes share the micro-batches; the result is the same for any number of them."""
        own: list[list[float]] = []
        processes = run.accelerator.num_processes
        mine = self.micro_batches[run.accelerator.process_index :: processes]
        busiest = math.ceil(len(self.micro_batches) / processes)
        done = padded(mine, self.micro_batches, busiest) if run.sharded else mine
        for number, micro_batch in enumerate(done):
            batch = self.reader(micro_batch)
            losses = validation_loss(run, batch, stratified_quantiles(self.seed, batch.keys))  # (LEVELS, B)
            if number < len(mine):
                own.extend(losses.T.tolist())
        return ValidationResult.of(gather(own, run))


def stratified_quantiles(seed: int, keys: Sequence[str]) -> Tensor:
    """Where in the training's noise levels each picture is measured: one place in each of ``LEVELS`` equal shares.

    It is the same at every measurement, and depends on the seed and the picture's name alone.

    Returns:
        Quantiles (LEVELS, B), in 0..1, fp64.
    """
    draws = (Draws(seed, tuple(keys), (share,) * len(keys)).uniform("validation level") for share in range(LEVELS))
    return torch.stack([(share + draw) / LEVELS for share, draw in enumerate(draws)])


def gather(values: list[list[float]], run: Run) -> list[list[float]]:
    """The values of all processes."""
    if run.accelerator.num_processes == 1:
        return values
    parts: list[list[list[float]]] = [[] for _ in range(run.accelerator.num_processes)]
    torch.distributed.all_gather_object(parts, values)
    return [value for part in parts for value in part]
