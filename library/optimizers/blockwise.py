"""Numbers in 8 bits: blocks of a tensor, each with its own smallest value and step (Dettmers et al. 2022,
arXiv:2110.02861, with 256 equal steps between a block's extremes).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048
_STEPS = 255


@dataclass(frozen=True)
class Blockwise:
    """A tensor in 8 bits.

    Attributes:
        codes: uint8, one per number: (numel,).
        low: The smallest number of each block: (blocks,).
        scale: The step between codes in each block: (blocks,).
    """

    codes: Tensor
    low: Tensor
    scale: Tensor

    def numbers(self, shape: torch.Size) -> Tensor:
        """The tensor again, fp32, in ``shape``."""
        low, scale = (per_block.repeat_interleave(BLOCK)[: len(self.codes)] for per_block in (self.low, self.scale))
        return torch.addcmul(low, self.codes.float(), scale).view(shape)


def blockwise(numbers: Tensor) -> Blockwise:
    """This stores ``numbers`` in 8 bits each, rounded to the nearest step of their block; its extremes stay exact."""
    flat = numbers.float().flatten()
    missing = -len(flat) % BLOCK
    blocks = torch.cat((flat, flat[-1:].expand(missing))).view(-1, BLOCK)  # the last number changes no extreme
    low, high = blocks.aminmax(dim=1)
    scale = (high - low) / _STEPS
    divisor = torch.where(scale > 0, scale, 1.0)  # a block of equal numbers has no step
    codes = ((blocks - low[:, None]) / divisor[:, None]).round_().clamp_(0, _STEPS).to(torch.uint8)
    return Blockwise(codes.flatten()[: len(flat)].clone(), low, scale)
