"""How products with eight-bit matrices are computed fastest here: measured, chosen, and told."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.memory.eight_bit import DEQUANTIZE, EIGHT_BIT, Matmul
from library.memory.quantization import WeightFormat

PLAIN = "plain"
"""With the matrix in the type that the run computes in, as it would be without the format."""

Timer = Callable[[Callable[[], Any]], float]
"""Does some work a few times and says how many milliseconds one time takes."""

_WARM_UPS, _TIMES = 2, 5


@dataclass(frozen=True)
class Times:
    """Milliseconds that a model's largest products take, by way of computing.

    Attributes:
        forward: ``PLAIN``, ``DEQUANTIZE`` and ``EIGHT_BIT`` -> of the answers.
        backward: The same of the gradients.
    """

    forward: dict[str, float]
    backward: dict[str, float]

    @property
    def best(self) -> Matmul:
        """The faster way in each direction."""
        return Matmul(*(min((DEQUANTIZE, EIGHT_BIT), key=times.__getitem__) for times in (self.forward, self.backward)))

    @property
    def slowdown(self) -> float:
        """How many times the time of plain matrices the best ways take."""
        best = self.best
        plain = self.forward[PLAIN] + self.backward[PLAIN]
        return (self.forward[best.forward] + self.backward[best.backward]) / plain


def measure(
    chosen: WeightFormat,
    sizes: Mapping[tuple[int, int], int],
    rows: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
) -> Times:
    """This times products with matrices of a model's sizes.

    Args:
        chosen: A format with arithmetic of its own.
        sizes: Outputs and inputs of a matrix -> how many matrices have them.
        rows: Of the activations.
        device: Where.
        dtype: What the run computes in.
        timer: Measures.
    """
    ways = (PLAIN, DEQUANTIZE, EIGHT_BIT)
    times = Times(dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0))
    generator = torch.Generator(device).manual_seed(0)  # the run's own draws are left alone

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    for (outputs, inputs), count in sizes.items():
        weight, x, grad = draw(outputs, inputs), draw(rows, inputs), draw(rows, outputs)
        for (direction, way), work in _works(chosen, weight, x, grad).items():
            getattr(times, direction)[way] += count * _time(timer, work, optional=way == EIGHT_BIT)
    return times


def _works(chosen: WeightFormat, weight: Tensor, x: Tensor, grad: Tensor) -> dict[tuple[str, str], Callable[[], Any]]:
    """By direction and way, what computes a product."""
    arithmetic, (codes, scales) = chosen.arithmetic, chosen.quantize(weight.float())
    assert arithmetic is not None
    return {
        ("forward", PLAIN): lambda: F.linear(x, weight),
        ("forward", DEQUANTIZE): lambda: F.linear(x, chosen.dequantize(codes, scales, x.dtype)),
        ("forward", EIGHT_BIT): lambda: arithmetic.product(x, codes, scales).to(x.dtype),
        ("backward", PLAIN): lambda: grad @ weight,
        ("backward", DEQUANTIZE): lambda: grad @ chosen.dequantize(codes, scales, x.dtype),
        ("backward", EIGHT_BIT): lambda: arithmetic.gradient(grad, codes, scales).to(x.dtype),
    }


def describe(times: Times, chosen: WeightFormat, *, rows: int, dtype: torch.dtype, saved_bytes: int) -> str:
    """What was measured and what follows, in a line.

    Args:
        times: From ``measure``.
        chosen: The format.
        rows: Of the activations.
        dtype: What the run computes in.
        saved_bytes: How much smaller the codes are than the matrices.
    """
    width = str(dtype).removeprefix("torch.")
    titles = {PLAIN: width, DEQUANTIZE: "dequantised", EIGHT_BIT: "8-bit"}
    measured = ", ".join(
        f"{title} {times.forward[way]:.2f} + {times.backward[way]:.2f} ms" for way, title in titles.items()
    )
    best, factor = times.best, times.slowdown
    effect = f"makes the step's matrix products {factor:.2f} times slower than {width} here"
    if factor <= 1:
        effect = f"the step's matrix products take {factor:.2f} of {width}'s time here"
    return (
        f"matrix products with {chosen.name}, the largest layers forward + backward with {rows} rows: {measured}. "
        f"Forward is computed {_adverb(best.forward)}, backward {_adverb(best.backward)}: {chosen.name} saves "
        f"{saved_bytes / (1 << 20):,.0f} MiB and {effect}"
    )


def cuda_timer(work: Callable[[], Any]) -> float:
    """A ``Timer`` by CUDA events: the fastest of a few times."""
    for _ in range(_WARM_UPS):
        work()
    found = math.inf
    for _ in range(_TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        found = min(found, start.elapsed_time(end))
    return found


def _time(timer: Timer, work: Callable[[], Any], *, optional: bool) -> float:
    """The time of some work; infinite where this device or library refuses what is optional."""
    try:
        return timer(work)
    except RuntimeError:
        if not optional:
            raise
        return math.inf


def _adverb(way: str) -> str:
    return "in 8 bits" if way == EIGHT_BIT else "by dequantising"
