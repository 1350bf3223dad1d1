"""A model as one file in the layout of the published LDM files, or as the folder that diffusers loads."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.config.ddpm import TIMESTEPS
from library.config.documents import read_json
from library.diffusion.ddpm import FIRST_BETA, LAST_BETA
from library.families.sd.checkpoint import named_as_module
from library.families.sd.files import SdFiles
from library.families.sd.key_maps import unet_key_maps
from library.families.sd.options import LATENTS
from library.families.sd.parts import COMPONENTS
from library.families.sd.sizes import vae_sizes
from library.families.sd.unet import UNetConfig
from library.io.diffusers_folder import ENCODER_STEM, MODEL_STEM, copy_tokenizer, save_component, write_json
from library.io.joined_tensors import JoinedTensors, PrefixedTensors
from library.io.key_maps import KeyMap, from_diffusers, to_diffusers
from library.io.parts import Part
from library.io.safetensors import LazyTensors, save_tensors
from library.nn.autoencoder_files import diffusers_config
from library.nn.autoencoder_kl import AutoencoderKLConfig
from library.nn.autoencoder_sizes import autoencoder_key_maps
from library.records import Resolution
from library.text_encoders.clip import PROJECTION, clip_config
from library.text_encoders.open_clip import open_clip_key_maps

Weights = Mapping[str, Tensor]

CLIP_PREFIX, OPEN_CLIP_PREFIX = "cond_stage_model.transformer.", "cond_stage_model.model."
PAD_TOKENS = {False: "<|endoftext|>", True: "!"}
"""What fills a caption up, in the words of the tokenizer's files, by whether the model is of the second generation."""

_PREFIXES = {"denoiser": "model.diffusion_model.", "vae": "first_stage_model."}
_LAYERS = "text_model.encoder.layers."


def save_single(
    weights: Mapping[str, Weights],
    path: Path,
    metadata: Mapping[str, str],
    *,
    is_v2: bool,
    dtypes: Mapping[str, torch.dtype | None],
    beside: Weights | None = None,
) -> None:
    """This writes one file, as the published LDM files are laid out.

    Args:
        weights: By component: its tensors, the denoiser's and the VAE's under LDM's names, the text encoder's under
            transformers'. They may be read when they are looked up.
        path: The file; it appears complete or not at all.
        metadata: Of the safetensors file.
        is_v2: Whether the text encoder is stored under OpenCLIP's names.
        dtypes: By component, the type to convert to; None: each tensor keeps its own.
        beside: What else lies beside the text encoder's weights, under its names in the file; from ``kept_beside``.

    Raises:
        ValueError: A number isn't finite.
    """
    parts = [
        PrefixedTensors(prefix, weights[name], dtypes[name]) for name, prefix in _PREFIXES.items() if name in weights
    ]
    if (clip := weights.get("clip")) is not None:
        clip = _encoder_weights(clip)
        prefix = OPEN_CLIP_PREFIX if is_v2 else CLIP_PREFIX
        if is_v2:
            depth = 1 + max(int(name.split(".")[3]) for name in clip if name.startswith(_LAYERS))
            clip = dict(from_diffusers(clip, open_clip_key_maps(depth=depth)))
        parts += [PrefixedTensors(prefix, clip, dtypes["clip"]), PrefixedTensors(prefix, beside or {})]
    save_tensors(JoinedTensors(*parts), path, metadata)


def save_folder(
    weights: Mapping[str, Weights],
    denoiser: UNetConfig,
    vae: AutoencoderKLConfig,
    folder: Path,
    metadata: Mapping[str, str],
    *,
    native: Resolution,
    dtypes: Mapping[str, torch.dtype | None],
) -> None:
    """This writes components as diffusers' ``StableDiffusionPipeline.from_pretrained`` reads them.

    Args:
        weights: See ``save_single``.
        denoiser: Sizes of the U-Net.
        vae: Sizes of the VAE.
        folder: Made if missing; each component gets a sub-folder.
        metadata: Of the U-Net's file.
        native: The resolution that the model was made for.
        dtypes: See ``save_single``.
    """
    for name, tensors in weights.items():
        place, dtype = folder / COMPONENTS[name].folder, dtypes[name]
        if name == "denoiser":
            theirs = dict(to_diffusers(tensors, _unet_maps(denoiser)))
            config = unet_config(denoiser, native)
            save_component(place, MODEL_STEM, theirs, config, metadata=metadata, dtype=dtype)
        elif name == "vae":
            theirs = dict(to_diffusers(tensors, _vae_maps(vae)))
            save_component(place, MODEL_STEM, theirs, diffusers_config(vae, LATENTS), dtype=dtype)
        else:
            tensors = _encoder_weights(tensors)
            shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            activation = "gelu" if denoiser.linear_projections else "quick_gelu"
            config = clip_config(shapes, activation=activation, source="the text encoder").to_dict()
            save_component(place, ENCODER_STEM, tensors, config | {"architectures": ["CLIPTextModel"]}, dtype=dtype)


def complete_pipeline(
    folder: Path, tokenizer: Path | None, *, is_v2: bool, v_prediction: bool, zero_terminal_snr: bool = False
) -> None:
    """This adds what makes a folder with all components a whole pipeline.

    Args:
        folder: With the components.
        tokenizer: Where the tokenizer lies; None: it is in the folder already.
        is_v2: Whether the model is of the second generation, whose captions are filled up with another token.
        v_prediction: Whether the model answers with velocities.
        zero_terminal_snr: Whether the last timestep of its schedule is pure noise.
    """
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder / "tokenizer")
        _set_padding(folder / "tokenizer", PAD_TOKENS[is_v2])
    schedule = scheduler_config(v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", schedule["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    write_json(folder / "model_index.json", index)


def scheduler_config(*, v_prediction: bool, zero_terminal_snr: bool) -> dict[str, Any]:
    """What diffusers' ``scheduler_config.json`` says of the schedule.

    Args:
        v_prediction: Whether the model answers with velocities.
        zero_terminal_snr: Whether the last timestep is pure noise; sampling must then begin there (Lin et al. 2023,
            arXiv:2305.08891, section 3.3).
    """
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": TIMESTEPS,
        "beta_start": FIRST_BETA,
        "beta_end": LAST_BETA,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction" if v_prediction else "epsilon",
        "rescale_betas_zero_snr": zero_terminal_snr,
        "timestep_spacing": "trailing" if zero_terminal_snr else "leading",
    }


def unet_config(config: UNetConfig, native: Resolution) -> dict[str, Any]:
    """What diffusers' ``config.json`` says of the U-Net.

    Args:
        config: Its sizes.
        native: The resolution that the model was made for.
    """
    widths = [config.width * multiplier for multiplier in config.multipliers]
    looks = [level < config.attention_levels for level in range(len(widths))]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": native.width // LATENTS.stride,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if looking else "DownBlock2D" for looking in looks],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if looking else "UpBlock2D" for looking in reversed(looks)],
        "block_out_channels": widths,
        "layers_per_block": config.blocks_per_level,
        "cross_attention_dim": config.context_width,
        # diffusers' name for the number of heads
        "attention_head_dim": config.num_heads or [config.heads(width) for width in widths],
        "use_linear_projection": config.linear_projections,
        # 2.1's attention overflows in fp16, and a file doesn't say whether it is 2.0 or 2.1
        "upcast_attention": config.linear_projections,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-05,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    }


def base_weights(files: SdFiles, parts: Collection[str]) -> dict[str, Weights]:
    """What the base model has of a choice of ``--save_parts``, by component, under the names of ``save_single``."""
    chosen: dict[str, Weights] = {}
    if "text_encoders" in parts:
        chosen["clip"] = dict(named_as_module(files.clip, LazyTensors(files.clip)))
    if "vae" in parts:
        tensors = LazyTensors(files.vae)
        in_theirs = files.vae.layout != "single"
        chosen["vae"] = dict(from_diffusers(tensors, vae_sizes(files.vae).key_maps)) if in_theirs else tensors
    return chosen


def kept_beside(clip: Part) -> Weights:
    """What a single file stores beside the text encoder's weights and nothing here reads, by its own names.

    The counting numbers of 1.x; of 2.x the projection, the scale of OpenCLIP's loss, and the layer after the last that
    is used. Other programs expect them. Of a folder nothing is kept: its names are others.
    """
    prefixes = {stored.removesuffix(name) for name, stored in clip.names.items()}
    if not prefixes <= {CLIP_PREFIX, OPEN_CLIP_PREFIX}:
        return {}
    beside = {
        stored.removeprefix(prefix): stored
        for prefix in prefixes
        for header in clip.headers
        for stored in header.tensors
        if stored.startswith(prefix) and re.match(COMPONENTS["clip"].drop, stored.removeprefix(prefix))
    }
    return LazyTensors(dataclasses.replace(clip, names=beside, scales={}, unused=()))


def _set_padding(tokenizer: Path, token: str) -> None:
    """Makes the copy of CLIP's tokenizer fill captions up as the model's own does: the vocabulary is the same."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tokenizer / name
        content = read_json(path) if path.is_file() else {}
        write_json(path, {**content, "pad_token": token})


def _encoder_weights(tensors: Weights) -> Weights:
    """The text encoder's tensors without the projection, which neither layout has and nothing here reads."""
    return {name: tensor for name, tensor in tensors.items() if name != PROJECTION}


def _unet_maps(config: UNetConfig) -> tuple[KeyMap, ...]:
    return unet_key_maps(
        multipliers=config.multipliers,
        attention_levels=config.attention_levels,
        blocks_per_level=config.blocks_per_level,
    )


def _vae_maps(config: AutoencoderKLConfig) -> tuple[KeyMap, ...]:
    return autoencoder_key_maps(
        level_widths=config.level_widths,
        blocks_per_level=config.blocks_per_level,
        quant_convolutions=config.quant_convolutions,
    )
