"""Skip-layer guidance: the denoiser with some of its blocks left out."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from library.nn.skipping import skipped_blocks


def skipped_layers(blocks: Sequence[nn.Module], layers: Sequence[int]) -> AbstractContextManager[None]:
    """Inside this context the blocks numbered ``layers`` leave the image tokens as they are.

    Args:
        blocks: The denoiser's blocks in forward order.
        layers: Which of them to skip, counted from 0.

    Raises:
        ValueError: There is no block of that number.
    """
    return skipped_blocks(blocks, layers, _pass_through)


def _pass_through(x: Tensor, *others: Any) -> Tensor:
    return x
