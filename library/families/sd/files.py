"""Where each part of Stable Diffusion 1.x and 2.x lies, and whether the files can work together, from headers alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.documents import read_json
from library.config.errors import ConfigError
from library.config.full import PARTS
from library.config.model import ModelConfig
from library.config.samplers import DDPM_SAMPLERS
from library.families.sd.options import SdOptions
from library.families.sd.parts import LAYOUT
from library.families.sd.predictions import prediction_defaults, specification
from library.families.sd.sizes import UNetSizes, clip_sizes, unet_sizes, vae_sizes
from library.families.searching import Search, base_folder, search
from library.io.parts import Part
from library.records import ModelDescription, Resolution, SamplingDefaults

_IMPLEMENTATION = "https://github.com/Stability-AI/stablediffusion"
_FIRST_IMPLEMENTATION = "https://github.com/CompVis/stable-diffusion"
_READERS: Mapping[str, Callable[[Part], Any]] = {"denoiser": unet_sizes, "vae": vae_sizes, "clip": clip_sizes}
_NATIVE_SIDE, _V_NATIVE_SIDE = 512, 768
_FIRST_ARCHITECTURE = "stable-diffusion-v1"
_ARCHITECTURE, _V_ARCHITECTURE = "stable-diffusion-v2-512", "stable-diffusion-v2-768-v"
_PREDICTIONS = {"epsilon": False, "v_prediction": True, "v": True}
"""What is said of the prediction: by diffusers' schedules, and by sai_model_spec, which says ``v``."""

_V_MARKER, _ZERO_MARKER = "v_pred", "ztsnr"

UNSKIPPABLE = "its stages change the size or the number of the features that pass through them"
"""Why none of them can be left out of the U-Net."""

SAMPLING_DEFAULTS = SamplingDefaults(sampler="ddim", samplers=DDPM_SAMPLERS, steps=30, scale=7.5)


@dataclass(frozen=True)
class SdFiles:
    """Where each part lies.

    Attributes:
        denoiser: The U-Net.
        vae: The VAE.
        clip: The text encoder.
        is_v2: Whether the model is of the second generation.
        v_prediction: Whether it predicts velocities, where the files say so; None: they don't.
        zero_terminal_snr: Whether the files say that it predicts velocities and that its schedule ends in pure noise.
    """

    denoiser: Part
    vae: Part
    clip: Part
    is_v2: bool
    v_prediction: bool | None
    zero_terminal_snr: bool


def problems(model: ModelConfig, options: SdOptions) -> list[str]:
    """This checks every path from headers alone and returns all that is wrong, a line each.

    Args:
        model: The base model and the VAE.
        options: Of the family.
    """
    return _searched(model, options).wrong


def locate(model: ModelConfig, options: SdOptions) -> SdFiles:
    """This finds every part.

    Args:
        model: The base model and the VAE.
        options: Of the family.

    Raises:
        ConfigError: What ``problems`` returns, if anything.
    """
    parts = _searched(model, options).checked()
    folder = base_folder(LAYOUT, model)
    v_prediction = _stored_prediction(parts["denoiser"], folder)
    return SdFiles(
        denoiser=parts["denoiser"],
        vae=parts["vae"],
        clip=parts["clip"],
        is_v2=unet_sizes(parts["denoiser"]).is_v2,
        v_prediction=v_prediction,
        zero_terminal_snr=bool(v_prediction) and _is_stored_as_stretched(parts["denoiser"], folder),
    )


def describe(files: SdFiles, options: SdOptions | None = None, *, v_prediction: bool | None = None) -> ModelDescription:
    """This says which model the files are.

    Args:
        files: From ``locate``.
        options: The family's options; None: their defaults.
        v_prediction: Whether it is taken to predict velocities; None: what the files say.
    """
    options = options or SdOptions()
    sizes, clip = unet_sizes(files.denoiser), clip_sizes(files.clip)
    title = "Stable Diffusion 2.x" if files.is_v2 else "Stable Diffusion 1.x"
    velocity = bool(files.v_prediction if v_prediction is None else v_prediction)
    side = _V_NATIVE_SIDE if velocity else _NATIVE_SIDE
    tokens = int(options.max_token_length) + 2
    own = prediction_defaults(
        files.denoiser.title,
        is_v2=files.is_v2,
        v_prediction=files.v_prediction,
        zero_terminal_snr=files.zero_terminal_snr,
    )
    return ModelDescription(
        title=title,
        architecture=(_V_ARCHITECTURE if velocity else _ARCHITECTURE) if files.is_v2 else _FIRST_ARCHITECTURE,
        base_model_version=("sd_v2" if files.is_v2 else "sd_v1") + ("_v" if velocity else ""),
        specification=specification(options, velocity=velocity),
        parameters=_numbers(files.denoiser),
        sizes={
            "width": sizes.width,
            "levels": len(sizes.multipliers),
            "text features": sizes.context_width,
            "layers of the text encoder": clip.depth,
        },
        native_resolution=Resolution(side, side),
        implementation=_IMPLEMENTATION if files.is_v2 else _FIRST_IMPLEMENTATION,
        blocks=stage_count(sizes),
        text_encoders=("clip",),
        trainable_text_encoders=("clip",),
        save_layouts={"safetensors": PARTS, "diffusers": PARTS},
        text_numbers=tokens * clip.width,
        defaults=own.defaults,
        stated=own.stated,
        unsure=own.unsure,
        unskippable=UNSKIPPABLE,
        sampling=SAMPLING_DEFAULTS,
    )


def stage_count(sizes: UNetSizes) -> int:
    """How many stages a U-Net has between its first and its last convolution."""
    levels, blocks = len(sizes.multipliers), sizes.blocks_per_level
    return levels * blocks + (levels - 1) + 1 + levels * (blocks + 1)


def _numbers(part: Part) -> int:
    return sum(math.prod(shape) for shape in part.shapes.values())


def _stored_prediction(denoiser: Part, folder: Path | None) -> bool | None:
    """Whether the model predicts velocities; None: the files don't say.

    A folder says so in its schedule. A single file can in its metadata (sai_model_spec), or by a tensor that is called
    ``v_pred`` and empty, as ComfyUI marks it.
    """
    if folder is not None:
        return _PREDICTIONS.get(str(_schedule(folder).get("prediction_type")))
    if any(_V_MARKER in header.tensors for header in denoiser.headers):
        return True
    said = (header.metadata.get("modelspec.prediction_type") for header in denoiser.headers)
    return next((_PREDICTIONS[word] for word in said if word in _PREDICTIONS), None)


def _is_stored_as_stretched(denoiser: Part, folder: Path | None) -> bool:
    """Whether the files say that the last timestep is pure noise: a folder in its schedule, a file by a marker."""
    if folder is not None:
        return _schedule(folder).get("rescale_betas_zero_snr") is True
    return any(_ZERO_MARKER in header.tensors for header in denoiser.headers)


def _schedule(folder: Path) -> Mapping[str, Any]:
    """What a folder says of its schedule; nothing where it has none.

    Raises:
        ConfigError: It has one that can't be read.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return {}
    said = read_json(path)
    if not isinstance(said, Mapping):
        raise ConfigError(f"{path}: is no table; get the folder's scheduler_config.json again")
    return said


def _searched(model: ModelConfig, options: SdOptions) -> Search:
    """All parts that can be found, and all that is wrong."""
    found = search(LAYOUT, _READERS, model, {"vae": model.vae})
    unet, clip = found.sizes.get("denoiser"), found.sizes.get("clip")
    if unet is not None and options.v2 is not None and options.v2 != unet.is_v2:
        word, generation = ("--v2", "1.x") if options.v2 else ("--no-v2", "2.x")
        found.wrong.append(f"{word}: {found.at('denoiser')} is Stable Diffusion {generation}; remove it")
    if clip is not None and unet is not None and (options.clip_skip or 1) > clip.depth:
        found.wrong.append(
            f"--clip_skip {options.clip_skip}: {found.at('clip')} has {clip.depth} layers; at most {clip.depth}"
        )
    if unet is not None and clip is not None and unet.context_width != clip.width:
        found.wrong.append(
            f"{found.at('clip')} holds a text encoder of width {clip.width}; the U-Net takes {unet.context_width}"
        )
    return found
