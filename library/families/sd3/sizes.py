"""The sizes of SD3's parts, read from tensor names and shapes alone, and whether the parts are whole."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.config.errors import ConfigError
from library.families.sd3.key_maps import denoiser_key_maps
from library.io.key_maps import KeyMap
from library.io.part_shapes import check_names, last_number, names_in_layout, numbers, shape_of
from library.io.parts import Part
from library.nn.autoencoder_sizes import AutoencoderSizes, autoencoder_sizes

HEAD_DIM = 64
"""Width of an attention head where no tensor tells it."""

_OLDER_CHANNELS = 4


@dataclass(frozen=True)
class DenoiserSizes:
    """The sizes of an MMDiT; the fields are those of ``mmdit.MMDiTConfig``, which needs torch."""

    depth: int
    width: int
    num_heads: int
    patch_size: int
    in_channels: int
    context_width: int
    pooled_width: int
    pos_embed_max_size: int
    qk_norm: bool
    dual_attention_blocks: tuple[int, ...]

    @property
    def key_maps(self) -> tuple[KeyMap, ...]:
        """All tensors of the denoiser, in both spellings."""
        return denoiser_key_maps(
            depth=self.depth, qk_norm=self.qk_norm, dual_attention_blocks=self.dual_attention_blocks
        )


@dataclass(frozen=True)
class EncoderSizes:
    """The sizes of a text encoder.

    Attributes:
        depth: Number of layers.
        width: Of its features.
        pooled_width: Of its pooled output; 0 for T5, which has none.
    """

    depth: int
    width: int
    pooled_width: int


@dataclass(frozen=True)
class _DenoiserNames:
    """Where each size shows, in one spelling."""

    patch: str
    table: str
    context: str
    pooled: str
    norm: str
    block: str
    second_attention: str


_DENOISER_NAMES = {
    "single": _DenoiserNames(
        patch="x_embedder.proj.weight",
        table="pos_embed",
        context="context_embedder.weight",
        pooled="y_embedder.mlp.0.weight",
        norm="joint_blocks.0.x_block.attn.ln_q.weight",
        block=r"joint_blocks\.(\d+)\.",
        second_attention=r"joint_blocks\.(\d+)\.x_block\.attn2\.",
    ),
    "diffusers": _DenoiserNames(
        patch="pos_embed.proj.weight",
        table="pos_embed.pos_embed",
        context="context_embedder.weight",
        pooled="time_text_embed.text_embedder.linear_1.weight",
        norm="transformer_blocks.0.attn.norm_q.weight",
        block=r"transformer_blocks\.(\d+)\.",
        second_attention=r"transformer_blocks\.(\d+)\.attn2\.",
    ),
}


def denoiser_sizes(part: Part) -> DenoiserSizes:
    """This reads the denoiser's sizes and checks that it is whole.

    Args:
        part: The denoiser, in either layout.

    Raises:
        ConfigError: A tensor is missing or unknown, or the sizes can't be those of an MMDiT.
    """
    names = _DENOISER_NAMES[part.layout]
    width, in_channels, patch_size, _ = shape_of(part, names.patch, 4)
    positions = shape_of(part, names.table, 3)[1]
    qk_norm = names.norm in part.names
    head_dim = shape_of(part, names.norm, 1)[0] if qk_norm else HEAD_DIM
    if math.isqrt(positions) ** 2 != positions:
        raise ConfigError(f"{part.title}: {names.table} has {positions} positions, which is no square")
    if width % head_dim:
        raise ConfigError(f"{part.title}: the denoiser's width {width} is not a multiple of its head size {head_dim}")
    sizes = DenoiserSizes(
        depth=last_number(part, names.block) + 1,
        width=width,
        num_heads=width // head_dim,
        patch_size=patch_size,
        in_channels=in_channels,
        context_width=shape_of(part, names.context, 2)[1],
        pooled_width=shape_of(part, names.pooled, 2)[1],
        pos_embed_max_size=math.isqrt(positions),
        qk_norm=qk_norm,
        dual_attention_blocks=tuple(sorted(numbers(part, names.second_attention))),
    )
    check_names(part, names_in_layout(sizes.key_maps, part.layout))
    return sizes


def vae_sizes(part: Part) -> AutoencoderSizes:
    """This reads the VAE's sizes and checks that it is whole.

    Args:
        part: The VAE, in either layout.

    Raises:
        ConfigError: A tensor is missing or unknown, or it is an older model's.
    """
    if shape_of(part, "decoder.conv_in.weight", 4)[1] == _OLDER_CHANNELS:
        raise ConfigError(f"{part.title} holds an SD1 or SDXL VAE with {_OLDER_CHANNELS} channels; SD3 needs 16")
    return autoencoder_sizes(part)


def clip_sizes(part: Part) -> EncoderSizes:
    """This reads a CLIP text encoder's sizes and checks that it is whole.

    Args:
        part: The encoder.

    Raises:
        ConfigError: A tensor is missing or unknown.
    """
    width = shape_of(part, "text_model.embeddings.token_embedding.weight", 2)[1]
    projection = "text_projection.weight"
    pooled_width = shape_of(part, projection, 2)[0] if projection in part.names else width
    depth = last_number(part, r"text_model\.encoder\.layers\.(\d+)\.") + 1
    linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    layers = [
        f"text_model.encoder.layers.{i}.{layer}"
        for i in range(depth)
        for layer in (*linear, "layer_norm1", "layer_norm2")
    ]
    names = [f"{layer}.{kind}" for layer in (*layers, "text_model.final_layer_norm") for kind in ("weight", "bias")]
    names += [f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position")]
    check_names(part, names, optional=(projection,))
    return EncoderSizes(depth, width, pooled_width)


def t5_sizes(part: Part) -> EncoderSizes:
    """This reads a T5 v1.1 encoder's sizes and checks that it is whole.

    Args:
        part: The encoder.

    Raises:
        ConfigError: A tensor is missing or unknown.
    """
    embeddings = ("shared.weight", "encoder.embed_tokens.weight")
    embedding = next((name for name in embeddings if name in part.names), embeddings[0])
    width = shape_of(part, embedding, 2)[1]
    depth = last_number(part, r"encoder\.block\.(\d+)\.") + 1
    first = [f"layer.0.SelfAttention.{kind}" for kind in ("q", "k", "v", "o")]
    second = [f"layer.1.DenseReluDense.{kind}" for kind in ("wi_0", "wi_1", "wo")]
    layers = [*first, "layer.0.layer_norm", *second, "layer.1.layer_norm"]
    names = [f"encoder.block.{i}.{layer}.weight" for i in range(depth) for layer in layers]
    names += ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "encoder.final_layer_norm.weight"]
    check_names(part, [*names, embedding], optional=embeddings)
    return EncoderSizes(depth, width, 0)


def count_parameters(shapes: Mapping[str, Sequence[int]], layout: str) -> int:
    """The denoiser's learnable parameters: all but the stored position table."""
    table = _DENOISER_NAMES[layout].table
    return sum(math.prod(shape) for name, shape in shapes.items() if name != table)
