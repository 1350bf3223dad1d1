"""What a person can choose for Stable Diffusion 1.x and 2.x alone, and what they can't."""

from dataclasses import dataclass

from library.config.ddpm import DdpmConfig, DdpmPictureConfig
from library.config.loss import LossConfig
from library.config.options import option
from library.config.picture_groups import DdpmGenerateConfig, DdpmSamplingConfig
from library.records import LatentFormat

TOKEN_LENGTHS = ("75", "150", "225")


@dataclass(frozen=True, kw_only=True)
class SdOptions:
    """Stable Diffusion 1.x and 2.x."""

    v2: bool = option(
        False,
        "The base model is Stable Diffusion 2.x. It is recognised without this; with it, a 1.x file is refused.",
        metadata_key="ss_v2",
    )
    clip_skip: int | None = option(
        None,
        "Take the text encoder's n-th layer from the end, followed by its last norm. By default the last for 1.x and "
        "the second from the end for 2.x, as they were trained; 2 is usual for anime models.",
        minimum=1,
        maximum=12,
        metadata_key="ss_clip_skip",
    )
    max_token_length: str = option(
        "75",
        "Tokens of a caption that are read, beside start and end: in chunks of 75, each encoded by itself.",
        choices=TOKEN_LENGTHS,
        parse=str,
        metadata_key="ss_max_token_length",
    )
    weighted_captions: bool = option(
        False,
        "Read (words:1.2), (words) and [words] in captions and prompts as weights of their tokens' features; a "
        "backslash before a bracket makes it a plain one.",
        metadata_key="ss_weighted_captions",
    )


OPTIONS = SdOptions
OBJECTIVE_GROUPS = {"ddpm": DdpmConfig, "loss": LossConfig}
SAMPLING, GENERATE_GROUPS = DdpmSamplingConfig, {"ddpm": DdpmPictureConfig, "generate": DdpmGenerateConfig}
NETWORK_SCRIPT, FULL_SCRIPT = "train_network", "train"
TITLE = "Stable Diffusion 1.x / 2.x"
LATENTS = LatentFormat(channels=4, stride=8, patch=8, scale=0.18215, shift=0.0)
RESOLUTION_STEP = LATENTS.resolution_step
TRAINING_ONLY = ()
"""Options that do nothing where pictures are made and nothing is trained."""

_FLOW = "it is for models that learn a flow, and this one learns to remove noise. Remove it"
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("weighting_scheme", "timestep_sampling", "logit_mean", "logit_std", "mode_scale", "sigmoid_scale"),
            *("training_shift", "flow_schedule_auto_shift", "flow_use_uniform_schedule", "flow_schedule_shift"),
        ),
        _FLOW,
    ),
    "clip_l": "the text encoder lies in the base model. Remove it",
    "clip_g": "this model has one text encoder, in the base model. Remove it",
    "t5xxl": "this model has no T5. Remove it",
}
"""Option of other trainers or families -> the end of ``--name does nothing for sd: ...``."""
