"""The sizes of Sana's parts, read from tensor names and shapes alone, and whether the parts are whole."""

import math
import re
from dataclasses import dataclass

from library.config.documents import read_json
from library.config.errors import ConfigError
from library.families.sana.key_maps import denoiser_key_maps, vae_key_maps
from library.families.sana.options import IMAGE_SIZES, LATENTS, SanaOptions
from library.io.key_maps import KeyMap
from library.io.part_shapes import check_names, last_number, names_in_layout, numbers, shape_of
from library.io.parts import Part

HEAD_DIM = 32
NATIVE_SIDE = 1024
"""What a model was made for where nothing tells."""

_CROSS_HEADS = {1152: 16, 2240: 20}
_SPRINT = re.compile(r"cfg_embedder\.|time_embed\.guidance_embedder\.")
_FP16_ADVICE = (
    "use weights that were trained in bf16 (Sana_1600M_1024px_BF16, Sana-1.5), or train with --mixed_precision no"
)


@dataclass(frozen=True)
class DenoiserSizes:
    """The sizes of a Sana denoiser; the fields are those of ``linear_dit.LinearDiTConfig``, which needs torch."""

    depth: int
    width: int
    head_dim: int
    num_cross_heads: int
    mlp_ratio: float
    patch_size: int
    in_channels: int
    context_width: int
    qk_norm: bool

    @property
    def key_maps(self) -> tuple[KeyMap, ...]:
        """All tensors of the denoiser, in both spellings."""
        return denoiser_key_maps(depth=self.depth, qk_norm=self.qk_norm)


@dataclass(frozen=True)
class VaeSizes:
    """The sizes of a DC-AE; the fields are those of ``dc_ae.DCAEConfig``, which needs torch."""

    widths: tuple[int, ...]
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    attention_from: int
    latent_channels: int

    @property
    def stride(self) -> int:
        """Pixels per latent position, on each side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def key_maps(self) -> tuple[KeyMap, ...]:
        """All tensors of the DC-AE, in both spellings."""
        return vae_key_maps(
            encoder_depths=self.encoder_depths,
            decoder_depths=self.decoder_depths,
            attention_from=self.attention_from,
        )


@dataclass(frozen=True)
class GemmaSizes:
    """The sizes of Gemma.

    Attributes:
        depth: Number of layers.
        width: Of its features.
    """

    depth: int
    width: int


@dataclass(frozen=True)
class _Names:
    """Where each size of the denoiser shows, in one spelling."""

    patch: str
    context: str
    inverted: str
    norm: str
    block: str


_NAMES = {
    "single": _Names(
        patch="x_embedder.proj.weight",
        context="y_embedder.y_proj.fc1.weight",
        inverted="blocks.0.mlp.inverted_conv.conv.weight",
        norm="blocks.0.attn.q_norm.weight",
        block=r"blocks\.(\d+)\.",
    ),
    "diffusers": _Names(
        patch="patch_embed.proj.weight",
        context="caption_projection.linear_1.weight",
        inverted="transformer_blocks.0.ff.conv_inverted.weight",
        norm="transformer_blocks.0.attn1.norm_q.weight",
        block=r"transformer_blocks\.(\d+)\.",
    ),
}


def denoiser_sizes(part: Part) -> DenoiserSizes:
    """This reads the denoiser's sizes and checks that it is whole.

    Args:
        part: The denoiser, in either layout.

    Raises:
        ConfigError: It is Sana Sprint, a tensor is missing or unknown, or the sizes can't be those of Sana.
    """
    _refuse_sprint(part)
    names = _NAMES[part.layout]
    width, in_channels, patch_size, _ = shape_of(part, names.patch, 4)
    inverted = shape_of(part, names.inverted, 4)[0]
    num_cross_heads = _cross_heads(width)
    if width % HEAD_DIM or width % num_cross_heads:
        raise ConfigError(
            f"{part.title}: the denoiser's width {width} doesn't divide into heads of {HEAD_DIM} and into "
            f"{num_cross_heads} heads of the attention to the text, so it is not Sana's"
        )
    sizes = DenoiserSizes(
        depth=last_number(part, names.block) + 1,
        width=width,
        head_dim=HEAD_DIM,
        num_cross_heads=num_cross_heads,
        mlp_ratio=inverted / 2 / width,
        patch_size=patch_size,
        in_channels=in_channels,
        context_width=shape_of(part, names.context, 2)[1],
        qk_norm=names.norm in part.names,
    )
    check_names(part, names_in_layout(sizes.key_maps, part.layout))
    return sizes


def vae_sizes(part: Part) -> VaeSizes:
    """This reads the DC-AE's sizes and checks that it is whole.

    Args:
        part: The DC-AE, in either layout.

    Raises:
        ConfigError: A tensor is missing or unknown: there are relatives of other structure.
    """
    if part.layout == "single":
        first, latent, up = "encoder.project_in.conv", "encoder.project_out.0.conv", "stages.{}.op_list.0.main.conv"
        down_stage, up_stage, attention = r"encoder\.stages", r"decoder\.stages", r"\.op_list\.\d+\.context_module\."
        block = r"\.op_list"
    else:
        first, latent, up = "encoder.conv_in", "encoder.conv_out", "up_blocks.{}.0"
        down_stage, up_stage, attention = r"encoder\.down_blocks", r"decoder\.up_blocks", r"\.\d+\.attn\."
        block = ""
    last = last_number(part, rf"{down_stage}\.(\d+)\.")
    widths = [shape_of(part, f"{first}.weight", 4)[0]]
    widths += [shape_of(part, f"decoder.{up.format(stage)}.conv.weight", 4)[1] for stage in range(last)]

    def depths(half: str) -> tuple[int, ...]:
        layers = [len(numbers(part, rf"{half}\.{stage}{block}\.(\d+)\.")) for stage in range(last + 1)]
        return tuple(count - (stage < last) for stage, count in enumerate(layers))  # but for the change of resolution

    sizes = VaeSizes(
        widths=tuple(widths),
        encoder_depths=depths(down_stage),
        decoder_depths=depths(up_stage),
        attention_from=min(numbers(part, rf"{down_stage}\.(\d+){attention}"), default=last + 1),
        latent_channels=shape_of(part, f"{latent}.weight", 4)[0],
    )
    try:
        check_names(part, names_in_layout(sizes.key_maps, part.layout))
    except ConfigError as error:
        raise ConfigError(f"{error}; Sana needs dc-ae-f32c32-sana-1.0 or 1.1, whole") from None
    return sizes


def gemma_sizes(part: Part) -> GemmaSizes:
    """This reads Gemma's sizes and checks that it is whole.

    Args:
        part: The encoder.

    Raises:
        ConfigError: A tensor is missing or unknown.
    """
    depth = last_number(part, r"layers\.(\d+)\.") + 1
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    layers = [
        *(f"self_attn.{kind}_proj" for kind in "qkvo"),
        *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
        *(f"{kind}_layernorm" for kind in norms),
    ]
    names = [f"layers.{i}.{layer}.weight" for i in range(depth) for layer in layers]
    check_names(part, [*names, "embed_tokens.weight", "norm.weight"])
    return GemmaSizes(depth, shape_of(part, "embed_tokens.weight", 2)[1])


def image_size(part: Part, options: SanaOptions) -> int:
    """This says for which side in pixels the denoiser was made.

    That is the option; else what the stored position table, or diffusers' configuration beside the weights, says.

    Args:
        part: The denoiser.
        options: The family's options.
    """
    if options.sana_image_size is not None:
        return int(options.sana_image_size)
    tokens = _stored_positions(part) or _configured_positions(part)
    known = {int(size) // LATENTS.stride: int(size) for size in IMAGE_SIZES}
    return NATIVE_SIDE if tokens is None else known.get(tokens, NATIVE_SIDE)


def count_parameters(part: Part) -> int:
    """The denoiser's learnable parameters."""
    return sum(math.prod(shape) for shape in part.shapes.values())


def fp16_warning(part: Part, sizes: DenoiserSizes) -> str | None:
    """This warns of weights that were trained in fp16, which lose quality in bf16; None: nothing says that they were.

    Two things tell: the published 0.6B exists in no other way, and weights stored in fp16 come from there. The first
    1.6B stored in fp32 can't be told from its bf16 successor.

    Args:
        part: The denoiser.
        sizes: Its sizes.
    """
    if sizes.qk_norm:
        return None  # Sana-1.5, trained in bf16
    if sizes.width == min(_CROSS_HEADS):
        return f"{part.title} is Sana 0.6B, which was trained in fp16 and loses quality in bf16: {_FP16_ADVICE}"
    if any(info.dtype == "F16" for info in part.tensors.values()):
        return (
            f"{part.title} is stored in fp16, as the first Sana 1.6B was trained, and loses quality in bf16: "
            f"{_FP16_ADVICE}"
        )
    return None


def _refuse_sprint(part: Part) -> None:
    if any(_SPRINT.match(name) for name in part.names):
        raise ConfigError(
            f"{part.title} is Sana Sprint, a model distilled to draw in one to four steps; plain flow matching undoes "
            "that, and its authors don't train it so either. Fine-tune Sana or Sana-1.5"
        )


def _cross_heads(width: int) -> int:
    """No shape tells the number of heads in the attention to the text; other widths have heads as in the other one."""
    return _CROSS_HEADS.get(width, max(1, width // HEAD_DIM))


def _stored_positions(part: Part) -> int | None:
    """Tokens per side of the position table, where the file has one."""
    patch = _NAMES[part.layout].patch
    prefix = part.names[patch].removesuffix(patch) if patch in part.names else ""
    for header in part.headers:
        info = header.tensors.get(f"{prefix}pos_embed")
        if info is not None and len(info.shape) == 3:
            return math.isqrt(info.shape[1])
    return None


def _configured_positions(part: Part) -> int | None:
    """Tokens per side, where ``config.json`` of diffusers lies beside the weights."""
    if part.layout != "diffusers":
        return None
    try:
        config = read_json(part.headers[0].path.parent / "config.json")
        size, scale = int(config["sample_size"]), config.get("interpolation_scale")
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return min(size, NATIVE_SIDE // LATENTS.stride) if scale is None else size  # without a scale: no positions
