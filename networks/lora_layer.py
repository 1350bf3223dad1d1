"""One layer's low-rank update (LoRA, Hu et al. 2021, arXiv:2106.09685).

Shapes: B batch, r rank. The update of a weight W (out, in) is ``multiplier * alpha / r * up @ down``.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.randomness import torch_generator


class LoraWeights(NamedTuple):
    """The numbers of one layer's update.

    Attributes:
        down: (r, in), or (r, in, kernel height, kernel width) for a convolution.
        up: (out, r), or (out, r, 1, 1).
        alpha: See the module's docstring.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The number of components, r."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """The update of the weight at multiplier 1, fp32, in the shape of ``down`` with ``out`` rows."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * (self.alpha / self.rank)).unflatten(1, self.down.shape[1:])


@dataclass(frozen=True)
class Dropouts:
    """What is dropped while training.

    Attributes:
        activations: Probability of each activation of the rank.
        ranks: Probability per sample of each component of the rank.
        module: Probability of the whole update.
    """

    activations: float = 0.0
    ranks: float = 0.0
    module: float = 0.0


NO_DROPOUT = Dropouts()


class LoraLayer(nn.Module):
    """The update of one linear layer or convolution, added to the layer's output by wrapping its ``forward``.

    The layer itself stays where it is: its state-dict keys, its storage and its hooks don't change.

    Args:
        base: The layer.
        component: The part of the model that the layer belongs to: ``denoiser``, ``clip_l``.
        rank: r.
        alpha: 0 means r.
        dropouts: What is dropped while training.
    """

    lora_down: nn.Linear | nn.Conv2d
    lora_up: nn.Linear | nn.Conv2d

    def __init__(
        self, base: nn.Linear | nn.Conv2d, *, component: str, rank: int, alpha: float, dropouts: Dropouts = NO_DROPOUT
    ):
        super().__init__()
        self.component = component
        self.rank = rank
        self.alpha = float(alpha) or float(rank)
        self.dropouts = dropouts
        self.multiplier = 1.0
        self.enabled = True
        self.lora_down, self.lora_up = _empty_pair(base, rank)
        # Kept out of torch's registration: the base is not part of the adapter.
        self.__dict__["base"] = base
        self._own_forward_of_base = base.__dict__.get("forward")
        self._base_forward = base.forward
        base.forward = self.forward  # type: ignore[method-assign, assignment]

    @property
    def scale(self) -> float:
        """What ``up @ down`` is multiplied by."""
        return self.multiplier * self.alpha / self.rank

    def initialise(self, run_seed: int, name: str) -> None:
        """This makes the update zero: ``up`` zeros, ``down`` uniform noise that depends on seed and name alone.

        The noise is that of He et al. (2015, arXiv:1502.01852) with a = sqrt(5): +-1 / sqrt(inputs).
        """
        with torch.no_grad():
            noise = torch.empty(self.lora_down.weight.shape)
            nn.init.kaiming_uniform_(noise, a=math.sqrt(5), generator=torch_generator(run_seed, "adapter", name))
            self.lora_down.weight.copy_(noise)
            self.lora_up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output with the update."""
        output = self._base_forward(x)
        if not self.enabled or (self.training and self._skips_module()):
            return output
        hidden = _project(x, self.lora_down, self.lora_down.weight)
        if self.training:
            hidden = self._dropped(hidden)
        # The scale acts on the small fp32 weight, before it is rounded to the activations' type.
        return output + _project(hidden, self.lora_up, self.lora_up.weight * self.scale).to(output.dtype)

    def weights(self) -> LoraWeights:
        """The numbers of the update."""
        return LoraWeights(self.lora_down.weight.detach(), self.lora_up.weight.detach(), self.alpha)

    def norm(self) -> Tensor:
        """The update's Frobenius norm at multiplier 1, (), on the weights' device.

        ``|up down|^2`` is the sum of the products of the two Gram matrices, which are only (r, r).
        """
        up, down = self.lora_up.weight.float().flatten(1), self.lora_down.weight.float().flatten(1)
        squared = ((up.T @ up) * (down @ down.T)).sum()
        return squared.clamp(min=0).sqrt() * (self.alpha / self.rank)

    def remove(self) -> None:
        """This gives the base layer its own ``forward`` back.

        Raises:
            ValueError: Something else has wrapped the layer since, and must go first.
        """
        base = self.__dict__["base"]
        if getattr(base.__dict__.get("forward"), "__self__", None) is not self:
            raise ValueError("the layer was wrapped again after this adapter; remove what came later first")
        if self._own_forward_of_base is None:
            del base.__dict__["forward"]
        else:
            base.__dict__["forward"] = self._own_forward_of_base

    def _skips_module(self) -> bool:
        # Drawn on the CPU, so that nobody waits for the device.
        return self.dropouts.module > 0 and torch.rand(()).item() < self.dropouts.module

    def _dropped(self, hidden: Tensor) -> Tensor:
        if self.dropouts.activations:
            hidden = F.dropout(hidden, self.dropouts.activations)
        if self.dropouts.ranks:
            sizes = [1] * hidden.ndim
            sizes[0] = hidden.shape[0]
            sizes[1 if isinstance(self.lora_down, nn.Conv2d) else -1] = self.rank
            kept = torch.rand(sizes, device=hidden.device) >= self.dropouts.ranks
            hidden = hidden * (kept / (1 - self.dropouts.ranks)).to(hidden.dtype)
        return hidden


def _empty_pair(base: nn.Linear | nn.Conv2d, rank: int) -> tuple[Any, Any]:
    """``down`` and ``up`` in fp32 on the base's device, without values, and without touching torch's generators."""
    device, skip_init = base.weight.device, torch.nn.utils.skip_init
    if isinstance(base, nn.Linear):
        return (
            skip_init(nn.Linear, base.in_features, rank, bias=False, device=device, dtype=torch.float32),
            skip_init(nn.Linear, rank, base.out_features, bias=False, device=device, dtype=torch.float32),
        )
    if base.groups != 1 or base.padding_mode != "zeros":
        raise ValueError(f"convolutions with groups or {base.padding_mode} padding can't get an adapter: {base}")
    geometry = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
    common = {"bias": False, "device": device, "dtype": torch.float32}
    return (
        skip_init(nn.Conv2d, base.in_channels, rank, base.kernel_size, **geometry, **common),
        skip_init(nn.Conv2d, rank, base.out_channels, 1, **common),
    )


def _project(x: Tensor, layer: nn.Linear | nn.Conv2d, weight: Tensor) -> Tensor:
    weight = weight.to(x.dtype)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)
    return F.linear(x, weight)
