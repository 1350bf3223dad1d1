"""Where the weights of a ControlNet lie, and whether it belongs to a base model, from headers alone."""

from typing import NamedTuple

from library.config.control_net import OPTION
from library.config.errors import ConfigError
from library.families.sd.control_net_keys import ControlNetKeys, control_net_keys
from library.families.sd.sizes import UNetSizes
from library.io.components import Component, require_part
from library.io.part_shapes import check_names, names_in_layout, shape_of
from library.io.parts import Part, read_weights

_COMPONENT = Component(
    "ControlNet",
    OPTION,
    "controlnet",
    "a ControlNet of Stable Diffusion 1.x or 2.x (control_model.*, or controlnet_down_blocks.* in diffusers' spelling)",
    {
        "single": (r"input_hint_block\.0\.weight", r"middle_block_out\.0\.weight"),
        "diffusers": (r"controlnet_cond_embedding\.conv_in\.weight", r"controlnet_mid_block\.weight"),
    },
    keep=r".",
    architectures=("a ControlNet",),
)


class _Names(NamedTuple):
    """Where its sizes show, in one spelling."""

    first: str
    middle: str


_NAMES = {
    "single": _Names("input_blocks.0.0.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"),
    "diffusers": _Names("conv_in.weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
}


def locate_control_net(path: str, base: UNetSizes) -> Part:
    """This finds a ControlNet and checks that it is whole and made for the base model.

    Args:
        path: A file in LDM's or in diffusers' spelling, or diffusers' folder.
        base: Sizes of the base model's U-Net.

    Raises:
        ConfigError: It isn't, naming the option.
    """
    try:
        part = require_part(_COMPONENT, read_weights(path), path)
        names = _NAMES[part.layout]
        context_width = shape_of(part, names.middle, 2)[1]
        if context_width != base.context_width:
            raise ConfigError(
                f"{part.title} is for a base model whose text features have a width of {context_width}; this one has "
                f"{base.context_width} (1.x 768, 2.x 1024, SDXL 2048). Use a ControlNet of this model, or leave it out "
                "to start from the base model"
            )
        width = shape_of(part, names.first, 4)[0]
        if width != base.width:
            raise ConfigError(f"{part.title} is for a base model of width {width}; this one has {base.width}")
        check_names(part, names_in_layout(keys_of(base).all, part.layout))
    except ConfigError as error:
        raise ConfigError(f"--{OPTION}: {error}") from error
    return part


def keys_of(base: UNetSizes) -> ControlNetKeys:
    """All tensors of the ControlNet of a base model, in both spellings."""
    return control_net_keys(
        multipliers=base.multipliers, attention_levels=base.attention_levels, blocks_per_level=base.blocks_per_level
    )
