"""How fast a device computes and copies: measured in a moment, or assumed where there is none."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_TRIES = 5
_COPIED = 1 << 28


@dataclass(frozen=True)
class Rates:
    """What a device can do.

    Attributes:
        operations: Floating-point operations per second, of a large matrix product.
        copied: Bytes per second between host and device, each way; None: nothing travels.
        title: Whose rates they are, and whether they were measured.
    """

    operations: float
    copied: float | None
    title: str

    def seconds(self, operations: float, up: int, down: int) -> float:
        """The least time for so many operations and copies beside each other."""
        times = [operations / self.operations]
        if self.copied is not None:
            times += [up / self.copied, down / self.copied]
        return max(times)


ASSUMED = Rates(130e12, 22e9, "a card of 130 TFLOP/s behind a link of 22 GB/s, assumed")
"""About what an RTX 4090 reaches: only to bring settings into an order where there is no card."""


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The device's rates, measured in less than a second and once in a process; nothing of the device stays taken."""
    return _measured(device, dtype, torch.get_num_threads())


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> Rates:
    operations = _product_rate(device, dtype)
    if device.type != "cuda":
        return Rates(operations, None, f"one matrix product, measured on {threads} threads")
    copied = _copy_rate(device)
    torch.cuda.empty_cache()
    title = f"one matrix product and one copy, measured on {torch.cuda.get_device_name(device)}"
    return Rates(operations, copied, title)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = 8192 if device.type == "cuda" else 768
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: left @ right, device)


def _copy_rate(device: torch.device) -> float:
    host = torch.empty(_COPIED, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    return _COPIED / _fastest(lambda: target.copy_(host, non_blocking=True), device)


def _fastest(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the middle of a few."""
    times = []
    for _ in range(_TRIES + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
