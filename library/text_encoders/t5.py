"""T5 v1.1's encoder (Raffel et al. 2020, arXiv 1910.10683): transformers' module, its sizes read from the weights.

Parameter names are those of transformers and of the published checkpoints: ``encoder.block.0.layer.0.SelfAttention...``
and ``shared.weight``.

Shapes: B captions, T positions, D width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.io.state_dict import load_strict

if TYPE_CHECKING:
    from transformers import T5Config, T5EncoderModel

EMBEDDING = "shared.weight"
_EMBEDDING_COPY = "encoder.embed_tokens.weight"
_RELATIVE_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_MAX_DISTANCE = 128


class Float32Linear(nn.Linear):
    """A linear layer without bias that computes in fp32 whatever comes in, under autocast too.

    The last layer of T5-XXL's feed-forward overflows fp16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


def t5_config(shapes: Mapping[str, Sequence[int]], *, source: str) -> "T5Config":
    """This reads the sizes of a T5 v1.1 encoder from the shapes of its weights.

    Args:
        shapes: Name without prefix -> shape.
        source: Where the weights lie, for errors.

    Raises:
        ConfigError: The names are not those of a T5 v1.1 encoder.
    """
    from transformers import T5Config

    embedding = EMBEDDING if EMBEDDING in shapes else _EMBEDDING_COPY
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    gate = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    for name in (embedding, _RELATIVE_BIAS, query, gate):
        if name not in shapes:
            raise ConfigError(f"{source} holds no T5 v1.1 encoder: {name} is missing; give a file that has it")
    vocabulary, width = shapes[embedding]
    buckets, heads = shapes[_RELATIVE_BIAS]
    return T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes[query][0] // heads,
        d_ff=shapes[gate][0],
        num_layers=len({name.split(".")[2] for name in shapes if name.startswith("encoder.block.")}),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=_MAX_DISTANCE,
        feed_forward_proj="gated-gelu",
    )


def load_t5(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Sequence[int]],
    *,
    device: Any,
    dtype: torch.dtype,
    source: str,
) -> "T5EncoderModel":
    """This builds a T5 encoder and streams its weights in.

    Args:
        tensors: Name without prefix and tensor, one at a time. A decoder's are left out.
        shapes: Name without prefix -> shape, of the same tensors.
        device: Where the encoder goes.
        dtype: Of its weights. With fp16 the feed-forward's last layers stay in fp32, where the values would overflow.
        source: Where the weights lie, for errors.

    Returns:
        The encoder, frozen, in eval mode.
    """
    from transformers import T5EncoderModel

    with torch.device("meta"):
        encoder = T5EncoderModel(t5_config(shapes, source=source))
        if dtype == torch.float16:
            _compute_last_layers_in_fp32(encoder)
    encoder.encoder.embed_tokens = encoder.shared  # files hold either name, or both
    in_fp32 = {name: module for name, module in encoder.named_modules() if isinstance(module, Float32Linear)}
    load_strict(
        encoder,
        _encoder_weights(tensors),
        device=device,
        dtype=dtype,
        source=source,
        keep_dtype=[f"{name}.weight" for name in in_fp32],
    )
    for module in in_fp32.values():
        module.float()
    return encoder.eval().requires_grad_(False)


def encode_t5(encoder: "T5EncoderModel", ids: Tensor, mask: Tensor | None) -> Tensor:
    """This runs T5 on token ids.

    Args:
        encoder: From ``load_t5``.
        ids: Token ids (B, T).
        mask: Which positions the self-attention may look at (B, T), bool; None: all.

    Returns:
        The last layer's output after the final norm (B, T, D), in the type of the embedding.
    """
    embedding = encoder.shared.weight
    output = encoder(
        ids.to(embedding.device),
        attention_mask=None if mask is None else mask.to(embedding.device, torch.long),
    )
    return output.last_hidden_state.to(embedding.dtype)


def _encoder_weights(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors if not name.startswith(("decoder.", "lm_head.")))


def _compute_last_layers_in_fp32(encoder: "T5EncoderModel") -> None:
    for name, module in list(encoder.named_modules()):
        if name.endswith("DenseReluDense.wo"):
            assert isinstance(module, nn.Linear)
            encoder.set_submodule(name, Float32Linear(module.in_features, module.out_features, bias=False))
