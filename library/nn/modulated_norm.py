"""Adaptive layer norm and gated residuals, with as little kept for the backward pass and as few passes as it takes.

Under torch.compile these are plain expressions, which it fuses itself.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """This is layer normalisation without weights, then ``x * (1 + scale) + shift`` (Peebles and Xie 2022,
    arXiv:2212.09748): the modulation takes the weights' place.

    For the backward pass it keeps ``x`` as it came, two numbers per token and the scale; what is between is computed
    again. On GPUs a Triton kernel does all in one pass each way. Elsewhere the numbers are bit for bit those of
    ``plain_modulated_norm``.

    Args:
        x: Tokens (B, N, D).
        shift: One vector per sample (B, 1, D).
        scale: The same.
        eps: Added to the variance.

    Returns:
        (B, N, D), in fp32 where autocast computes norms so.
    """
    return modulated_norms(x, [(shift, scale)], eps)[0]


def modulated_norms(x: Tensor, vectors: Sequence[tuple[Tensor, Tensor]], eps: float) -> tuple[Tensor, ...]:
    """This is ``modulated_norm`` by several pairs of shift and scale, with one norm for all."""
    if torch.compiler.is_compiling():
        normed = F.layer_norm(x, x.shape[-1:], eps=eps)
        return tuple(normed * (1 + scale) + shift for shift, scale in vectors)
    return _ModulatedNorms.apply(x, eps, *(vector for pair in vectors for vector in pair))


def plain_modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """What ``modulated_norm`` computes, in torch's own operations."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """This adds an update (B, N, D) to tokens, weighted by a vector per sample (B, 1, D): ``x + gate * update``."""
    if x.is_cuda and x.dtype == gate.dtype == update.dtype and not torch.compiler.is_compiling():
        return torch.addcmul(x, gate, update)  # one pass, rounded once
    return x + gate * update


class _ModulatedNorms(torch.autograd.Function):
    """``modulated_norms`` of x (B, N, D), and of shift, scale, shift, scale, ..."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, *vectors: Tensor) -> tuple[Tensor, ...]:
        """See ``modulated_norms``."""
        shifts, scales = vectors[::2], vectors[1::2]
        ctx.eps, ctx.kernel = eps, _has_kernel(x, *vectors)
        ctx.shift_types = [shift.dtype for shift in shifts]
        if ctx.kernel:
            results = [
                _kernel().forward(x, shift, scale, eps, _result_dtype(x, shift, scale))
                for shift, scale in zip(shifts, scales)
            ]
            answers, (_, mean, rstd) = [answer for answer, _, _ in results], results[0]
        else:
            normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
            ctx.dtype = normed.dtype
            *first, last = zip(shifts, scales)
            answers = [*(_modulate(normed, *pair, last=False) for pair in first), _modulate(normed, *last, last=True)]
        ctx.save_for_backward(x, mean, rstd, *scales)
        return tuple(answers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, and of each shift and scale."""
        x, mean, rstd, *scales = ctx.saved_tensors
        needs_x, _, *needed = ctx.needs_input_grad
        if ctx.kernel:
            of_x, of_vectors = None, []
            for number, (gradient, scale) in enumerate(zip(gradients, scales)):
                needs = needed[2 * number : 2 * number + 2]
                own, of_shift, of_scale = _kernel().backward(gradient, x, scale, mean, rstd, vectors=any(needs))
                of_x = own if of_x is None else of_x + own
                of_vectors += [
                    of_shift.to(ctx.shift_types[number]) if needs[0] else None,
                    of_scale if needs[1] else None,
                ]
            return of_x if needs_x else None, None, *of_vectors
        computed, shape = x.to(ctx.dtype), x.shape[-1:]
        normed: Any = torch.native_layer_norm(computed, shape, None, None, ctx.eps)[0] if any(needed[1::2]) else None
        of_normed, of_vectors = None, []
        for gradient, scale, dtype, needs_shift, needs_scale in zip(
            gradients, scales, ctx.shift_types, needed[::2], needed[1::2]
        ):
            of_vectors.append(gradient.sum_to_size(scale.shape).to(dtype) if needs_shift else None)
            of_vectors.append((gradient * normed).sum_to_size(scale.shape).to(scale.dtype) if needs_scale else None)
            own = (gradient * (1 + scale)).to(ctx.dtype)
            of_normed = own if of_normed is None else of_normed + own
        if not needs_x:
            return None, None, *of_vectors
        of_x = torch.ops.aten.native_layer_norm_backward(
            of_normed, computed, shape, mean, rstd, None, None, [True, False, False]
        )[0]
        return of_x.to(x.dtype), None, *of_vectors


def _modulate(normed: Tensor, shift: Tensor, scale: Tensor, *, last: bool) -> Tensor:
    gain = 1 + scale
    same_type = _result_type(normed, gain, shift) == normed.dtype
    product = normed.mul_(gain) if last and same_type else normed * gain  # nobody needs the norm after the last
    return product.add_(shift) if same_type else product + shift


def _result_type(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _result_dtype(x: Tensor, shift: Tensor, scale: Tensor) -> torch.dtype:
    """The type of ``plain_modulated_norm``: under a GPU's autocast norms are in fp32."""
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else _result_type(x, shift, scale)


def _has_kernel(x: Tensor, *vectors: Tensor) -> bool:
    shape = (x.shape[0], 1, x.shape[-1])
    return (
        x.is_cuda
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.ndim == 3
        and all(vector.shape == shape for vector in vectors)
        and kernel_works(x.device)
    )


def _kernel() -> Any:
    """The module that imports triton, where it is needed."""
    return importlib.import_module("library.nn.modulated_norm_kernel")


@functools.cache
def kernel_works(device: torch.device) -> bool:
    """Whether the kernel runs on a device and answers what the plain expression does; if not, the log says so once."""
    if importlib.util.find_spec("triton") is None:
        log.info("triton isn't installed: norms run in torch's own kernels")
        return False
    generator = torch.Generator(device).manual_seed(0)
    x, gradient = (torch.randn(2, 3, 80, generator=generator, device=device) for _ in range(2))
    shift, scale = (torch.randn(2, 1, 80, generator=generator, device=device) for _ in range(2))
    try:
        kernel = _kernel()
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            answer, mean, rstd = kernel.forward(x, shift, scale, 1e-6, torch.float32)
            ours = (answer, *kernel.backward(gradient, x, scale, mean, rstd, vectors=True))
            inputs = [tensor.requires_grad_() for tensor in (x, shift, scale)]
            expected = plain_modulated_norm(x, shift, scale, 1e-6)
            theirs = (expected, *torch.autograd.grad(expected, inputs, gradient))
        wrong = [not torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in zip(ours, theirs)]
        reason = "its numbers are wrong" if any(wrong) else None
    except Exception as error:  # whatever a compiler of kernels may raise, training can do without
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        log.warning("the Triton kernel of norms doesn't work on %s (%s): torch's own kernels run", device, reason)
    return reason is None
