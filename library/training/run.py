"""Everything a run holds once it is set up."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from library.config.run import RunConfig
from library.data.plan import BatchPlan
from library.families.protocols import ModelFamily, TextEncodingStrategy
from library.memory.block_swap import BlockSwap
from library.memory.compiling import Compiling
from library.optimizers.one_by_one import OneByOne
from library.records import Batch
from library.training.ema import WeightAverage
from library.training.fused_backward import FusedBackward
from library.training.guarded_update import GuardedUpdate
from library.training.losses import LossHistory
from library.training.non_finite import DroppedSteps
from library.training.pending_step import PendingStep
from library.training.stopping import Stopper
from library.training.trackers import Trackers

if TYPE_CHECKING:
    from library.training.jobs import Job


@dataclass
class Run:
    """A training run: the parts that the loop, the step and the hooks work with.

    Attributes:
        config: What the user asked for, validated.
        seed: Of every random draw.
        job: What kind of training it is.
        family: The architecture's parts.
        accelerator: Device, precision and processes.
        plan: Which samples each optimizer step uses.
        batches: This process's micro-batches, in order, from ``first_step`` on.
        denoiser: Frozen, unless it is what is trained.
        trainable: The module whose parameters are trained: the adapter or the denoiser.
        text: How captions become conditioning.
        text_encoders: By name; empty once every caption's features are cached.
        vae: On the host while latents are cached and samples are wanted; None when nothing needs it.
        optimizer: Prepared by accelerate.
        schedule: Learning-rate schedule.
        max_steps: Optimizer steps of the whole run.
        first_step: Steps that were done before this process started.
        weight_dtype: Of the frozen weights.
        hooks: Called in order after each optimizer step, once its numbers are known.
        trackers: Where numbers are logged.
        history: Losses of the steps so far.
        stopper: Whether this process was asked to stop.
        stop_code: What to exit with, once any process was asked to stop; 0: go on.
        average: The moving average of the trained weights, or None.
        metadata: Facts for saved files that are known before training.
        one_by_one: Steps the weights singly, where that is asked for.
        origin: What states keep of where the run comes from, see ``prepare_data``, and of how it computes.
        last_state: The newest state that this process knows to be whole: what it wrote last, or went on from.
        fused_backward: Steps them during the backward pass, where that is asked for.
        guard: Lets the device drop an update whose numbers are none, where the optimizer can do that. Then the host
            goes on without having seen them.
        pending: The newest step, while its numbers are on their way to the host.
        swap: Takes trained weights to and fro between host and device, where that is asked for.
        sharded: Whether each process has a part of every trained weight. Then all processes take part in each forward
            pass, and in whatever reads whole weights.
        compiling: Compiles the denoiser's blocks and counts; None: nothing does.
        dropped: The steps so far whose numbers were not finite.
    """

    config: RunConfig
    seed: int
    job: "Job"
    family: ModelFamily
    accelerator: Accelerator
    plan: BatchPlan
    batches: Generator[Batch, None, None]
    denoiser: nn.Module
    trainable: Any
    text: TextEncodingStrategy
    text_encoders: Mapping[str, nn.Module]
    vae: nn.Module | None
    optimizer: Any
    schedule: Any
    max_steps: int
    first_step: int
    weight_dtype: torch.dtype
    trackers: Trackers
    history: LossHistory
    metadata: dict[str, str]
    stopper: Stopper = field(default_factory=lambda: Stopper(None, 0.0))
    stop_code: int = 0
    average: WeightAverage | None = None
    one_by_one: OneByOne | None = None
    fused_backward: FusedBackward | None = None
    guard: GuardedUpdate | None = None
    pending: PendingStep | None = None
    swap: BlockSwap | None = None
    sharded: bool = False
    origin: Mapping[str, Any] = field(default_factory=dict)
    last_state: Path | None = None
    compiling: Compiling | None = None
    dropped: DroppedSteps = field(default_factory=DroppedSteps)
    hooks: Sequence["StepHook"] = ()
    step_numbers: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return self.accelerator.device

    @property
    def trains_text_encoders(self) -> bool:
        """Whether gradients flow into the text encoders."""
        return any(
            parameter.requires_grad
            for name in self.text_encoders
            for parameter in self.trainable.component_parameters(name)
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def close(self) -> None:
        """End the processes and threads that make batches, and the trackers."""
        try:
            self.batches.close()
        finally:
            if self.average is not None:
                self.average.close()
            self.trackers.close()

    def epoch_ended(self, done: int) -> bool:
        """Whether ``done`` optimizer steps complete an epoch."""
        return done == self.plan.first_step(self.plan.epoch_of(done))

    def epoch_number(self, done: int) -> int:
        """The epoch, counted from 1, that the last of ``done`` optimizer steps belongs to."""
        return self.plan.epoch_of(done - 1) + 1


class StepHook:
    """What happens after optimizer steps, on every process.

    Attributes:
        due: Takes the run and the number of optimizer steps done, and says whether it is time.
        act: Takes the same and does it.
        can_wait: Whether it needs the step's numbers and no weights, so that the next step may be under way.
    """

    def __init__(self, due: Callable[[Run, int], bool], act: Callable[[Run, int], None], *, can_wait: bool = False):
        self.due, self.act, self.can_wait = due, act, can_wait
