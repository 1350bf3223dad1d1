"""A trained denoiser as a file in NVlabs' layout, or as the folder that diffusers loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.families.sana.key_maps import denoiser_key_maps
from library.families.sana.linear_dit import LinearDiTConfig
from library.families.sana.options import LATENTS
from library.io.atomic import atomic_path, write_text
from library.io.key_maps import to_diffusers
from library.io.safetensors import is_finite, save_tensors

EMPTY_CAPTION = "y_embedder.y_embedding"
STEM = "diffusion_pytorch_model"


def save_single(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    empty_caption: Tensor | None = None,
) -> None:
    """This writes the denoiser in NVlabs' layout.

    Args:
        tensors: The denoiser's state dict, of ``linear_dit.LinearDiT``.
        path: With the suffix ``.pth`` a checkpoint in torch's format, with the dictionary ``state_dict`` inside; else a
            safetensors file. It appears complete or not at all.
        metadata: Of the safetensors file.
        dtype: Type to convert to; by default each keeps its own.
        empty_caption: Features of the empty caption (T, D), which NVlabs' programs find in the file; None: left out.

    Raises:
        ValueError: A number isn't finite.
    """
    stored = dict(tensors)
    if empty_caption is not None:
        stored[EMPTY_CAPTION] = empty_caption
    if path.suffix != ".pth":
        save_tensors(stored, path, metadata, dtype=dtype)
        return
    plain = {name: tensor.detach().to("cpu", dtype or tensor.dtype).clone() for name, tensor in stored.items()}
    for name, tensor in plain.items():
        if not is_finite(tensor):
            raise ValueError(f"{name} has numbers that are not finite; {path} is not written")
    with atomic_path(path) as temporary:
        torch.save({"state_dict": plain}, temporary)


def save_folder(
    tensors: Mapping[str, Tensor],
    config: LinearDiTConfig,
    folder: Path,
    metadata: Mapping[str, str],
    *,
    image_size: int,
    dtype: torch.dtype | None = None,
) -> None:
    """This writes the denoiser as diffusers' ``SanaTransformer2DModel.from_pretrained`` reads it.

    Args:
        tensors: The denoiser's state dict, of ``linear_dit.LinearDiT``.
        config: Its sizes.
        folder: Usually called ``transformer``; made if missing.
        metadata: Of the safetensors file.
        image_size: Side in pixels of the pictures that the weights are made for.
        dtype: Type to convert to; by default each keeps its own.
    """
    maps = denoiser_key_maps(depth=config.depth, qk_norm=config.qk_norm)
    theirs = dict(to_diffusers(tensors, maps))
    save_tensors(theirs, folder / f"{STEM}.safetensors", {"format": "pt", **metadata}, dtype=dtype)
    text = json.dumps(diffusers_config(config, image_size), indent=2, sort_keys=True)
    write_text(folder / "config.json", f"{text}\n")


def diffusers_config(config: LinearDiTConfig, image_size: int) -> dict[str, Any]:
    """What diffusers' ``config.json`` says of the denoiser.

    Args:
        config: Its sizes.
        image_size: Side in pixels of the pictures that the weights are made for.
    """
    return {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth,
        "num_cross_attention_heads": config.num_cross_heads,
        "cross_attention_head_dim": config.width // config.num_cross_heads,
        "cross_attention_dim": config.width,
        "caption_channels": config.context_width,
        "mlp_ratio": config.mlp_ratio,
        "dropout": 0.0,
        "attention_bias": False,
        "sample_size": image_size // LATENTS.stride,
        "patch_size": config.patch_size,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None if config.position_base is None else config.position_scale,
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
    }
