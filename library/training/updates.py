"""How gradients become weights, where that is not the optimizer's step over all of them."""

import contextlib
import functools
import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.config.updates import single_step_options
from library.memory.state_offload import StateOffload
from library.memory.state_transfers import CudaStateTransfers, StateTransfers
from library.optimizers.kahan import KahanSummation, forget_rests
from library.optimizers.one_by_one import Narrowing, OneByOne, steps_apart
from library.optimizers.rounding import Rounding
from library.training.fused_backward import FusedBackward
from library.training.guarded_update import GuardedUpdate, takes_guard
from library.training.optimizers import OPTIMIZERS, create_optimizer
from library.training.placing import Carriers
from library.training.run import Run

log = logging.getLogger(__name__)


def prepare_updates(run: Run, carriers: Carriers | None = None) -> None:
    """This gives the run what steps its weights one by one, where options ask for that, or what guards its updates.

    Args:
        run: Its optimizer's state has been restored.
        carriers: Take the place of the device's own.
    """
    training, memory = run.config.training, run.config.memory
    optimizer: Optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    if not training.kahan_summation:
        forget_rests(optimizer)
    if not single_step_options(training, memory):
        run.guard = guarded_update(run, optimizer)
        return
    parameters, swap = run.parameters, run.swap
    narrowing: Narrowing | None = None
    if training.kahan_summation:
        narrowing = KahanSummation()
    elif training.stochastic_rounding:
        narrowing = Rounding(run.seed)
    with swap.stand_ins() if swap is not None else contextlib.nullcontext():  # it looks where the state must be
        run.one_by_one = OneByOne(optimizer, narrowing, state_home(run, optimizer, carriers))
    if memory.fused_backward_pass:
        names = {parameter: name for name, parameter in run.trainable.named_parameters()}
        called = [names.get(parameter, f"parameter {number}") for number, parameter in enumerate(parameters)]
        stepped = swap.changed if swap is not None else None
        run.fused_backward = FusedBackward(run.one_by_one, parameters, called, stepped)
        if swap is not None:
            swap.settle = run.fused_backward.settle


def guarded_update(run: Run, optimizer: Optimizer) -> GuardedUpdate | None:
    """What lets the device drop updates; None where the host has to wait for each step's numbers before it updates."""
    scaled = run.accelerator.scaler is not None  # the loss scaler decides on updates itself
    # an activation's memory is free for others once the host sees that its copy has ended: ahead of the device by a
    # step, it would see two steps' activations held
    offloaded = run.config.memory.cpu_offload_checkpointing
    waits = run.sharded or scaled or offloaded or not takes_guard(optimizer)
    return None if waits else GuardedUpdate(run.optimizer, optimizer)


def state_home(run: Run, optimizer: Optimizer, carriers: Carriers | None) -> StateOffload | None:
    """Where the optimizer's state waits between steps; None: where it is made."""
    if not run.config.memory.optimizer_state_on_host:
        return None
    transfers = state_transfers_to(run.device) if carriers is None else carriers.states
    if transfers is None:
        log.info("no accelerator: the optimizer's state is in host memory already, nothing moves")
        return None
    expected = run.parameters[::-1] if run.config.memory.fused_backward_pass else run.parameters
    log.info("the optimizer's state waits in host memory; tensors below 64 KiB stay on the device")
    return StateOffload(optimizer, expected, run.device, transfers())


def state_transfers_to(device: torch.device) -> Callable[[], StateTransfers] | None:
    """What moves an optimizer's state between the host and a device; None if the device is the host."""
    return None if device.type == "cpu" else functools.partial(CudaStateTransfers, device)


def check_updates(config: RunConfig) -> None:
    """This tries whether an optimizer that is known by its class alone can step one weight at a time.

    Raises:
        ConfigError: It can't, and an option asks for it.
    """
    asking = single_step_options(config.training, config.memory)
    if not asking or config.optimizer.name.lower() in OPTIMIZERS:
        return
    optimizer = _small_problem(config)
    try:
        # schedule-free optimizers have modes and move all weights when they change
        apart = not hasattr(optimizer, "eval") and steps_apart(optimizer, _small_problem(config))
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        apart = False  # an optimizer that needs all parameters at hand fails in its own way
    if not apart:
        raise ConfigError(
            f"--{asking[0]} steps one weight at a time, and with {config.optimizer.name} that is not the same as a "
            "step of all weights together; remove it, or use an optimizer such as AdamW or CAME"
        )


def _small_problem(config: RunConfig) -> Optimizer:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, number, generator=generator)) for number in (3, 5)]
    rate = config.optimizer.learning_rate
    assert rate is not None
    return create_optimizer(
        config.optimizer.name,
        config.optimizer.optimizer_args,
        [{"params": weights, "lr": rate}],
        learning_rate=rate,
        device=torch.device("cpu"),
    ).optimizer
