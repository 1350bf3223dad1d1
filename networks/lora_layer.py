"""One layer's low-rank update (LoRA, Hu et al. 2021, arXiv:2106.09685).

Shapes: B batch, r rank. The update of a weight W (out, in) is ``multiplier * alpha / r * up @ down``.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.randomness import torch_generator
from networks.wrapping import NO_DROPOUT, Base, Dropouts, WrappedForward, layer_size, tensor_of


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
    def method(self) -> str:
        """The kind of update, for people."""
        return "LoRA"

    @property
    def rank(self) -> int:
        """The number of components, r."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that is changed."""
        return (self.up.shape[0], *self.down.shape[1:])

    def tensors(self) -> dict[str, Tensor]:
        """The numbers by the end of their key in a file, which is their parameter's name in the layer too."""
        return {"lora_down.weight": self.down, "lora_up.weight": self.up}

    @property
    def lora_rank(self) -> int:
        """The rank of the same update as a LoRA."""
        return self.rank

    def as_lora(self, kernel: tuple[int, ...]) -> "LoraWeights":
        """The same update as a LoRA."""
        return self

    def delta(self) -> Tensor:
        """The update of the weight at multiplier 1, fp32, in the shape of ``down`` with ``out`` rows."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * (self.alpha / self.rank)).unflatten(1, self.down.shape[1:])


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

    def __init__(self, base: Base, *, component: str, rank: int, alpha: float, dropouts: Dropouts = NO_DROPOUT):
        super().__init__()
        self.component = component
        self.rank = rank
        self.alpha = float(alpha) or float(rank)
        self.dropouts = dropouts
        self.multiplier = 1.0
        self.enabled = True
        self.lora_down, self.lora_up = _empty_pair(base, rank)
        self.wrapped = WrappedForward(base, self.forward)

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
        output = self.wrapped.original(x)
        if not self.enabled or (self.training and self.dropouts.skip_module()):
            return output
        hidden = _project(x, self.lora_down, self.lora_down.weight)
        if self.training:
            hidden = self._dropped(hidden)
        # The scale acts on the small fp32 weight, before it is rounded to the activations' type.
        return output + _project(hidden, self.lora_up, self.lora_up.weight * self.scale).to(output.dtype)

    @property
    def parts_by_rate(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters with the plain learning rate, and those to which LoRA+ gives a larger one."""
        return list(self.lora_down.parameters()), list(self.lora_up.parameters())

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

    def _dropped(self, hidden: Tensor) -> Tensor:
        if self.dropouts.activations:
            hidden = F.dropout(hidden, self.dropouts.activations)
        return self.dropouts.drop_channels(hidden, 1 if isinstance(self.lora_down, nn.Conv2d) else -1)


def _empty_pair(base: Base, rank: int) -> tuple[Any, Any]:
    """``down`` and ``up`` in fp32 on the base's device, without values, and without touching torch's generators."""
    device, skip_init = tensor_of(base).device, torch.nn.utils.skip_init
    if isinstance(base, nn.Linear):
        return (
            skip_init(nn.Linear, base.in_features, rank, bias=False, device=device, dtype=torch.float32),
            skip_init(nn.Linear, rank, base.out_features, bias=False, device=device, dtype=torch.float32),
        )
    layer_size(base)  # refuses what can't have an update
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
