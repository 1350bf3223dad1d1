"""A forecast in lines of plain text."""

from collections.abc import Iterator

from library.data.report_cache import CacheNeeds
from library.data.report_lines import amount
from library.training.device_rates import Rates
from library.training.forecast import CONTEXT, STEP, Forecast
from library.training.trial import AVERAGE, BASE, BATCH, GRADIENTS, KEPT, STATE, TRAINED, WORKING

_ORDER = (BASE, TRAINED, GRADIENTS, STATE, AVERAGE, KEPT, WORKING, BATCH)
_LEAST = 1 << 20


def forecast_lines(
    forecast: Forecast,
    *,
    rates: Rates | None = None,
    steps: int | None = None,
    cache: CacheNeeds | None = None,
    free: int | None = None,
) -> Iterator[str]:
    """What a run will take, line by line.

    Args:
        forecast: What was foreseen.
        rates: Of the device.
        steps: Optimizer steps of the run.
        cache: What the caches take.
        free: Free bytes of the device.
    """
    device = "the device" if forecast.cuda else "the host, libraries apart"
    room = "" if free is None else f", {amount(free)} are free"
    context = f", {amount(CONTEXT)} of them for CUDA itself" if forecast.cuda else ""
    yield (
        f"forecast: at most {amount(forecast.peak)} of {device}{context}{room}; most in {forecast.largest_phase}, "
        f"with {forecast.shape.rows} x {forecast.shape.resolution}"
    )
    parts = forecast.step.components
    named = [name for name in _ORDER if parts.get(name, 0) >= _LEAST]
    if named:
        yield f"  the step's peak: {', '.join(f'{name} {amount(parts[name])}' for name in named)}"
    others = {name: size for name, size in forecast.phases.items() if name != STEP}
    if others:
        yield f"  other phases: {', '.join(f'{name} {amount(size)}' for name, size in others.items())}"
    waits = [f"{name} {amount(size)}" for name, size in forecast.host.items() if size >= _LEAST]
    if cache is not None and cache.on_disk:
        waits.append(f"cache on disk {amount(cache.on_disk)}")
    if cache is not None and cache.in_memory:
        waits.append(f"cache in memory {amount(cache.in_memory)}")
    if waits:
        yield f"  beside the device: {', '.join(waits)}"
    yield from _time_lines(forecast, rates, steps)
    for what in forecast.unseen:
        yield f"  not foreseen: {what}"


def _time_lines(forecast: Forecast, rates: Rates | None, steps: int | None) -> Iterator[str]:
    step = forecast.step
    taken = f"  each step: {step.operations / 1e12:.3g} TFLOP for {forecast.rows} pictures"
    if step.up or step.down:
        taken += f", {amount(step.up)} to the device and {amount(step.down)} back"
    if rates is None:
        yield taken
        return
    seconds = rates.seconds(step.operations, step.up, step.down)
    total = "" if steps is None else f", {_duration(seconds * steps)} for {steps} steps"
    yield f"{taken}; at least {seconds:.2g} s{total}, at {rates.operations / 1e12:.3g} TFLOP/s ({rates.title})"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.2g} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
