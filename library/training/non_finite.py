"""A step whose numbers are none."""

import math
from typing import TYPE_CHECKING

from library.config.errors import ConfigError

if TYPE_CHECKING:
    from library.training.run import Run


class NonFiniteLoss(ConfigError):
    """A loss or gradient was not a number: the run stops before anything of it reaches the weights."""


def refuse_non_finite(run: "Run", step: int, samples: list[str]) -> None:
    """Stop at a loss or gradient that is no number, naming the step and the samples.

    With fp16 a gradient beyond the number range is ordinary: the loss scaler drops that update and lowers its scale.
    """
    loss, norm = run.step_numbers["loss"], run.step_numbers["gradient_norm"]
    scaled = run.accelerator.scaler is not None
    if math.isfinite(loss) and (math.isfinite(norm) or scaled):
        return
    what = "loss" if not math.isfinite(loss) else "gradient"
    value = loss if what == "loss" else norm
    raise NonFiniteLoss(
        f"step {step + 1}: the {what} is {value}; samples: {', '.join(samples) or 'of another process'}. "
        "Nothing of this step was applied or saved. Lower --learning_rate, or look at these pictures"
    )
