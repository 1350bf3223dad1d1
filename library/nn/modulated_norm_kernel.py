"""The Triton kernels of ``modulated_norm``: one pass over the tokens forward, one backward."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32
"""Tokens that one program of the backward pass sums over."""


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The answer (B, N, D) in ``dtype``, and each token's mean and inverse deviation (B, N), fp32."""
    x, shift, scale = x.contiguous(), _rows(shift), _rows(scale)
    batch, tokens, width = x.shape
    answer = torch.empty_like(x, dtype=dtype)
    mean, rstd = (torch.empty(batch, tokens, dtype=torch.float32, device=x.device) for _ in range(2))
    strides = (shift.stride(0), scale.stride(0))
    _forward[(batch * tokens,)](
        x, shift, scale, answer, mean, rstd, tokens, width, *strides, eps, block=triton.next_power_of_2(width)
    )
    return answer, mean, rstd


def backward(
    gradient: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, *, vectors: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x (B, N, D), and with ``vectors`` of shift (B, 1, D), fp32, and scale (B, 1, D)."""
    gradient, x, scale = gradient.contiguous(), x.contiguous(), _rows(scale)
    batch, tokens, width = x.shape
    parts = triton.cdiv(tokens, _ROWS)
    of_x = torch.empty_like(x)
    sums = torch.empty(2, batch, parts if vectors else 0, width, dtype=torch.float32, device=x.device)
    _backward[(batch, parts)](
        *(gradient, x, scale, mean, rstd, of_x, sums[0], sums[1], tokens, width, scale.stride(0), parts),
        rows=_ROWS,
        vectors=vectors,
        block=triton.next_power_of_2(width),
    )
    if not vectors:
        return of_x, None, None
    of_shift, of_scale = sums.sum(dim=2, keepdim=True)
    return of_x, of_shift, of_scale.to(scale.dtype)


def _rows(vectors: Tensor) -> Tensor:
    return vectors if vectors.stride(-1) == 1 else vectors.contiguous()


@triton.jit
def _forward(
    x: Any,
    shift: Any,
    scale: Any,
    answer: Any,
    mean: Any,
    rstd: Any,
    tokens: Any,
    width: Any,
    shift_stride: Any,
    scale_stride: Any,
    eps: Any,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    at = tl.arange(0, block)
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    average = tl.sum(values, axis=0) / width
    centred = tl.where(inside, values - average, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    factor = tl.load(scale + sample * scale_stride + at, mask=inside, other=0.0)
    gain = (1.0 + factor.to(tl.float32)).to(factor.dtype).to(tl.float32)  # rounded as ``1 + scale`` is
    offset = tl.load(shift + sample * shift_stride + at, mask=inside, other=0.0).to(tl.float32)
    result = centred * inverse * gain + offset
    tl.store(answer + row * width + at, result.to(answer.dtype.element_ty), mask=inside)
    tl.store(mean + row, average)
    tl.store(rstd + row, inverse)


@triton.jit
def _backward(
    gradient: Any,
    x: Any,
    scale: Any,
    mean: Any,
    rstd: Any,
    of_x: Any,
    of_shift: Any,
    of_scale: Any,
    tokens: Any,
    width: Any,
    scale_stride: Any,
    parts: Any,
    rows: tl.constexpr,
    vectors: tl.constexpr,
    block: tl.constexpr,
):
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, block)
    inside = at < width
    factor = tl.load(scale + sample * scale_stride + at, mask=inside, other=0.0)
    gain = (1.0 + factor.to(tl.float32)).to(factor.dtype).to(tl.float32)
    shift_sum = tl.zeros([block], dtype=tl.float32)
    scale_sum = tl.zeros([block], dtype=tl.float32)
    for token in range(part * rows, tl.minimum((part + 1) * rows, tokens)):
        row = sample * tokens + token
        arrived = tl.load(gradient + row * width + at, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        normed = tl.where(inside, (values - tl.load(mean + row)) * inverse, 0.0)
        of_normed = arrived * gain
        average = tl.sum(of_normed, axis=0) / width
        along = tl.sum(of_normed * normed, axis=0) / width
        result = (of_normed - average - normed * along) * inverse
        tl.store(of_x + row * width + at, result.to(of_x.dtype.element_ty), mask=inside)
        if vectors:
            shift_sum += arrived
            scale_sum += arrived * normed
    if vectors:
        to = (sample * parts + part) * width + at
        tl.store(of_shift + to, shift_sum, mask=inside)
        tl.store(of_scale + to, scale_sum, mask=inside)
