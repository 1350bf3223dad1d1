"""CLIP's text encoders (Radford et al. 2021, arXiv 2103.00020): transformers' module, its sizes read from the weights.

Parameter names are those of transformers and of the published checkpoints: ``text_model.encoder.layers.0...`` and
``text_projection.weight``.

Shapes: B captions, N positions, D width, P width of the projection.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.config.errors import ConfigError
from library.io.state_dict import load_strict

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"
POSITION_EMBEDDING = "text_model.embeddings.position_embedding.weight"
PROJECTION = "text_projection.weight"
# Not weights: counting numbers that older files store, and the scale of CLIP's own contrastive loss.
_IGNORED = frozenset({"text_model.embeddings.position_ids", "logit_scale"})
_HEAD_DIM = 64


def clip_config(shapes: Mapping[str, Sequence[int]], *, activation: str, source: str) -> "CLIPTextConfig":
    """This reads the sizes of a CLIP text encoder from the shapes of its weights.

    Args:
        shapes: Name without prefix -> shape.
        activation: ``quick_gelu`` for OpenAI's CLIP-L, ``gelu`` for OpenCLIP's bigG; the weights don't say.
        source: Where the weights lie, for errors.

    Raises:
        ConfigError: The names are not those of a CLIP text encoder.
    """
    from transformers import CLIPTextConfig

    first_fc1 = "text_model.encoder.layers.0.mlp.fc1.weight"
    for name in (TOKEN_EMBEDDING, POSITION_EMBEDDING, first_fc1):
        if name not in shapes:
            raise ConfigError(f"{source} holds no CLIP text encoder: {name} is missing; give a file that has it")
    vocabulary, width = shapes[TOKEN_EMBEDDING]
    if width % _HEAD_DIM:
        raise ConfigError(f"{source}: CLIP's width {width} is not a multiple of its head size {_HEAD_DIM}")
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes[first_fc1][0],
        projection_dim=shapes[PROJECTION][0] if PROJECTION in shapes else width,
        num_hidden_layers=len({name.split(".")[3] for name in shapes if name.startswith("text_model.encoder.layers.")}),
        num_attention_heads=width // _HEAD_DIM,
        max_position_embeddings=shapes[POSITION_EMBEDDING][0],
        hidden_act=activation,
        # With 2, the value of the published configurations, transformers pools at the highest id of a caption. That
        # is the first end token, whatever the size of the vocabulary.
        eos_token_id=2,
        # Nothing reads these, and the defaults lie outside a small vocabulary.
        bos_token_id=None,
        pad_token_id=None,
    )


def load_clip(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Sequence[int]],
    *,
    activation: str,
    device: Any,
    dtype: torch.dtype,
    source: str,
) -> "CLIPTextModelWithProjection":
    """This builds a CLIP text encoder and streams its weights in.

    Args:
        tensors: Name without prefix and tensor, one at a time.
        shapes: Name without prefix -> shape, of the same tensors.
        activation: See ``clip_config``.
        device: Where the encoder goes.
        dtype: Of its weights.
        source: Where the weights lie, for errors.

    Returns:
        The encoder, frozen, in eval mode. A file without a projection (CLIP-L) gets the identity.
    """
    from transformers import CLIPTextModelWithProjection

    config = clip_config(shapes, activation=activation, source=source)
    with torch.device("meta"):
        encoder = CLIPTextModelWithProjection(config)

    def wanted() -> Iterable[tuple[str, Tensor]]:
        yield from ((name, tensor) for name, tensor in tensors if name not in _IGNORED)
        if PROJECTION not in shapes:
            yield PROJECTION, torch.eye(config.hidden_size)

    load_strict(encoder, wanted(), device=device, dtype=dtype, source=source)
    # Counting numbers, in no state dict, so they are still on the meta device.
    embeddings = encoder.text_model.embeddings
    embeddings.position_ids = torch.arange(config.max_position_embeddings, device=device).expand((1, -1))
    return encoder.eval().requires_grad_(False)


def encode_clip(encoder: "CLIPTextModelWithProjection", ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """This runs CLIP on token ids.

    Args:
        encoder: From ``load_clip``.
        ids: Token ids (B, N), the end token being the highest.
        mask: Which positions the self-attention may look at (B, N), bool; None: all.

    Returns:
        The penultimate layer's output, without the final norm (B, N, D); the projected output at the end token (B, P).
    """
    device = encoder.text_model.embeddings.token_embedding.weight.device
    output = encoder(
        ids.to(device),
        attention_mask=None if mask is None else mask.to(device, torch.long),
        output_hidden_states=True,
    )
    return output.hidden_states[-2], output.text_embeds


def encode_clip_layer(encoder: "CLIPTextModelWithProjection", ids: Tensor, layer: int) -> Tensor:
    """This runs CLIP on token ids, and puts the last norm after one of its layers.

    Args:
        encoder: From ``load_clip``.
        ids: Token ids (B, N).
        layer: Which layer, counted from the first, which is 1.

    Returns:
        (B, N, D).
    """
    text_model = encoder.text_model
    output = text_model(ids.to(text_model.embeddings.token_embedding.weight.device), output_hidden_states=True)
    if layer == text_model.config.num_hidden_layers:
        return output.last_hidden_state
    return text_model.final_layer_norm(output.hidden_states[layer])
