"""Frozen weights in eight or four bits: how they are stored, and layers that compute from them.

Every format is symmetric: a weight is its code's value times a scale. Eight-bit formats have a scale for each output,
four-bit formats one for each run of ``GROUP`` weights of an output. Codes and scales are plain buffers of the layer, so
that whatever moves a layer's tensors (block swap, ``to``) moves them too.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.bound_forward import BoundForward
from library.memory.eight_bit import EIGHT_BIT, FP8, INT8, EightBit, Matmul, fits
from library.memory.nf4_kernel import Dequantize, fast_dequantize

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
        values: Codes (O, n) -> their values (O, I), fp32, before the scales; None: they are their own.
        bits: Per weight, scales apart.
        group: Weights of one output that share a scale; None: all of them.
        arithmetic: Products with the codes themselves; None: the matrix is always dequantised.
        fast: On CUDA, a faster way to dequantise for a device, a type and the plain way, if there is one.
    """

    name: str
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    values: Callable[[Tensor], Tensor] | None
    bits: int
    group: int | None
    arithmetic: EightBit | None = None
    fast: Callable[[torch.device, torch.dtype, Dequantize], Dequantize | None] | None = None

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix (O, I) that codes and scales stand for."""
        if (
            self.fast is not None
            and codes.is_cuda
            and (fast := self.fast(codes.device, dtype, self.dequantize_plainly))
        ):
            return fast(codes, scales, dtype)
        return self.dequantize_plainly(codes, scales, dtype)

    def dequantize_plainly(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The same by torch's own operations."""
        if self.values is None or self.group is None:
            # fp32 products, rounded once: in one pass over memory rather than three. Every fp8 number is one of dtype's
            values = codes if codes.dtype == torch.int8 else codes.to(dtype)
            return torch.mul(values, scales, out=torch.empty(codes.shape, dtype=dtype, device=codes.device))
        values = self.values(codes)
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
        WeightFormat("int8", _to_int8, None, 8, None, INT8),
        WeightFormat("fp8", _to_fp8, None, 8, None, FP8),
        WeightFormat("int4", _to_int4, lambda codes: _unpack(codes).float().sub(8), 4, GROUP),
        WeightFormat("nf4", _to_nf4, _nf4_values, 4, GROUP, fast=fast_dequantize),
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


class CodesAndScales(NamedTuple):
    """A matrix as the fp8 format stores it: codes (O, I), float8_e4m3fn, and a scale for each output (O, 1), fp32."""

    codes: Tensor
    scales: Tensor


Stored = Callable[[nn.Module], CodesAndScales | None]
"""What a file has of a layer's matrix in fp8, or None."""


class Quantized(NamedTuple):
    """What was done to a model's layers.

    Attributes:
        layers: How many are stored in a format now.
        kept: How many of those have the very codes of the file.
    """

    layers: int
    kept: int


def quantize_layer(
    layer: nn.Linear | nn.Conv2d,
    chosen: WeightFormat,
    stored: CodesAndScales | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> bool:
    """This replaces a layer's weight by codes and scales, and its ``forward`` by one that computes from them.

    The layer's type, name and bias stay. It has no ``weight`` any more, so it can't be trained, merged or saved.

    Args:
        layer: One that ``can_quantize``.
        chosen: The format.
        stored: What the file has of the matrix: it is taken as it is for fp8, and for other formats the numbers are
            made from it rather than from the weight, which may have been rounded. If the weight was changed since it
            was loaded, the weight counts.
        dtype: What the layer computes and answers in; by default the autocast's type, or that of its input.

    Returns:
        Whether the codes are those of the file.
    """
    weight = layer.weight.detach().flatten(1)
    exact, kept = weight.float(), False
    if stored is not None and not weight.is_meta:
        stored = CodesAndScales(*(tensor.to(weight.device) for tensor in stored))
        product = FORMATS["fp8"].dequantize(*stored, torch.float32)
        if torch.equal(product.to(weight.dtype), weight):
            exact, kept = product, chosen.name == "fp8"
    codes, scales = stored if stored is not None and kept else chosen.quantize(exact)
    del layer.weight
    layer.register_buffer("weight_codes", codes, persistent=False)
    layer.register_buffer("weight_scales", scales, persistent=False)
    layer.quantized_matmul = Matmul()  # type: ignore[assignment]
    layer.forward = BoundForward(_forward, layer, chosen, dtype).call  # type: ignore[method-assign, assignment]
    return kept


def quantize_blocks(blocks: Iterable[nn.Module], chosen: WeightFormat, stored: Stored | None = None) -> Quantized:
    """This stores the matrices of a model's blocks in a format; norms, biases and all else stay.

    Args:
        blocks: The blocks.
        chosen: The format.
        stored: Tells what the file has of a layer in fp8, see ``quantize_layer``.
    """
    layers = [layer for block in blocks for layer in block.modules() if can_quantize(layer, chosen)]
    kept = [quantize_layer(layer, chosen, stored and stored(layer)) for layer in layers]  # type: ignore[arg-type]
    return Quantized(len(layers), sum(kept))


def quantized_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers inside a module that are stored in a format, by their name."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "weight_codes")}


def compute_by(module: nn.Module, matmul: Matmul) -> None:
    """This says how the products of all eight-bit layers inside a module are computed from now on."""
    for layer in quantized_layers(module).values():
        layer.quantized_matmul = matmul  # type: ignore[assignment]


def _forward(layer: Any, chosen: WeightFormat, dtype: torch.dtype | None, x: Tensor) -> Tensor:
    kind = x.device.type
    if dtype is None:
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x = x.to(dtype)
    matrix = isinstance(layer, nn.Linear)
    if not matrix:  # a 1x1 convolution is a matrix over the channels
        x = x.permute(0, 2, 3, 1)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    out = _QuantizedMatmul.apply(x, layer.weight_codes, layer.weight_scales, bias, chosen, layer.quantized_matmul)
    return out if matrix else out.permute(0, 3, 1, 2)


class _QuantizedMatmul(torch.autograd.Function):
    """x W^T, keeping codes and scales for the backward pass instead of the matrix."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, chosen: WeightFormat, matmul: Matmul
    ) -> Tensor:
        """From x (..., I), codes, scales and a frozen bias (O,): (..., O)."""
        ctx.save_for_backward(codes, scales)
        ctx.chosen, ctx.dtype, ctx.matmul = chosen, x.dtype, matmul
        with torch.autocast(x.device.type, enabled=False):  # the type was chosen before
            if arithmetic := _eight_bit(chosen, matmul.forward, x, codes):
                out = arithmetic.product(x.flatten(0, -2), codes, scales)
                out = (out if bias is None else out.add_(bias)).to(x.dtype)
                return out.view(*x.shape[:-1], len(codes))
            return F.linear(x, chosen.dequantize(codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x; the weights and the bias have none."""
        codes, scales = ctx.saved_tensors
        if arithmetic := _eight_bit(ctx.chosen, ctx.matmul.backward, grad, codes):
            dx = arithmetic.gradient(grad.flatten(0, -2), codes, scales).to(ctx.dtype)
            dx = dx.view(*grad.shape[:-1], codes.shape[1])
        else:
            dx = grad.to(ctx.dtype) @ ctx.chosen.dequantize(codes, scales, ctx.dtype)
        return dx, None, None, None, None, None


def _eight_bit(chosen: WeightFormat, way: str, x: Tensor, codes: Tensor) -> EightBit | None:
    """The arithmetic for a product with rows ``x``; None: the matrix is dequantised."""
    wanted = way == EIGHT_BIT and fits(math.prod(x.shape[:-1]), codes)
    return chosen.arithmetic if wanted else None
