"""The names of samplers, by what a model learned."""

from typing import Any

from library.records import SamplingDefaults

FLOW_SAMPLERS = SamplingDefaults.samplers
DDPM_SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc")
SAMPLERS = tuple(dict.fromkeys((*FLOW_SAMPLERS, *DDPM_SAMPLERS)))
"""All of them; each model has some."""

_OTHER_NAMES = {
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "euler_ancestral": "euler_a",
    "k_euler_ancestral": "euler_a",
    "uni_pc": "unipc",
}


def parse_sampler(value: Any) -> str:
    """This turns the names that other programs have for the same samplers into ours; any other stays as it is.

    Raises:
        ValueError: It is no text.
    """
    if not isinstance(value, str):
        raise ValueError(f"expected the name of a sampler, got {value!r}")
    return _OTHER_NAMES.get(value, value)
