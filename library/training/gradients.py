"""The gradients of a step: summed over processes, measured, clipped."""

import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.training.shards import clip_gradients
from library.training.step_run import StepRun

_BUNDLE_NUMBERS = 1 << 24


def sum_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Add up the gradients of all processes, in place.

    An adapter's forward is patched into the denoiser, so DistributedDataParallel never sees it and its averaging
    wouldn't run. Each process's loss is its share of the whole step's mean, so the sum is the step's gradient. A
    process without a micro-batch in this step contributes zeros. Small gradients travel together, and never all at
    once: a whole model's would need as much memory again.
    """
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for some in bundles(parameters, _BUNDLE_NUMBERS):
        gradients = [parameter.grad for parameter in some if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat, op=torch.distributed.ReduceOp.SUM)
        for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(summed.view_as(gradient))


def bundles(parameters: list[nn.Parameter], numbers: int) -> Iterator[list[nn.Parameter]]:
    """The parameters in groups of one type with about so many numbers; none is cut."""
    bundle: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(other.numel() for other in bundle) + parameter.numel() > numbers
        if bundle and (full or parameter.dtype != bundle[0].dtype):
            yield bundle
            bundle = []
        bundle.append(parameter)
    if bundle:
        yield bundle


def gradient_norm(run: StepRun, parameters: list[nn.Parameter]) -> Tensor:
    """The norm of all gradients together before clipping; clips them to ``--max_grad_norm`` when it is above 0."""
    limit = run.config.optimizer.max_grad_norm or math.inf
    if run.sharded:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return clip_gradients(gradients, limit, run.device)
    return run.accelerator.clip_grad_norm_(parameters, limit)
