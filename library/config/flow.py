"""Options of flow matching: which noise levels are trained, and how much each of them counts."""

import math
from dataclasses import dataclass
from typing import ClassVar

from library.config.errors import ConfigError
from library.config.loss import LossConfig
from library.config.options import option

WEIGHTING_SCHEMES = ("uniform", "none", "sigma_sqrt", "cosmap", "logit_normal", "mode")
DENSITIES = ("uniform", "logit_normal", "mode", "sigmoid")

_DENSITY_PARAMETERS = {
    "logit_mean": "logit_normal",
    "logit_std": "logit_normal",
    "mode_scale": "mode",
    "sigmoid_scale": "sigmoid",
}
LARGEST_MODE_SCALE = 2 / (math.pi - 2)
"""Beyond it, Esser et al.'s mode density folds back on itself."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Noise levels (flow matching)."""

    own_density: ClassVar[str] = "uniform"
    """The density where nobody says anything."""

    weighting_scheme: str = option(
        "uniform",
        "Weight of each noise level's loss, with kohya's meaning: it multiplies the error of the x_0 estimate, so the "
        "error of the velocity is weighted by sigma^2 times it. uniform and none: 1 (velocity: sigma^2). sigma_sqrt: "
        "sigma^-2 (velocity: 1, the plain flow-matching loss). cosmap: 2 / (pi (1 - 2 sigma + 2 sigma^2)). "
        "logit_normal and mode: 1, and the noise levels are drawn from the density of that name.",
        choices=WEIGHTING_SCHEMES,
        metadata_key="ss_weighting_scheme",
    )
    timestep_sampling: str | None = option(
        None,
        "Density that noise levels are drawn from, before the shift. sigmoid: sigmoid(sigmoid_scale * normal). By "
        "default what --weighting_scheme implies: logit_normal and mode their own, all others uniform.",
        choices=DENSITIES,
        metadata_key="ss_timestep_sampling",
    )
    logit_mean: float = option(
        0.0, "Mean of the logit_normal density; above 0 means more noise.", metadata_key="ss_logit_mean"
    )
    logit_std: float = option(1.0, "Standard deviation of the logit_normal density.", metadata_key="ss_logit_std")
    mode_scale: float = option(
        1.29,
        "How much the mode density prefers middle noise levels: -1 to 1.75, 0 is uniform.",
        minimum=-1.0,
        maximum=LARGEST_MODE_SCALE,
        metadata_key="ss_mode_scale",
    )
    sigmoid_scale: float = option(
        1.0,
        "Width of the sigmoid density; a larger one reaches more of both ends.",
        metadata_key="ss_sigmoid_scale",
    )
    training_shift: float | None = option(
        1.0,
        "Shift k of the noise levels, s' = k s / (1 + (k - 1) s): above 1 trains composition, below 1 fine detail, and "
        "1 shifts nothing. SD3's own value at 1024 px is 3.",
        minimum=0.1,
        maximum=10.0,
        aliases=("flow_schedule_shift",),
        metadata_key="ss_training_shift",
    )
    flow_schedule_auto_shift: bool = option(
        False,
        "Takes the shift from each picture's number of tokens instead of --training_shift: 1.88 at 512 px and 3.16 at "
        "1024 px for SD3; above 4096 tokens it grows with the square root of their number.",
        metadata_key="ss_flow_schedule_auto_shift",
    )
    flow_use_uniform_schedule: bool = option(
        False, "Draws noise levels uniformly: the same as --timestep_sampling uniform."
    )
    min_timestep: int | None = option(
        None,
        "Lowest trained timestep, 0 to 999: the drawn and shifted levels are scaled into the range. By default 0.",
        minimum=0,
        maximum=999,
        metadata_key="ss_min_timestep",
    )
    max_timestep: int | None = option(
        None,
        "Highest trained timestep, 1 to 1000. By default 1000, pure noise.",
        minimum=1,
        maximum=1000,
        metadata_key="ss_max_timestep",
    )

    @property
    def density(self) -> str:
        """The density that noise levels are drawn from: one of ``DENSITIES``."""
        if self.flow_use_uniform_schedule:
            return "uniform"
        return self.timestep_sampling or self._implied_density or self.own_density

    @property
    def idle_options(self) -> tuple[str, ...]:
        """Options that have no effect beside the others, so that saved files don't mention them."""
        idle = [name for name, owner in _DENSITY_PARAMETERS.items() if owner != self.density]
        return (*idle, "training_shift") if self.flow_schedule_auto_shift else tuple(idle)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest noise level."""
        low = 0 if self.min_timestep is None else self.min_timestep
        high = 1000 if self.max_timestep is None else self.max_timestep
        return low / 1000, high / 1000

    @property
    def _implied_density(self) -> str | None:
        return self.weighting_scheme if self.weighting_scheme in ("logit_normal", "mode") else None

    def __post_init__(self) -> None:
        self._check_density()
        self._check_parameters_act()
        if self.logit_std <= 0:
            raise ConfigError(f"--logit_std {self.logit_std} must be above 0")
        if self.sigmoid_scale <= 0:
            raise ConfigError(f"--sigmoid_scale {self.sigmoid_scale} must be above 0")
        if self.training_shift is not None and self.training_shift <= 0:
            raise ConfigError(f"--training_shift {self.training_shift} must be above 0; 1 means no shift")
        if self.flow_schedule_auto_shift and self.training_shift not in (None, 1.0):
            raise ConfigError(
                f"--training_shift {self.training_shift} and --flow_schedule_auto_shift exclude each other: "
                "the shift is either given or taken from the resolution. Remove one"
            )
        low, high = self.sigma_range
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"--min_timestep {round(low * 1000)} must be below --max_timestep {round(high * 1000)}, "
                "both from 0 to 1000"
            )

    def _check_density(self) -> None:
        chosen = self.timestep_sampling
        if self.flow_use_uniform_schedule and chosen not in (None, "uniform"):
            raise ConfigError(
                f"--flow_use_uniform_schedule contradicts --timestep_sampling {chosen}: both choose the density. "
                "Remove one"
            )
        if self.flow_use_uniform_schedule:
            chosen = "uniform"
        implied = self._implied_density
        if implied and chosen not in (None, implied):
            name = "--flow_use_uniform_schedule" if self.flow_use_uniform_schedule else f"--timestep_sampling {chosen}"
            raise ConfigError(
                f"{name} contradicts --weighting_scheme {implied}, which draws from the {implied} density. "
                "Use --weighting_scheme uniform: it has the same weight and leaves the density open"
            )

    def _check_parameters_act(self) -> None:
        for name, owner in _DENSITY_PARAMETERS.items():
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default and self.density != owner:
                raise ConfigError(
                    f"--{name} {value} does nothing: noise levels are drawn from the {self.density} density. "
                    f"Remove it or add --timestep_sampling {owner}"
                )


def flow_problems(flow: FlowConfig, loss: LossConfig) -> list[str]:
    """This lists what a flow-matching family can't do with the two groups together, one sentence each."""
    problems = []
    if loss.huber_schedule == "snr":
        problems.append(
            f"--huber_schedule snr does nothing for flow matching, which has no noise schedule of variances "
            f"(--loss_type {loss.loss_type}). Use constant or exponential"
        )
    return problems
