"""Stochastic rounding: weights in bf16 that still learn from updates smaller than their last bit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.randomness import seed_for

_DROPPED_BITS = 16  # of fp32's fraction, beside bf16's


def round_stochastically(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """This rounds fp32 to one of the two nearest bf16 numbers, the nearer the likelier (Zamirai et al. 2020,
    arXiv:2010.06192): the mean of many roundings is the number itself.

    Args:
        numbers: fp32.
        generator: On the device of ``numbers``.

    Returns:
        bf16; what is not finite stays what it is.
    """
    noise = torch.randint(
        1 << _DROPPED_BITS, numbers.shape, dtype=torch.int32, device=numbers.device, generator=generator
    )
    # random low bits carry into the kept ones as often as the dropped part is large; then the low bits go
    raised = noise.add_(numbers.view(torch.int32)).bitwise_and_(-(1 << _DROPPED_BITS)).view(torch.float32)
    return torch.where(numbers.isfinite(), raised, numbers).to(torch.bfloat16)


@dataclass(frozen=True)
class Rounding:
    """Where the random bits of a run's roundings come from.

    Attributes:
        run_seed: The run's ``--seed``.
    """

    run_seed: int

    def rounded(self, weight: Tensor, *, step: int, number: int) -> Tensor:
        """This rounds the fp32 ``weight`` of parameter ``number`` to bf16: a function of seed, step and number."""
        generator = torch.Generator(weight.device)
        generator.manual_seed(seed_for(self.run_seed, "stochastic rounding", step, number))
        return round_stochastically(weight, generator)

    def widened(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        """See ``library.optimizers.one_by_one.Narrowing``."""
        return weight.detach().float()

    def narrow(self, wide: Tensor, weight: Tensor, state: dict[str, Any], *, step: int, number: int) -> None:
        """See ``library.optimizers.one_by_one.Narrowing``."""
        weight.copy_(self.rounded(wide, step=step, number=number))
