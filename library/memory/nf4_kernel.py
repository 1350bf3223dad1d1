"""NF4 matrices from their codes by bitsandbytes' kernel, in one pass over memory instead of several.

Codes and scales lie here as bitsandbytes lays them: two codes to a byte, the first in the upper half, row after row,
and a scale for each 64 weights. So its kernel reads our buffers as they are.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Dequantize = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""Codes (O, I / 2), scales (O, I / 64) and a type -> the matrix (O, I)."""

_GROUP = 64


def by_bitsandbytes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix (O, I) by bitsandbytes, which must have been imported.

    Args:
        codes: (O, I / 2), uint8.
        scales: (O, I / 64), fp32.
        dtype: Of the matrix.
    """
    shape = (len(codes), 2 * codes.shape[1])
    operation = torch.ops.bitsandbytes.dequantize_4bit
    return operation(codes.view(-1, 1), scales.flatten(), _GROUP, "nf4", shape, dtype)


@functools.cache
def fast_dequantize(device: torch.device, dtype: torch.dtype, ours: Dequantize) -> Dequantize | None:
    """The way of bitsandbytes for a device and a type, where it is installed and gives the very numbers of ``ours``.

    Its kernels are compiled for some versions of CUDA; where they can't run, or would change a bit, None.
    """
    try:
        import bitsandbytes  # noqa: F401  # registers its operations
    except ImportError:
        log.info("nf4: bitsandbytes isn't installed, so matrices are made by torch's own kernels, which takes longer")
        return None
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (64, _GROUP), dtype=torch.uint8, generator=generator).to(device)
    scales = torch.rand(64, 2, generator=generator).to(device)
    reason: str | None
    try:
        same = torch.equal(by_bitsandbytes(codes, scales, dtype), ours(codes, scales, dtype))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    else:
        reason = None if same else "its numbers differ"
    if reason is None:
        return by_bitsandbytes
    log.info("nf4: bitsandbytes' kernel isn't used on %s (%s); torch's own take longer", device, reason)
    return None
