"""The way from noise to latents of a model that learned a flow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from library.diffusion.ddpm_samplers import NoiseOfStep
from library.diffusion.flow_matching import x_0_estimate
from library.diffusion.samplers import Callback, Denoise, Sampler
from library.records import NoisedLatents


@dataclass(frozen=True)
class FlowPath:
    """Through noise levels from 1 to 0 (``library.families.protocols.SamplingPath``).

    Attributes:
        sampler: How a step is made.
        levels: The noise levels (steps + 1,), fp32.
    """

    sampler: Sampler
    levels: Tensor

    def asked(self, x: Tensor, level: float) -> NoisedLatents:
        """``x`` as it is, at its noise level."""
        return NoisedLatents(x_t=x, sigma=torch.full((len(x),), level, device=x.device))

    def estimate(self, x: Tensor, answer: Tensor, level: float) -> Tensor:
        """The latents that a velocity leads to (B, C, h, w), fp32."""
        return x_0_estimate(x, answer, level)

    def walk(self, denoise: Denoise, noise: Tensor, *, fresh: NoiseOfStep, callback: Callback | None = None) -> Tensor:
        """The latents at the last level, fp32; these samplers draw no fresh noise."""
        return self.sampler(denoise, noise, self.levels, callback=callback)
