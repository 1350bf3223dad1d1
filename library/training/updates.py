"""How gradients become weights, where that is not the optimizer's step over all of them."""

import contextlib

import torch
from torch import nn
from torch.optim import Optimizer

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.config.updates import single_step_options
from library.optimizers.one_by_one import OneByOne, steps_apart
from library.optimizers.rounding import Rounding
from library.training.fused_backward import FusedBackward
from library.training.optimizers import OPTIMIZERS, create_optimizer
from library.training.run import Run


def prepare_updates(run: Run) -> None:
    """This gives the run what ``--stochastic_rounding`` and ``--fused_backward_pass`` ask for."""
    training, memory = run.config.training, run.config.memory
    if not single_step_options(training, memory):
        return
    optimizer: Optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    swap = run.swap
    with swap.stand_ins() if swap is not None else contextlib.nullcontext():  # it looks where the state must be
        run.one_by_one = OneByOne(optimizer, Rounding(run.seed) if training.stochastic_rounding else None)
    if memory.fused_backward_pass:
        names = {parameter: name for name, parameter in run.trainable.named_parameters()}
        parameters = run.parameters
        called = [names.get(parameter, f"parameter {number}") for number, parameter in enumerate(parameters)]
        stepped = swap.changed if swap is not None else None
        run.fused_backward = FusedBackward(run.one_by_one, parameters, called, stepped)
        if swap is not None:
            swap.settle = run.fused_backward.settle


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
