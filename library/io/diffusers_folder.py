"""Writing a model as a folder in diffusers' layout: a sub-folder per component, with its weights and its sizes."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.io.atomic import write_text
from library.io.safetensors import save_tensors

MODEL_STEM = "diffusion_pytorch_model"
"""Name of the weights of diffusers' own models, without the ending."""

ENCODER_STEM = "model"
"""Name of the weights of text encoders, which transformers loads."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)


def save_component(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """This writes one component.

    Args:
        folder: Its sub-folder; made if missing.
        stem: ``MODEL_STEM`` or ``ENCODER_STEM``.
        tensors: In the names that its loader expects.
        config: What its ``config.json`` says.
        metadata: Of the safetensors file.
        dtype: Type to convert to; by default each tensor keeps its own.
    """
    save_tensors(tensors, folder / f"{stem}.safetensors", {"format": "pt", **(metadata or {})}, dtype=dtype)
    write_json(folder / "config.json", config)


def copy_tokenizer(source: str | os.PathLike[str], folder: Path) -> None:
    """This copies a tokenizer's files, whatever else lies beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)


def write_json(path: Path, content: object) -> None:
    """This writes a JSON file, the same bytes for the same content."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
