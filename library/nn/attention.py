"""Scaled dot-product attention, by the library the user chose."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from library.config.errors import ConfigError

AttentionFunction = Callable[..., Tensor]
"""``(q, k, v, mask=None) -> Tensor``; q, k, v and the result are (B, heads, N, head_dim)."""


def attention_function(name: str) -> AttentionFunction:
    """This gives the attention function called ``name``.

    Args:
        name: ``sdpa`` (torch's own) or ``xformers``.

    Returns:
        A function of q (B, heads, N, head_dim), k and v (B, heads, M, head_dim) and an optional mask that broadcasts
        to (B, heads, N, M): bool, True where a query may look, or a float that is added to the logits.

    Raises:
        ConfigError: xformers was chosen and is not installed.
        ValueError: There is no attention of that name.
    """
    if name == "sdpa":
        return sdpa
    if name == "xformers":
        try:
            from xformers.ops import memory_efficient_attention
        except ImportError as error:
            raise ConfigError(f"--xformers: {error}; run `pip install xformers`, or use --sdpa") from error
        return partial(_xformers, memory_efficient_attention)
    raise ValueError(f"attention {name!r} is not known; it is one of sdpa, xformers")


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """This is torch's attention, see ``attention_function``."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _xformers(
    memory_efficient_attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    bias = None if mask is None else _aligned_bias(mask, (*q.shape[:3], k.shape[2]), v.dtype)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, N, heads, head_dim)
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)  # (B, heads, N, head_dim)


def _aligned_bias(mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # The kernels read the bias in rows of 8: it is a view into a buffer whose last dimension is a multiple of that.
    *leading, columns = shape
    buffer = torch.zeros(*leading, -(-columns // 8) * 8, dtype=dtype, device=mask.device)
    bias = buffer[..., :columns]
    return bias.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else bias.add_(mask)
