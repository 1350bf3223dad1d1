"""What a CUDA device does otherwise than the host with the same call, as far as memory shows it.

Under autocast it computes norms and sums in fp32, and it has one kernel for root-mean-square norms.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_OVERLOADS = {
    **{name: name for name in ("layer_norm", "rms_norm", "group_norm", "exp", "rsqrt", "sum", "prod", "cumsum")},
    **{"softmax": "softmax.int", "log_softmax": "log_softmax.int", "pow": "pow.Tensor_Scalar"},
}
"""Name of a function -> its operation: those that models here call and that the two may treat differently."""


class AsOnCuda(TorchFunctionMode):
    """Inside, functions of tensors on the host allocate what they would on a CUDA device."""

    def __init__(self) -> None:
        super().__init__()
        self._widened = {name for name, operation in _OVERLOADS.items() if _wide_on_cuda_alone(operation)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """See ``TorchFunctionMode``."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in self._widened and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, kwargs))
        if name == "rms_norm" and hasattr(torch.ops.aten, "_fused_rms_norm"):
            return _RmsNorm.apply(*_rms_norm_inputs(*args, **kwargs))
        return func(*args, **kwargs)


class _RmsNorm(torch.autograd.Function):
    """Takes the memory of the kernel for root-mean-square norms, and does not compute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, width: int) -> Tensor:
        """From x (..., width): the same shape."""
        ctx.save_for_backward(x, weight, x.new_empty(x.numel() // width, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and the weight."""
        x, weight, _ = ctx.saved_tensors
        wanted = (x, weight, None)
        return tuple(torch.empty_like(of) if need else None for of, need in zip(wanted, ctx.needs_input_grad))


def _rms_norm_inputs(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor | None, int]:
    return x, weight, math.prod(normalized_shape)


def _wide_on_cuda_alone(operation: str) -> bool:
    on_cuda, on_host = (
        torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operation}", f"Autocast{kind}")
        for kind in ("CUDA", "CPU")
    )
    return bool(on_cuda and not on_host)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
