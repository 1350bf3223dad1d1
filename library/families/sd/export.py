"""Models written in the layout of the published LDM files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.io.joined_tensors import JoinedTensors, PrefixedTensors
from library.io.key_maps import from_diffusers
from library.io.safetensors import save_tensors
from library.text_encoders.open_clip import open_clip_key_maps

Weights = Mapping[str, Tensor]

_PREFIXES = {"denoiser": "model.diffusion_model.", "vae": "first_stage_model."}
_CLIP_PREFIX, _OPEN_CLIP_PREFIX = "cond_stage_model.transformer.", "cond_stage_model.model."
_LAYERS = "text_model.encoder.layers."


def save_single(
    weights: Mapping[str, Weights],
    path: Path,
    metadata: Mapping[str, str],
    *,
    is_v2: bool,
    dtypes: Mapping[str, torch.dtype | None],
) -> None:
    """This writes one file, as the published LDM files are laid out.

    Args:
        weights: By component: its tensors, the denoiser's and the VAE's under LDM's names, the text encoder's under
            transformers'.
        path: The file; it appears complete or not at all.
        metadata: Of the safetensors file.
        is_v2: Whether the text encoder is stored under OpenCLIP's names.
        dtypes: By component, the type to convert to; None: each tensor keeps its own.

    Raises:
        ValueError: A number isn't finite.
    """
    parts = [
        PrefixedTensors(prefix, weights[name], dtypes[name]) for name, prefix in _PREFIXES.items() if name in weights
    ]
    if (clip := weights.get("clip")) is not None:
        prefix = _CLIP_PREFIX
        if is_v2:
            depth = 1 + max(int(name.split(".")[3]) for name in clip if name.startswith(_LAYERS))
            clip, prefix = dict(from_diffusers(clip, open_clip_key_maps(depth=depth))), _OPEN_CLIP_PREFIX
        parts.append(PrefixedTensors(prefix, clip, dtypes["clip"]))
    save_tensors(JoinedTensors(*parts), path, metadata)
