"""Loss per element, with kohya's formulas: they compare estimates of x_0. And what masks make of it."""

import math

import torch
from torch import Tensor

from library.config.loss import LossConfig


def weight(scheme: str, sigma: Tensor) -> Tensor:
    """This gives the weight of the x_0 loss at each noise level, by ``--weighting_scheme``.

    Args:
        scheme: One of ``library.config.flow.WEIGHTING_SCHEMES``.
        sigma: Noise levels above 0.

    Returns:
        Weights, of the shape of ``sigma``.
    """
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def huber_parameter(config: LossConfig, sigma: Tensor) -> Tensor:
    """This gives c of huber and smooth_l1 at each noise level, by ``--huber_schedule``.

    Args:
        config: The loss options; no schedule means constant.
        sigma: Noise levels.

    Returns:
        c, of the shape of ``sigma``.
    """
    if config.huber_schedule in (None, "constant"):
        return torch.full_like(sigma, config.huber_c * config.huber_scale)
    if config.huber_schedule == "exponential":
        return torch.exp(math.log(config.huber_c) * sigma) * config.huber_scale
    raise ValueError(f"huber_schedule {config.huber_schedule!r} is not for flow matching; use constant or exponential")


def elementwise(config: LossConfig, difference: Tensor, c: Tensor) -> Tensor:
    """This measures each element of the difference, by ``--loss_type``.

    ``sqrt(d^2 + c^2) - c`` is computed as ``d^2 / (sqrt(d^2 + c^2) + c)``, which keeps its digits when d is small.

    Args:
        config: The loss options.
        difference: What was answered minus what should have been.
        c: Where huber and smooth_l1 turn linear; broadcastable to ``difference``.

    Returns:
        The loss, of the shape of ``difference``.
    """
    if config.loss_type == "l2":
        return difference**2
    if config.loss_type == "l1":
        return difference.abs()
    squared = difference**2
    pseudo_huber = 2 * squared / (torch.sqrt(squared + c**2) + c)
    return c * pseudo_huber if config.loss_type == "huber" else pseudo_huber


def masked_mean(per_element: Tensor, mask: Tensor | None, *, normalize: bool) -> Tensor:
    """This gives the loss of each sample.

    Args:
        per_element: The loss of each element (B, C, h, w).
        mask: Its weight (B, 1, h, w), or None: 1 everywhere.
        normalize: Divide each sample's loss by the mean of its mask, so that the size of the masked area doesn't
            matter. A mask that is zero everywhere gives 0.

    Returns:
        The mean over all of a sample's elements (B,).
    """
    if mask is None:
        return per_element.mean(dim=(1, 2, 3))
    weighted = (per_element * mask).mean(dim=(1, 2, 3))
    if not normalize:
        return weighted
    area = mask.mean(dim=(1, 2, 3))
    return weighted / torch.where(area > 0, area, 1)
