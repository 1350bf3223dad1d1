"""A model as one file in the published layout, or as the folder that diffusers loads."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.families.sd3.checkpoint import read_vae_config
from library.families.sd3.files import Sd3Files
from library.families.sd3.key_maps import denoiser_key_maps
from library.families.sd3.mmdit import MMDiTConfig
from library.families.sd3.options import LATENTS
from library.io.diffusers_folder import ENCODER_STEM, MODEL_STEM, copy_tokenizer, save_component, write_json
from library.io.joined_tensors import JoinedTensors, PrefixedTensors
from library.io.key_maps import KeyMap, from_diffusers, to_diffusers
from library.io.safetensors import LazyTensors, save_tensors
from library.nn.autoencoder_files import diffusers_config
from library.nn.autoencoder_kl import AutoencoderKLConfig
from library.nn.autoencoder_sizes import autoencoder_key_maps
from library.text_encoders.clip import PROJECTION, clip_config
from library.text_encoders.t5 import t5_config

Weights = Mapping[str, Tensor]

PREFIXES = {
    "denoiser": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}
"""Where each part lies in the single file."""

SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}

_ENCODER_FOLDERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
_ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}
_SAMPLE_SIZE = 1024 // LATENTS.stride


def save_single(
    weights: Mapping[str, Weights],
    path: Path,
    metadata: Mapping[str, str],
    *,
    dtypes: Mapping[str, torch.dtype | None],
) -> None:
    """This writes one file, as Stability AI and ComfyUI lay it out.

    Args:
        weights: By component: its tensors under the single file's names. They may be read when they are looked up.
        path: The file; it appears complete or not at all.
        metadata: Of the safetensors file.
        dtypes: By component, the type to convert to; None: each tensor keeps its own.

    Raises:
        ValueError: A number isn't finite.
    """
    parts = (PrefixedTensors(PREFIXES[name], tensors, dtypes[name]) for name, tensors in weights.items())
    save_tensors(JoinedTensors(*parts), path, metadata)


def save_folder(
    weights: Mapping[str, Weights],
    denoiser: MMDiTConfig,
    vae: AutoencoderKLConfig,
    folder: Path,
    metadata: Mapping[str, str],
    *,
    dtypes: Mapping[str, torch.dtype | None],
) -> None:
    """This writes components as diffusers' ``StableDiffusion3Pipeline.from_pretrained`` reads them.

    Args:
        weights: See ``save_single``.
        denoiser: Sizes of the denoiser.
        vae: Sizes of the VAE.
        folder: Made if missing; each component gets a sub-folder.
        metadata: Of the denoiser's file.
        dtypes: See ``save_single``.
    """
    for name, tensors in weights.items():
        if name == "denoiser":
            _save_denoiser(tensors, denoiser, folder, metadata, dtypes[name])
        elif name == "vae":
            theirs = dict(to_diffusers(tensors, _vae_maps(vae)))
            save_component(folder / "vae", MODEL_STEM, theirs, diffusers_config(vae, LATENTS), dtype=dtypes[name])
        else:
            _save_encoder(name, tensors, folder, dtypes[name])


def base_weights(files: Sd3Files, parts: Collection[str]) -> dict[str, Weights]:
    """What the base model has of a choice of ``--save_parts``, by component, under the single file's names."""
    encoders = {"clip_l": files.clip_l, "clip_g": files.clip_g, "t5xxl": files.t5xxl}
    chosen: dict[str, Weights] = {}
    if "text_encoders" in parts:  # they have the same names in both layouts
        chosen |= {name: LazyTensors(part) for name, part in encoders.items() if part is not None}
    if "vae" in parts:
        tensors = LazyTensors(files.vae)
        in_theirs = files.vae.layout != "single"
        chosen["vae"] = dict(from_diffusers(tensors, _vae_maps(read_vae_config(files)))) if in_theirs else tensors
    return chosen


def complete_pipeline(folder: Path, tokenizers: Mapping[str, Path], *, has_t5: bool) -> None:
    """This adds what makes a folder with all components a whole pipeline.

    Args:
        folder: With the components.
        tokenizers: Where the tokenizers lie, by the name of their sub-folder.
        has_t5: Whether T5 is among the components.
    """
    for name, source in tokenizers.items():
        copy_tokenizer(source, folder / name)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", dict(_model_index(has_t5=has_t5)))


def transformer_config(config: MMDiTConfig) -> dict[str, Any]:
    """What diffusers' ``config.json`` says of the denoiser."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": _SAMPLE_SIZE,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_width,
        "pos_embed_max_size": config.pos_embed_max_size,
        "dual_attention_layers": list(config.dual_attention_blocks),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def _save_denoiser(
    tensors: Weights, config: MMDiTConfig, folder: Path, metadata: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    maps = denoiser_key_maps(
        depth=config.depth, qk_norm=config.qk_norm, dual_attention_blocks=config.dual_attention_blocks
    )
    theirs = dict(to_diffusers(tensors, maps))
    save_component(
        folder / "transformer", MODEL_STEM, theirs, transformer_config(config), metadata=metadata, dtype=dtype
    )


def _save_encoder(name: str, tensors: Weights, folder: Path, dtype: torch.dtype | None) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if name == "t5xxl":
        config = t5_config(shapes, source=name).to_dict() | {"architectures": ["T5EncoderModel"]}
    else:
        config = clip_config(shapes, activation=_ACTIVATIONS[name], source=name).to_dict()
        config |= {"architectures": ["CLIPTextModelWithProjection"]}
        if PROJECTION not in tensors:  # the single file leaves CLIP-L's out, which is the identity
            tensors = {**tensors, PROJECTION: torch.eye(config["hidden_size"])}
    save_component(folder / _ENCODER_FOLDERS[name], ENCODER_STEM, tensors, config, dtype=dtype)


def _vae_maps(config: AutoencoderKLConfig) -> tuple[KeyMap, ...]:
    return autoencoder_key_maps(
        level_widths=config.level_widths,
        blocks_per_level=config.blocks_per_level,
        quant_convolutions=config.quant_convolutions,
    )


def _model_index(*, has_t5: bool) -> Iterator[tuple[str, Any]]:
    yield "_class_name", "StableDiffusion3Pipeline"
    yield "scheduler", ["diffusers", SCHEDULER["_class_name"]]
    yield "transformer", ["diffusers", "SD3Transformer2DModel"]
    yield "vae", ["diffusers", "AutoencoderKL"]
    for number in ("", "_2"):
        yield f"text_encoder{number}", ["transformers", "CLIPTextModelWithProjection"]
        yield f"tokenizer{number}", ["transformers", "CLIPTokenizer"]
    yield "text_encoder_3", ["transformers", "T5EncoderModel"] if has_t5 else [None, None]
    yield "tokenizer_3", ["transformers", "PreTrainedTokenizerFast"] if has_t5 else [None, None]
