"""One layer's update as an elementwise product of two low-rank matrices (LoHa).

Hyeon-Woo et al. 2021 (arXiv:2108.06098, FedPara), for diffusion models by Yeh et al. 2023 (arXiv:2309.14859): the
update is ``alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)`` with (out, r) and (r, in * kernel). Its rank is up to r * r.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.randomness import torch_generator
from networks.lora_layer import LoraWeights
from networks.wrapping import NO_DROPOUT, Base, Dropouts, WrappedForward, empty_parameter, layer_size, tensor_of


class LohaWeights(NamedTuple):
    """The numbers of one layer's update.

    Attributes:
        w1_a: (out, r).
        w1_b: (r, in * kernel).
        w2_a: (out, r).
        w2_b: (r, in * kernel).
        alpha: See the module's docstring.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float

    @property
    def method(self) -> str:
        """The kind of update, for people."""
        return "LoHa"

    @property
    def rank(self) -> int:
        """The inner size of the factors, r."""
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (out, in * kernel) of the weight that is changed."""
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The numbers by the end of their key in a file, which is their parameter's name in the layer too."""
        return {f"hada_{name}": getattr(self, name) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}

    def delta(self) -> Tensor:
        """The update of the weight at multiplier 1, fp32, (out, in * kernel)."""
        w1_a, w1_b, w2_a, w2_b = (tensor.float() for tensor in self.tensors().values())
        return (w1_a @ w1_b) * (w2_a @ w2_b) * (self.alpha / self.rank)

    @property
    def lora_rank(self) -> int:
        """The rank of the same update as a LoRA."""
        return self.rank**2

    def as_lora(self, kernel: tuple[int, ...]) -> LoraWeights:
        """The same update as a LoRA of rank r * r: products of every column with every column, and of rows with rows.

        Args:
            kernel: Of a convolution; empty for a linear layer.
        """
        w1_a, w1_b, w2_a, w2_b = (tensor.float() for tensor in self.tensors().values())
        up = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
        down = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
        if kernel:
            up, down = up[..., None, None], down.unflatten(1, (-1, *kernel))
        return LoraWeights(down, up, self.alpha * self.rank)


class LohaLayer(nn.Module):
    """The update of one linear layer or convolution, added to the layer's output by wrapping its ``forward``.

    The update is made whole in every forward pass, in the activations' type, and kept for the backward pass.

    Args:
        base: The layer.
        component: The part of the model that the layer belongs to: ``denoiser``, ``clip_l``.
        rank: r.
        alpha: 0 means r.
        dropouts: What is dropped while training.
    """

    def __init__(self, base: Base, *, component: str, rank: int, alpha: float, dropouts: Dropouts = NO_DROPOUT):
        super().__init__()
        self.component = component
        self.rank = rank
        self.alpha = float(alpha) or float(rank)
        self.dropouts = dropouts
        self.multiplier = 1.0
        self.enabled = True
        self.size = layer_size(base)
        for part in ("w1", "w2"):
            rows = empty_parameter(self.size.outputs, rank, like=tensor_of(base))
            self.register_parameter(f"hada_{part}_a", rows)
            self.register_parameter(f"hada_{part}_b", empty_parameter(rank, self.size.columns, like=tensor_of(base)))
        self.wrapped = WrappedForward(base, self.forward)

    @property
    def scale(self) -> float:
        """What the elementwise product is multiplied by."""
        return self.multiplier * self.alpha / self.rank

    @property
    def parts_by_rate(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters with the plain learning rate, and those with a larger one: none, LoRA+ is for LoRA."""
        return list(self.parameters()), []

    def initialise(self, run_seed: int, name: str) -> None:
        """This makes the update zero: ``w2_a`` zeros, the others normal noise that depends on seed and name alone.

        The standard deviations are LyCORIS's, so that its learning rates carry over.
        """
        generator = torch_generator(run_seed, "adapter", name)
        deviations = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
        with torch.no_grad():
            for part, parameter in self.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * deviations[part])

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output with the update."""
        output = self.wrapped.original(x)
        if not self.enabled or (self.training and self.dropouts.skip_module()):
            return output
        w1_a, w1_b, w2_a, w2_b = self.parameters()
        # The scale acts on a small fp32 factor, before the product is rounded to the activations' type.
        delta = _HadamardProduct.apply(w1_a * self.scale, w1_b, w2_a, w2_b, x.dtype)
        update = self._through(x, delta)
        if self.training:
            update = self.dropouts.drop_channels(update, 1 if self.size.kernel else -1)
        return output + update.to(output.dtype)

    def weights(self) -> LohaWeights:
        """The numbers of the update."""
        w1_a, w1_b, w2_a, w2_b = (parameter.detach() for parameter in self.parameters())
        return LohaWeights(w1_a, w1_b, w2_a, w2_b, self.alpha)

    def norm(self) -> Tensor:
        """The update's Frobenius norm at multiplier 1, (), on the weights' device."""
        return self.weights().delta().norm()

    def _through(self, x: Tensor, delta: Tensor) -> Tensor:
        base = self.wrapped.base
        if isinstance(base, nn.Linear):
            return F.linear(x, delta)
        weight = delta.unflatten(1, (self.size.inputs, *self.size.kernel))
        return F.conv2d(x, weight, None, base.stride, base.padding, base.dilation)


class _HadamardProduct(torch.autograd.Function):
    """``(a @ b) * (c @ d)``, keeping only the four factors for the backward pass, not the two products."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(a, b, c, d)
        with torch.autocast(a.device.type, enabled=False):
            return ((a @ b) * (c @ d)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        a, b, c, d = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            gradient = gradients[0].to(a.dtype)
            of_first, of_second = gradient * (c @ d), gradient * (a @ b)
            return of_first @ b.T, a.T @ of_first, of_second @ d.T, c.T @ of_second, None
