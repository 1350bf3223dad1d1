"""Holds the Triton kernel of norms to the plain expression. Run with TRITON_INTERPRET=1, which must be set first."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.nn import modulated_norm_kernel as kernel
from library.nn.modulated_norm import kernel_works, plain_modulated_norm

BATCH, WIDTH = 2, 48
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compare(dtype: torch.dtype, tokens: int) -> None:
    """Forward and backward, with vectors that are views into a longer one."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(BATCH, tokens, WIDTH, generator=generator).to(dtype) for _ in range(2))
    vectors = torch.randn(BATCH, 1, 6 * WIDTH, generator=generator).to(dtype)
    shift, scale = vectors.split(WIDTH, dim=-1)[2:4]
    answer, mean, rstd = kernel.forward(x, shift, scale, 1e-6, dtype)
    ours = (answer, *kernel.backward(gradient, x, scale, mean, rstd, vectors=True))
    inputs = [tensor.detach().float().requires_grad_() for tensor in (x, shift, scale)]
    expected = plain_modulated_norm(*inputs, 1e-6)
    theirs = (expected, *torch.autograd.grad(expected, inputs, gradient.float()))
    for one, other in zip(ours, theirs):
        error = (one.float() - other).norm() / other.norm()
        assert error < TOLERANCES[dtype], (dtype, tokens, float(error))
    assert kernel.backward(gradient, x, scale, mean, rstd, vectors=False)[1:] == (None, None)


if __name__ == "__main__":
    for dtype in TOLERANCES:
        for tokens in (1, 32, 70):  # a backward program sums over 32
            compare(dtype, tokens)
    assert kernel_works(torch.device("cpu"))
