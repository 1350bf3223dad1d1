"""Samplers for flow matching. Each is a plain function with one signature: ``sampler(denoise, x, sigmas)``.

``denoise(x_t, sigma)`` answers with the estimate of x_0; ``sigmas`` fall strictly, from at most 1 down to 0 or above.
Coefficients are computed in fp64 and ``x`` is kept in fp32, whatever the denoiser computes in.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, Tensor], None]


class Sampler(Protocol):
    """What every sampler of this module looks like."""

    def __call__(self, denoise: Denoise, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
        """This goes from the noised latents ``x`` at ``sigmas[0]`` to the latents at ``sigmas[-1]``.

        Args:
            denoise: Noised latents and their noise level to the estimate of x_0.
            x: Noised latents (B, C, h, w) at ``sigmas[0]``.
            sigmas: Noise levels (steps + 1,), falling strictly.
            callback: Called after each step with its number (from 0) and the estimate of x_0 that it used.

        Returns:
            Latents (B, C, h, w), fp32.
        """
        ...


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """This is Euler's method on the probability-flow ODE: first order, one question per step. See ``Sampler``."""
    x = x.float()
    levels = _levels(sigmas)
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x_0 = denoise(x, sigma).float()
        x = _move(x, x_0, sigma, sigma_next)
        if callback is not None:
            callback(step, x_0)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """This is Heun's method (Karras et al. 2022, arXiv:2206.00364, alg. 1), without churn. See ``Sampler``.

    Second order; two questions per step, except for a step to zero, which asks once.
    """
    x = x.float()
    levels = _levels(sigmas)
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x_0 = denoise(x, sigma).float()
        moved = _move(x, x_0, sigma, sigma_next)
        if sigma_next > 0:
            velocity = (x - x_0) / sigma
            velocity_next = (moved - denoise(moved, sigma_next).float()) / sigma_next
            moved = x + (sigma_next - sigma) * (velocity + velocity_next) / 2
        x = moved
        if callback is not None:
            callback(step, x_0)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """This is DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, alg. 2) for flow. See ``Sampler``.

    Second order; one question per step. With alpha = 1 - sigma and lambda = log(alpha / sigma), the factor
    ``-alpha_t (exp(-h) - 1)`` of the paper is ``1 - sigma_t / sigma_s``, so the first-order step is Euler's. Lambda is
    infinite at sigma 1 and 0: a step that touches one of them, or follows a step that does, is of first order.
    """
    x = x.float()
    levels = _levels(sigmas)
    previous_x_0, previous_h = None, math.inf
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x_0 = denoise(x, sigma).float()
        h = _half_log_snr(sigma_next) - _half_log_snr(sigma)
        extrapolated = x_0
        if previous_x_0 is not None and math.isfinite(h) and math.isfinite(previous_h):
            extrapolated = x_0 + (h / (2 * previous_h)) * (x_0 - previous_x_0)
        x = _move(x, extrapolated, sigma, sigma_next)
        previous_x_0, previous_h = x_0, h
        if callback is not None:
            callback(step, x_0)
    return x


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def _levels(sigmas: Tensor) -> list[float]:
    levels = [float(sigma) for sigma in sigmas.double().tolist()]
    falling = all(sigma > sigma_next for sigma, sigma_next in pairwise(levels))
    if len(levels) < 2 or not falling or levels[0] > 1 or levels[-1] < 0:
        raise ValueError(f"sigmas must fall strictly within 1..0 and be at least two, not {levels}")
    return levels


def _move(x: Tensor, x_0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The point at ``sigma_next`` of the straight line from ``x`` at ``sigma`` to ``x_0`` at 0."""
    ratio = sigma_next / sigma
    return ratio * x + (1 - ratio) * x_0


def _half_log_snr(sigma: float) -> float:
    if sigma >= 1:
        return -math.inf
    return math.log((1 - sigma) / sigma) if sigma > 0 else math.inf
