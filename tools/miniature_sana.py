"""A complete, tiny Sana-1.5 with random weights: denoiser, DC-AE, Gemma, tokenizer.

It has everything that the published model has (query and key norms, attention in the autoencoder's deep stages, sides
compressed 32 times), in the published names, and is made in seconds. The published parts lie in files of their own;
here one file can hold them all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.families.sana.dc_ae import DCAE, DCAEConfig
from library.families.sana.export import complete_pipeline, save_folder, save_gemma, save_vae
from library.families.sana.family import SAMPLING_SHIFT
from library.families.sana.linear_dit import LinearDiT, LinearDiTConfig
from library.families.sana.options import LATENTS
from library.families.sana.tokenizers import INSTRUCTION
from library.io.safetensors import save_tensors
from library.nn.attention import sdpa
from tools.miniature_parts import DTYPES, Weights, random_weight
from tools.miniature_tokenizers import WORDS, gemma_pieces, write_gemma_tokenizer

FILE_NAME = "sana-miniature.safetensors"
IMAGE_SIZE = 1024
_HEAD_DIM, _GEMMA_HEAD_DIM = 32, 256
_METADATA = {
    "modelspec.title": "Miniature of Sana-1.5",
    "modelspec.description": "Random weights, for tests and for trying things out",
}


@dataclass(frozen=True, kw_only=True)
class SanaSizes:
    """How small the miniature is.

    Attributes:
        depth: Blocks of the denoiser.
        width: Of the denoiser, a multiple of the head size, 32.
        gemma_width: Of Gemma and of the denoiser's context.
        gemma_depth: Layers of Gemma.
        gemma_hidden: Width inside Gemma's feed-forward layers.
        vae_widths: Features of the DC-AE per stage, from full resolution down; from the fourth on multiples of 32.
        vae_blocks: Blocks of the DC-AE per stage.
    """

    depth: int = 4
    width: int = 256
    gemma_width: int = 256
    gemma_depth: int = 2
    gemma_hidden: int = 512
    vae_widths: tuple[int, ...] = (16, 16, 32, 64, 64, 64)
    vae_blocks: int = 1

    def denoiser(self) -> LinearDiTConfig:
        """The denoiser's configuration."""
        return LinearDiTConfig(
            depth=self.depth,
            width=self.width,
            head_dim=_HEAD_DIM,
            num_cross_heads=self.width // _HEAD_DIM,
            mlp_ratio=2.5,
            patch_size=LATENTS.patch,
            in_channels=LATENTS.channels,
            context_width=self.gemma_width,
            qk_norm=True,
            position_base=None,
            position_scale=1.0,
        )

    def vae(self) -> DCAEConfig:
        """The DC-AE's configuration."""
        depths = (self.vae_blocks,) * len(self.vae_widths)
        return DCAEConfig(
            widths=self.vae_widths,
            encoder_depths=depths,
            decoder_depths=depths,
            attention_from=3,
            latent_channels=LATENTS.channels,
        )

    def gemma(self) -> dict[str, tuple[int, ...]]:
        """Gemma's tensors: name -> shape."""
        width, hidden, heads = self.gemma_width, self.gemma_hidden, _GEMMA_HEAD_DIM
        layer = {
            "self_attn.q_proj": (2 * heads, width),
            "self_attn.k_proj": (heads, width),
            "self_attn.v_proj": (heads, width),
            "self_attn.o_proj": (width, 2 * heads),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
            **{
                f"{place}_layernorm": (width,)
                for place in ("input", "post_attention", "pre_feedforward", "post_feedforward")
            },
        }
        vocabulary = -(-len(gemma_pieces(_words())) // 64) * 64
        return {
            "embed_tokens.weight": (vocabulary, width),
            **{f"layers.{i}.{name}.weight": shape for i in range(self.gemma_depth) for name, shape in layer.items()},
            "norm.weight": (width,),
        }


def make_sana(
    output: Path, *, seed: int = 0, dtype: str = "fp32", layout: str = "single", sizes: SanaSizes | None = None
) -> Path:
    """This writes the miniature; the same arguments give the same bytes.

    Args:
        output: The folder, made if missing. The tokenizer lies in it too.
        seed: Of the weights.
        dtype: What the weights are stored as: fp32, fp16 or bf16.
        layout: ``single`` writes one file with all parts, ``diffusers`` a folder per part.
        sizes: How small.

    Returns:
        What ``--pretrained_model_name_or_path`` takes: the single file, or ``output``.
    """
    sizes = sizes or SanaSizes()
    output.mkdir(parents=True, exist_ok=True)
    write_gemma_tokenizer(output / "tokenizer", _words())
    parts = sana_weights(seed, sizes)
    if layout == "diffusers":
        _write_diffusers(output, parts, sizes, DTYPES[dtype])
        return output
    prefixes = {
        "denoiser": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "gemma": "text_encoders.gemma2_2b.transformer.model.",
    }
    tensors = {prefixes[part] + name: tensor for part, weights in parts.items() for name, tensor in weights.items()}
    save_tensors(tensors, output / FILE_NAME, _METADATA, dtype=DTYPES[dtype])
    return output / FILE_NAME


def sana_weights(seed: int, sizes: SanaSizes) -> dict[str, Weights]:
    """This makes the weights of all parts, fp32, each part with the names of the published files."""
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {
            "denoiser": LinearDiT(sizes.denoiser(), attention=sdpa),
            "vae": DCAE(sizes.vae()),
        }
    shapes = {
        part: {name: tuple(place.shape) for name, place in module.state_dict().items()}
        for part, module in modules.items()
    }
    shapes["gemma"] = sizes.gemma()
    return {
        part: {
            name: random_weight(f"{part}.{name}", shape, seed, _SCALES, gain=_GAINS[part])
            for name, shape in names.items()
        }
        for part, names in shapes.items()
    }


def _words() -> list[str]:
    """The words that are one token each: those of every miniature, and those of the instruction before captions."""
    instruction = "".join(letter if letter.isalpha() else " " for letter in INSTRUCTION).split()
    return list(dict.fromkeys([*WORDS, *instruction]))


_GAINS = {"denoiser": 1, "vae": 1, "gemma": 0}  # Gemma adds one to its gains

# Size of the numbers, for activations about 1: of a layer's outputs for inputs about 1.
_SCALES = (
    ("denoiser.final_layer.linear.weight", 0.5),
    ("vae.encoder.stages.*.main.conv.weight", 0.3),
    ("vae.encoder.project_out.0.conv.weight", 0.5),
    ("vae.decoder.project_out.2.conv.weight", 0.5),
)


def _write_diffusers(output: Path, parts: Mapping[str, Weights], sizes: SanaSizes, dtype: torch.dtype) -> None:
    save_folder(parts["denoiser"], sizes.denoiser(), output / "transformer", {}, image_size=IMAGE_SIZE, dtype=dtype)
    save_vae(parts["vae"], sizes.vae(), output / "vae", dtype=dtype)
    save_gemma(parts["gemma"], output / "text_encoder", dtype=dtype)
    complete_pipeline(output, None, shift=SAMPLING_SHIFT)
