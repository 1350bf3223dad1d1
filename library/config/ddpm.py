"""Options of models with a noise schedule of variances (DDPM): what is predicted, which noise is added, what counts."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.config.errors import ConfigError
from library.config.options import option, redeclared

TIMESTEPS = 1000

# An option that only changes another -> that other.
_DEPENDENT = {
    "noise_offset_random_strength": "noise_offset",
    "adaptive_noise_scale": "noise_offset",
    "multires_noise_discount": "multires_noise_iterations",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
}

# Switches that say something only where they are on.
_SWITCHES = (
    *("v_parameterization", "zero_terminal_snr", "noise_offset_random_strength", "ip_noise_gamma_random_strength"),
    *("scale_v_pred_loss_like_noise_pred", "debiased_estimation_loss"),
)


@dataclass(frozen=True, kw_only=True)
class DdpmConfig:
    """Noise schedule (DDPM)."""

    v_parameterization: bool | None = option(
        None,
        "The model answers with the velocity, as Stable Diffusion 2.x at 768 px does, instead of the noise. By default "
        "what its files say; where they say nothing, the noise.",
        metadata_key="ss_v_parameterization",
    )
    zero_terminal_snr: bool | None = option(
        None,
        "Stretch the schedule so that its last timestep is pure noise (Lin et al. 2023). For models that predict the "
        "velocity. By default what the model's files say; where they say nothing, not.",
        metadata_key="ss_zero_terminal_snr",
    )
    min_timestep: int | None = option(
        None, "Lowest trained timestep, 0 to 999. By default 0.", minimum=0, maximum=999, metadata_key="ss_min_timestep"
    )
    max_timestep: int | None = option(
        None,
        "Timesteps below this one are trained, 1 to 1000. By default 1000.",
        minimum=1,
        maximum=1000,
        metadata_key="ss_max_timestep",
    )
    noise_offset: float | None = option(
        None,
        "Add noise of this strength that is the same at all positions of a channel, so that the brightness of whole "
        "pictures is learned. By default none.",
        minimum=0,
        metadata_key="ss_noise_offset",
    )
    noise_offset_random_strength: bool = option(
        False,
        "Draw the strength of --noise_offset from 0 to its value for each sample.",
        metadata_key="ss_noise_offset_random_strength",
    )
    adaptive_noise_scale: float | None = option(
        None,
        "Add this times the mean of each channel of the latents to --noise_offset; the sum is never below 0. By "
        "default 0.",
        metadata_key="ss_adaptive_noise_scale",
    )
    multires_noise_iterations: int | None = option(
        None,
        "Add noise of so many lower resolutions, each two to four times as coarse as the one before; the sum has "
        "deviation 1 again. By default none.",
        minimum=1,
        metadata_key="ss_multires_noise_iterations",
    )
    multires_noise_discount: float = option(
        0.3,
        "Strength of each further resolution of --multires_noise_iterations, of the one before.",
        minimum=0,
        metadata_key="ss_multires_noise_discount",
    )
    ip_noise_gamma: float | None = option(
        None,
        "Add noise of this strength to what the model is asked about and not to what it should answer (input "
        "perturbation, Ning et al. 2023). By default none.",
        minimum=0,
        metadata_key="ss_ip_noise_gamma",
    )
    ip_noise_gamma_random_strength: bool = option(
        False,
        "Draw the strength of --ip_noise_gamma from 0 to its value for each sample.",
        metadata_key="ss_ip_noise_gamma_random_strength",
    )
    min_snr_gamma: float | None = option(
        None,
        "Weigh timesteps whose signal-to-noise ratio is above this down to it (Hang et al. 2023; 5 is theirs). By "
        "default all count alike.",
        minimum=0,
        metadata_key="ss_min_snr_gamma",
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False,
        "Weigh the loss of a velocity as that of the noise that follows from it: snr / (snr + 1).",
        metadata_key="ss_scale_v_pred_loss_like_noise_pred",
    )
    v_pred_like_loss: float | None = option(
        None,
        "Add the loss of the velocity that follows from the predicted noise, times this. By default none.",
        minimum=0,
        metadata_key="ss_v_pred_like_loss",
    )
    debiased_estimation_loss: bool = option(
        False,
        "Weigh timesteps by 1 / sqrt(snr), or with --v_parameterization by 1 / (snr + 1) (Yu et al. 2023).",
        metadata_key="ss_debiased_estimation",
    )

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def timestep_range(self) -> range:
        """The trained timesteps."""
        low = 0 if self.min_timestep is None else self.min_timestep
        return range(low, TIMESTEPS if self.max_timestep is None else self.max_timestep)

    @property
    def idle_options(self) -> tuple[str, ...]:
        """Options that have no effect beside the others, so that saved files don't mention them."""
        idle = [name for name, needed in _DEPENDENT.items() if getattr(self, needed) is None]
        return (*idle, *(name for name in _SWITCHES if getattr(self, name) is False))

    def _problems(self) -> Iterator[str]:
        for name, needed in _DEPENDENT.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default and getattr(self, needed) is None:
                yield f"--{name} changes --{needed} and does nothing without it; add it, or remove this"
        for name in ("min_snr_gamma", "v_pred_like_loss", "ip_noise_gamma"):
            if getattr(self, name) == 0:
                does = "weighs every loss by 0" if name == "min_snr_gamma" else "does nothing"
                yield f"--{name} 0 {does}; give a number above 0, or remove it"
        if self.noise_offset == 0 and not self.adaptive_noise_scale:
            yield "--noise_offset 0 does nothing without --adaptive_noise_scale; give a number above 0, or remove it"
        if not self.timestep_range:
            yield f"--min_timestep {self.min_timestep} must be below --max_timestep {self.timestep_range.stop}"


def ddpm_problems(ddpm: DdpmConfig) -> list[str]:
    """This lists what does nothing, or harm, with what the model predicts, one sentence each.

    Args:
        ddpm: With ``v_parameterization`` as it is for the model; None counts as the noise.
    """
    problems = []
    if ddpm.scale_v_pred_loss_like_noise_pred and not ddpm.v_parameterization:
        problems.append(
            "--scale_v_pred_loss_like_noise_pred is for models that predict velocities, and this one predicts the "
            "noise; remove it, or add --v_parameterization if the model is one"
        )
    if ddpm.v_pred_like_loss is not None and ddpm.v_parameterization:
        problems.append(
            f"--v_pred_like_loss {ddpm.v_pred_like_loss:g} is for models that predict the noise, and this one predicts "
            "velocities (--v_parameterization); remove it"
        )
    if ddpm.zero_terminal_snr and not ddpm.v_parameterization:
        problems.append(
            "--zero_terminal_snr makes the last timestep pure noise, of which a model that predicts the noise "
            "learns nothing; add --v_parameterization if the model predicts velocities, or remove it"
        )
    return problems


@dataclass(frozen=True, kw_only=True)
class DdpmPictureConfig:
    """Noise schedule (DDPM)."""

    v_parameterization: bool | None = redeclared(DdpmConfig, "v_parameterization", None)
    zero_terminal_snr: bool | None = redeclared(
        DdpmConfig,
        "zero_terminal_snr",
        None,
        "Begin in pure noise, at the last timestep of a schedule stretched to it, for models that were trained so. By "
        "default what the model's files say; where they say nothing, the schedule is the published one.",
    )
