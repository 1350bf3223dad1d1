"""Embeddings of scalars and vectors: the noise level, the pooled text.

Shapes: B batch, C channels, D width.
"""

import math

import torch
from torch import Tensor, nn

MAX_PERIOD = 10000
"""The longest wavelength of every sinusoid here, in units of its argument over 2 pi."""


def timestep_sinusoid(timestep: Tensor, channels: int) -> Tensor:
    """This embeds timesteps as cosines and sines of falling frequency (Vaswani et al. 2017, arXiv:1706.03762).

    Args:
        timestep: (B,), on 0..1000. It should come in fp32: bf16 can't tell neighbouring timesteps apart.
        channels: How many numbers per timestep; even.

    Returns:
        (B, C), fp32 whatever the input: the cosines, then the sines.
    """
    half = channels // 2
    frequency = torch.exp(
        -math.log(MAX_PERIOD) / half * torch.arange(half, dtype=torch.float32, device=timestep.device)
    )
    angle = timestep.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # (B, C)


def sincos_1d(position: Tensor, channels: int) -> Tensor:
    """This embeds positions as sines and cosines of falling frequency, computed in fp64.

    Args:
        position: (..., N), any real numbers.
        channels: How many numbers per position; even.

    Returns:
        (..., N, C), fp32: the sines, then the cosines.
    """
    half = channels // 2
    frequency = 1.0 / MAX_PERIOD ** (torch.arange(half, dtype=torch.float64, device=position.device) / half)
    angle = position.double()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()  # (..., N, C)


class MLPEmbedder(nn.Module):
    """Two layers that bring a vector to the model's width."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, vector: Tensor) -> Tensor:
        """(B, C) -> (B, D)."""
        return self.mlp(vector)
