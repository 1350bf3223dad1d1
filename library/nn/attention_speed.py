"""Which of torch's attention kernels is fastest for a shape: a stopwatch."""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from library.nn.attention import TORCH_KERNELS, AttentionShape, sdpa

_WARM_UP, _TIMES = 3, 10


def measure_kernels(
    shape: AttentionShape, *, batch_size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """The seconds of a forward and a backward pass by each kernel that can do them, by the names of ``--attn_mode``.

    Args:
        shape: What to compute.
        batch_size: Of the step.
        device: Where.
        dtype: Of queries, keys and values.
    """
    taken = {}
    for name, kernel in TORCH_KERNELS.items():
        # a kernel that can't says why by warnings, and then raises
        with sdpa_kernel([kernel]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                taken[name] = _seconds(partial(_both_passes, *_tensors(shape, batch_size, device, dtype)), device)
            except RuntimeError:
                continue
    return taken


def fastest(taken: Mapping[str, float]) -> str | None:
    """The kernel with the shortest time; None if there is none."""
    return min(taken, key=taken.__getitem__, default=None)


def _tensors(
    shape: AttentionShape, batch_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(batch_size, shape.heads, tokens, shape.head_dim, generator=generator, device=device)
        .to(dtype)
        .requires_grad_()
        for tokens in (shape.queries, shape.keys, shape.keys)
    )
    if not shape.masked:
        return q, k, v, None
    mask = torch.ones(batch_size, 1, 1, shape.keys, dtype=torch.bool, device=device)
    mask[..., shape.keys // 2 :] = False
    return q, k, v, mask


def _both_passes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    answer = sdpa(q, k, v, mask)
    torch.autograd.grad(answer, (q, k, v), answer)


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    taken = []
    for _ in range(_WARM_UP + _TIMES):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[_WARM_UP:])
