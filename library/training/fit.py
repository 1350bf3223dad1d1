"""The fastest settings whose forecast fits into a device's memory."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.config.errors import ConfigError
from library.config.memory import MemoryConfig
from library.config.run import DERIVED, RunConfig
from library.training.device_rates import Rates
from library.training.forecast import Forecast

Foresee = Callable[[RunConfig], Forecast]
"""What a configuration takes."""

# Those that give the same results, from what costs least time to what takes least memory.
_RECOMPUTED: tuple[Mapping[str, Any], ...] = (
    {"gradient_checkpointing": False},
    {"gradient_checkpointing": True, "gradient_checkpointing_interval": 4},
    {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2},
    {"gradient_checkpointing": True, "gradient_checkpointing_keep_attention": True},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "cpu_offload_checkpointing": True},
)
_DEFAULTS = {
    "gradient_checkpointing_interval": 1,
    "gradient_checkpointing_keep_attention": False,
    "cpu_offload_checkpointing": False,
}

# These change results, so that they are a last resort: the finer first.
_PRECISIONS = ("int8", "fp8", "nf4")


@dataclass(frozen=True)
class Fitting:
    """Settings that fit.

    Attributes:
        config: The run with them.
        values: Options that were chosen and aren't at their defaults.
        forecast: What the run takes.
        seconds: The least time of a step.
    """

    config: RunConfig
    values: Mapping[str, Any]
    forecast: Forecast
    seconds: float

    @property
    def pasted(self) -> str:
        """The chosen options as they are typed."""
        words = [f"--{name}" if value is True else f"--{name} {value}" for name, value in self.values.items()]
        return " ".join(words)


class _Search:
    """Looks for the fastest settings.

    Args:
        config: The run. What somebody gave in it stays.
        blocks: Of the model.
        budget: Bytes.
        rates: Of the device.
        foresee: Foresees a configuration.
    """

    def __init__(self, config: RunConfig, blocks: int, budget: int, rates: Rates, foresee: Foresee):
        self._config, self._budget, self._rates = config, budget, rates
        self._blocks, self._foresee = blocks, foresee
        self.smallest: Fitting | None = None

    def fastest(self, fixed: Mapping[str, Any], *, streams: bool) -> Fitting | None:
        """The fastest settings that fit, with some of them ``fixed``; ``streams``: modulation may stream."""
        variants = list(self._variants(streams))
        if not self._fits(self._leanest({**variants[-1], **fixed})):
            return None
        best: Fitting | None = None
        bound = None
        for values in variants:
            tried = self._try({**values, **fixed})
            bound = tried.seconds if bound is None else min(bound, tried.seconds)
            if best is not None and tried.seconds >= best.seconds:
                continue  # swapping makes none faster
            found = tried if self._fits(tried) else self._with_fewest_swaps({**values, **fixed}, tried)
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
            if best is not None and best.seconds <= bound:
                break
        return best

    def with_fewest_swaps(self) -> Fitting:
        """The settings as they are, with the fewest swapped blocks that fit, or all of them if none do."""
        plain = self._try({"blocks_to_swap": 0})
        if self._fits(plain):
            return plain
        found = self._with_fewest_swaps({}, plain)
        return self._try({"blocks_to_swap": self._blocks}) if found is None else found

    def _leanest(self, values: Mapping[str, Any]) -> Fitting:
        """With all blocks swapped, if they may be."""
        return self._try({**values, "blocks_to_swap": self._blocks} if self._may_swap(values) else values)

    def _may_swap(self, values: Mapping[str, Any]) -> bool:
        given = self._config.was_given("blocks_to_swap") and not self._config.memory.swaps_automatically
        return not given and self._allowed({**values, "blocks_to_swap": self._blocks})

    def _variants(self, streams: bool) -> Iterator[dict[str, Any]]:
        seen = []
        for recomputed in _RECOMPUTED:
            for streamed in (False, True) if streams else (False,):
                wanted = {**_DEFAULTS, **recomputed, "stream_modulation": streamed}
                values = {name: value for name, value in wanted.items() if not self._config.was_given(name)}
                if values not in seen and self._allowed(values):
                    seen.append(values)
                    yield values

    def _allowed(self, values: Mapping[str, Any]) -> bool:
        try:
            changed = self._with(values)
        except ConfigError:
            return False
        return len(changed.problems()) <= len(self._config.problems())

    def _with(self, values: Mapping[str, Any]) -> RunConfig:
        memory = dataclasses.replace(self._config.memory, **values)
        sources = {name: f"{DERIVED}: what fits" for name in values}
        return dataclasses.replace(self._config, memory=memory, provenance={**self._config.provenance, **sources})

    def _try(self, values: Mapping[str, Any]) -> Fitting:
        config = self._with(values)
        forecast = self._foresee(config)
        step, defaults = forecast.step, MemoryConfig()
        names = [field.name for field in dataclasses.fields(MemoryConfig) if values.get(field.name)]
        chosen = {name: values[name] for name in names if values[name] != getattr(defaults, name)}
        seconds = self._rates.seconds(step.operations, step.up, step.down)
        tried = Fitting(config, chosen, forecast, seconds)
        if self.smallest is None or forecast.peak < self.smallest.forecast.peak:
            self.smallest = tried
        return tried

    def _fits(self, tried: Fitting) -> bool:
        return tried.forecast.peak <= self._budget

    def _with_fewest_swaps(self, values: Mapping[str, Any], plain: Fitting) -> Fitting | None:
        """The fewest swapped blocks with which it fits; None: not even all do, or they must not be swapped."""
        if not self._may_swap(values):
            return None
        few, many = 0, self._blocks
        below, found = plain, self._try({**values, "blocks_to_swap": many})
        if not self._fits(found):
            return None
        while many - few > 1:
            # memory falls evenly with the blocks, so the place can be guessed
            fall = max(1, below.forecast.peak - found.forecast.peak)
            guess = few + -(-(below.forecast.peak - self._budget) * (many - few) // fall)
            middle = min(max(guess, few + 1), many - 1)
            tried = self._try({**values, "blocks_to_swap": middle})
            if self._fits(tried):
                many, found = middle, tried
            else:
                few, below = middle, tried
        return found


def fit(
    config: RunConfig,
    blocks: int,
    budget: int,
    rates: Rates,
    foresee: Foresee,
    *,
    streams: bool,
) -> Fitting:
    """This finds the fastest settings that fit; those that change results only where no others do.

    First come those with the same results: which blocks are computed again, which are swapped, whether their inputs
    wait on the host, whether modulation streams. Of equally fast ones the first wins, in the order from little to much
    machinery. Only if none fit is the frozen model stored in fewer bits.

    Args:
        config: The run. What somebody gave in it stays.
        blocks: Of the model.
        budget: Bytes of the device.
        rates: Of the device.
        foresee: Foresees a configuration.
        streams: Whether modulation may stream, where nobody says.

    Raises:
        ConfigError: Nothing fits.
    """
    search = _Search(config, blocks, budget, rates, foresee)
    fixed: list[dict[str, Any]] = [{}]
    if config.full is None and not config.was_given("base_model_precision"):
        fixed += [{"base_model_precision": name} for name in _PRECISIONS]
    for values in fixed:
        if (found := search.fastest(values, streams=streams)) is not None:
            return found
    assert search.smallest is not None
    least = search.smallest
    with_what = f" with {least.pasted}" if least.values else ""
    smaller = ", or train an adapter" if config.full is not None else ""
    smaller = ", or --network_dim" if config.network is not None else smaller
    raise ConfigError(
        f"--fit {config.memory.fit}: nothing fits; the least is {least.forecast.peak / 2**30:.2f} GiB{with_what}, most "
        f"of it in {least.forecast.largest_phase}. Lower the resolution or --train_batch_size" + smaller
    )


def fewest_swaps(config: RunConfig, blocks: int, budget: int, rates: Rates, foresee: Foresee) -> Fitting:
    """This finds the fewest swapped blocks with which the settings, as they are, fit; all blocks if none do.

    Args:
        config: The run.
        blocks: Of the model.
        budget: Bytes of the device.
        rates: Of the device.
        foresee: Foresees a configuration.
    """
    return _Search(config, blocks, budget, rates, foresee).with_fewest_swaps()
