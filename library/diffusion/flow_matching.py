"""Flow matching (Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003).

``x_t = (1 - sigma) x_0 + sigma noise``; the denoiser answers with the velocity ``noise - x_0``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from library.config.flow import FlowConfig
from library.config.loss import LossConfig
from library.diffusion import timesteps
from library.diffusion.loss import elementwise, huber_parameter, weight
from library.randomness import Draws
from library.records import NoisedLatents


@dataclass(frozen=True)
class FlowMatching:
    """The objective of a flow-matching family (``library.families.protocols.Objective``).

    Attributes:
        flow: Which noise levels are trained, and their weights.
        loss_options: How a difference is measured.
        levels: Entries of the table that noise levels come from before the shift, where the denoiser is told
            ``levels * sigma`` without its fraction; None: any level.
    """

    flow: FlowConfig
    loss_options: LossConfig
    levels: int | None = None

    def __post_init__(self) -> None:
        if self.flow.training_shift is None and not self.flow.flow_schedule_auto_shift:
            raise ValueError("training_shift is None: the family must put its own shift there")

    def sigmas(self, uniform: Tensor, *, tokens: int) -> Tensor:
        """Noise levels (B,), fp32, in (0, 1].

        Args:
            uniform: One number of the open interval (0, 1) per row (B,), fp64.
            tokens: Tokens per picture, which ``--flow_schedule_auto_shift`` depends on.
        """
        u = uniform.double()
        if self.flow.density == "logit_normal":
            u = timesteps.logit_normal(u, self.flow.logit_mean, self.flow.logit_std)
        elif self.flow.density == "mode":
            u = timesteps.mode(u, self.flow.mode_scale)
        elif self.flow.density == "sigmoid":
            u = timesteps.logit_normal(u, 0.0, self.flow.sigmoid_scale)
        if self.levels is not None:
            u = timesteps.table_level(u, self.levels)
        u = timesteps.shift(u, self._shift(tokens))
        low, high = self.flow.sigma_range
        sigma = (low + (high - low) * u).clamp(timesteps.SMALLEST_SIGMA, 1.0)
        return sigma.float() if self.levels is None else timesteps.truncating(sigma, self.levels)

    def _shift(self, tokens: int) -> float:
        if self.flow.flow_schedule_auto_shift:
            return timesteps.shift_for_tokens(tokens)
        assert self.flow.training_shift is not None
        return self.flow.training_shift

    def add_noise(self, x_0: Tensor, noise: Tensor, sigma: Tensor, draws: Draws | None = None) -> NoisedLatents:
        """The noised latents, fp32.

        Args:
            x_0: Clean, normalised latents (B, C, h, w).
            noise: Gaussian noise (B, C, h, w).
            sigma: Noise levels (B,).
            draws: Not looked at: the noise stays as it is.
        """
        x_0, noise = x_0.float(), noise.float()
        sigma = sigma.to(x_0.device, torch.float32)
        s = sigma.view(-1, 1, 1, 1)
        return NoisedLatents(x_t=(1 - s) * x_0 + s * noise, sigma=sigma, x_0=x_0, noise=noise)

    def target(self, noised: NoisedLatents) -> Tensor:
        """The velocity (B, C, h, w) that leads to the clean latents, fp32.

        Args:
            noised: Noised latents with ``x_0`` and ``noise``.
        """
        if noised.x_0 is None or noised.noise is None:
            raise ValueError("the velocity needs x_0 and noise of the noised latents, but they are None")
        return noised.noise.float() - noised.x_0.float()

    def loss(self, prediction: Tensor, noised: NoisedLatents, target: Tensor | None = None) -> Tensor:
        """Loss per element (B, C, h, w), fp32, weighted by noise level.

        Args:
            prediction: The denoiser's velocity (B, C, h, w).
            noised: What it was asked about.
            target: The velocity that it should have answered (B, C, h, w); by default ``target(noised)``.
        """
        if target is None:
            target = self.target(noised)
        velocity_error = prediction.float() - target.float()
        if self.flow.weighting_scheme == "sigma_sqrt" and self.loss_options.loss_type == "l2":
            return velocity_error**2  # sigma^2 and sigma^-2 cancel; multiplying both would lose digits at small sigma
        sigma = noised.sigma.float().view(-1, 1, 1, 1)
        x_0_error = sigma * velocity_error  # of the estimate x_t - sigma * prediction, up to the sign
        c = huber_parameter(self.loss_options, sigma)
        return elementwise(self.loss_options, x_0_error, c) * weight(self.flow.weighting_scheme, sigma)


def x_0_estimate(x_t: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """This follows the velocity all the way to the clean latents.

    Args:
        x_t: Noised latents.
        velocity: The denoiser's answer, of the shape of ``x_t``.
        sigma: The noise level of ``x_t``.

    Returns:
        The estimate of x_0, fp32, of the shape of ``x_t``.
    """
    return x_t.float() - sigma * velocity.float()
