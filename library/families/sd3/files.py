"""Where each part of Stable Diffusion 3 lies, and whether the files can work together, from their headers alone.

A part that the user names wins over the one inside the base model.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.full import PARTS
from library.config.model import ModelConfig
from library.families.sd3.options import RESOLUTION_STEP, Sd3Options
from library.families.sd3.parts import COMPONENTS
from library.families.sd3.sizes import (
    DenoiserSizes,
    clip_sizes,
    count_parameters,
    denoiser_sizes,
    t5_sizes,
    vae_sizes,
)
from library.families.searching import Search, base_folder, search
from library.io.base_model import Layout
from library.io.parts import Part
from library.records import ModelDescription, Resolution
from library.text_encoders.tokenizers import CLIP_LENGTH

_NATIVE_SIDE = 1024
_IMPLEMENTATION = "https://github.com/Stability-AI/sd3.5"
_T5_OPTIONS = (
    "t5xxl_max_token_length",
    "apply_t5_attn_mask",
    "t5_padding",
    "t5_dropout_rate",
    "sd3_t5_uncond_behaviour",
)
_LAYOUT = Layout("SD3", "StableDiffusion3Pipeline", "StableDiffusion3", COMPONENTS, optional=("t5xxl",))
_READERS: Mapping[str, Callable[[Part], Any]] = {
    "denoiser": denoiser_sizes,
    "vae": vae_sizes,
    "clip_l": clip_sizes,
    "clip_g": clip_sizes,
    "t5xxl": t5_sizes,
}


@dataclass(frozen=True)
class Sd3Files:
    """Where each part lies.

    Attributes:
        denoiser: The MMDiT.
        vae: The VAE.
        clip_l: The first CLIP.
        clip_g: The second CLIP.
        t5xxl: T5, or None: zeros stand in for it.
        folder: The base model's folder, when it is one in diffusers' layout: tokenizers may lie there.
    """

    denoiser: Part
    vae: Part
    clip_l: Part
    clip_g: Part
    t5xxl: Part | None
    folder: Path | None


def problems(model: ModelConfig, options: Sd3Options) -> list[str]:
    """This checks every path from headers alone and returns all that is wrong, a line each.

    Args:
        model: The base model and the VAE.
        options: The text encoders.
    """
    return _searched(model, options).wrong


def locate(model: ModelConfig, options: Sd3Options) -> Sd3Files:
    """This finds every part.

    Args:
        model: The base model and the VAE.
        options: The text encoders.

    Raises:
        ConfigError: What ``problems`` returns, if anything.
    """
    parts = _searched(model, options).checked()
    return Sd3Files(
        denoiser=parts["denoiser"],
        vae=parts["vae"],
        clip_l=parts["clip_l"],
        clip_g=parts["clip_g"],
        t5xxl=parts.get("t5xxl"),
        folder=base_folder(_LAYOUT, model),
    )


def describe(files: Sd3Files, options: Sd3Options | None = None) -> ModelDescription:
    """This says which model the files are.

    Args:
        files: From ``locate``.
        options: The family's options; None: their defaults.
    """
    sizes = denoiser_sizes(files.denoiser)
    largest_side = sizes.pos_embed_max_size * RESOLUTION_STEP
    native_side = min(_NATIVE_SIDE, largest_side)
    if not sizes.qk_norm:
        title, version, architecture = "Stable Diffusion 3 medium", "medium", "stable-diffusion-3-medium"
    elif sizes.dual_attention_blocks:
        title, version, architecture = "Stable Diffusion 3.5 medium", "5-medium", "stable-diffusion-3-5-medium"
    else:
        title, version, architecture = "Stable Diffusion 3.5 large", "5-large", "stable-diffusion-3-5-large"
    return ModelDescription(
        title=title,
        architecture=architecture,
        base_model_version=version,
        parameters=count_parameters(files.denoiser.shapes, files.denoiser.layout),
        sizes={
            "depth": sizes.depth,
            "width": sizes.width,
            "heads": sizes.num_heads,
            "blocks with two attentions": len(sizes.dual_attention_blocks),
            "position table": f"{sizes.pos_embed_max_size}x{sizes.pos_embed_max_size}",
            "T5": "absent (zeros stand in for it)" if files.t5xxl is None else "present",
        },
        native_resolution=Resolution(native_side, native_side),
        implementation=_IMPLEMENTATION,
        blocks=sizes.depth,
        text_encoders=("clip_l", "clip_g", *(() if files.t5xxl is None else ("t5xxl",))),
        trainable_text_encoders=("clip_l", "clip_g"),
        save_layouts={"safetensors": PARTS, "diffusers": PARTS},
        # The scaled table is computed for any size; the checkpoint's own ends somewhere.
        largest_side=None if options is not None and options.enable_scaled_pos_embed else largest_side,
        text_numbers=_text_numbers(files, options or Sd3Options()),
    )


def _text_numbers(files: Sd3Files, options: Sd3Options) -> int:
    """Numbers in the features of one caption: both CLIPs' per token and pooled, and T5's per token."""
    clips = clip_sizes(files.clip_l), clip_sizes(files.clip_g)
    numbers = sum(CLIP_LENGTH * sizes.width + sizes.pooled_width for sizes in clips)
    return numbers if files.t5xxl is None else numbers + options.t5xxl_max_token_length * t5_sizes(files.t5xxl).width


def _searched(model: ModelConfig, options: Sd3Options) -> Search:
    """All parts that can be found, and all that is wrong."""
    named = {"vae": model.vae, "clip_l": options.clip_l, "clip_g": options.clip_g, "t5xxl": options.t5xxl}
    found = search(_LAYOUT, _READERS, model, named)
    found.wrong.extend(_misfits(found))
    if not found.wrong and "t5xxl" not in found.parts:
        found.wrong.extend(
            f"--{name} does nothing: the base model has no T5 inside; add --t5xxl, or remove --{name}"
            for name in _T5_OPTIONS
            if getattr(options, name) != type(options).__dataclass_fields__[name].default
        )
    return found


def _misfits(found: Search) -> Iterator[str]:
    """What is wrong between the parts."""
    sizes, at = found.sizes, found.at
    if "denoiser" not in sizes:
        return
    denoiser: DenoiserSizes = sizes["denoiser"]
    if (vae := sizes.get("vae")) and vae.latent_channels != denoiser.in_channels:
        yield f"{at('vae')} is a VAE with {vae.latent_channels} channels; the denoiser takes {denoiser.in_channels}"
    if (clip_l := sizes.get("clip_l")) and (clip_g := sizes.get("clip_g")):
        clips = (("clip_l", "CLIP-L", clip_l), ("clip_g", "CLIP-G", clip_g))
        given = " and ".join(f"{at(name)} ({title}, width {clip.pooled_width})" for name, title, clip in clips)
        if clip_l.pooled_width + clip_g.pooled_width != denoiser.pooled_width:
            yield f"{given} do not fit the denoiser, which takes {denoiser.pooled_width} together"
        elif clip_l.width + clip_g.width > denoiser.context_width:
            yield f"{given} give more features per token than the denoiser takes, {denoiser.context_width}"
    if (t5 := sizes.get("t5xxl")) and t5.width != denoiser.context_width:
        yield f"{at('t5xxl')} is a T5 of width {t5.width}; the denoiser takes {denoiser.context_width}"
