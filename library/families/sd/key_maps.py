"""How the published LDM files and diffusers' folders name the same tensors of the U-Net.

LDM numbers stages through all resolutions; diffusers counts blocks per resolution. No tensor differs in its layout.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from library.io.key_maps import KeyMap, LayerMap, tensor_maps

_OUTSIDE = (
    LayerMap("time_embed.0", ("time_embedding.linear_1",)),
    LayerMap("time_embed.2", ("time_embedding.linear_2",)),
    LayerMap("input_blocks.0.0", ("conv_in",)),
    LayerMap("out.0", ("conv_norm_out",)),
    LayerMap("out.2", ("conv_out",)),
)
_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
_TRANSFORMER = ("norm", "proj_in", "proj_out")
_TRANSFORMER_BLOCK = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")
_WITHOUT_BIAS = tuple(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v"))


def unet_key_maps(*, multipliers: tuple[int, ...], attention_levels: int, blocks_per_level: int) -> tuple[KeyMap, ...]:
    """This lists every tensor of a U-Net in both spellings.

    Args:
        multipliers: Features of each resolution, of those of the first convolution.
        attention_levels: How many resolutions, from the first, look at the text.
        blocks_per_level: Residual blocks of a resolution on the way down; one more on the way up.
    """
    maps = list(tensor_maps(_OUTSIDE))
    for piece in _pieces(multipliers, attention_levels, blocks_per_level):
        if piece.kind == "transformer":
            maps += _transformer(piece)
            continue
        names = {"": ""} if piece.kind == "sampler" else {f".{name}": f".{to}" for name, to in _RES_BLOCK.items()}
        if piece.kind == "widening":
            names[".skip_connection"] = ".conv_shortcut"
        maps += tensor_maps(LayerMap(piece.ours + name, (piece.theirs + other,)) for name, other in names.items())
    return tuple(maps)


class _Piece(NamedTuple):
    """A part of a stage by both module paths; ``widening`` is a residual block whose number of features changes."""

    ours: str
    theirs: str
    kind: Literal["residual", "widening", "transformer", "sampler"]


def _pieces(multipliers: tuple[int, ...], attention_levels: int, blocks_per_level: int) -> Iterator[_Piece]:
    last = len(multipliers) - 1
    stage, before = 1, 1
    for level, multiplier in enumerate(multipliers):
        theirs = f"down_blocks.{level}"
        for block in range(blocks_per_level):
            yield _Piece(
                f"input_blocks.{stage}.0",
                f"{theirs}.resnets.{block}",
                "residual" if multiplier == before else "widening",
            )
            if level < attention_levels:
                yield _Piece(f"input_blocks.{stage}.1", f"{theirs}.attentions.{block}", "transformer")
            stage, before = stage + 1, multiplier
        if level < last:
            yield _Piece(f"input_blocks.{stage}.0.op", f"{theirs}.downsamplers.0.conv", "sampler")
            stage += 1
    yield _Piece("middle_block.0", "mid_block.resnets.0", "residual")
    yield _Piece("middle_block.1", "mid_block.attentions.0", "transformer")
    yield _Piece("middle_block.2", "mid_block.resnets.1", "residual")
    stage = 0
    for level in reversed(range(last + 1)):
        theirs = f"up_blocks.{last - level}"
        for block in range(blocks_per_level + 1):
            yield _Piece(f"output_blocks.{stage}.0", f"{theirs}.resnets.{block}", "widening")
            if level < attention_levels:
                yield _Piece(f"output_blocks.{stage}.1", f"{theirs}.attentions.{block}", "transformer")
            if level and block == blocks_per_level:
                place = 2 if level < attention_levels else 1
                yield _Piece(f"output_blocks.{stage}.{place}.conv", f"{theirs}.upsamplers.0.conv", "sampler")
            stage += 1


def _transformer(piece: _Piece) -> Iterator[KeyMap]:
    yield from tensor_maps(LayerMap(f"{piece.ours}.{name}", (f"{piece.theirs}.{name}",)) for name in _TRANSFORMER)
    inside = "transformer_blocks.0"
    ours, theirs = f"{piece.ours}.{inside}", f"{piece.theirs}.{inside}"
    yield from tensor_maps(LayerMap(f"{ours}.{name}", (f"{theirs}.{name}",)) for name in _TRANSFORMER_BLOCK)
    for name in _WITHOUT_BIAS:
        yield KeyMap(f"{ours}.{name}.weight", (f"{theirs}.{name}.weight",), "copy")
