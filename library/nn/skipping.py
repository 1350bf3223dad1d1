"""Blocks of a model left out for a while, without the model knowing: what skip-layer guidance needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def skipped_blocks(blocks: Sequence[nn.Module], layers: Sequence[int], instead: Callable[..., Any]) -> Iterator[None]:
    """Inside this context the blocks numbered ``layers`` do something else.

    Args:
        blocks: The model's repeated blocks in forward order.
        layers: Which of them to skip, counted from 0.
        instead: What is called in place of their ``forward``, with the same arguments.

    Raises:
        ValueError: There is no block of that number.
    """
    if unknown := sorted(layer for layer in layers if not 0 <= layer < len(blocks)):
        raise ValueError(f"there is no block {unknown}: the model has blocks 0 to {len(blocks) - 1}")
    skipped = [blocks[layer] for layer in sorted(set(layers))]
    forwards = [block.__dict__.get("forward") for block in skipped]  # None unless someone wrapped the block before
    for block in skipped:
        block.forward = instead  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, forward in zip(skipped, forwards):
            del block.forward
            if forward is not None:
                block.forward = forward
