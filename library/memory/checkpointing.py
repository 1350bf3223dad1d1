"""Gradient checkpointing: some blocks forget their inner activations and compute them again in the backward pass."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

Checkpoint = Callable[..., Any]
"""``(forward, *args) -> answer``: runs a block so that it keeps less."""

_ATTENTION = (
    "aten::_scaled_dot_product_",  # torch's kernels: flash, efficient, cuDNN, and the CPU's
    "flash_attn::",
    "flash_attn_3::",
    "xformers",
)


def recompute_all(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block that keeps its inputs only (Chen et al. 2016, arXiv:1604.06174)."""
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def recompute_all_but_attention(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block that keeps its inputs and what its attention answers: all else is computed again."""
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_attention_kept, **kwargs)


def _attention_kept() -> tuple["_Keeping", "_Answering"]:
    """What surrounds a block's pass, and its recomputation.

    torch's own selective checkpointing wants the recomputation to do what the first pass did, operation by operation;
    with block swap it copies weights, too.
    """
    kept: deque[Any] = deque()
    return _Keeping(kept), _Answering(kept)


class _Keeping(TorchDispatchMode):
    """Inside, what attention answers is kept."""

    def __init__(self, kept: deque[Any]):
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if _is_attention(func):
            # without the graph that autograd is going to hang onto the answer
            self._kept.append(tree_map_only(Tensor, Tensor.detach, answer))
        return answer


class _Answering(TorchDispatchMode):
    """Inside, attention answers what was kept, in the same order."""

    def __init__(self, kept: deque[Any]):
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self._kept.popleft() if _is_attention(func) else func(*args, **(kwargs or {}))


def _is_attention(operator: Any) -> bool:
    name: str = operator.name()
    return name.startswith(_ATTENTION) and "backward" not in name


def enable_checkpointing(blocks: Sequence[nn.Module], interval: int, run: Checkpoint = recompute_all) -> None:
    """This makes every ``interval``-th block keep as little as ``run`` does.

    Each block's ``forward`` is wrapped on the instance, so modules, hooks and state-dict keys stay. The wrapper acts
    whenever gradients are enabled, whatever needs them: inputs, weights or an adapter inside. Hooks on the block itself
    run in the forward pass only; those of its children run again in the recomputation, which follows the block's
    backward pre-hooks.

    Args:
        blocks: The model's blocks in forward order.
        interval: Blocks 0, n, 2n, ... are checkpointed; 1 means all.
        run: How they are run.

    Raises:
        ValueError: The interval is not positive, or a block is checkpointed already.
    """
    if interval < 1:
        raise ValueError(f"the interval of gradient checkpointing is {interval}; it must be at least 1")
    for block in blocks[::interval]:
        if getattr(block.forward, "func", None) is _checkpointed:
            raise ValueError(f"a {type(block).__name__} is checkpointed already; enable checkpointing once")
        # A partial over a bound method, unlike a closure, follows the block through deepcopy and pickle.
        block.forward = partial(_checkpointed, run, block.forward)  # type: ignore[method-assign]


def _checkpointed(run: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return run(forward, *args, **kwargs)
