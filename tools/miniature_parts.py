"""What the miniatures of all families have in common: types, random weights of a useful size, CLIPs."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from library.randomness import torch_generator
from tools.miniature_tokenizers import clip_vocabulary_size

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HEAD_DIM = 64
"""Of CLIP, of SD3 and of Stable Diffusion 2.x."""

Weights = dict[str, Tensor]
Scales = Sequence[tuple[str, float]]
"""Patterns of names, and the size of the numbers: of a table's entries, or of a layer's outputs for inputs about 1."""


def random_weight(
    name: str, shape: tuple[int, ...], seed: int, scales: Scales, *, tables: Sequence[str] = (), gain: float = 1
) -> Tensor:
    """This draws a tensor for activations about 1, fp32: the same for the same name, shape and seed.

    Args:
        name: Of the tensor; of one dimension, gains end in ``weight``, offsets don't.
        shape: Its shape.
        seed: Of the miniature.
        scales: The first that fits counts; 1 where none does.
        tables: Patterns of names of tables, whose rows are looked up instead of multiplied.
        gain: What gains lie around.
    """
    noise = torch.randn(shape, generator=torch_generator(seed, name))
    if len(shape) == 1:
        return gain + 0.1 * noise if name.endswith("weight") else 0.02 * noise
    scale = next((scale for pattern, scale in scales if fnmatchcase(name, pattern)), 1.0)
    if any(fnmatchcase(name, pattern) for pattern in tables):
        return scale * noise
    return scale / math.sqrt(math.prod(shape[1:])) * noise


def clip_config(width: int, depth: int, activation: str, architecture: str) -> Any:
    """A CLIP's configuration, transformers' kind.

    Args:
        width: Of its features, a multiple of ``HEAD_DIM``.
        depth: Layers.
        activation: ``quick_gelu`` or ``gelu``.
        architecture: The class that loads it.
    """
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=clip_vocabulary_size(),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_DIM,
        hidden_act=activation,
        bos_token_id=clip_vocabulary_size() - 2,
        eos_token_id=2,  # as published: transformers then pools at the highest id, the end token
        architectures=[architecture],
    )
