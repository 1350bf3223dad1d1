"""The way from noise to latents of a model with a schedule of variances, as diffusers goes it.

The coordinates are those of ``library.diffusion.ddpm_samplers``: ``x = x_0 + level * noise``. The model knows
``x / sqrt(1 + level^2)``, and whole timesteps, so it is asked at the timestep whose level is nearest in logarithms.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.config.ddpm import TIMESTEPS
from library.diffusion import ddpm_samplers
from library.diffusion.ddpm import signal_fractions
from library.diffusion.ddpm_samplers import NoiseOfStep, karras_levels
from library.diffusion.samplers import Callback, Denoise
from library.records import NoisedLatents

LEAST_SIGNAL = 2.0**-24
"""What diffusers takes for the fraction of signal where a schedule leaves none: it keeps the level finite, at 4096."""


@dataclass(frozen=True)
class _Way:
    """How one sampler goes.

    Attributes:
        step: Of ``ddpm_samplers``.
        karras: Whether its levels are Karras', rather than those of evenly spaced timesteps.
        to_zero: Whether it ends without noise, rather than at the first timestep's level, as the published DDIM.
        draws: Whether its steps add fresh noise.
    """

    step: Callable[..., Tensor]
    karras: bool = False
    to_zero: bool = True
    draws: bool = False


_WAYS = {
    "ddim": _Way(ddpm_samplers.euler, to_zero=False),
    "euler": _Way(ddpm_samplers.euler),
    "euler_a": _Way(ddpm_samplers.euler_ancestral, draws=True),
    "dpmpp_2m": _Way(ddpm_samplers.dpmpp_2m, karras=True),
    "unipc": _Way(ddpm_samplers.unipc, karras=True),
}


@dataclass(frozen=True)
class DdpmPath:
    """Through the levels of a sampler (``library.families.protocols.SamplingPath``).

    Attributes:
        sampler: One of ``library.config.samplers.DDPM_SAMPLERS``.
        levels: The noise levels (steps + 1,), fp64.
        v_parameterization: Whether the model answers with the velocity instead of the noise.
        zero_terminal_snr: Whether its schedule ends in pure noise.
    """

    sampler: str
    levels: Tensor
    v_parameterization: bool
    zero_terminal_snr: bool

    def asked(self, x: Tensor, level: float) -> NoisedLatents:
        """``x`` with variance 1, at the nearest timestep."""
        timestep = nearest_timestep(level, zero_terminal_snr=self.zero_terminal_snr)
        sigma = torch.full((len(x),), (timestep + 1) / TIMESTEPS, device=x.device)
        return NoisedLatents(x_t=x / math.sqrt(1 + level**2), sigma=sigma)

    def estimate(self, x: Tensor, answer: Tensor, level: float) -> Tensor:
        """The latents that noise or velocity leave of ``x`` (B, C, h, w), fp32."""
        x, answer = x.float(), answer.float()
        if not self.v_parameterization:
            return x - level * answer
        return x / (1 + level**2) - level / math.sqrt(1 + level**2) * answer

    def walk(self, denoise: Denoise, noise: Tensor, *, fresh: NoiseOfStep, callback: Callback | None = None) -> Tensor:
        """The latents at the last level, fp32, with variance 1."""
        way, first, last = _WAYS[self.sampler], float(self.levels[0]), float(self.levels[-1])
        drawn: dict[str, Any] = {"noise": fresh} if way.draws else {}
        x = way.step(denoise, noise * math.sqrt(1 + first**2), self.levels, callback=callback, **drawn)
        return x / math.sqrt(1 + last**2)


def ddpm_path(sampler: str, steps: int, *, v_parameterization: bool, zero_terminal_snr: bool) -> DdpmPath:
    """The path of a sampler, of so many steps.

    Args:
        sampler: One of ``library.config.samplers.DDPM_SAMPLERS``.
        steps: How often the model is asked, 1 to 1000.
        v_parameterization: Whether the model answers with the velocity instead of the noise.
        zero_terminal_snr: Whether its schedule ends in pure noise.
    """
    way, table = _WAYS[sampler], level_table(zero_terminal_snr=zero_terminal_snr)
    if way.karras:
        levels = karras_levels(float(table[-1]), float(table[0]), steps)
    else:
        timesteps = spaced_timesteps(steps, from_the_end=zero_terminal_snr)
        last = table[:1] if timesteps[-1] > 0 and not way.to_zero else torch.zeros_like(table[:1])
        levels = torch.cat([table[timesteps], last])
    return DdpmPath(sampler, levels, v_parameterization, zero_terminal_snr)


@functools.cache
def level_table(*, zero_terminal_snr: bool) -> Tensor:
    """The noise level at each timestep (1000,), fp64, rising: noise over signal."""
    signal = signal_fractions(zero_terminal_snr=zero_terminal_snr).clamp(min=LEAST_SIGNAL)
    return ((1 - signal) / signal).sqrt()


def nearest_timestep(level: float, *, zero_terminal_snr: bool) -> int:
    """The timestep whose level is nearest, in logarithms; beyond the ends of the schedule, the end."""
    table = level_table(zero_terminal_snr=zero_terminal_snr).log()
    wanted = math.log(level)
    above = min(max(int(torch.searchsorted(table, wanted)), 1), len(table) - 1)
    low, high = float(table[above - 1]), float(table[above])
    share = min(max((wanted - low) / (high - low), 0.0), 1.0)
    return round(above - 1 + share)


def spaced_timesteps(steps: int, *, from_the_end: bool) -> list[int]:
    """Evenly spaced timesteps, falling.

    Args:
        steps: How many, 1 to 1000.
        from_the_end: Begin at the last timestep, which matters where it alone is pure noise (Lin et al. 2023,
            arXiv:2305.08891, section 3.3); else end at timestep 1, as the published models' schedulers do, unless
            there is but one step, which would leave the noise as it is.
    """
    if from_the_end or steps == 1:
        return [round(TIMESTEPS - step * TIMESTEPS / steps) - 1 for step in range(steps)]
    apart = TIMESTEPS // steps
    offset = min(1, TIMESTEPS - 1 - (steps - 1) * apart)
    return [step * apart + offset for step in reversed(range(steps))]
