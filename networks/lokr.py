"""One layer's update as a Kronecker product (LoKr; Yeh et al. 2023, arXiv:2309.14859, section 4).

Letters: a weight (out, in) with out = a * b and in = c * d gets the update ``kron(w1, w2)`` of w1 (a, c) and w2 (b, d):
row ``i * b + k``, column ``j * d + l`` is ``w1[i, j] * w2[k, l]``. Either factor can be whole or itself a product of
two matrices of rank r; then the update is multiplied by ``alpha / r``. In a convolution w2 has the kernel too.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.randomness import torch_generator
from networks.lora_layer import LoraWeights
from networks.wrapping import (
    NO_DROPOUT,
    Base,
    Dropouts,
    LayerSize,
    WrappedForward,
    empty_parameter,
    layer_size,
    tensor_of,
)

Factor = tuple[Tensor, ...]
"""A whole factor, or the two matrices whose product it is."""


class LokrWeights(NamedTuple):
    """The numbers of one layer's update.

    Attributes:
        w1: (a, c), or its factors (a, r) and (r, c).
        w2: (b, d) or (b, d, kernel height, kernel width), or its factors (b, r) and (r, d * kernel).
        alpha: See the module's docstring; without effect where both are whole.
    """

    w1: Factor
    w2: Factor
    alpha: float

    @property
    def method(self) -> str:
        """The kind of update, for people."""
        return "LoKr"

    @property
    def rank(self) -> int:
        """The inner size of the factors, r; 1 where both are whole."""
        inner = [factor[1].shape[0] for factor in (self.w2, self.w1) if len(factor) == 2]
        return inner[0] if inner else 1

    @property
    def strength(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank if len(self.w1) == 2 or len(self.w2) == 2 else 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (out, in * kernel) of the weight that is changed."""
        first, second = _product(self.w1), _product(self.w2).flatten(1)
        return first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The numbers by the end of their key in a file, which is their parameter's name in the layer too."""
        named: dict[str, Tensor] = {}
        for name, factor in (("lokr_w1", self.w1), ("lokr_w2", self.w2)):
            named |= dict(zip((name,) if len(factor) == 1 else (f"{name}_a", f"{name}_b"), factor))
        return named

    def delta(self) -> Tensor:
        """The update of the weight at multiplier 1, fp32, (out, in * kernel)."""
        first, second = _product(self.w1).float(), _product(self.w2).float().flatten(1)
        return torch.kron(first, second) * self.strength

    @property
    def lora_rank(self) -> int | None:
        """The rank of the same update as a LoRA; None where w2 is whole: it would be that of the layer."""
        if len(self.w2) == 1:
            return None
        return self.rank * (self.w1[1].shape[0] if len(self.w1) == 2 else min(self.w1[0].shape))

    def as_lora(self, kernel: tuple[int, ...]) -> LoraWeights:
        """The same update as a LoRA. Only where there is a ``lora_rank``.

        ``kron(w1, p @ q) = kron(w1, p) @ kron(1, q) = kron(1, p) @ kron(w1, q)``.

        Args:
            kernel: Of a convolution; empty for a linear layer.
        """
        p, q = (part.float() for part in self.w2)
        if len(self.w1) == 2:
            left, right = (part.float() for part in self.w1)
        else:
            (w1,) = (part.float() for part in self.w1)
            a, c = w1.shape
            left, right = (w1, torch.eye(c, device=w1.device)) if c <= a else (torch.eye(a, device=w1.device), w1)
        up, down = torch.kron(left, p), torch.kron(right, q)
        if kernel:
            up, down = up[..., None, None], down.unflatten(1, (-1, *kernel))
        return LoraWeights(down, up, self.strength * down.shape[0])


@dataclass(frozen=True)
class LokrPlan:
    """How a layer's weight is cut into factors.

    Attributes:
        w1: Rows and columns of w1 (a, c).
        w2: Rows and columns of w2 (b, d).
        w1_rank: Rank of w1; None: it is whole.
        w2_rank: Rank of w2; None: it is whole.
    """

    w1: tuple[int, int]
    w2: tuple[int, int]
    w1_rank: int | None
    w2_rank: int | None

    @property
    def rank(self) -> int:
        """The inner size of the factors; 1 where both are whole."""
        return self.w2_rank or self.w1_rank or 1

    @property
    def is_whole(self) -> bool:
        """Whether no factor is a product, so that alpha doesn't act."""
        return self.w1_rank is None and self.w2_rank is None


def factorise(size: int, factor: int) -> tuple[int, int]:
    """This cuts a size into two whole factors, the smaller first.

    Args:
        size: Of a side of the weight.
        factor: What one of them should be. Where that doesn't divide the size, the smaller one is the largest divisor
            below it; -1 makes both as equal as can be.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    smaller = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return smaller, size // smaller


def plan_factors(size: LayerSize, *, rank: int, factor: int, decompose_both: bool, full_matrix: bool) -> LokrPlan:
    """This decides a layer's factors as LyCORIS does: a factor is whole where the rank is half of its longer side.

    Args:
        size: The layer's.
        rank: Of the factors that aren't whole.
        factor: See ``factorise``.
        decompose_both: Whether w1 may be a product too.
        full_matrix: Whether both are whole in any case.
    """
    a, b = factorise(size.outputs, factor)
    c, d = factorise(size.inputs, factor)
    w1_rank = rank if decompose_both and not full_matrix and rank < max(a, c) / 2 else None
    w2_rank = rank if not full_matrix and rank < max(b, d) / 2 else None
    return LokrPlan((a, c), (b, d), w1_rank, w2_rank)


def plan_of(weights: LokrWeights, size: LayerSize) -> LokrPlan:
    """The factors of an update that has its numbers already."""
    a, b = weights.w1[0].shape[0], weights.w2[0].shape[0]
    c = weights.w1[-1].shape[1]
    ranks = [factor[1].shape[0] if len(factor) == 2 else None for factor in (weights.w1, weights.w2)]
    return LokrPlan((a, c), (b, size.inputs // c), *ranks)


class LokrLayer(nn.Module):
    """The update of one linear layer or convolution, added to the layer's output by wrapping its ``forward``.

    The product of the factors is never made: each input is a matrix (c, d), w2 acts on its columns and w1 on its rows.
    That costs 1/a + 1/d of the layer's own work or less.

    Args:
        base: The layer.
        component: The part of the model that the layer belongs to: ``denoiser``, ``clip_l``.
        plan: The factors' sizes.
        alpha: 0 means the rank.
        dropouts: What is dropped while training.
    """

    def __init__(self, base: Base, *, component: str, plan: LokrPlan, alpha: float, dropouts: Dropouts = NO_DROPOUT):
        super().__init__()
        self.component = component
        self.plan = plan
        self.rank = plan.rank
        self.alpha = 1.0 if plan.is_whole else float(alpha) or float(plan.rank)
        self.dropouts = dropouts
        self.multiplier = 1.0
        self.enabled = True
        self.size = layer_size(base)
        (a, c), (b, d) = plan.w1, plan.w2
        columns = d * torch.Size(self.size.kernel).numel()
        self._make("lokr_w1", plan.w1_rank, (a, c), (a, c), tensor_of(base))
        self._make("lokr_w2", plan.w2_rank, (b, columns), (b, d, *self.size.kernel), tensor_of(base))
        self.wrapped = WrappedForward(base, self.forward)

    @property
    def scale(self) -> float:
        """What the Kronecker product is multiplied by."""
        return self.multiplier * self.alpha / self.rank

    @property
    def parts_by_rate(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters with the plain learning rate, and those with a larger one: none, LoRA+ is for LoRA."""
        return list(self.parameters()), []

    def initialise(self, run_seed: int, name: str) -> None:
        """This makes the update zero: the last factor is zeros, the others are noise that depends on seed and name.

        The noise is that of He et al. (2015, arXiv:1502.01852) with a = sqrt(5): +-1 / sqrt(columns).
        """
        generator = torch_generator(run_seed, "adapter", name)
        parts = list(self.parameters())
        with torch.no_grad():
            for parameter in parts[:-1]:
                noise = torch.empty(parameter.shape)
                parameter.copy_(nn.init.kaiming_uniform_(noise, a=math.sqrt(5), generator=generator))
            parts[-1].zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output with the update."""
        output = self.wrapped.original(x)
        if not self.enabled or (self.training and self.dropouts.skip_module()):
            return output
        weights = self._weights()
        # The scale acts on the small fp32 factor, before it is rounded to the activations' type.
        w1, w2 = (_product(weights.w1) * self.scale).to(x.dtype), _product(weights.w2).to(x.dtype)
        update = self._through_convolution(x, w1, w2) if self.size.kernel else _through_linear(x, w1, w2)
        if self.training:
            update = self.dropouts.drop_channels(update, 1 if self.size.kernel else -1)
        return output + update.to(output.dtype)

    def weights(self) -> LokrWeights:
        """The numbers of the update."""
        weights = self._weights()
        return LokrWeights(_detached(weights.w1), _detached(weights.w2), weights.alpha)

    def norm(self) -> Tensor:
        """The update's Frobenius norm at multiplier 1, (), on the weights' device: that of w1 times that of w2."""
        weights = self._weights()
        return _product(weights.w1).float().norm() * _product(weights.w2).float().norm() * weights.strength

    def _make(self, name: str, rank: int | None, sides: tuple[int, int], whole: tuple[int, ...], like: Tensor) -> None:
        if rank is None:
            self.register_parameter(name, empty_parameter(*whole, like=like))
        else:
            self.register_parameter(f"{name}_a", empty_parameter(sides[0], rank, like=like))
            self.register_parameter(f"{name}_b", empty_parameter(rank, sides[1], like=like))

    def _weights(self) -> LokrWeights:
        parts = list(self.parameters())
        split = 1 if self.plan.w1_rank is None else 2
        return LokrWeights(tuple(parts[:split]), tuple(parts[split:]), self.alpha)

    def _through_convolution(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        base = self.wrapped.base
        (a, c), (b, d) = self.plan.w1, self.plan.w2
        kernels = w2.reshape(b, d, *self.size.kernel)

        def by_w2(rows: Tensor) -> Tensor:
            geometry: Any = (base.stride, base.padding, base.dilation)
            return F.conv2d(rows.flatten(0, 1), kernels, None, *geometry).unflatten(0, (len(x), -1))

        def by_w1(rows: Tensor) -> Tensor:
            return torch.einsum("ac,nc...->na...", w1, rows)

        rows = x.unflatten(1, (c, d))  # (B, c, d, h, w)
        result = by_w2(by_w1(rows)) if a * d < c * b else by_w1(by_w2(rows))
        return result.flatten(1, 2)


def _through_linear(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The product applied to x (..., c * d), the factor first that leaves less in between.

    Plain matrices throughout: for others torch chooses the kernel by whether the weight is trained, and rounds apart.
    """
    (a, c), (b, d) = w1.shape, w2.shape
    rows = x.reshape(-1, c, d)
    result = _by_columns(_by_rows(rows, w1), w2) if a * d < c * b else _by_rows(_by_columns(rows, w2), w1)
    return result.reshape(*x.shape[:-1], a * b)


def _by_rows(x: Tensor, w1: Tensor) -> Tensor:
    """(n, c, m) to (n, a, m)."""
    flat = x.transpose(1, 2).reshape(-1, x.shape[1])
    return F.linear(flat, w1).unflatten(0, (-1, x.shape[2])).transpose(1, 2)


def _by_columns(x: Tensor, w2: Tensor) -> Tensor:
    """(n, m, d) to (n, m, b)."""
    return F.linear(x.reshape(-1, x.shape[2]), w2).unflatten(0, (-1, x.shape[1]))


def _product(factor: Factor) -> Tensor:
    return factor[0] if len(factor) == 1 else factor[0] @ factor[1]


def _detached(factor: Factor) -> Factor:
    return tuple(part.detach() for part in factor)
