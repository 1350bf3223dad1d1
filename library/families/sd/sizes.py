"""The sizes of the parts of Stable Diffusion 1.x and 2.x, read from tensor names and shapes alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from library.config.errors import ConfigError
from library.families.sd.key_maps import unet_key_maps
from library.families.sd.parts import CLIP_EMBEDDING, OPEN_CLIP_EMBEDDING
from library.io.key_maps import KeyMap
from library.io.part_shapes import check_names, last_number, names_in_layout, shape_of
from library.io.parts import Part
from library.nn.autoencoder_sizes import AutoencoderSizes, autoencoder_sizes
from library.text_encoders.open_clip import open_clip_key_maps

NUM_HEADS = 8
"""Heads of every attention in 1.x."""

HEAD_DIM = 64
"""Width of a head in 2.x."""

_LATENT_CHANNELS = 4
_USED_OF_VIT_H = {24: 23, 23: 23}
"""Layers that a file of OpenCLIP ViT-H holds -> those that 2.x was trained with. Some write 23 in its spelling."""

_KINDS = {
    8: "an upscaler's or an image-editing U-Net (8 channels)",
    9: "an inpainting U-Net (9 channels)",
    5: "a depth-guided U-Net (5 channels)",
    7: "an upscaler's U-Net (7 channels)",
}


@dataclass(frozen=True)
class UNetSizes:
    """The sizes of a U-Net; the fields are those of ``unet.UNetConfig``, which needs torch."""

    in_channels: int
    out_channels: int
    width: int
    multipliers: tuple[int, ...]
    attention_levels: int
    blocks_per_level: int
    context_width: int
    num_heads: int | None
    head_dim: int | None
    linear_projections: bool

    @property
    def is_v2(self) -> bool:
        """Whether it is of the second generation, as far as its tensors tell."""
        return self.linear_projections

    @property
    def key_maps(self) -> tuple[KeyMap, ...]:
        """All tensors of the U-Net, in both spellings."""
        return unet_key_maps(
            multipliers=self.multipliers,
            attention_levels=self.attention_levels,
            blocks_per_level=self.blocks_per_level,
        )


@dataclass(frozen=True)
class ClipSizes:
    """The sizes of a text encoder.

    Attributes:
        depth: Number of layers.
        width: Of its features.
    """

    depth: int
    width: int


@dataclass(frozen=True)
class _Names:
    """Where the sizes of a U-Net show, in one spelling."""

    first: str
    last: str
    middle: str


_NAMES = {
    "single": _Names("input_blocks.0.0.weight", "out.2.weight", "middle_block.1"),
    "diffusers": _Names("conv_in.weight", "conv_out.weight", "mid_block.attentions.0"),
}


def unet_sizes(part: Part) -> UNetSizes:
    """This reads the U-Net's sizes and checks that it is whole.

    Args:
        part: The U-Net, in either layout.

    Raises:
        ConfigError: It is for another task, or a tensor is missing or unknown.
    """
    names = _NAMES[part.layout]
    width, in_channels, *_ = shape_of(part, names.first, 4)
    if in_channels != _LATENT_CHANNELS:
        kind = _KINDS.get(in_channels, f"a U-Net with {in_channels} channels")
        raise ConfigError(f"{part.title} is {kind}; only those that make pictures from text (4 channels) are trained")
    levels = _single_levels(part) if part.layout == "single" else _diffusers_levels(part)
    blocks = {len(level) for level in levels}
    if len(blocks) != 1 or not levels or any(own % width for level in levels for own in level):
        raise ConfigError(f"{part.title}: its U-Net has levels of widths {levels}, which is none of Stable Diffusion's")
    projection = part.shapes.get(f"{names.middle}.proj_in.weight", ())
    linear = len(projection) == 2
    sizes = UNetSizes(
        in_channels=in_channels,
        out_channels=shape_of(part, names.last, 4)[0],
        width=width,
        multipliers=tuple(level[-1] // width for level in levels),
        attention_levels=_attention_levels(part, levels),
        blocks_per_level=blocks.pop(),
        context_width=shape_of(part, f"{names.middle}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        num_heads=None if linear else NUM_HEADS,
        head_dim=HEAD_DIM if linear else None,
        linear_projections=linear,
    )
    check_names(part, names_in_layout(sizes.key_maps, part.layout))
    return sizes


def vae_sizes(part: Part) -> AutoencoderSizes:
    """This reads the VAE's sizes and checks that it is whole.

    Args:
        part: The VAE, in either layout.

    Raises:
        ConfigError: A tensor is missing or unknown, or it is another model's.
    """
    channels = shape_of(part, "decoder.conv_in.weight", 4)[1]
    if channels != _LATENT_CHANNELS:
        raise ConfigError(f"{part.title} holds a VAE with {channels} channels; Stable Diffusion 1.x and 2.x need 4")
    return autoencoder_sizes(part)


def clip_sizes(part: Part) -> ClipSizes:
    """This reads a text encoder's sizes and checks that it is whole.

    Args:
        part: The text encoder, in transformers' or OpenCLIP's spelling.

    Raises:
        ConfigError: A tensor is missing or unknown.
    """
    single = part.layout == "single"
    width = shape_of(part, OPEN_CLIP_EMBEDDING if single else CLIP_EMBEDDING, 2)[1]
    layer = r"transformer\.resblocks\.(\d+)\." if single else r"text_model\.encoder\.layers\.(\d+)\."
    sizes = ClipSizes(last_number(part, layer) + 1, width)
    check_names(part, names_in_layout(open_clip_key_maps(depth=sizes.depth), part.layout))
    return sizes


def used_layers(part: Part) -> int:
    """How many layers of a text encoder the model was trained with, counted from the first.

    OpenCLIP's files hold one more at the end, which 2.x never used; diffusers' folders leave it out.

    Args:
        part: The text encoder, in transformers' or OpenCLIP's spelling.
    """
    depth = clip_sizes(part).depth
    if depth in _USED_OF_VIT_H:
        return _USED_OF_VIT_H[depth]
    return depth - 1 if part.layout == "single" else depth


def _single_levels(part: Part) -> list[list[int]]:
    """The widths of the residual blocks of each resolution, on the way down."""
    levels: list[list[int]] = [[]]
    for stage in range(1, last_number(part, r"input_blocks\.(\d+)\.") + 1):
        if f"input_blocks.{stage}.0.op.weight" in part.names:
            levels.append([])
        else:
            levels[-1].append(shape_of(part, f"input_blocks.{stage}.0.out_layers.3.weight", 4)[0])
    return levels


def _diffusers_levels(part: Part) -> list[list[int]]:
    levels = []
    for level in range(last_number(part, r"down_blocks\.(\d+)\.") + 1):
        count = last_number(part, rf"down_blocks\.{level}\.resnets\.(\d+)\.") + 1
        names = [f"down_blocks.{level}.resnets.{block}.conv2.weight" for block in range(count)]
        levels.append([shape_of(part, name, 4)[0] for name in names])
    return levels


def _attention_levels(part: Part, levels: Sequence[Sequence[int]]) -> int:
    """How many resolutions, from the first, look at the text."""
    if part.layout == "diffusers":
        return last_number(part, r"down_blocks\.(\d+)\.attentions\.") + 1
    with_attention = {
        int(match[1]) for name in part.names if (match := re.match(r"input_blocks\.(\d+)\.1\.proj_in\.", name))
    }
    stages = len(levels[0]) + 1  # of a resolution, with the one that halves it
    return max(((stage - 1) // stages for stage in with_attention), default=-1) + 1
