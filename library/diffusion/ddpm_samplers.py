"""Samplers for models with a schedule of variances, in the coordinates of Karras et al. (2022, arXiv:2206.00364).

There ``x = x_0 + level * noise``, with ``level = sqrt((1 - a) / a)``: pure noise is level 14.6 for the published
schedule, not 1. Each sampler is a plain function with the signature of ``library.diffusion.samplers.Sampler``;
``denoise(x, level)`` answers with the estimate of x_0. Coefficients are computed in fp64, ``x`` is kept in fp32.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from library.diffusion.samplers import Callback, Denoise

RHO = 7.0
"""The exponent of Karras et al.'s steps."""

NoiseOfStep = Callable[[int], Tensor]
"""Fresh noise, of the shape of the latents, for a step's number."""


def euler(denoise: Denoise, x: Tensor, levels: Tensor, *, callback: Callback | None = None) -> Tensor:
    """This is Euler's method. Over the timesteps of DDIM (Song et al. 2020, arXiv:2010.02502) it is DDIM."""
    x = x.float()
    for step, (level, following) in enumerate(pairwise(_checked(levels))):
        x_0 = denoise(x, level).float()
        x = _towards(x, x_0, following / level)
        _tell(callback, step, x_0)
    return x


def euler_ancestral(
    denoise: Denoise, x: Tensor, levels: Tensor, *, noise: NoiseOfStep, callback: Callback | None = None
) -> Tensor:
    """This goes further down than Euler's method, and adds fresh noise up to the next level."""
    x = x.float()
    for step, (level, following) in enumerate(pairwise(_checked(levels))):
        x_0 = denoise(x, level).float()
        up = math.sqrt(following**2 * (level**2 - following**2) / level**2)
        x = _towards(x, x_0, math.sqrt(following**2 - up**2) / level)
        if up:
            x = x + up * noise(step).to(x)
        _tell(callback, step, x_0)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: Tensor, *, callback: Callback | None = None) -> Tensor:
    """This is DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2); a step to 0 is of first order."""
    x, before = x.float(), None
    for step, (level, following) in enumerate(pairwise(_checked(levels))):
        x_0 = denoise(x, level).float()
        aim, h = x_0, _log_ratio(level, following)
        if before is not None and following > 0:
            x_0_before, h_before = before
            aim = x_0 + h / (2 * h_before) * (x_0 - x_0_before)
        x = _towards(x, aim, following / level)
        before = (x_0, h)
        _tell(callback, step, x_0)
    return x


def unipc(denoise: Denoise, x: Tensor, levels: Tensor, *, callback: Callback | None = None) -> Tensor:
    """This is UniPC (Zhao et al. 2023, arXiv:2302.04867) of second order with B2(h); the last step is of first order.

    Each step is corrected by the estimate at its end, which the next step asks for anyway.
    """
    x = x.float()
    numbers = _checked(levels)
    known: list[tuple[float, Tensor]] = []  # levels, and the estimates of x_0 there, the newest last
    start = x  # where the present step began
    for step, (level, following) in enumerate(pairwise(numbers)):
        x_0 = denoise(x, level).float()
        if known:
            x = _corrected(start, known, level, x_0)
        known = [*known[-1:], (level, x_0)]
        start = x
        last = step == len(numbers) - 2
        x = _predicted(x, known[-1:] if last else known, following)
        _tell(callback, step, x_0)
    return x


def _predicted(x: Tensor, known: list[tuple[float, Tensor]], following: float) -> Tensor:
    """UniP: from the newest known level to the following one."""
    level, x_0 = known[-1]
    moved = _towards(x, x_0, following / level)
    if len(known) == 1:
        return moved
    level_before, x_0_before = known[0]
    h = _log_ratio(level, following)
    ratio = -_log_ratio(level_before, level) / h
    return moved - math.expm1(-h) / 2 * (x_0_before - x_0) / ratio


def _corrected(start: Tensor, known: list[tuple[float, Tensor]], level: float, x_0_there: Tensor) -> Tensor:
    """UniC: the step from the newest known level to ``level`` again, now that the estimate at its end is known."""
    level_start, x_0 = known[-1]
    h = _log_ratio(level_start, level)
    scale = math.expm1(-h)
    moved = _towards(start, x_0, level / level_start)
    ahead = x_0_there - x_0
    if len(known) == 1:
        return moved - scale / 2 * ahead
    level_before, x_0_before = known[0]
    ratio = -_log_ratio(level_before, level_start) / h
    first = (scale / -h - 1) / -h
    right = torch.tensor([first, (first - 0.5) / -h * 2], dtype=torch.float64) * -h / scale
    left = torch.tensor([[1.0, 1.0], [ratio, 1.0]], dtype=torch.float64)
    of_before, of_there = torch.linalg.solve(left, right).tolist()
    return moved - scale * (of_before * (x_0_before - x_0) / ratio + of_there * ahead)


def karras_levels(highest: float, lowest: float, steps: int) -> Tensor:
    """The levels of Karras et al. (2022, equation 5), and 0 (steps + 1,), fp64."""
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    roots = highest ** (1 / RHO) + share * (lowest ** (1 / RHO) - highest ** (1 / RHO))
    return torch.cat([roots**RHO, torch.zeros(1, dtype=torch.float64)])


def _checked(levels: Tensor) -> list[float]:
    numbers = [float(level) for level in levels.double().tolist()]
    falling = all(level > following for level, following in pairwise(numbers))
    if len(numbers) < 2 or not falling or numbers[-1] < 0:
        raise ValueError(f"noise levels must fall strictly to 0 or above and be at least two, not {numbers}")
    return numbers


def _towards(x: Tensor, x_0: Tensor, ratio: float) -> Tensor:
    """The point of the line from x_0 through ``x`` whose noise is ``ratio`` of that in ``x``."""
    return ratio * x + (1 - ratio) * x_0


def _log_ratio(level: float, following: float) -> float:
    return math.log(level / following) if following > 0 else math.inf


def _tell(callback: Callback | None, step: int, x_0: Tensor) -> None:
    if callback is not None:
        callback(step, x_0)
