"""The sizes of an AutoencoderKL, read from tensor names and shapes alone, and its tensors in both spellings.

The published single files and diffusers' folders name the same tensors; diffusers has linear layers where the single
file's attention has 1x1 convolutions.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from library.io.key_maps import KeyMap, LayerMap, tensor_maps
from library.io.part_shapes import check_names, last_number, names_in_layout, shape_of
from library.io.parts import Part

QUANT_CONVOLUTIONS = ("quant_conv", "post_quant_conv")

_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LEVEL = {
    "single": "encoder.down.{}.block.{}.norm2.weight",
    "diffusers": "encoder.down_blocks.{}.resnets.{}.norm2.weight",
}


@dataclass(frozen=True)
class AutoencoderSizes:
    """Of an autoencoder; the fields are those of ``autoencoder_kl.AutoencoderKLConfig``, which needs torch."""

    pixel_channels: int
    latent_channels: int
    level_widths: tuple[int, ...]
    blocks_per_level: int
    quant_convolutions: bool

    @property
    def key_maps(self) -> tuple[KeyMap, ...]:
        """All tensors, in both spellings."""
        return autoencoder_key_maps(
            level_widths=self.level_widths,
            blocks_per_level=self.blocks_per_level,
            quant_convolutions=self.quant_convolutions,
        )


def autoencoder_sizes(part: Part) -> AutoencoderSizes:
    """This reads the sizes and checks that the autoencoder is whole.

    Args:
        part: The autoencoder, in either layout.

    Raises:
        ConfigError: A tensor is missing or unknown.
    """
    level = _LEVEL[part.layout]
    levels = last_number(part, re.escape(level.split("{")[0]) + r"(\d+)\.") + 1
    sizes = AutoencoderSizes(
        pixel_channels=shape_of(part, "encoder.conv_in.weight", 4)[1],
        latent_channels=shape_of(part, "decoder.conv_in.weight", 4)[1],
        level_widths=tuple(shape_of(part, level.format(i, 0), 1)[0] for i in range(levels)),
        blocks_per_level=sum(level.format(0, i) in part.names for i in range(len(part.names))),
        quant_convolutions=any(f"{name}.weight" in part.names for name in QUANT_CONVOLUTIONS),
    )
    check_names(part, names_in_layout(sizes.key_maps, part.layout))
    return sizes


def autoencoder_key_maps(
    *, level_widths: Sequence[int], blocks_per_level: int, quant_convolutions: bool
) -> tuple[KeyMap, ...]:
    """This lists every tensor of the autoencoder in both spellings.

    Args:
        level_widths: Features per level, from full resolution to latent resolution.
        blocks_per_level: Residual blocks per level of the encoder; the decoder has one more.
        quant_convolutions: Whether there are convolutions between the Gaussian and either half.
    """
    last = len(level_widths) - 1
    layers = [LayerMap(name, (name,)) for name in QUANT_CONVOLUTIONS] if quant_convolutions else []
    for half in ("encoder", "decoder"):
        layers += [LayerMap(f"{half}.{name}", (f"{half}.{name}",)) for name in ("conv_in", "conv_out")]
        layers.append(LayerMap(f"{half}.norm_out", (f"{half}.conv_norm_out",)))
        layers += _resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        layers += _resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        layers += _attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
    for level, width in enumerate(level_widths):
        down, down_block = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        up, up_block = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"
        for i in range(blocks_per_level):
            shortcut = i == 0 and width != level_widths[max(level - 1, 0)]
            layers += _resnet(f"{down}.block.{i}", f"{down_block}.resnets.{i}", shortcut)
        for i in range(blocks_per_level + 1):
            shortcut = i == 0 and width != level_widths[min(level + 1, last)]
            layers += _resnet(f"{up}.block.{i}", f"{up_block}.resnets.{i}", shortcut)
        if level < last:
            layers.append(LayerMap(f"{down}.downsample.conv", (f"{down_block}.downsamplers.0.conv",)))
        if level > 0:
            layers.append(LayerMap(f"{up}.upsample.conv", (f"{up_block}.upsamplers.0.conv",)))
    return tuple(tensor_maps(layers))


def _resnet(ours: str, theirs: str, shortcut: bool = False) -> Iterator[LayerMap]:
    names = _RESNET | ({"nin_shortcut": "conv_shortcut"} if shortcut else {})
    for our_name, their_name in names.items():
        yield LayerMap(f"{ours}.{our_name}", (f"{theirs}.{their_name}",))


def _attention(ours: str, theirs: str) -> Iterator[LayerMap]:
    yield LayerMap(f"{ours}.norm", (f"{theirs}.group_norm",))
    for our_name, their_name in _ATTENTION.items():
        yield LayerMap(f"{ours}.{our_name}", (f"{theirs}.{their_name}",), "squeeze")
