"""What every kind of update shares: how it gets into a layer's ``forward``, which layers can take one, and dropouts."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

Base = nn.Linear | nn.Conv2d


class LayerSize(NamedTuple):
    """The size of a layer's weight.

    Attributes:
        outputs: Features or channels.
        inputs: Features or channels.
        kernel: Height and width of a convolution's kernel; empty for a linear layer.
    """

    outputs: int
    inputs: int
    kernel: tuple[int, ...]

    @property
    def columns(self) -> int:
        """The weight's numbers per output."""
        return self.inputs * torch.Size(self.kernel).numel()


def layer_size(base: Base) -> LayerSize:
    """This measures a layer.

    Raises:
        ValueError: It is a convolution that can't have an update.
    """
    if isinstance(base, nn.Linear):
        return LayerSize(base.out_features, base.in_features, ())
    if base.groups != 1 or base.padding_mode != "zeros":
        raise ValueError(f"convolutions with groups or {base.padding_mode} padding can't get an adapter: {base}")
    return LayerSize(base.out_channels, base.in_channels, tuple(base.kernel_size))


def weight_shape(base: Base) -> tuple[int, ...]:
    """The shape of a layer's weight, however it is stored."""
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    return base.out_channels, base.in_channels // base.groups, *base.kernel_size


def tensor_of(base: Base) -> Tensor:
    """A tensor that lies where the layer's numbers lie; a layer that stores them in few bits has no ``weight``."""
    return next(itertools.chain(base.parameters(), base.buffers()))


class WrappedForward:
    """A layer's ``forward``, replaced by another function until ``remove``.

    The layer itself stays where it is: its state-dict keys, its storage and its hooks don't change.

    Args:
        base: The layer.
        forward: What is called instead.
    """

    def __init__(self, base: Base, forward: Callable[[Tensor], Tensor]):
        self.base = base
        self.original = base.forward
        self._own = base.__dict__.get("forward")
        self._replacement = forward
        base.forward = forward  # type: ignore[method-assign, assignment]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Height and width of a convolution's kernel; empty for a linear layer."""
        return layer_size(self.base).kernel

    def remove(self) -> None:
        """This gives the layer its own ``forward`` back.

        Raises:
            ValueError: Something else has wrapped the layer since, and must go first.
        """
        if self.base.__dict__.get("forward") is not self._replacement:
            raise ValueError("the layer was wrapped again after this adapter; remove what came later first")
        if self._own is None:
            del self.base.__dict__["forward"]
        else:
            self.base.__dict__["forward"] = self._own


@dataclass(frozen=True)
class Dropouts:
    """What is dropped while training.

    Attributes:
        activations: Probability of each activation of the rank. LoRA only.
        ranks: Probability per sample of each component of the rank, or, where the update has none that can be dropped
            alone (LoKr, LoHa), of each output of the update.
        module: Probability of the whole update.
    """

    activations: float = 0.0
    ranks: float = 0.0
    module: float = 0.0

    def skip_module(self) -> bool:
        """Whether the whole update is left out this time. Drawn on the CPU, so that nobody waits for the device."""
        return self.module > 0 and torch.rand(()).item() < self.module

    def drop_channels(self, x: Tensor, channel: int) -> Tensor:
        """This zeroes channels by ``ranks``, each sample's own, and scales up the others.

        Args:
            x: (B, ...).
            channel: Index of the dimension that is dropped.
        """
        if not self.ranks:
            return x
        sizes = [1] * x.ndim
        sizes[0], sizes[channel] = x.shape[0], x.shape[channel]
        kept = torch.rand(sizes, device=x.device) >= self.ranks
        return x * (kept / (1 - self.ranks)).to(x.dtype)


NO_DROPOUT = Dropouts()


def empty_parameter(*sizes: int, like: Tensor) -> nn.Parameter:
    """This makes an fp32 parameter without values on the device of ``like``."""
    return nn.Parameter(torch.empty(sizes, device=like.device, dtype=torch.float32))
