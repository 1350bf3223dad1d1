"""How the published LDM files and diffusers name the same tensors of a ControlNet, without prefix.

Those that it shares with the U-Net have the same names there. No tensor differs in its layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from library.families.sd.key_maps import unet_key_maps
from library.io.key_maps import KeyMap, LayerMap, tensor_maps

_WAY_UP = ("output_blocks.", "out.")
_HINT_CONVOLUTIONS = 8


@dataclass(frozen=True)
class ControlNetKeys:
    """All tensors of a ControlNet in both spellings.

    Attributes:
        copied: Those that the U-Net has too.
        encoder: Those of the picture's encoder, but for its last layer.
        zeros: Those that are zero before training.
    """

    copied: tuple[KeyMap, ...]
    encoder: tuple[KeyMap, ...]
    zeros: tuple[KeyMap, ...]

    @property
    def all(self) -> tuple[KeyMap, ...]:
        """Every tensor."""
        return (*self.copied, *self.encoder, *self.zeros)


def control_net_keys(*, multipliers: tuple[int, ...], attention_levels: int, blocks_per_level: int) -> ControlNetKeys:
    """This lists the tensors of the ControlNet of a U-Net; the arguments are those of ``unet_key_maps``."""
    unet = unet_key_maps(multipliers=multipliers, attention_levels=attention_levels, blocks_per_level=blocks_per_level)
    levels = len(multipliers)
    stages = 1 + levels * blocks_per_level + (levels - 1)
    *encoder, last = _hint_layers()
    zeros = [
        last,
        *(LayerMap(f"zero_convs.{stage}.0", (f"controlnet_down_blocks.{stage}",)) for stage in range(stages)),
        LayerMap("middle_block_out.0", ("controlnet_mid_block",)),
    ]
    return ControlNetKeys(
        copied=tuple(entry for entry in unet if not entry.ours.startswith(_WAY_UP)),
        encoder=tuple(tensor_maps(encoder)),
        zeros=tuple(tensor_maps(zeros)),
    )


def _hint_layers() -> Iterator[LayerMap]:
    last = _HINT_CONVOLUTIONS - 1
    for number in range(_HINT_CONVOLUTIONS):
        name = {0: "conv_in", last: "conv_out"}.get(number, f"blocks.{number - 1}")
        # an activation stands after each convolution but the last
        yield LayerMap(f"input_hint_block.{2 * number}", (f"controlnet_cond_embedding.{name}",))
