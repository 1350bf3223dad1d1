"""Kahan summation: weights in bf16 that keep beside them what rounding took away."""

from typing import Any

import torch
from torch import Tensor

REST = "kahan_rest"
"""Where a weight's rest lies in the optimizer's state."""


class KahanSummation:
    """Carries what rounding to bf16 drops from one step to the next (Kahan 1965, doi:10.1145/363707.363723; for weights
    in bf16 Zamirai et al. 2020, arXiv:2010.06192).

    The paper keeps the rest in bf16, which drops in its turn what lies below the 16th bit. A rest of the same size can
    be exact: the lower half of the fp32 number. So a weight and its rest are the weight that fp32 would have, bit for
    bit, and the step is made there.
    """

    def widened(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        """The weight in fp32 with its rest, which leaves the ``state``: an optimizer finds there what is its own."""
        wide = weight.detach().float()
        rest = state.pop(REST, None)
        return wide if rest is None else wide.view(torch.int32).add_(rest).view(torch.float32)

    def narrow(self, wide: Tensor, weight: Tensor, state: dict[str, Any], *, step: int, number: int) -> None:
        """This rounds ``wide`` into the ``weight``; the rest goes into the state."""
        bits = wide.view(torch.int32)
        lower = bits.to(torch.int16)  # as a signed number: below 0 where the upper half is rounded up
        # not finite numbers stay so: rounding up a nan could carry into the sign
        weight.copy_(torch.where(wide.isfinite(), (bits - lower).view(torch.float32), wide))
        state[REST] = lower


def forget_rests(optimizer: torch.optim.Optimizer) -> None:
    """This drops the rests from the state of an optimizer that goes on without them."""
    for state in optimizer.state.values():
        if isinstance(state, dict):
            state.pop(REST, None)
