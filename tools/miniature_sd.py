"""A complete, tiny Stable Diffusion 1.x or 2.x with random weights: U-Net, VAE, text encoder, tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.families.sd.export import PAD_TOKENS, complete_pipeline, save_folder, save_single
from library.families.sd.options import LATENTS
from library.families.sd.unet import UNet, UNetConfig
from library.nn.attention import sdpa
from library.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from library.records import Resolution
from tools.miniature_parts import DTYPES, HEAD_DIM, Weights, clip_config, random_weight
from tools.miniature_tokenizers import write_clip_tokenizer

FILE_NAME = "sd-miniature.safetensors"
VARIANTS = ("sd1", "sd2", "sd2-v")
"""1.x, 2.x, and a 2.x that answers with velocities."""

_V_PREDICTION = ("sd2-v",)
_NATIVE, _V_NATIVE = Resolution(512, 512), Resolution(768, 768)
_METADATA = {
    "modelspec.title": "Miniature of Stable Diffusion",
    "modelspec.description": "Random weights, for tests and for trying things out",
}


@dataclass(frozen=True, kw_only=True)
class SdSizes:
    """How small the miniature is. Widths are multiples of 64.

    Attributes:
        is_v2: Whether it is of the second generation.
        width: Of the U-Net's first level.
        multipliers: Features of each level, of ``width``.
        attention_levels: How many levels, from the first, look at the text.
        blocks_per_level: Residual blocks of a level on the way down.
        clip_width: Of the text encoder.
        clip_depth: Layers of the text encoder.
        vae_widths: Features of the VAE per level, multiples of 32.
        vae_blocks: Residual blocks of the VAE per level.
    """

    is_v2: bool = False
    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    attention_levels: int = 3
    blocks_per_level: int = 1
    clip_width: int = 128
    clip_depth: int = 3
    vae_widths: tuple[int, ...] = (32, 64, 64, 64)
    vae_blocks: int = 1

    def denoiser(self) -> UNetConfig:
        """The U-Net's configuration."""
        return UNetConfig(
            in_channels=4,
            out_channels=4,
            width=self.width,
            multipliers=self.multipliers,
            attention_levels=self.attention_levels,
            blocks_per_level=self.blocks_per_level,
            context_width=self.clip_width,
            num_heads=None if self.is_v2 else 8,
            head_dim=HEAD_DIM if self.is_v2 else None,
            linear_projections=self.is_v2,
        )

    def vae(self) -> AutoencoderKLConfig:
        """The VAE's configuration."""
        return AutoencoderKLConfig(
            pixel_channels=3,
            latent_channels=4,
            level_widths=self.vae_widths,
            blocks_per_level=self.vae_blocks,
            quant_convolutions=True,
        )

    def clip(self) -> Any:
        """The text encoder's configuration, transformers' kind."""
        activation = "gelu" if self.is_v2 else "quick_gelu"
        return clip_config(self.clip_width, self.clip_depth, activation, "CLIPTextModel")


def make_sd(
    output: Path,
    *,
    seed: int = 0,
    dtype: str = "fp32",
    layout: str = "single",
    sizes: SdSizes | None = None,
    variant: str = "sd1",
) -> Path:
    """This writes the miniature; the same arguments give the same bytes.

    Args:
        output: The folder, made if missing. The tokenizer lies in it too.
        seed: Of the weights.
        dtype: What the weights are stored as: fp32, fp16 or bf16.
        layout: ``single`` writes one file with all parts, ``diffusers`` a folder per part.
        sizes: How small; by default that of the variant.
        variant: One of ``VARIANTS``. Weights are random: what they predict is only what the files say.

    Returns:
        What ``--pretrained_model_name_or_path`` takes: the single file, or ``output``.
    """
    v_prediction = variant in _V_PREDICTION
    sizes = sizes or SdSizes(is_v2=variant != "sd1")
    output.mkdir(parents=True, exist_ok=True)
    write_clip_tokenizer(output / "tokenizer", pad_token=PAD_TOKENS[sizes.is_v2])
    parts = sd_weights(seed, sizes)
    dtypes = dict.fromkeys(parts, DTYPES[dtype])
    if layout == "diffusers":
        native = _V_NATIVE if v_prediction else _NATIVE
        save_folder(parts, sizes.denoiser(), sizes.vae(), output, {}, native=native, dtypes=dtypes)
        complete_pipeline(output, None, is_v2=sizes.is_v2, v_prediction=v_prediction)
        return output
    path = output / FILE_NAME
    said = {"modelspec.prediction_type": "v"} if v_prediction else {}
    save_single(parts, path, _METADATA | said, is_v2=sizes.is_v2, dtypes=dtypes)
    return path


def sd_weights(seed: int, sizes: SdSizes) -> dict[str, Weights]:
    """This makes the weights of all parts, fp32: LDM's names, and the text encoder's under transformers'."""
    from transformers import CLIPTextModel

    with torch.device("meta"):
        modules: dict[str, nn.Module] = {
            "denoiser": UNet(sizes.denoiser(), attention=sdpa),
            "vae": AutoencoderKL(sizes.vae()),
            "clip": CLIPTextModel(sizes.clip()),
        }
    shapes = {
        part: {_stored(part, name): tuple(place.shape) for name, place in module.state_dict().items()}
        for part, module in modules.items()
    }
    parts = {
        part: {
            name: random_weight(f"{part}.{name}", shape, seed, _SCALES, tables=_TABLES) for name, shape in named.items()
        }
        for part, named in shapes.items()
    }
    _, log_variance = parts["vae"]["quant_conv.bias"].chunk(2)
    log_variance -= 8  # little noise, as in a trained VAE
    mean, _ = parts["vae"]["quant_conv.weight"].chunk(2)
    mean *= 8  # raw latents of the published size, which is about 1 when they are normalised
    return parts


def _stored(part: str, name: str) -> str:
    """The name in published files: newer transformers leave out a prefix."""
    return name if part != "clip" or name.startswith("text_model.") else f"text_model.{name}"


# Size of the numbers, for activations about 1: of a table's entries, or of a layer's outputs for inputs about 1.
_SCALES = (
    ("*token_embedding.weight", 0.5),
    ("*position_embedding.weight", 0.2),
    ("denoiser.out.2.weight", 0.5),
    ("vae.decoder.conv_out.weight", 0.5),
    ("vae.post_quant_conv.weight", LATENTS.scale),
)
_TABLES = ("*embedding.weight",)
