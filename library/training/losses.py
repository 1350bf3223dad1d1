"""The losses of a run, kept so that a resumed run goes on with them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class LossHistory:
    """Losses of the optimizer steps of the current epoch.

    Attributes:
        epoch_losses: One per optimizer step since the epoch began.
        smoothed: Exponential moving average over about a hundred steps, corrected for its start.
        steps: Steps in ``smoothed``.
    """

    epoch_losses: list[float] = field(default_factory=list)
    smoothed_sum: float = 0.0
    smoothed_weight: float = 0.0

    decay: float = 0.99

    def add(self, loss: float) -> None:
        """Take in the loss of one optimizer step."""
        self.epoch_losses.append(loss)
        self.smoothed_sum = self.decay * self.smoothed_sum + (1 - self.decay) * loss
        self.smoothed_weight = self.decay * self.smoothed_weight + (1 - self.decay)

    def end_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch_losses = []

    @property
    def smoothed(self) -> float:
        """The moving average; NaN before the first step."""
        return self.smoothed_sum / self.smoothed_weight if self.smoothed_weight else math.nan

    @property
    def epoch_average(self) -> float:
        """The mean over the current epoch; NaN before its first step."""
        return mean(self.epoch_losses)

    def state(self) -> dict[str, object]:
        """What ``restore`` takes."""
        return {
            "epoch_losses": self.epoch_losses,
            "smoothed_sum": self.smoothed_sum,
            "smoothed_weight": self.smoothed_weight,
        }

    def restore(self, state: dict) -> None:
        """Go on from a saved state."""
        self.epoch_losses = list(state["epoch_losses"])
        self.smoothed_sum, self.smoothed_weight = state["smoothed_sum"], state["smoothed_weight"]


def mean(values: Sequence[float]) -> float:
    """The mean, summed exactly; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
