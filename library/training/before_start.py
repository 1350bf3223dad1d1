"""What is said and decided before a run loads anything, from its forecast."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import torch

from library.config.errors import ConfigError
from library.config.run import DERIVED, RunConfig
from library.config.sizes import AUTO, size_in_bytes
from library.data.buckets import Placement
from library.data.report import DataReport
from library.data.report_lines import WARNING, amount
from library.families.protocols import ModelFamily
from library.records import Sample
from library.training.device_rates import ASSUMED, Rates, measured_rates
from library.training.fit import fewest_swaps, fit
from library.training.forecast import CONTEXT, Forecast, OtherPhases, forecast, largest_shape
from library.training.forecast_lines import forecast_lines
from library.training.jobs import job_of
from library.training.precision import Precision, resolve_precision
from library.training.trial import MicroBatchShape

log = logging.getLogger(__name__)


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that a run can have: what is free, and what this process has taken for CUDA already."""
    return int(torch.cuda.mem_get_info(device)[0]) + CONTEXT


class NotForeseen(Exception):
    """A run whose step can't be taken without numbers; the message says why."""


def foresee(
    config: RunConfig,
    family: ModelFamily,
    shape: MicroBatchShape,
    precision: Precision,
    *,
    cuda: bool,
    other: OtherPhases | None = None,
) -> Forecast:
    """This foresees a run.

    Raises:
        NotForeseen: Something in it needs numbers, or is unknown to torch's meta device.
        ConfigError: Its options can't work.
    """
    if config.network is not None and config.network.network_train_text_encoder_only:
        raise NotForeseen("text encoders alone are trained, and their passes aren't foreseen")
    if config.network is not None and config.trains_text_encoders:
        network = dataclasses.replace(config.network, network_train_unet_only=True)
        step_config = dataclasses.replace(config, network=network)
    elif config.full is not None and config.trains_text_encoders:
        step_config = dataclasses.replace(config, full=dataclasses.replace(config.full, train_text_encoder=False))
    else:
        step_config = config
    if step_config.network is not None and step_config.network.network_weights is not None:
        if step_config.network.dim_from_weights:
            raise NotForeseen("--dim_from_weights takes the ranks from a file, and a forecast reads no weights")
        # what an adapter starts from changes no size
        step_config = dataclasses.replace(
            step_config, network=dataclasses.replace(step_config.network, network_weights=None)
        )
    try:
        return forecast(config, family, shape, precision, cuda=cuda, step_config=step_config, other=other)
    except ConfigError:
        raise
    except Exception as error:  # whatever a package of others does when a tensor has no numbers: no run ends by it
        reason = (str(error).splitlines() or [""])[0][:200]
        raise NotForeseen(f"{type(error).__name__}: {reason}") from error


def starting_lines(
    config: RunConfig,
    family: ModelFamily,
    precision: Precision,
    device: torch.device,
    samples: Sequence[Sample],
    placements: Sequence[Placement],
    report: DataReport | None,
) -> list[str]:
    """The forecast of a run that begins, in lines; the first may begin with ``WARNING``."""
    cuda = device.type == "cuda"
    shape = largest_shape(config, family.latents.format, samples, placements)
    free = free_memory(device) if cuda else None
    rates = measured_rates(device, precision.frozen)
    return list(_lines(config, family, precision, shape, rates, free, report, cuda=cuda))


def dry_run_lines(
    config: RunConfig,
    family: ModelFamily,
    samples: Sequence[Sample],
    placements: Sequence[Placement],
    report: DataReport,
    *,
    accelerator_available: bool,
) -> list[str]:
    """The forecast of a run in lines, and what ``--fit`` found.

    Raises:
        ConfigError: Nothing fits.
    """
    shape = largest_shape(config, family.latents.format, samples, placements)
    device = torch.device("cuda" if accelerator_available else "cpu")
    precision = resolve_precision(config, accelerator_available=accelerator_available)
    rates = measured_rates(device, precision.frozen)
    free = free_memory(device) if accelerator_available else None
    config, notes = with_found_swaps(config, family, precision, device, shape)
    lines = [
        *notes,
        *_lines(config, family, precision, shape, rates, free, report, cuda=accelerator_available),
    ]
    if config.memory.fit is not None:
        lines += _fit_lines(config, family, shape, rates if accelerator_available else None)
    return lines


def with_found_swaps(
    config: RunConfig,
    family: ModelFamily,
    precision: Precision,
    device: torch.device,
    shape: MicroBatchShape | None = None,
) -> tuple[RunConfig, list[str]]:
    """The configuration with a number in the place of ``--blocks_to_swap auto``, and why it is that, in lines.

    Args:
        config: The run.
        family: The model's parts.
        precision: Of the run.
        device: Where it trains.
        shape: Of the largest micro-batch; by default what the datasets' settings allow.
    """
    if not config.memory.swaps_automatically:
        return config, []
    if device.type != "cuda":
        note = "--blocks_to_swap auto: 0, the model is in host memory already"
        return _with_swaps(config, 0, "no accelerator"), [note]
    shape = shape or largest_shape(config, family.latents.format)
    free = free_memory(device)
    try:
        found = fewest_swaps(
            config,
            family.description.blocks,
            free,
            ASSUMED,
            lambda changed: foresee(changed, family, shape, precision, cuda=True),
        )
    except NotForeseen as told:
        note = f"{WARNING}--blocks_to_swap auto: 0, since the run can't be foreseen ({told})"
        return _with_swaps(config, 0, "not foreseen"), [note]
    count = found.config.memory.blocks_to_swap or 0
    assert isinstance(count, int)
    needed = found.forecast.peak
    note = f"--blocks_to_swap auto: {count}, the forecast is {amount(needed)} and {amount(free)} are free"
    if needed > free:
        note = f"{WARNING}{note}, which is too little all the same; --fit auto finds other settings"
    return _with_swaps(config, count, f"the fewest that fit into {amount(free)}"), [note]


def _with_swaps(config: RunConfig, count: int, why: str) -> RunConfig:
    return dataclasses.replace(
        config,
        memory=dataclasses.replace(config.memory, blocks_to_swap=count),
        provenance={**config.provenance, "blocks_to_swap": f"{DERIVED}: {AUTO}, {why}"},
    )


def _lines(
    config: RunConfig,
    family: ModelFamily,
    precision: Precision,
    shape: MicroBatchShape,
    rates: Rates,
    free: int | None,
    report: DataReport | None,
    *,
    cuda: bool,
) -> Iterator[str]:
    try:
        found = foresee(config, family, shape, precision, cuda=cuda)
    except (NotForeseen, ConfigError) as told:  # what is wrong with the run, the run finds with its numbers
        yield f"forecast: none ({str(told).splitlines()[0]})"
        return
    if free is not None and found.peak > free:
        yield (
            f"{WARNING}this run may need {amount(found.peak)} of the device, and {amount(free)} are free; --fit auto "
            "finds the fastest settings that fit"
        )
    steps, cache = (None, None) if report is None else (report.steps.total, report.cache)
    yield from forecast_lines(found, rates=rates, steps=steps, cache=cache, free=free)


def _fit_lines(config: RunConfig, family: ModelFamily, shape: MicroBatchShape, rates: Rates | None) -> Iterator[str]:
    """What ``--fit`` found: the settings of a run on a CUDA device, whether there is one here or not."""
    asked = config.memory.fit
    assert asked is not None
    if asked == AUTO and rates is None:
        raise ConfigError("--fit auto: this machine has no GPU whose free memory could be taken; give an amount")
    budget = free_memory(torch.device("cuda")) if asked == AUTO else size_in_bytes(asked)
    precision = resolve_precision(config, accelerator_available=True)
    rates = rates or ASSUMED
    try:
        other = OtherPhases.of(config, family, shape, precision, cuda=True)
        found = fit(
            config,
            family.description.blocks,
            budget,
            rates,
            lambda changed: foresee(changed, family, shape, precision, cuda=True, other=other),
            streams=_may_stream(config, family),
        )
    except NotForeseen as told:
        raise ConfigError(f"--fit {asked}: the run can't be foreseen ({told}); choose the settings yourself") from told
    yield (
        f"--fit {asked}: {amount(found.forecast.peak)} of {amount(budget)} with "
        f"{found.pasted or 'the settings as they are'}"
    )
    yield from forecast_lines(found.forecast, rates=rates)
    yield f"paste: {found.pasted}" if found.pasted else "paste: nothing, the settings fit as they are"


def _may_stream(config: RunConfig, family: ModelFamily) -> bool:
    """Whether the modulation of this model may stream with this adapter."""
    if config.network is None:
        return False
    memory = dataclasses.replace(config.memory, stream_modulation=True)
    try:
        job_of(config).rehearse(dataclasses.replace(config, memory=memory), family)
    except ConfigError:
        return False
    return True
