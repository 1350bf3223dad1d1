"""Scaled dot-product attention, by the library the user chose."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.config.errors import ConfigError

AttentionFunction = Callable[..., Tensor]
"""``(q, k, v, mask=None) -> Tensor``; q, k, v and the result are (B, heads, N, head_dim)."""

TORCH_KERNELS = {
    "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""The kernels that torch brings along, by the names of ``--attn_mode``."""

NAMES = ("sdpa", *TORCH_KERNELS, "xformers", "flash", "sage")

_PACKAGES = {
    "xformers": ("xformers.ops", "memory_efficient_attention", "pip install xformers"),
    "flash": ("flash_attn", "flash_attn_func", "pip install flash-attn --no-build-isolation"),
    "sage": ("sageattention", "sageattn", "pip install sageattention"),
}


class AttentionShape(NamedTuple):
    """The attention that takes most of a model's time.

    Attributes:
        heads: Of it.
        head_dim: Width of a head.
        queries: Tokens that look.
        keys: Tokens that are looked at.
        masked: Whether some keys are hidden.
    """

    heads: int
    head_dim: int
    queries: int
    keys: int
    masked: bool


def attention_function(name: str) -> AttentionFunction:
    """This gives the attention function called ``name``.

    Args:
        name: ``sdpa``: torch's own, with the kernel that it prefers; ``torch-cudnn``, ``torch-flash`` and
            ``torch-efficient``: the same, with this kernel wherever it can; ``xformers``; ``flash``: the package
            flash-attn, and torch's own where there is a mask; ``sage``: SageAttention, which has no backward pass and
            is quantised, and torch's own where there is a mask.

    Returns:
        A function of q (B, heads, N, head_dim), k and v (B, heads, M, head_dim) and an optional mask that broadcasts
        to (B, heads, N, M): bool, True where a query may look, or a float that is added to the logits.

    Raises:
        ConfigError: A package was chosen that is not installed.
        ValueError: There is no attention of that name.
    """
    if name == "sdpa":
        return sdpa
    if name in TORCH_KERNELS:
        return partial(_sdpa_by, name)
    if name in _PACKAGES:
        module, function, install = _PACKAGES[name]
        try:
            kernel = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            option = "--xformers" if name == "xformers" else f"--attn_mode {name}"
            raise ConfigError(f"{option}: {error}; run `{install}`, or use --sdpa") from error
        return partial({"xformers": _xformers, "flash": _flash, "sage": _sage}[name], kernel)
    raise ValueError(f"attention {name!r} is not known; it is one of {', '.join(NAMES)}")


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """This is torch's attention, see ``attention_function``."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _sdpa_by(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    others = [kernel for other, kernel in TORCH_KERNELS.items() if other != name]
    with sdpa_kernel([TORCH_KERNELS[name], *others, SDPBackend.MATH], set_priority=True):
        return sdpa(q, k, v, mask)


def _xformers(
    memory_efficient_attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    bias = None if mask is None else _aligned_bias(mask, (*q.shape[:3], k.shape[2]), v.dtype)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, N, heads, head_dim)
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)  # (B, heads, N, head_dim)


def _flash(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:  # it knows lengths and no masks
        return sdpa(q, k, v, mask)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, N, heads, head_dim)
    return kernel(q, k, v).transpose(1, 2)  # (B, heads, N, head_dim)


def _sage(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        return sdpa(q, k, v, mask)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("SageAttention has no backward pass; train with another attention")
    return kernel(q, k, v, tensor_layout="HND", is_causal=False)


def _aligned_bias(mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # The kernels read the bias in rows of 8: it is a view into a buffer whose last dimension is a multiple of that.
    *leading, columns = shape
    buffer = torch.zeros(*leading, -(-columns // 8) * 8, dtype=dtype, device=mask.device)
    bias = buffer[..., :columns]
    return bias.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else bias.add_(mask)
