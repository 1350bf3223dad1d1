"""What differs between training an adapter, the model itself, and a ControlNet. The loop doesn't know which it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from library.config.run import RunConfig
from library.families.protocols import ModelFamily
from library.training.adapter_job import AdapterJob
from library.training.control_net_job import ControlNetJob
from library.training.full_job import FullJob
from library.training.precision import Precision
from library.training.run import Run


class Job(Protocol):
    """One kind of training."""

    def check(self, config: RunConfig, family: ModelFamily) -> tuple[str, ...]:
        """This finds what is wrong with the job's own options before anything is loaded.

        Returns:
            The components that will be trained.

        Raises:
            ConfigError: Something can't work.
        """
        ...

    def rehearse(self, config: RunConfig, family: ModelFamily) -> nn.Module:
        """What would be trained, on the meta device, where modules have shapes and no weights."""
        ...

    def dtype(self, component: str, config: RunConfig, family: ModelFamily, precision: Precision) -> torch.dtype:
        """What the weights of a component are kept in."""
        ...

    def load(
        self, config: RunConfig, family: ModelFamily, *, device: torch.device, precision: Precision, seed: int
    ) -> Mapping[str, nn.Module]:
        """What the job needs beside the base model's parts, by name.

        Args:
            config: The run.
            family: The model's parts.
            device: Where it goes; on ``meta`` nothing is read.
            precision: Of the weights.
            seed: Of the run.
        """
        ...

    def prepare(
        self, config: RunConfig, family: ModelFamily, roots: Mapping[str, nn.Module], *, seed: int, precision: Precision
    ) -> Any:
        """What is trained: ``Run.trainable``.

        Args:
            config: The run.
            family: The model's parts.
            roots: The denoiser, the text encoders that the step needs, and what ``load`` gave, by name.
            seed: Of the run.
            precision: Of the weights.
        """
        ...

    def blocks(self, family: ModelFamily, trainable: Any) -> Sequence[nn.Module]:
        """Repeated blocks in forward order that are trained and aren't the denoiser's."""
        ...

    def save(
        self, run: Run, stem: str, done: int, dtype: torch.dtype | None, facts: Mapping[str, str]
    ) -> Sequence[Path]:
        """This writes what is trained, as it is now.

        Args:
            run: The run.
            stem: Of the names.
            done: Optimizer steps.
            dtype: Type to convert to; None: each tensor keeps its own.
            facts: More entries for the metadata.

        Returns:
            The files or folders.
        """
        ...


def job_of(config: RunConfig) -> Job:
    """The kind of training that a configuration asks for."""
    if config.control_net is not None:
        return ControlNetJob()
    return AdapterJob() if config.network is not None else FullJob()
