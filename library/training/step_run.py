"""What a training step reads of a run: all of it when a run trains, a few parts when one step is done again."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from library.config.run import RunConfig
from library.families.protocols import ModelFamily, TextEncodingStrategy


class StepRun(Protocol):
    """The parts; ``Run`` has them all."""

    @property
    def config(self) -> RunConfig:
        """What the user asked for, validated."""
        ...

    @property
    def seed(self) -> int:
        """Of every random draw."""
        ...

    @property
    def family(self) -> ModelFamily:
        """The architecture's parts."""
        ...

    @property
    def accelerator(self) -> Accelerator:
        """Device, precision and processes."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        ...

    @property
    def sharded(self) -> bool:
        """Whether each process has a part of every trained weight."""
        ...

    @property
    def denoiser(self) -> nn.Module:
        """Frozen, unless it is what is trained."""
        ...

    @property
    def trainable(self) -> Any:
        """The module whose parameters are trained."""
        ...

    @property
    def text(self) -> TextEncodingStrategy:
        """How captions become conditioning."""
        ...

    @property
    def text_encoders(self) -> Mapping[str, nn.Module]:
        """By name; empty where features are cached."""
        ...

    @property
    def trains_text_encoders(self) -> bool:
        """Whether gradients flow into the text encoders."""
        ...

    @property
    def vae(self) -> nn.Module | None:
        """None when nothing needs it."""
        ...
