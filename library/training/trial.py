"""One optimizer step of a run without numbers: what it allocates, computes and moves, from shapes alone.

The trainer's own code places the model, makes what is trained, and takes the step; only the numbers are missing
(``library.memory.hollow``). So an option that changes what the step keeps is counted without being known here.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from library.config.memory import MemoryConfig
from library.config.run import RunConfig
from library.data.plan import BatchPlan, MicroBatch, Visit
from library.families.protocols import ModelFamily
from library.memory.allocations import Allocations, on_gradients
from library.memory.as_on_cuda import AsOnCuda
from library.memory.hollow import hollow
from library.memory.plain_transfers import PlainStash, PlainStateTransfers, PlainTransfers, Traffic
from library.records import Batch, Resolution, TensorRecord
from library.training.ema import WeightAverage
from library.training.jobs import job_of
from library.training.loop import optimize, update_weights
from library.training.losses import LossHistory
from library.training.model_side import ModelSide, assemble
from library.training.optimizers import set_training_mode
from library.training.placing import Carriers
from library.training.precision import Precision
from library.training.run import Run
from library.training.schedules import create_schedule
from library.training.trackers import Trackers
from library.training.updates import prepare_updates

BASE, TRAINED, STATE, AVERAGE = "base weights", "trained weights", "optimizer state", "moving average"
GRADIENTS, KEPT, WORKING, BATCH = "gradients", "activations kept", "working set", "batch"

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class MicroBatchShape:
    """The size of a micro-batch.

    Attributes:
        rows: Pictures.
        resolution: Of each.
    """

    rows: int
    resolution: Resolution


@dataclass(frozen=True)
class Trial:
    """What one optimizer step takes.

    Attributes:
        peak: The most bytes on the device at once.
        components: What they were, by name.
        resident: Bytes that stay on the device between steps.
        operations: Floating-point operations.
        up: Bytes that travel to the device, the batch apart.
        down: Bytes that travel to the host.
        host: Bytes of weights and activations that wait on the host.
        trained: Trained numbers.
        batch: Bytes of a micro-batch.
    """

    peak: int
    components: dict[str, int]
    resident: int
    operations: float
    up: int
    down: int
    host: int
    trained: int
    batch: int


def try_step(
    config: RunConfig,
    family: ModelFamily,
    denoiser: nn.Module,
    text: TensorRecord,
    shape: MicroBatchShape,
    precision: Precision,
    *,
    cuda: bool,
    moves: bool | None = None,
) -> Trial:
    """This takes a step of a run with one process, whose latents and text features are cached.

    Args:
        config: The run.
        family: The model's parts.
        denoiser: On the meta device, in the type that its weights are loaded in.
        text: Features of as many captions, on any device.
        shape: Of the largest micro-batch.
        precision: Of the run.
        cuda: Whether the step is to run on a CUDA device, or on the host.
        moves: Whether weights and activations travel between device and host; by default with CUDA.
    """
    with _nothing_said(), contextlib.ExitStack() as modes:
        modes.enter_context(torch.random.fork_rng(devices=[]))  # the step seeds torch's own generator
        allocations = modes.enter_context(Allocations("cpu", hollow))
        if cuda:
            modes.enter_context(AsOnCuda())
        traffic = Traffic()
        run = _make_run(config, family, denoiser, text, shape, precision, allocations, traffic, cuda=cuda, moves=moves)
        return _count(run, allocations, traffic)


def plain_carriers(allocations: Allocations | None, traffic: Traffic) -> Carriers:
    """Copies that ``traffic`` counts, between the device that ``allocations`` watches and what stands for the host."""
    on_host = _ignore if allocations is None else allocations.leave_out
    return Carriers(
        functools.partial(PlainTransfers, traffic, on_host),
        PlainStash(traffic, on_host),
        functools.partial(PlainStateTransfers, traffic, on_host),
    )


def _ignore(tensor: Tensor) -> None:
    """Nobody counts."""


def _make_run(
    config: RunConfig,
    family: ModelFamily,
    denoiser: nn.Module,
    text: TensorRecord,
    shape: MicroBatchShape,
    precision: Precision,
    allocations: Allocations,
    traffic: Traffic,
    *,
    cuda: bool,
    moves: bool | None,
) -> Run:
    moving = cuda if moves is None else moves
    carriers = plain_carriers(allocations, traffic) if moving else Carriers(None, None, None)
    config = dataclasses.replace(config, memory=uncompiled(config.memory))
    allocations.start(BASE)
    denoiser = denoiser.to_empty(device=_HOST).eval().requires_grad_(False)
    job = job_of(config)
    target = torch.device("cuda" if cuda else "cpu")
    beside = job.load(config, family, device=torch.device("meta"), precision=precision, seed=0)
    beside = {name: module.to_empty(device=_HOST) for name, module in beside.items()}
    side = assemble(
        config, family, job, denoiser, beside, _HOST, precision, seed=0, optimizer_device=target, carriers=carriers
    )
    accelerator = cast(Any, _Accelerator(precision.mixed))
    batch = hollow_batch(family, text, shape, steered=config.control_net is not None)
    allocations.name(batch_tensors(batch), BATCH)
    run = trial_run(config, family, side, accelerator, shape, batch, precision)
    allocations.name(run.parameters, TRAINED)
    on_gradients(run.parameters, lambda gradient: allocations.name([gradient], GRADIENTS))
    if config.ema.use_ema and config.ema.ema_device != "cpu":
        allocations.start(AVERAGE)
        run.average = WeightAverage(_named(run.parameters), config.ema.ema_decay, on_host=False)
    prepare_updates(run, carriers)
    run.trainable.train()
    set_training_mode(run.optimizer, True)
    return run


def _count(run: Run, allocations: Allocations, traffic: Traffic) -> Trial:
    allocations.start(STATE)
    # what is where at a step's end, and in which order weights stepped, decides what the next one moves
    if traffic.host or run.config.memory.optimizer_state_on_host:
        optimize(run, 0)
    else:
        for parameter in run.parameters:
            parameter.grad = torch.empty_like(parameter)
        update_weights(run, 0)
        run.optimizer.zero_grad(set_to_none=True)
    allocations.name(_state_tensors(run.optimizer), STATE)
    allocations.start(WORKING)
    traffic.up = traffic.down = 0
    with _seen_at(run, lambda: allocations.rename(WORKING, KEPT)):
        optimize(run, 1)
    return Trial(
        peak=allocations.peak,
        components=allocations.at_peak(),
        resident=allocations.alive,
        operations=allocations.operations,
        up=traffic.up,
        down=traffic.down,
        host=traffic.host,
        trained=sum(parameter.numel() for parameter in run.parameters),
        batch=sum(tensor.nbytes for tensor in batch_tensors(next(run.batches))),
    )


def trial_run(
    config: RunConfig,
    family: ModelFamily,
    side: ModelSide,
    accelerator: Any,
    shape: MicroBatchShape,
    batch: Batch,
    precision: Precision,
) -> Run:
    """A run that takes any number of steps over one batch, with nothing cached, logged, saved or drawn."""
    accumulation = config.training.gradient_accumulation_steps
    steps = config.training.max_train_steps
    return Run(
        config=config,
        seed=0,
        job=job_of(config),
        family=family,
        accelerator=accelerator,
        plan=cast(BatchPlan, OneShape(shape, accumulation)),
        batches=(batch for _ in itertools.count()),
        denoiser=side.denoiser,
        trainable=side.trainable,
        text=cast(Any, _AsItIs()),
        text_encoders={},
        vae=None,
        optimizer=side.created.optimizer,
        schedule=create_schedule(config.optimizer, side.created.optimizer, max_steps=steps),
        max_steps=steps,
        first_step=0,
        weight_dtype=precision.frozen,
        trackers=cast(Trackers, None),
        history=LossHistory(),
        metadata={},
        swap=side.swap,
        compiling=side.compiling,
    )


def hollow_batch(family: ModelFamily, text: TensorRecord, shape: MicroBatchShape, *, steered: bool = False) -> Batch:
    """A batch of this shape, with control pictures if it is ``steered``; without numbers inside ``Hollow``."""
    latent_format, rows = family.latents.format, shape.rows
    width, height = shape.resolution
    size = (rows, latent_format.channels, *latent_format.latent_size(shape.resolution))
    return Batch(
        keys=tuple(map(str, range(rows))),
        visits=(0,) * rows,
        captions=("",) * rows,
        dropped=torch.zeros(rows, dtype=torch.bool),
        loss_weight=torch.ones(rows),
        resolution=shape.resolution,
        noise=torch.empty(size),
        latents=torch.empty(size),
        text=type(text).from_tensors(
            {name: torch.empty(value.shape, dtype=value.dtype) for name, value in text.tensors().items()}
        ),
        control=torch.empty(rows, 3, height, width) if steered else None,
    )


def batch_tensors(batch: Batch) -> list[Tensor]:
    """The tensors of a batch."""
    values = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    text = [] if batch.text is None else list(batch.text.tensors().values())
    return [*text, *(value for value in values if isinstance(value, Tensor))]


@dataclass(frozen=True)
class OneShape:
    """A plan whose micro-batches all have one shape."""

    shape: MicroBatchShape
    accumulation: int

    def step(self, step: int) -> tuple[MicroBatch, ...]:
        """See ``BatchPlan``."""
        visits = tuple(Visit(row, step) for row in range(self.shape.rows))
        samples = self.shape.rows * self.accumulation
        return (MicroBatch(step, 0, 0, self.shape.resolution, visits, samples),) * self.accumulation


class _AsItIs:
    """A text strategy for features that nothing is dropped from."""

    def drop(self, text: TensorRecord, dropped: Tensor) -> TensorRecord:
        """See ``TextEncodingStrategy``."""
        return text


class _Accelerator:
    """As much of accelerate as a step asks for, for one process on the host."""

    num_processes, process_index, is_main_process = 1, 0, True
    device, scaler = _HOST, None

    def __init__(self, mixed: str):
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed)

    def autocast(self) -> Any:
        return torch.autocast("cpu", self._dtype, enabled=self._dtype is not None)

    def backward(self, loss: Tensor) -> None:
        # ``backward`` itself would take the modes of functions away from what is computed again
        engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
        ones = (torch.ones_like(loss),)
        engine.run_backward((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)

    def clip_grad_norm_(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def reduce(self, sums: Tensor, reduction: str) -> Tensor:
        return sums.new_zeros(sums.shape)


def uncompiled(memory: MemoryConfig) -> MemoryConfig:
    """The options without compilation, which needs numbers; compiled blocks keep no more than these."""
    compilation = {"torch_compile", "dynamo_backend", "compile_dynamic"}
    fields: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(memory) if field.name in compilation
    }
    return dataclasses.replace(memory, **fields)


def _named(parameters: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    return {str(number): parameter for number, parameter in enumerate(parameters)}


def _state_tensors(optimizer: Any) -> Iterator[Any]:
    for state in optimizer.state.values():
        yield from torch.utils._pytree.tree_leaves(state)


@contextlib.contextmanager
def _seen_at(run: Run, act: Any) -> Iterator[None]:
    """Call ``act`` whenever a backward pass is about to begin."""
    backward = run.accelerator.backward

    def seen(loss: Tensor) -> None:
        act()
        backward(loss)

    run.accelerator.backward = seen  # type: ignore[method-assign]
    try:
        yield
    finally:
        run.accelerator.backward = backward  # type: ignore[method-assign]


@contextlib.contextmanager
def _nothing_said() -> Iterator[None]:
    """What the run says when it is made, it says when it is made in earnest."""
    loggers = [logging.getLogger(name) for name in ("library", "networks")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
