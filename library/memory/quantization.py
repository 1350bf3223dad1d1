"""Frozen weights in eight or four bits: how they are stored, and layers that compute from them.

Every format is symmetric: a weight is its code's value times a scale. Eight-bit formats have a scale for each output,
four-bit formats one for each run of ``GROUP`` weights of an output. Codes and scales are plain buffers of the layer, so
that whatever moves a layer's tensors (block swap, ``to``) moves them too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.bound_forward import BoundForward

GROUP = 64
"""Weights that share a scale in the four-bit formats, as published for NF4."""

_TINY = torch.finfo(torch.float32).tiny

# Dettmers et al. 2023, arXiv:2305.14314, appendix E: the quantiles of a normal distribution, scaled to -1..1
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class WeightFormat:
    """One way to store a matrix (O, I).

    Attributes:
        name: As typed.
        quantize: The matrix in fp32 -> codes (O, n) and scales (O, groups), fp32.
        values: Codes (O, n) -> their values (O, I), fp32, before the scales.
        bits: Per weight, scales apart.
        group: Weights of one output that share a scale; None: all of them.
    """

    name: str
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    values: Callable[[Tensor], Tensor]
    bits: int
    group: int | None

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix (O, I) that codes and scales stand for."""
        values = self.values(codes)
        if self.group is None:
            return (values * scales).to(dtype)
        return (values.view(len(codes), -1, self.group) * scales.unsqueeze(-1)).to(dtype).view(len(codes), -1)


def _scaled(weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """A matrix divided by its outputs' scales, so that its extremes are ``largest``; and the scales (O, 1)."""
    scales = weight.abs().amax(dim=1, keepdim=True).div(largest).clamp_min(_TINY)
    return weight / scales, scales


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scaled, scales = _scaled(weight, 127)
    return scaled.round().to(torch.int8), scales


def _to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scaled, scales = _scaled(weight, torch.finfo(torch.float8_e4m3fn).max)
    return scaled.to(torch.float8_e4m3fn), scales


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    scaled, scales = _scaled(weight.reshape(-1, GROUP), 7)
    codes = scaled.round().to(torch.int8).add(8).to(torch.uint8).view_as(weight)
    return _pack(codes), scales.view(len(weight), -1)


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    scaled, scales = _scaled(weight.reshape(-1, GROUP), 1)
    table = torch.tensor(_NF4, device=weight.device)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8).view_as(weight)
    return _pack(codes), scales.view(len(weight), -1)


def _pack(codes: Tensor) -> Tensor:
    """Two codes of four bits to a byte, the first in the upper half."""
    return codes[:, ::2].bitwise_left_shift(4).bitwise_or(codes[:, 1::2])


def _unpack(codes: Tensor) -> Tensor:
    return torch.stack([codes.bitwise_right_shift(4), codes.bitwise_and(15)], dim=-1).view(len(codes), -1)


def _nf4_values(codes: Tensor) -> Tensor:
    return torch.tensor(_NF4, device=codes.device)[_unpack(codes).int()]


FORMATS = {
    known.name: known
    for known in (
        WeightFormat("int8", _to_int8, Tensor.float, 8, None),
        WeightFormat("fp8", _to_fp8, Tensor.float, 8, None),
        WeightFormat("int4", _to_int4, lambda codes: _unpack(codes).float().sub(8), 4, GROUP),
        WeightFormat("nf4", _to_nf4, _nf4_values, 4, GROUP),
    )
}
"""By the name that is typed."""


def can_quantize(layer: nn.Module, chosen: WeightFormat) -> bool:
    """Whether a layer is a matrix, linear or a 1x1 convolution, whose inputs fall into whole groups."""
    if isinstance(layer, nn.Conv2d):
        matrix = set(layer.kernel_size) == {1} and layer.groups == 1 and layer.padding_mode == "zeros"
        matrix = matrix and set(layer.stride) == {1} and set(layer.padding) == {0}
        inputs = layer.in_channels
    elif isinstance(layer, nn.Linear):
        matrix, inputs = True, layer.in_features
    else:
        return False
    return matrix and inputs % (chosen.group or 1) == 0


def quantize_layer(layer: nn.Linear | nn.Conv2d, chosen: WeightFormat) -> None:
    """This replaces a layer's weight by codes and scales, and its ``forward`` by one that computes from them.

    The layer's type, name and bias stay. It has no ``weight`` any more, so it can't be trained, merged or saved.
    """
    weight = layer.weight.detach().float().flatten(1)
    codes, scales = chosen.quantize(weight)
    del layer.weight
    layer.register_buffer("weight_codes", codes, persistent=False)
    layer.register_buffer("weight_scales", scales, persistent=False)
    layer.forward = BoundForward(_forward, layer, chosen).call  # type: ignore[method-assign, assignment]


def quantize_blocks(blocks: list[nn.Module], chosen: WeightFormat) -> int:
    """This stores the matrices of a model's blocks in a format; norms, biases and all else stay. Returns how many."""
    layers = [layer for block in blocks for layer in block.modules() if can_quantize(layer, chosen)]
    for layer in layers:
        quantize_layer(layer, chosen)  # type: ignore[arg-type]
    return len(layers)


def _forward(layer: Any, chosen: WeightFormat, x: Tensor) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x = x.to(dtype)
    matrix = isinstance(layer, nn.Linear)
    if not matrix:  # a 1x1 convolution is a matrix over the channels
        x = x.permute(0, 2, 3, 1)
    out = _QuantizedMatmul.apply(x, layer.weight_codes, layer.weight_scales, chosen)
    if layer.bias is not None:
        out = out + layer.bias.to(dtype)
    return out if matrix else out.permute(0, 3, 1, 2)


class _QuantizedMatmul(torch.autograd.Function):
    """x W^T, keeping codes and scales for the backward pass instead of the matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, chosen: WeightFormat) -> Tensor:
        """From x (..., I), codes and scales: (..., O)."""
        ctx.save_for_backward(codes, scales)
        ctx.chosen, ctx.dtype = chosen, x.dtype
        return F.linear(x, chosen.dequantize(codes, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x; the weights have none."""
        codes, scales = ctx.saved_tensors
        return grad.to(ctx.dtype) @ ctx.chosen.dequantize(codes, scales, ctx.dtype), None, None, None
