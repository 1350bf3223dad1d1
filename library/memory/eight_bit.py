"""Products of activations with frozen eight-bit matrices, computed in eight bits too.

The activations, and in the backward pass the gradients, are rounded when they come: each row has a scale of its own.
Products of codes are summed in int32 or fp32, and the scales multiply the sums: of rows and of the matrix's outputs in
the forward pass; in the backward pass, where outputs are summed over, the matrix's scales go into the gradient first.

Shapes: N rows, I inputs, O outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DEQUANTIZE, EIGHT_BIT = "dequantize", "8bit"

_MOST_INT8 = 127
_MOST_FP8 = torch.finfo(torch.float8_e4m3fn).max
_TINY = torch.finfo(torch.float32).tiny
_FEWEST_ROWS = 17  # torch._int_mm takes no fewer
_MULTIPLE = 16  # of both sides of the matrix, for the tensor cores


@dataclass(frozen=True)
class Matmul:
    """How products with an eight-bit matrix are computed: ``dequantize`` the matrix first, or in ``8bit``.

    Attributes:
        forward: Of the answer.
        backward: Of the input's gradient.
    """

    forward: str = DEQUANTIZE
    backward: str = DEQUANTIZE


@dataclass(frozen=True)
class EightBit:
    """Arithmetic with one kind of eight-bit codes.

    Attributes:
        capability: The first CUDA compute capability that has an instruction for it.
        round_rows: Rows (N, K) -> their codes and a scale for each (N, 1), fp32.
        multiply: Codes (N, K) and codes (K, M) -> the sums of their products (N, M).
    """

    capability: tuple[int, int]
    round_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    multiply: Callable[[Tensor, Tensor], Tensor]

    def product(self, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """X W^T (N, O), fp32, from x (N, I), codes (O, I) and scales (O, 1)."""
        rows, row_scales = self.round_rows(x)
        return self.multiply(rows, codes.t()) * row_scales * scales.t()

    def gradient(self, grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """The gradient of x (N, I), fp32, from that of the answer (N, O)."""
        rows, row_scales = self.round_rows(grad * scales.t())
        return self.multiply(rows, codes) * row_scales


def fits(rows: int, codes: Tensor) -> bool:
    """Whether the eight-bit instructions take a matrix (O, I) and so many rows; if not, it is dequantised."""
    return rows >= _FEWEST_ROWS and codes.shape[0] % _MULTIPLE == 0 and codes.shape[1] % _MULTIPLE == 0


def _rows_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(dim=1, keepdim=True).float().div(_MOST_INT8).clamp_min(_TINY)
    return (x / scales).round_().to(torch.int8), scales


def _rows_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(dim=1, keepdim=True).float().div(_MOST_FP8).clamp_min(_TINY)
    return (x / scales).to(torch.float8_e4m3fn), scales


def _multiply_int8(a: Tensor, b: Tensor) -> Tensor:
    return torch._int_mm(a, _by_columns(b) if a.is_cuda else b)


def _multiply_fp8(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_cuda:
        return a.float() @ b.float()  # exact products, summed in fp32, as the instruction does
    return scaled_mm(a, b)


def scaled_mm(a: Tensor, b: Tensor) -> Tensor:
    """The product of fp8 codes (N, K) and (K, M), fp32, by torch's instruction; scales come afterwards."""
    one = torch.ones((), device=a.device)
    # without use_fast_accum: on Hopper it drops bits of the sums
    return torch._scaled_mm(a, _by_columns(b), scale_a=one, scale_b=one, out_dtype=torch.float32)


def _by_columns(b: Tensor) -> Tensor:
    """The matrix laid out column after column, as the tensor cores' 8-bit instructions want it; a byte to copy each."""
    return b if b.stride(0) == 1 else b.t().contiguous().t()


INT8 = EightBit((7, 5), _rows_to_int8, _multiply_int8)
FP8 = EightBit((8, 9), _rows_to_fp8, _multiply_fp8)
