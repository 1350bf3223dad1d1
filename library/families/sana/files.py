"""Where each part of Sana lies, and whether the files can work together, from their headers alone.

A part that the user names wins over the one inside the base model.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.config.errors import ConfigError
from library.config.full import PARTS
from library.config.model import ModelConfig
from library.families.sana.options import LATENTS, NO_PREFIX, SanaOptions
from library.families.sana.parts import LAYOUT
from library.families.sana.sizes import (
    DenoiserSizes,
    count_parameters,
    denoiser_sizes,
    fp16_warning,
    gemma_sizes,
    image_size,
    vae_sizes,
)
from library.families.searching import Search, search
from library.io.parts import Part
from library.records import ModelDescription, Resolution, SamplingDefaults

_IMPLEMENTATION = "https://github.com/NVlabs/Sana"
_READERS: Mapping[str, Callable[[Part], Any]] = {"denoiser": denoiser_sizes, "vae": vae_sizes, "gemma": gemma_sizes}
_SHIFT, _SMALL_SHIFT, _LARGEST_SHIFT = 3.0, 4.0, 6.0
_LEARNING_RATE = 1e-5
_MOST_PREFIX_BYTES = 1 << 20
"""Of a full fine-tune; adapters have their own. A tenth of the published pre-training's."""


@dataclass(frozen=True)
class SanaFiles:
    """Where each part lies.

    Attributes:
        denoiser: The transformer.
        vae: DC-AE.
        gemma: The text encoder.
    """

    denoiser: Part
    vae: Part
    gemma: Part


def problems(model: ModelConfig, options: SanaOptions) -> list[str]:
    """This checks every path from headers alone and returns all that is wrong, a line each.

    Args:
        model: The base model and the VAE.
        options: The text encoder and the prefix.
    """
    return _searched(model, options).wrong


def locate(model: ModelConfig, options: SanaOptions) -> SanaFiles:
    """This finds every part.

    Args:
        model: The base model and the VAE.
        options: The text encoder and the prefix.

    Raises:
        ConfigError: What ``problems`` returns, if anything.
    """
    parts = _searched(model, options).checked()
    return SanaFiles(parts["denoiser"], parts["vae"], parts["gemma"])


def describe(files: SanaFiles, options: SanaOptions | None = None) -> ModelDescription:
    """This says which model the files are.

    Args:
        files: From ``locate``.
        options: The family's options; None: their defaults.
    """
    options = options or SanaOptions()
    sizes = denoiser_sizes(files.denoiser)
    side = image_size(files.denoiser, options)
    parameters = count_parameters(files.denoiser)
    size = f"{parameters / 1e9:.1f}B" if parameters > 1e8 else f"{parameters / 1e6:.1f}M"
    warning = fp16_warning(files.denoiser, sizes)
    return ModelDescription(
        title=f"Sana{'-1.5' if sizes.qk_norm else ''} {size}, {side} px",
        architecture="sana-1.5" if sizes.qk_norm else "sana",
        base_model_version=f"{'1.5' if sizes.qk_norm else '1.0'}-{size.lower()}-{side}px",
        parameters=parameters,
        sizes={
            "depth": sizes.depth,
            "width": sizes.width,
            "heads": sizes.width // sizes.head_dim,
            "heads to the text": sizes.num_cross_heads,
            "query and key norms": "yes" if sizes.qk_norm else "no",
            "positions": "none" if side <= 1024 else f"{side // LATENTS.stride}x{side // LATENTS.stride}",
        },
        native_resolution=Resolution(side, side),
        implementation=_IMPLEMENTATION,
        blocks=sizes.depth,
        text_encoders=("gemma",),
        save_layouts={"safetensors": (), "diffusers": PARTS, "pth": ()},
        text_numbers=options.sana_max_token_length * (gemma_sizes(files.gemma).width + 1),
        defaults={"training_shift": published_shift(sizes, side), "learning_rate": _LEARNING_RATE},
        sampling=SamplingDefaults(sampler="dpmpp_2m", steps=20, scale=4.5, table=f"aspect_{side}"),
        refused_precisions={"fp16": "Gemma 2 and DC-AE overflow in it; use --mixed_precision bf16, or no"},
        precision_warnings={} if warning is None else {"bf16": warning},
    )


def published_shift(sizes: DenoiserSizes, side: int) -> float:
    """This is the shift of the noise levels that a model was trained with.

    Args:
        sizes: Of the denoiser.
        side: Of the pictures that it was made for, in pixels.
    """
    if side >= 4096:
        return _LARGEST_SHIFT
    small = not sizes.qk_norm and (sizes.depth, sizes.width) == (28, 1152)
    return _SMALL_SHIFT if small and side == 1024 else _SHIFT


def _searched(model: ModelConfig, options: SanaOptions) -> Search:
    """All parts that can be found, and all that is wrong."""
    found = search(LAYOUT, _READERS, model, {"vae": model.vae, "gemma": options.gemma})
    found.wrong.extend(_misfits(found))
    try:
        read_prefix(options)
    except ConfigError as error:
        found.wrong.append(str(error))
    return found


def read_prefix(options: SanaOptions) -> str | None:
    """This reads the text before every caption; None: the published instruction.

    Args:
        options: With ``sana_prompt_prefix``.

    Raises:
        ConfigError: The file can't be read.
    """
    name = options.sana_prompt_prefix
    if name is None:
        return None
    if name == NO_PREFIX:
        return ""
    option = "--sana_prompt_prefix"
    try:
        with open(name, "rb") as file:
            text = file.read(_MOST_PREFIX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{option}: {name} can't be read ({error.strerror}); name a text file, or none") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{option}: {name} is not UTF-8 text; save it as UTF-8") from None
    text = text.removesuffix("\n")  # that of editors; a space at the end belongs to the text
    if not text.strip():
        raise ConfigError(f"{option}: {name} is empty; write the text into it, or use {option} {NO_PREFIX}")
    return text


def _misfits(found: Search) -> Iterator[str]:
    """What is wrong between the parts."""
    sizes = found.sizes
    if "denoiser" not in sizes:
        return
    denoiser: DenoiserSizes = sizes["denoiser"]
    if (vae := sizes.get("vae")) and (vae.latent_channels, vae.stride) != (denoiser.in_channels, LATENTS.stride):
        yield (
            f"{found.at('vae')} is a DC-AE with {vae.latent_channels} channels that compresses {vae.stride} times; the "
            f"denoiser takes {denoiser.in_channels} channels of {LATENTS.stride} times"
        )
    if (gemma := sizes.get("gemma")) and gemma.width != denoiser.context_width:
        yield f"{found.at('gemma')} is a Gemma of width {gemma.width}; the denoiser takes {denoiser.context_width}"
