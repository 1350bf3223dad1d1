"""Options of training a ControlNet, which steers a frozen model by a picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.config.options import option

if TYPE_CHECKING:
    from library.config.run import RunConfig

OPTION = "controlnet_model_name_or_path"
SAVE_LAYOUTS = ("safetensors", "diffusers")


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """ControlNet."""

    controlnet_model_name_or_path: str | None = option(
        None,
        "ControlNet to train on: diffusers' folder, or a file in diffusers' or the published spelling. By default a "
        "copy of the base model's way down, which changes nothing before its first step.",
        metavar="FILE",
    )


def control_net_problems(config: "RunConfig") -> Iterator[str]:
    """What contradicts training a ControlNet in other groups, one sentence each."""
    optimizer, layout = config.optimizer, config.saving.save_model_as
    if optimizer.learning_rate is None:
        yield "--learning_rate is missing: a ControlNet has no safe default; 1e-5 is a common start"
    if optimizer.unet_lr is not None:
        yield "--unet_lr is for adapters; a ControlNet trains at --learning_rate, and the U-Net stays as it is"
    if optimizer.text_encoder_lr is not None:
        yield "--text_encoder_lr does nothing: beside a ControlNet the text encoders stay as they are. Remove it"
    if layout not in SAVE_LAYOUTS:
        yield f"--save_model_as {layout}: a ControlNet is written as {' or '.join(SAVE_LAYOUTS)}"
    for place, subset in config.subsets():
        if subset.conditioning_data_dir is None:
            yield (
                f"{place}: conditioning_data_dir is missing: a ControlNet learns from a control picture for every "
                "picture; name their folder"
            )
        if subset.is_regularisation_data:
            yield f"{place}: is_regularisation_data needs an adapter to switch off; a ControlNet has none"
        if subset.unmasked_weight and not subset.alpha_mask:
            yield f"{place}: unmasked_weight does nothing without masks (alpha_mask); remove it"
