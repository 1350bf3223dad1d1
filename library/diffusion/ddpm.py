"""Denoising diffusion with a schedule of variances (Ho et al. 2020, arXiv:2006.11239), as latent diffusion uses it.

``x_t = sqrt(a) x_0 + sqrt(1 - a) noise`` with a falling from 1 to 0 over 1000 timesteps. The model answers with the
noise, or with the velocity ``sqrt(a) noise - sqrt(1 - a) x_0`` (Salimans and Ho 2022, arXiv:2202.00512). The house's
noise level ``sigma``, from 0 to 1, is here ``(timestep + 1) / 1000``.
"""

import functools
import itertools
import math
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library.config.ddpm import TIMESTEPS, DdpmConfig
from library.config.loss import LossConfig
from library.diffusion.loss import elementwise
from library.randomness import Draws
from library.records import NoisedLatents

FIRST_BETA, LAST_BETA = 0.00085, 0.012
LARGEST_DEBIASED_SNR = 1000.0


def signal_fractions(*, zero_terminal_snr: bool = False) -> Tensor:
    """The fraction of signal, a, at each timestep (1000,), fp64: the scaled-linear schedule.

    Args:
        zero_terminal_snr: Shift and scale the square roots so that the last is 0 and the first stays (Lin et al. 2023,
            arXiv:2305.08891, algorithm 1).
    """
    return torch.tensor(_fractions(zero_terminal_snr), dtype=torch.float64)


@functools.cache
def _fractions(zero_terminal_snr: bool) -> tuple[float, ...]:
    """See ``signal_fractions``. No tensors: one that is made while a step is foreseen has no numbers, for ever."""
    low, high = FIRST_BETA**0.5, LAST_BETA**0.5
    betas = ((low + (high - low) * number / (TIMESTEPS - 1)) ** 2 for number in range(TIMESTEPS))
    fractions = tuple(itertools.accumulate((1 - beta for beta in betas), operator.mul))
    if not zero_terminal_snr:
        return fractions
    roots = [math.sqrt(fraction) for fraction in fractions]
    first, last = roots[0], roots[-1]
    return tuple(((root - last) * first / (first - last)) ** 2 for root in roots)


def timestep_of(sigma: Tensor) -> Tensor:
    """The timestep, int64, that a noise level stands for."""
    return (sigma.double() * TIMESTEPS).round().long() - 1


@dataclass(frozen=True)
class Ddpm:
    """The objective of a family with a schedule of variances (``library.families.protocols.Objective``).

    Attributes:
        ddpm: What is predicted, how noise is made, which timesteps count how much.
        loss_options: How a difference is measured.
    """

    ddpm: DdpmConfig
    loss_options: LossConfig

    def sigmas(self, uniform: Tensor, *, tokens: int) -> Tensor:
        """Noise levels (B,), fp32, of timesteps that are all equally likely.

        Args:
            uniform: One number of the open interval (0, 1) per row (B,), fp64.
            tokens: Not looked at: the schedule is the same at every resolution.
        """
        timesteps = self.ddpm.timestep_range
        number = (uniform.double() * len(timesteps)).long().clamp(max=len(timesteps) - 1)  # 1 - 1e-17 rounds up to 1
        return ((number + timesteps.start + 1) / TIMESTEPS).float()

    def add_noise(self, x_0: Tensor, noise: Tensor, sigma: Tensor, draws: Draws | None = None) -> NoisedLatents:
        """The noised latents, fp32.

        Args:
            x_0: Clean, normalised latents (B, C, h, w).
            noise: Gaussian noise (B, C, h, w).
            sigma: Noise levels (B,).
            draws: What the options that change the noise draw; None: they don't act.
        """
        x_0, noise, sigma = x_0.float(), noise.float(), sigma.to(x_0.device, torch.float32)
        perturbed = noise
        if draws is not None:
            noise = self._changed(noise, x_0, draws)
            perturbed = self._perturbed(noise, draws)
        signal, rest = self._roots(sigma)
        return NoisedLatents(x_t=signal * x_0 + rest * perturbed, sigma=sigma, x_0=x_0, noise=noise)

    def target(self, noised: NoisedLatents) -> Tensor:
        """What the model should answer (B, C, h, w), fp32: the noise, or the velocity."""
        if noised.x_0 is None or noised.noise is None:
            raise ValueError("the target needs x_0 and noise of the noised latents, but they are None")
        if not self.ddpm.v_parameterization:
            return noised.noise
        signal, rest = self._roots(noised.sigma)
        return signal * noised.noise - rest * noised.x_0

    def loss(self, prediction: Tensor, noised: NoisedLatents, target: Tensor | None = None) -> Tensor:
        """Loss per element (B, C, h, w), fp32, weighted by timestep.

        Args:
            prediction: The model's answer (B, C, h, w).
            noised: What it was asked about.
            target: What it should have answered; by default ``target(noised)``.
        """
        if target is None:
            target = self.target(noised)
        difference = prediction.float() - target.float()
        per_element = elementwise(self.loss_options, difference, self._huber_parameter(noised.sigma))
        return per_element * self._weight(noised.sigma)

    def _signal(self, sigma: Tensor) -> Tensor:
        """The fraction of signal at noise levels: (B, 1, 1, 1), fp64, on their device."""
        fractions = signal_fractions(zero_terminal_snr=bool(self.ddpm.zero_terminal_snr))
        return fractions.to(sigma.device, non_blocking=True)[timestep_of(sigma)].view(-1, 1, 1, 1)

    def _roots(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        signal = self._signal(sigma)
        return signal.sqrt().float(), (1 - signal).sqrt().float()

    def _weight(self, sigma: Tensor) -> Tensor:
        """What each sample's loss is multiplied by (B, 1, 1, 1), fp32."""
        signal, options = self._signal(sigma), self.ddpm
        snr = signal / (1 - signal)
        weight = torch.ones_like(snr)
        if options.min_snr_gamma is not None:  # Hang et al. 2023, arXiv:2303.09556
            limited = snr.clamp(max=options.min_snr_gamma)
            # of the velocity: without a division by 0 where no signal is left
            weight = weight * (limited / (snr + 1) if options.v_parameterization else limited / snr)
        if options.scale_v_pred_loss_like_noise_pred:
            weight = weight * signal
        if options.v_pred_like_loss is not None:
            weight = weight * (1 + options.v_pred_like_loss / signal)
        if options.debiased_estimation_loss:  # Yu et al. 2023, arXiv:2310.08442
            limited = snr.clamp(max=LARGEST_DEBIASED_SNR)
            weight = weight * (1 / (limited + 1) if options.v_parameterization else limited.rsqrt())
        return weight.float()

    def _huber_parameter(self, sigma: Tensor) -> Tensor:
        """Where huber and smooth_l1 turn linear (B, 1, 1, 1), by ``--huber_schedule``; by default snr."""
        options, least = self.loss_options, self.loss_options.huber_c
        if options.huber_schedule == "constant":
            c = torch.full_like(sigma, least)
        elif options.huber_schedule == "exponential":
            c = least ** (timestep_of(sigma) / TIMESTEPS)
        else:
            signal = self._signal(sigma).flatten()
            c = (1 - least) / (1 + ((1 - signal) / signal).sqrt()) ** 2 + least
        return (c * options.huber_scale).float().view(-1, 1, 1, 1)

    def _changed(self, noise: Tensor, x_0: Tensor, draws: Draws) -> Tensor:
        options = self.ddpm
        if options.noise_offset is not None:
            strength = torch.tensor(options.noise_offset)
            if options.noise_offset_random_strength:
                strength = strength * _rows(draws, "noise offset strength")
            strength = strength.to(noise.device, non_blocking=True)
            if options.adaptive_noise_scale is not None:
                means = x_0.mean(dim=(2, 3), keepdim=True).abs()
                strength = (strength + options.adaptive_noise_scale * means).clamp(min=0)
            offset = draws.normal("noise offset", (noise.shape[1], 1, 1))
            noise = noise + strength * offset.to(noise.device, non_blocking=True)
        if options.multires_noise_iterations is not None:
            noise = _multires(noise, draws, options.multires_noise_iterations, options.multires_noise_discount)
        return noise

    def _perturbed(self, noise: Tensor, draws: Draws) -> Tensor:
        gamma = self.ddpm.ip_noise_gamma
        if gamma is None:
            return noise
        strength = torch.tensor(gamma)
        if self.ddpm.ip_noise_gamma_random_strength:
            strength = strength * _rows(draws, "input perturbation strength")
        added = strength * draws.normal("input perturbation", tuple(noise.shape[1:]))
        return noise + added.to(noise.device, non_blocking=True)


def _rows(draws: Draws, purpose: str) -> Tensor:
    """A number from 0 to 1 for each row (B, 1, 1, 1), fp32."""
    return draws.uniform(purpose).float().view(-1, 1, 1, 1)


def _multires(noise: Tensor, draws: Draws, iterations: int, discount: float) -> Tensor:
    """Noise of several resolutions: kohya's, with resolutions and deviation for each sample by itself."""
    # not as tensors, which have no numbers where a run is foreseen
    shares = (draws.uniform(f"multires ratio {level}").tolist() for level in range(iterations))
    ratios = [[2 + 2 * share for share in of_level] for of_level in shares]
    added = [
        _coarse_noise(
            Draws(draws.run_seed, (key,), (visit,)), noise.shape[1:], [of_level[row] for of_level in ratios], discount
        )
        for row, (key, visit) in enumerate(zip(draws.keys, draws.visits))
    ]
    mixed = noise + torch.cat(added).to(noise.device, non_blocking=True)
    return mixed / mixed.std(dim=(1, 2, 3), keepdim=True)


def _coarse_noise(draws: Draws, shape: torch.Size, ratios: list[float], discount: float) -> Tensor:
    """The sum of one sample's coarser noises (1, C, h, w), until one is a single row or column."""
    channels, height, width = shape
    added = torch.zeros(1, *shape)
    for level, ratio in enumerate(ratios):
        sides = [max(1, int(side / ratio**level)) for side in (height, width)]
        coarse = draws.normal(f"multires noise {level}", (channels, *sides))
        added += F.interpolate(coarse, (height, width), mode="bilinear") * discount**level
        if 1 in sides:
            break
    return added
