"""The data of a run before its first step: found, planned, reported, and encoded where it is cached."""

import functools
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.config.training import AUTO
from library.data.plan import BatchPlan
from library.data.report import DataReport
from library.data.report_lines import WARNING, report_lines
from library.families.protocols import ModelFamily, TextEncodingStrategy
from library.training.data import TrainingData, file_index, find_data
from library.training.data_summary import summarize_data
from library.training.encoders import base_weights_signature
from library.training.jobs import job_of
from library.training.report import data_report
from library.training.resume_from import Resumed, complete
from library.training.resuming import changes_since
from library.training.states import refuse_other_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """What is trained on, and when.

    Attributes:
        data: The pictures.
        plan: Which of them each optimizer step uses.
        max_steps: Optimizer steps of the whole run.
        first_step: Steps that were done before this process started.
        report: What is said about the data; None on processes that say nothing.
        forecast: What the run will take, in lines; none on processes that say nothing.
        origin: What states keep of where the run comes from: its own name, its data and the base model's weights.
    """

    data: TrainingData
    plan: BatchPlan
    max_steps: int
    first_step: int
    report: DataReport | None
    forecast: Sequence[str]
    origin: Mapping[str, Any]


def prepare_data(
    config: RunConfig,
    family: ModelFamily,
    text: TextEncodingStrategy,
    resumed: Resumed | None,
    accelerator: Accelerator,
    *,
    seed: int,
    foresee: Callable[[TrainingData, DataReport], Sequence[str]],
    fill: Callable[[TrainingData], Mapping[str, str]],
) -> PreparedData:
    """This finds the pictures, plans the steps, says what is known of the run, and fills the cache of latents.

    A picture that can't be decoded shows when it is encoded. It is remembered, and the data is found again: that stops
    the run and lists such pictures or, with ``--skip_bad_images``, leaves them out. What was encoded is kept.

    Args:
        config: The run.
        family: The model's parts.
        text: For what is said about captions.
        resumed: The state that the run goes on from, or None.
        accelerator: Device and processes.
        seed: Of the run.
        foresee: What the run will take, in lines.
        fill: Encodes what the cache of latents lacks; returns the pictures that can't be decoded, content -> why.

    Raises:
        ConfigError: The data can't be used, no step is left to do, or the run is another one than the state's.
        RunIsComplete: No step is left to do, and the state was found by itself.
    """
    find = functools.partial(
        find_data,
        config,
        seed,
        resolution_step=family.latents.format.resolution_step,
        largest_side=family.description.largest_side,
    )
    weights = {**family.identities(), **base_weights_signature(config)}
    data, left_out = find(), set[str]()
    while True:
        plan = plan_batches(config, data, seed, accelerator.num_processes)
        max_steps = resolve_steps(config, plan)
        check_update_interval(config, max_steps)
        per_step = accelerator.num_processes * config.training.gradient_accumulation_steps
        summary = summarize_data(config.datasets, data, plan, micro_batches_per_step=per_step)
        changes = resume(config, family, plan, max_steps, resumed, weights=weights, summary=summary)
        first_step = resumed.step if resumed is not None else 0
        check_bundle_step(config.training.replay_bundle_at_step, first_step, max_steps)
        report: DataReport | None = None
        forecast: Sequence[str] = ()
        if accelerator.is_main_process:
            report = data_report(config, data, plan, family, text, accelerator.num_processes)
            forecast = foresee(data, report)
            for line in (*report_lines(report), *forecast):
                log.log(logging.WARNING if line.startswith(WARNING) else logging.INFO, line.removeprefix(WARNING))
        bad = fill(data)
        if not bad:
            break
        assert left_out.isdisjoint(bad), "a picture that was found to be bad is used again"
        left_out.update(bad)
        if accelerator.is_main_process:
            file_index(config).mark_bad(bad)
        accelerator.wait_for_everyone()
        data = find()
    if resumed is not None and changes:
        log.warning(
            "--resume_anyway: going on with another run than that of %s: %s", resumed.folder, ", ".join(changes)
        )
    origin = {
        "run": (resumed and resumed.progress.get("run")) or secrets.token_hex(8),
        "data": summary,
        "weights": weights,
    }
    return PreparedData(data, plan, max_steps, 0 if resumed is None else resumed.step, report, forecast, origin)


def check_update_interval(config: RunConfig, max_steps: int) -> None:
    """Refuse an average that would never be updated, and so be saved as the weights before training.

    Raises:
        ConfigError: The run is shorter than the interval.
    """
    interval = config.ema.ema_update_interval
    if config.ema.use_ema and interval > max_steps:
        raise ConfigError(
            f"--ema_update_interval {interval}: the run has {max_steps} optimizer steps, so the average would never be "
            "updated; lower it"
        )


def check_bundle_step(step: int | None, first_step: int, max_steps: int) -> None:
    """Refuse a replay bundle of a step that never comes.

    Raises:
        ConfigError: It is done already, or is beyond the end.
    """
    if step is not None and not first_step < step <= max_steps:
        done = f", {first_step} of which are done" if first_step else ""
        raise ConfigError(
            f"--replay_bundle_at_step {step}: the run has {max_steps} optimizer steps{done}, so it never comes to this "
            "one; choose another step, or remove it"
        )


def plan_batches(config: RunConfig, data: TrainingData, seed: int, processes: int) -> BatchPlan:
    """This plans the steps.

    Raises:
        ConfigError: In some of them no picture is used.
    """
    plan = BatchPlan(
        data.discovery.samples,
        data.placements,
        config.datasets,
        seed=seed,
        micro_batches_per_step=processes * config.training.gradient_accumulation_steps,
    )
    if idle := plan.problem(resolve_steps(config, plan)):
        raise ConfigError(f"{config.data.dataset_config}: {idle}")
    return plan


def resolve_steps(config: RunConfig, plan: BatchPlan) -> int:
    """Optimizer steps of the whole run."""
    if config.training.max_train_epochs is not None:
        return plan.first_step(config.training.max_train_epochs)
    return config.training.max_train_steps


def resume(
    config: RunConfig,
    family: ModelFamily,
    plan: BatchPlan,
    max_steps: int,
    resumed: Resumed | None,
    *,
    weights: Mapping[str, str],
    summary: Mapping[str, Any],
) -> list[str]:
    """What differs from the run that saved the state; nothing without one.

    Raises:
        ConfigError: The state can't be gone on from with these options, or its run is over.
        RunIsComplete: Its run is over, and it was found by itself.
    """
    if resumed is None:
        return []
    if resumed.step >= max_steps:
        if config.training.resume == AUTO:
            raise complete(resumed)
        raise ConfigError(
            f"--resume {resumed.folder}: {resumed.step} steps are done and the run has {max_steps}; "
            "raise --max_train_steps or --max_train_epochs"
        )
    changes = changes_since(config, resumed, weights=weights, data=summary, fingerprint=plan.fingerprint())
    refuse_other_weights(resumed.folder, job_of(config).rehearse(config, family))
    return changes
