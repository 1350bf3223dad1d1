"""Floating-point operations of torch's operations, with what ``torch.utils.flop_counter`` lacks or takes for another.

A multiplication and an addition are two. Attention's backward pass counts twice its forward pass, whatever a kernel
computes again; torch takes the gradient of a grouped convolution's weight for that of a full one.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

_MATRICES = 4  # query x key and weights x value, two operations each


def operations(func: Any, args: Any, kwargs: Mapping[str, Any], answer: Any) -> float:
    """How many operations a call took; 0 for what is no matrix product.

    Args:
        func: What was called, as a dispatch mode sees it.
        args: With this.
        kwargs: And this.
        answer: What it gave.
    """
    count = _count_of(func)
    return 0 if count is None else float(count(args, kwargs, answer))


@functools.cache
def _count_of(func: Any) -> Callable[[Any, Mapping[str, Any], Any], float] | None:
    """From an operation's arguments and answer, how many it took; None for what is no matrix product."""
    packet = func._overloadpacket
    if packet is torch.ops.aten.convolution_backward:
        return lambda args, kwargs, answer: _convolution_backward(args)
    name = packet.__name__
    if name.startswith("_scaled_dot_product") and "attention" in name:
        if name.endswith("_backward"):
            return lambda args, kwargs, answer: 2 * _attention(*args[1:4])
        return lambda args, kwargs, answer: _attention(*args[:3])
    if packet in flop_registry:
        return lambda args, kwargs, answer: flop_registry[packet](*args, **kwargs, out_val=answer)
    return None


def _attention(q: Any, k: Any, v: Any) -> float:
    """Of q (B, heads, N, K), k (B, heads, M, K) and v (B, heads, M, K)."""
    return _MATRICES / 2 * math.prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])


def _convolution_backward(args: Any) -> float:
    gradient, _, weight = args[:3]
    transposed, needed = args[7], args[10]
    positions = (args[1] if transposed else gradient).shape
    forward = 2 * positions[0] * math.prod(positions[2:]) * weight.numel()
    return float(forward * (needed[0] + needed[1]))
