"""The groups with the options of pictures, for each kind of model: their samplers are its own."""

from dataclasses import dataclass

from library.config.generate import GenerateConfig
from library.config.options import redeclared
from library.config.samplers import DDPM_SAMPLERS, FLOW_SAMPLERS
from library.config.sampling import SamplingConfig

_FLOW = (
    "heun asks the model twice per step. By default the model's own: euler for SD3, dpmpp_2m (DPM-Solver++) for Sana."
)
_DDPM = (
    "euler_a (Euler ancestral) adds fresh noise in every step; dpmpp_2m (DPM-Solver++) and unipc step through Karras' "
    "noise levels, and 20 steps are enough for them. By default ddim."
)


@dataclass(frozen=True, kw_only=True)
class FlowSamplingConfig(SamplingConfig):
    """Sample pictures while training."""

    sample_sampler: str | None = redeclared(
        SamplingConfig,
        "sample_sampler",
        None,
        f"Sampler of sample pictures, where the prompt names none. {_FLOW}",
        choices=FLOW_SAMPLERS,
    )


@dataclass(frozen=True, kw_only=True)
class DdpmSamplingConfig(SamplingConfig):
    """Sample pictures while training."""

    sample_sampler: str | None = redeclared(
        SamplingConfig,
        "sample_sampler",
        None,
        f"Sampler of sample pictures, where the prompt names none. {_DDPM}",
        choices=DDPM_SAMPLERS,
    )


@dataclass(frozen=True, kw_only=True)
class FlowGenerateConfig(GenerateConfig):
    """Pictures."""

    sampler: str | None = redeclared(GenerateConfig, "sampler", None, f"Sampler. {_FLOW}", choices=FLOW_SAMPLERS)


@dataclass(frozen=True, kw_only=True)
class DdpmGenerateConfig(GenerateConfig):
    """Pictures."""

    sampler: str | None = redeclared(GenerateConfig, "sampler", None, f"Sampler. {_DDPM}", choices=DDPM_SAMPLERS)
