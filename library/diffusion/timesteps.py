"""Training densities of noise levels.

Each density is given by its quantile function (inverse CDF), in fp64: a sample's noise level is a function of one
number from (0, 1). A small number means a low level in every density, so runs that differ in the density are paired.
"""

import math

import torch
from torch import Tensor

SMALLEST_SIGMA = 1e-4
"""Below it a picture is its own noised version, and weights such as sigma^-1 explode."""


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """This is the quantile function of ``sigmoid(mean + std * normal)`` (Esser et al. 2024, arXiv:2403.03206, eq. 19).

    Args:
        u: Numbers of the open interval (0, 1), fp64.
        mean: Location; above 0 means more noise.
        std: Scale, above 0.

    Returns:
        Noise levels, of the shape of ``u``.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float) -> Tensor:
    """This is the quantile function of mode sampling with heavy tails (Esser et al. 2024, arXiv:2403.03206, eq. 20).

    The paper's ``1 - r - s (cos^2(pi r / 2) - 1 + r)`` falls in its argument; with ``r = 1 - u`` it rises.

    Args:
        u: Numbers of the open interval (0, 1), fp64.
        scale: -1 to 2 / (pi - 2); 0 is uniform.

    Returns:
        Noise levels, of the shape of ``u``.
    """
    return u - scale * (torch.sin(math.pi * u / 2) ** 2 - u)


def table_level(u: Tensor, levels: int) -> Tensor:
    """This takes the nearest level below from a table of evenly spaced ones, 0 to 1 - 1 / ``levels``.

    The table is the one of discrete flow schedules, ``1 - linspace(1, 1 / levels, levels)``, with its rounding.

    Args:
        u: Noise levels in 0..1, fp64.
        levels: Entries of the table.

    Returns:
        Noise levels, of the shape of ``u``.
    """
    index = torch.floor(u * levels).clamp(max=levels - 1)
    return 1.0 - (1.0 + index * ((1 / levels - 1.0) / (levels - 1)))


def truncating(sigma: Tensor, levels: int) -> Tensor:
    """This rounds noise levels to fp32 so that the integer part of ``levels * sigma`` is the same as before.

    A level that rounding would carry over a whole number moves by a few last places instead.

    Args:
        sigma: Noise levels, fp64.
        levels: What they are multiplied by, in fp32, before they are truncated.

    Returns:
        Noise levels, fp32, of the shape of ``sigma``.
    """
    rounded = sigma.float()
    wanted, got = torch.floor(sigma * levels), torch.floor(rounded * levels)
    # two eps: of one, half may be lost again in the product
    return rounded * (1 + torch.sign(wanted - got.double()).float() * 2 * torch.finfo(torch.float32).eps)


def shift(sigma: Tensor, factor: float) -> Tensor:
    """This moves noise levels up (factor above 1) or down (Esser et al. 2024, arXiv:2403.03206, eq. 23).

    Args:
        sigma: Noise levels in 0..1.
        factor: The shift, above 0; 1 changes nothing.

    Returns:
        Noise levels, of the shape of ``sigma``; 0 and 1 stay where they are.
    """
    return factor * sigma / (1 + (factor - 1) * sigma)


def shift_for_tokens(tokens: int) -> float:
    """This gives the shift for a picture of ``tokens`` tokens, so that larger pictures are trained at more noise.

    The logarithm of the shift is linear in the tokens through (256, 0.5) and (4096, 1.15), as in FLUX. Above 4096 that
    would explode; there the shift goes on as the square root of the tokens (Esser et al. 2024, arXiv:2403.03206,
    eq. 23).

    Args:
        tokens: Tokens of the denoiser, at least 1.

    Returns:
        The shift factor.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}")
    known = min(tokens, 4096)
    at_known = math.exp(0.5 + (1.15 - 0.5) * (known - 256) / (4096 - 256))
    return at_known * math.sqrt(tokens / known)
