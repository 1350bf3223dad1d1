"""Skip-layer guidance: the denoiser with some of its blocks left out.

Stability's guidance for 3.5 medium compares the model's answer with that of the model without a few middle blocks.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from library.nn.skipping import skipped_blocks


def skipped_layers(blocks: Sequence[nn.Module], layers: Sequence[int]) -> AbstractContextManager[None]:
    """Inside this context the blocks numbered ``layers`` leave both of their streams as they are.

    Args:
        blocks: The denoiser's joint blocks in forward order.
        layers: Which of them to skip, counted from 0.

    Raises:
        ValueError: There is no block of that number.
    """
    return skipped_blocks(blocks, layers, _pass_through)


def _pass_through(context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return context, x
