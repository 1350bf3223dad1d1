"""CAME (Luo et al. 2023, arXiv:2307.02047, algorithm 2) as Sana was trained with it, and its 8-bit form.

Linear layers and 1x1 convolutions are factored as matrices (out, in). Everything else, such as 3x3 and depthwise
convolutions and vectors, keeps its whole second moment and goes without the confidence term. The package came-pytorch
differs there: it factors every tensor over its last two dimensions. There is no bias correction.

State names are those of Adafactor's descendants: ``exp_avg`` is the momentum, ``exp_avg_sq_*`` the second moment,
``exp_avg_res_*`` the instability of the momentum.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from library.optimizers.blockwise import Blockwise, blockwise

SMALLEST_8BIT = 16384
_State = dict[str, Any]


class CAME(Optimizer):
    """Factored second moments and a confidence in each update; the momentum in fp32.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of the momentum, of the second moment, and of the instability.
        eps: Added to the squared gradient, and to the squared residual.
        clip_threshold: Largest root mean square of a tensor's update.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, _checked_defaults(lr, betas, eps, clip_threshold, weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the parameters that have gradients."""
        return _step(self, closure, _read_whole, _write_whole)


class CAME8bit(Optimizer):
    """CAME with the momentum of matrices of 16384 numbers and more in 8 bits; all else in fp32.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of the momentum, of the second moment, and of the instability.
        eps: Added to the squared gradient, and to the squared residual.
        clip_threshold: Largest root mean square of a tensor's update.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, _checked_defaults(lr, betas, eps, clip_threshold, weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the parameters that have gradients."""
        return _step(self, closure, _read_8bit, _write_8bit)


def _checked_defaults(lr: Any, betas: Any, eps: Any, clip_threshold: Any, weight_decay: Any) -> dict[str, Any]:
    if not (isinstance(betas, tuple | list) and len(betas) == 3 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"betas takes three numbers from 0 to below 1 (0.9,0.999,0.9999), got {betas!r}")
    if not (isinstance(eps, tuple | list) and len(eps) == 2 and all(number >= 0 for number in eps)):
        raise ValueError(f"eps takes two numbers (1e-30,1e-16), got {eps!r}")
    if not clip_threshold > 0:
        raise ValueError(f"clip_threshold must be above 0, got {clip_threshold!r}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be below 0, got {weight_decay!r}")
    return {
        "lr": lr,
        "betas": tuple(betas),
        "eps": tuple(eps),
        "clip_threshold": clip_threshold,
        "weight_decay": weight_decay,
    }


def _step(
    optimizer: Optimizer,
    closure: Callable[[], Any] | None,
    read_momentum: Callable[[_State, Tensor], Tensor],
    write_momentum: Callable[[_State, Tensor], None],
) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    for group in optimizer.param_groups:
        beta_momentum, _, beta_confidence = group["betas"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            gradient = as_matrix(parameter.grad.float())
            update = _normalised(gradient, state, group)
            momentum = read_momentum(state, gradient)
            momentum.mul_(beta_momentum).add_(update, alpha=1 - beta_momentum)
            write_momentum(state, momentum)
            if gradient.ndim == 2:
                instability = (update - momentum).square_().add_(group["eps"][1])
                momentum = momentum * _factored_rsqrt(state, "exp_avg_res", instability, beta_confidence)
            if group["weight_decay"]:
                parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
            parameter.add_(momentum.view_as(parameter), alpha=-group["lr"])
    return loss


def as_matrix(weight: Tensor) -> Tensor:
    """The weight of a Linear or a 1x1 convolution as (out, in); any other tensor as it is."""
    is_pointwise = weight.ndim > 2 and all(side == 1 for side in weight.shape[2:])
    return weight.flatten(1) if is_pointwise else weight


def _normalised(gradient: Tensor, state: _State, group: dict[str, Any]) -> Tensor:
    """The gradient over the root of its second moment, its root mean square at most ``clip_threshold``."""
    beta = group["betas"][1]
    squared = gradient.square().add_(group["eps"][0])
    if gradient.ndim == 2:
        update = _factored_rsqrt(state, "exp_avg_sq", squared, beta).mul_(gradient)
    else:
        average = _running(state, "exp_avg_sq", gradient.shape, gradient)
        update = average.mul_(beta).add_(squared, alpha=1 - beta).rsqrt().mul_(gradient)
    root_mean_square = update.square().mean().sqrt_()
    return update.div_((root_mean_square / group["clip_threshold"]).clamp_(min=1))


def _factored_rsqrt(state: _State, name: str, squared: Tensor, beta: float) -> Tensor:
    """One over the root of a running average (out, in), which is kept as its row and column means."""
    rows = _running(state, f"{name}_row", squared.shape[:1], squared)
    columns = _running(state, f"{name}_col", squared.shape[1:], squared)
    rows.mul_(beta).add_(squared.mean(dim=1), alpha=1 - beta)
    columns.mul_(beta).add_(squared.mean(dim=0), alpha=1 - beta)
    return torch.outer((rows / rows.mean()).rsqrt_(), columns.rsqrt())


def _running(state: _State, name: str, shape: torch.Size, like: Tensor) -> Tensor:
    """A running average of the state; zeros before the first step."""
    if name not in state:
        state[name] = like.new_zeros(shape)
    return state[name]


def _read_whole(state: _State, like: Tensor) -> Tensor:
    return _running(state, "exp_avg", like.shape, like)


def _write_whole(state: _State, momentum: Tensor) -> None:
    state["exp_avg"] = momentum


def _read_8bit(state: _State, like: Tensor) -> Tensor:
    if not _kept_in_8bit(like):
        return _read_whole(state, like)
    if "exp_avg" not in state:
        return torch.zeros_like(like)
    return Blockwise(state["exp_avg"], state["exp_avg_low"], state["exp_avg_scale"]).numbers(like.shape)


def _write_8bit(state: _State, momentum: Tensor) -> None:
    if not _kept_in_8bit(momentum):
        return _write_whole(state, momentum)
    stored = blockwise(momentum)
    state["exp_avg"], state["exp_avg_low"], state["exp_avg_scale"] = stored.codes, stored.low, stored.scale


def _kept_in_8bit(momentum: Tensor) -> bool:
    return momentum.ndim == 2 and momentum.numel() >= SMALLEST_8BIT
