"""The trained weights as files for use: their names, and which weights are meant to be used."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

from library.config.errors import ConfigError
from library.config.saving import SavingConfig
from library.training.finite_optimizer import refuse_non_finite_average
from library.training.optimizers import set_training_mode
from library.training.run import Run
from library.training.save_errors import saving_together
from library.training.shards import first_non_finite

RAW = "_raw"
"""Goes after the name of what is made with the weights as they are trained, beside their average."""

_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def step_name(config: SavingConfig, step: int) -> str:
    """The stem of what is saved at an optimizer step."""
    return f"{config.output_name}-step{step:08d}"


def epoch_name(config: SavingConfig, epoch: int) -> str:
    """The stem of what is saved at an epoch's end; epochs count from 1."""
    return f"{config.output_name}-{epoch:06d}"


def save_weights(run: Run, stem: str, done: int) -> list[Path]:
    """Write the trained weights in every format that was asked for. Every process calls it.

    Returns:
        The files and folders, on the main process.

    Raises:
        SaveFailed: One can't be written; what was there before is as it was.
        ConfigError: A weight is not finite.
    """
    written: list[Path] = []
    precision = run.config.saving.save_precision
    dtype = _DTYPES[precision] if precision else None
    takes_part = run.accelerator.is_main_process or run.sharded  # a sharded model's processes give their parts
    with saving_together(run, lambda: _size(run, dtype)):
        if takes_part:
            refuse_non_finite_weights(run, done)
            refuse_non_finite_average(run, done)
            with averaged_weights(run):
                facts = run.config.ema.metadata(run.average.updates) if run.average is not None else {}
                written += run.job.save(run, stem, done, dtype, facts)
    if run.config.ema.ema_save_raw:
        with saving_together(run, lambda: _size(run, dtype)):
            if takes_part:
                written += run.job.save(run, f"{stem}{RAW}", done, dtype, {})
    return written


def _size(run: Run, dtype: torch.dtype | None) -> int:
    """About how many bytes the trained weights have in a file of this type."""
    tensors = run.trainable.state_dict().values()
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors)


def refuse_non_finite_weights(run: Run, done: int) -> None:
    """Stop before anything is written when a trained weight, or the average of one, is no number.

    Raises:
        ConfigError: One is, naming it.
    """
    average = run.average.tensors() if run.average is not None else {}
    averaged = ((f"the average of {name}", tensor) for name, tensor in average.items())
    names, tensors = zip(*itertools.chain(run.trainable.state_dict().items(), averaged))
    if run.sharded:  # any process may have the number, and all must stop
        bad = first_non_finite(tensors, run.device)
    else:
        bad = next((number for number, tensor in enumerate(tensors) if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise ConfigError(
            f"after step {done} {names[bad]} has numbers that are not finite, so nothing is saved; lower "
            "--learning_rate"
        )


@contextlib.contextmanager
def averaged_weights(run: Run) -> Iterator[None]:
    """Inside, the weights are those that are meant to be used: their average. Afterwards training goes on exactly.

    Schedule-free optimizers have an average of their own. Their way back is a rounding away from where they were, so
    the training weights are kept and put back.
    """
    if run.average is not None:
        with run.average.shown():
            yield
        return
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    if not hasattr(inner, "eval"):
        yield
        return
    kept = [parameter.detach().clone() for parameter in run.parameters]
    set_training_mode(run.optimizer, False)
    try:
        yield
    finally:
        set_training_mode(run.optimizer, True)
        with torch.no_grad():
            for parameter, value in zip(run.parameters, kept):
                parameter.copy_(value)
