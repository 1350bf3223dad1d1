"""Gemma 2 as a text encoder (Gemma Team 2024, arXiv 2408.00118): transformers' module, its sizes from the weights.

Parameter names are those of the published checkpoints, ``model.layers.0.self_attn...``, whose leading ``model.`` may be
missing.

Shapes: B captions, T positions, D width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.config.errors import ConfigError
from library.io.state_dict import load_strict

if TYPE_CHECKING:
    from transformers import Gemma2Config, Gemma2Model

_PREFIX = "model."
_EMBEDDING = "embed_tokens.weight"
_LAYER = "layers.0."
# what shapes don't say
_NORM_EPS = 1e-6
_ROPE_THETA = 10_000.0
_ATTENTION_SOFT_CAP = 50.0
_SLIDING_WINDOW = 4096
_HEAD_DIM = 256
# soft-capping comes between the product and the softmax, where no fused kernel lets anything in
_EAGER: dict[str, Any] = {"attn_implementation": "eager"}


def gemma_config(shapes: Mapping[str, Sequence[int]], *, source: str) -> "Gemma2Config":
    """This reads the sizes of a Gemma 2 decoder from the shapes of its weights.

    Args:
        shapes: Name -> shape.
        source: Where the weights lie, for errors.

    Raises:
        ConfigError: The names are not those of Gemma 2.
    """
    from transformers import Gemma2Config

    plain = {name.removeprefix(_PREFIX): shape for name, shape in shapes.items()}
    query, key, gate = (f"{_LAYER}{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"))
    # the norm before the feed-forward tells it from the first Gemma
    for name in (_EMBEDDING, query, key, gate, f"{_LAYER}pre_feedforward_layernorm.weight"):
        if name not in plain:
            raise ConfigError(f"{source} holds no Gemma 2: {name} is missing; give a file or folder that has it")
    vocabulary, width = plain[_EMBEDDING]
    depth = len({name.split(".")[1] for name in plain if name.startswith("layers.")})
    if plain[query][0] % _HEAD_DIM or plain[key][0] % _HEAD_DIM:
        raise ConfigError(f"{source} has heads that are not {_HEAD_DIM} wide, so it is not Gemma 2 2b; give that one")
    return Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=plain[gate][0],
        num_hidden_layers=depth,
        num_attention_heads=plain[query][0] // _HEAD_DIM,
        num_key_value_heads=plain[key][0] // _HEAD_DIM,
        head_dim=_HEAD_DIM,
        query_pre_attn_scalar=_HEAD_DIM,
        hidden_activation="gelu_pytorch_tanh",
        rms_norm_eps=_NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        attn_logit_softcapping=_ATTENTION_SOFT_CAP,
        sliding_window=_SLIDING_WINDOW,
        layer_types=["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(depth)],
        use_cache=False,
        **_EAGER,
    )


def load_gemma(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Sequence[int]],
    *,
    device: Any,
    dtype: torch.dtype,
    source: str,
) -> "Gemma2Model":
    """This builds the decoder and streams its weights in.

    Args:
        tensors: Name and tensor, one at a time. The output layer's are left out.
        shapes: Name -> shape, of the same tensors.
        device: Where it goes.
        dtype: Of its weights; not fp16, in which its residual stream overflows.
        source: Where the weights lie, for errors.

    Returns:
        The decoder, frozen, in eval mode.

    Raises:
        ConfigError: The weights are none of Gemma 2, or ``dtype`` is fp16.
    """
    from transformers import Gemma2Model

    if dtype == torch.float16:
        raise ConfigError("Gemma 2 overflows in fp16; use --mixed_precision bf16, or no")
    with torch.device("meta"):
        decoder = Gemma2Model(gemma_config(shapes, source=source))
    load_strict(decoder, decoder_weights(tensors), device=device, dtype=dtype, source=source)
    if torch.device(device).type != "meta":
        _compute_constants(decoder, device)
    return decoder.eval().requires_grad_(False)


def encode_gemma(decoder: "Gemma2Model", ids: Tensor, mask: Tensor) -> Tensor:
    """This runs the decoder on token ids.

    Args:
        decoder: From ``load_gemma``.
        ids: Token ids (B, T), padded on the right.
        mask: Which positions are the caption's (B, T), bool.

    Returns:
        The last layer's output after the final norm (B, T, D).
    """
    device = decoder.embed_tokens.weight.device
    output = decoder(ids.to(device), attention_mask=mask.to(device, torch.long), use_cache=False)
    return output.last_hidden_state


def _compute_constants(decoder: Any, device: Any) -> None:
    """Makes what is computed and not stored, and so was left on the meta device."""
    config = decoder.config
    with torch.device(device):
        decoder.rotary_emb = type(decoder.rotary_emb)(config)
        decoder.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)


def decoder_weights(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The decoder's own tensors of a file, under its own names: without the output layer."""
    for name, tensor in tensors:
        if not name.startswith("lm_head."):
            yield name.removeprefix(_PREFIX), tensor
