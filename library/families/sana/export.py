"""A trained denoiser as a file in NVlabs' layout, or a model as the folder that diffusers loads."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.families.sana.checkpoint import read_vae_config
from library.families.sana.dc_ae import DCAEConfig
from library.families.sana.files import SanaFiles
from library.families.sana.key_maps import denoiser_key_maps, vae_key_maps
from library.families.sana.linear_dit import LinearDiTConfig
from library.families.sana.options import LATENTS
from library.io.diffusers_folder import ENCODER_STEM, MODEL_STEM, copy_tokenizer, save_component, write_json
from library.io.key_maps import KeyMap, from_diffusers, to_diffusers
from library.io.parts import Part
from library.io.safetensors import LazyTensors, is_finite, load_tensors, save_tensors
from library.io.torch_files import save_torch
from library.text_encoders.gemma import decoder_weights, gemma_config

EMPTY_CAPTION = "y_embedder.y_embedding"

Weights = Mapping[str, Tensor]


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
    save_torch({"state_dict": plain}, path)


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
    save_component(folder, MODEL_STEM, theirs, diffusers_config(config, image_size), metadata=metadata, dtype=dtype)


def save_vae(tensors: Weights, config: DCAEConfig, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """This writes the DC-AE as diffusers' ``AutoencoderDC.from_pretrained`` reads it.

    Args:
        tensors: Under the names of ``dc_ae.DCAE``.
        config: Its sizes.
        folder: Usually called ``vae``; made if missing.
        dtype: Type to convert to; by default each keeps its own.
    """
    theirs = dict(to_diffusers(tensors, _vae_maps(config)))
    save_component(folder, MODEL_STEM, theirs, vae_config(config), dtype=dtype)


def save_gemma(tensors: Weights, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """This writes Gemma as transformers' ``Gemma2Model.from_pretrained`` reads it.

    Args:
        tensors: The decoder's, by name.
        folder: Usually called ``text_encoder``; made if missing.
        dtype: Type to convert to; by default each keeps its own.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = gemma_config(shapes, source="Gemma").to_dict() | {"architectures": ["Gemma2Model"]}
    save_component(folder, ENCODER_STEM, tensors, config, dtype=dtype)


def vae_weights(files: SanaFiles) -> Weights:
    """The base model's DC-AE under the names of ``dc_ae.DCAE``, in the types of its file."""
    tensors = LazyTensors(files.vae)
    if files.vae.layout == "single":
        return tensors
    return dict(from_diffusers(tensors, _vae_maps(read_vae_config(files))))


def gemma_weights(files: SanaFiles) -> Weights:
    """The base model's Gemma without its output layer, in the types of its file."""
    return dict(decoder_weights(LazyTensors(files.gemma).items()))


def stored_empty_caption(part: Part) -> Tensor | None:
    """The features of the empty caption that NVlabs' files hold beside the denoiser's weights; None: there are none."""
    for header in part.headers:
        for name in header.tensors:
            if name.endswith(EMPTY_CAPTION) and header.format != "pickle":
                return next(load_tensors(header, [name]))[1]
    return None


def complete_pipeline(folder: Path, tokenizer: Path | None, *, shift: float) -> None:
    """This adds what makes a folder with all components a whole pipeline.

    Args:
        folder: With the components.
        tokenizer: Where the tokenizer lies; None: in its place already.
        shift: Of the noise levels in sampling.
    """
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", {**_SCHEDULER, "flow_shift": shift})
    write_json(folder / "model_index.json", dict(_model_index()))


def vae_config(config: DCAEConfig) -> dict[str, Any]:
    """What diffusers' ``config.json`` says of the DC-AE."""
    stages = range(len(config.widths))
    kinds = ["EfficientViTBlock" if stage >= config.attention_from else "ResBlock" for stage in stages]
    scales = [[5] if stage >= config.attention_from else [] for stage in stages]
    return {
        "_class_name": "AutoencoderDC",
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "attention_head_dim": 32,
        "encoder_block_types": kinds,
        "decoder_block_types": kinds,
        "encoder_block_out_channels": list(config.widths),
        "decoder_block_out_channels": list(config.widths),
        "encoder_layers_per_block": list(config.encoder_depths),
        "decoder_layers_per_block": list(config.decoder_depths),
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "conv",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": LATENTS.scale,
    }


_SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


def _vae_maps(config: DCAEConfig) -> tuple[KeyMap, ...]:
    return vae_key_maps(
        encoder_depths=config.encoder_depths,
        decoder_depths=config.decoder_depths,
        attention_from=config.attention_from,
    )


def _model_index() -> Iterator[tuple[str, Any]]:
    yield "_class_name", "SanaPipeline"
    yield "scheduler", ["diffusers", _SCHEDULER["_class_name"]]
    yield "transformer", ["diffusers", "SanaTransformer2DModel"]
    yield "vae", ["diffusers", "AutoencoderDC"]
    yield "text_encoder", ["transformers", "Gemma2Model"]
    yield "tokenizer", ["transformers", "PreTrainedTokenizerFast"]


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
