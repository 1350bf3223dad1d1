"""Skip-layer guidance: the denoiser with some of its blocks left out, without the model knowing.

Stability's guidance for 3.5 medium compares the model's answer with that of the model without a few middle blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def skipped_layers(blocks: Sequence[nn.Module], layers: Sequence[int]) -> Iterator[None]:
    """Inside this context the blocks numbered ``layers`` leave both of their streams as they are.

    Args:
        blocks: The denoiser's joint blocks in forward order.
        layers: Which of them to skip, counted from 0.

    Raises:
        ValueError: There is no block of that number.
    """
    if unknown := sorted(layer for layer in layers if not 0 <= layer < len(blocks)):
        raise ValueError(f"there is no block {unknown}: the model has blocks 0 to {len(blocks) - 1}")
    skipped = [blocks[layer] for layer in sorted(set(layers))]
    forwards = [block.__dict__.get("forward") for block in skipped]  # None unless someone wrapped the block before
    for block in skipped:
        block.forward = _pass_through  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, forward in zip(skipped, forwards):
            del block.forward
            if forward is not None:
                block.forward = forward


def _pass_through(context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return context, x
