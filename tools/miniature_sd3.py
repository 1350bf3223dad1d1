"""A complete, tiny Stable Diffusion 3.5 medium with random weights: denoiser, VAE, three text encoders, tokenizers.

It has everything that the published model has (query and key norms, second attention in the first blocks, a stored
position table), in the published layout, and is made in seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.families.sd3.export import complete_pipeline, save_folder, save_single
from library.families.sd3.mmdit import MMDiT, MMDiTConfig
from library.families.sd3.position_table import sincos_table
from library.nn.attention import sdpa
from library.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from tools.miniature_parts import DTYPES, HEAD_DIM, Weights, clip_config, random_weight
from tools.miniature_tokenizers import (
    CLIP_END,
    t5_vocabulary_size,
    write_clip_tokenizer,
    write_t5_tokenizer,
)

FILE_NAME = "sd3-miniature.safetensors"
_METADATA = {
    "modelspec.title": "Miniature of Stable Diffusion 3.5 medium",
    "modelspec.description": "Random weights, for tests and for trying things out",
}


@dataclass(frozen=True, kw_only=True)
class Sd3Sizes:
    """How small the miniature is. Widths are multiples of the head size, 64.

    Attributes:
        depth: Joint blocks of the denoiser.
        width: Of the denoiser.
        dual_attention_blocks: Blocks with a second attention.
        pos_embed_max_size: Sides of the stored position table, in tokens of 16 pixels.
        clip_l_width: Of CLIP-L.
        clip_g_width: Of CLIP-G.
        clip_depth: Layers of both CLIPs.
        t5_width: Of T5 and of the denoiser's context; at least the sum of the CLIPs' widths.
        t5_heads: Heads of T5's attention.
        t5_hidden: Width inside T5's feed-forward layers.
        t5_depth: Blocks of T5.
        vae_widths: Features of the VAE per level, multiples of 32.
        vae_blocks: Residual blocks of the VAE per level.
    """

    depth: int = 4
    width: int = 256
    dual_attention_blocks: tuple[int, ...] = (0, 1)
    pos_embed_max_size: int = 48
    clip_l_width: int = 128
    clip_g_width: int = 192
    clip_depth: int = 3
    t5_width: int = 384
    t5_heads: int = 4
    t5_hidden: int = 768
    t5_depth: int = 2
    vae_widths: tuple[int, ...] = (32, 64, 64, 64)
    vae_blocks: int = 1

    def denoiser(self) -> MMDiTConfig:
        """The denoiser's configuration."""
        return MMDiTConfig(
            depth=self.depth,
            width=self.width,
            num_heads=self.width // HEAD_DIM,
            patch_size=2,
            in_channels=16,
            context_width=self.t5_width,
            pooled_width=self.clip_l_width + self.clip_g_width,
            pos_embed_max_size=self.pos_embed_max_size,
            qk_norm=True,
            dual_attention_blocks=self.dual_attention_blocks,
        )

    def vae(self) -> AutoencoderKLConfig:
        """The VAE's configuration."""
        return AutoencoderKLConfig(
            pixel_channels=3,
            latent_channels=16,
            level_widths=self.vae_widths,
            blocks_per_level=self.vae_blocks,
            quant_convolutions=False,
        )

    def clip(self, width: int, activation: str) -> Any:
        """A CLIP's configuration, transformers' kind."""
        return clip_config(width, self.clip_depth, activation, "CLIPTextModelWithProjection")

    def t5(self) -> Any:
        """T5's configuration, transformers' kind."""
        from transformers import T5Config

        return T5Config(
            vocab_size=t5_vocabulary_size(),
            d_model=self.t5_width,
            d_kv=HEAD_DIM,
            d_ff=self.t5_hidden,
            num_layers=self.t5_depth,
            num_heads=self.t5_heads,
            feed_forward_proj="gated-gelu",
            architectures=["T5EncoderModel"],
        )


def make_sd3(
    output: Path, *, seed: int = 0, dtype: str = "fp32", layout: str = "single", sizes: Sd3Sizes | None = None
) -> Path:
    """This writes the miniature; the same arguments give the same bytes.

    Args:
        output: The folder, made if missing. The tokenizers lie in it too.
        seed: Of the weights.
        dtype: What the weights are stored as: fp32, fp16 or bf16.
        layout: ``single`` writes one file with all parts, ``diffusers`` a folder per part.
        sizes: How small.

    Returns:
        What ``--pretrained_model_name_or_path`` takes: the single file, or ``output``.
    """
    sizes = sizes or Sd3Sizes()
    output.mkdir(parents=True, exist_ok=True)
    write_clip_tokenizer(output / "tokenizer", pad_token=CLIP_END)
    write_clip_tokenizer(output / "tokenizer_2", pad_token="!")
    write_t5_tokenizer(output / "tokenizer_3")
    parts = sd3_weights(seed, sizes)
    if layout == "diffusers":
        _write_diffusers(output, parts, sizes, DTYPES[dtype])
        return output
    save_single(parts, output / FILE_NAME, _METADATA, dtypes=dict.fromkeys(parts, DTYPES[dtype]))
    return output / FILE_NAME


def sd3_weights(seed: int, sizes: Sd3Sizes) -> dict[str, Weights]:
    """This makes the weights of all parts, fp32, each part with the names of the published single file.

    CLIP-L has no projection, as published: it is the identity.
    """
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    with torch.device("meta"):
        modules: dict[str, nn.Module] = {
            "denoiser": MMDiT(sizes.denoiser(), attention=sdpa),
            "vae": AutoencoderKL(sizes.vae()),
            "clip_l": CLIPTextModelWithProjection(sizes.clip(sizes.clip_l_width, "quick_gelu")),
            "clip_g": CLIPTextModelWithProjection(sizes.clip(sizes.clip_g_width, "gelu")),
            "t5xxl": T5EncoderModel(sizes.t5()),
        }
    parts = {
        part: {
            name: random_weight(f"{part}.{name}", tuple(place.shape), seed, _SCALES, tables=_TABLES)
            for name, place in module.state_dict().items()
        }
        for part, module in modules.items()
    }
    parts["denoiser"]["pos_embed"] = sincos_table(sizes.pos_embed_max_size, sizes.width)
    del parts["clip_l"]["text_projection.weight"]
    del parts["t5xxl"]["encoder.embed_tokens.weight"]  # shared.weight by another name
    _, log_variance = parts["vae"]["encoder.conv_out.bias"].chunk(2)
    log_variance -= 8  # little noise, as in a trained VAE
    return parts


# Size of the numbers, for activations about 1: of a table's entries, or of a layer's outputs for inputs about 1.
_SCALES = (
    ("*token_embedding.weight", 0.5),
    ("*position_embedding.weight", 0.2),
    ("t5xxl.shared.weight", 1.0),
    ("*relative_attention_bias.weight", 0.5),
    ("t5xxl.*SelfAttention.q.weight", HEAD_DIM**-0.5),  # T5 doesn't divide by the root of the head size
    ("*adaLN_modulation.1.weight", 0.5),
    ("denoiser.final_layer.linear.weight", 0.5),
    ("vae.decoder.conv_out.weight", 0.5),
)
_TABLES = ("*embedding.weight", "*shared.weight", "*relative_attention_bias.weight")


def _write_diffusers(output: Path, parts: Mapping[str, Weights], sizes: Sd3Sizes, dtype: torch.dtype) -> None:
    save_folder(parts, sizes.denoiser(), sizes.vae(), output, {}, dtypes=dict.fromkeys(parts, dtype))
    complete_pipeline(output, {}, has_t5=True)
