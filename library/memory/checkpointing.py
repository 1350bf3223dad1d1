"""Gradient checkpointing: some blocks forget their inner activations and compute them again in the backward pass."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.memory.activation_offload import ActivationOffload


def enable_checkpointing(blocks: Sequence[nn.Module], interval: int, offload: ActivationOffload | None = None) -> None:
    """This makes every ``interval``-th block keep its inputs only (Chen et al. 2016, arXiv:1604.06174).

    Each block's ``forward`` is wrapped on the instance, so modules, hooks and state-dict keys stay. The wrapper acts
    whenever gradients are enabled, whatever needs them: inputs, weights or an adapter inside. Hooks on the block itself
    run in the forward pass only; those of its children run again in the recomputation, which follows the block's
    backward pre-hooks.

    Args:
        blocks: The model's blocks in forward order.
        interval: Blocks 0, n, 2n, ... are checkpointed; 1 means all.
        offload: Where their inputs wait for the backward pass; None: on the device.

    Raises:
        ValueError: The interval is not positive, or a block is checkpointed already.
    """
    if interval < 1:
        raise ValueError(f"the interval of gradient checkpointing is {interval}; it must be at least 1")
    for block in blocks[::interval]:
        if getattr(block.forward, "func", None) is _checkpointed:
            raise ValueError(f"a {type(block).__name__} is checkpointed already; enable checkpointing once")
        # A partial over a bound method, unlike a closure, follows the block through deepcopy and pickle.
        run = partial(checkpoint, use_reentrant=False) if offload is None else offload.run
        block.forward = partial(_checkpointed, run, block.forward)  # type: ignore[method-assign]


def _checkpointed(run: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return run(forward, *args, **kwargs)
