"""RunConfig to Run: load, cache, inject, prepare. What is no longer needed leaves memory before the next part comes."""

import functools
import logging
import os
import secrets
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler, broadcast_object_list
from torch import nn

from library.config.errors import ConfigError
from library.config.resolved import resolved_toml
from library.config.run import RunConfig
from library.config.sampling import SkipLayerGuidance
from library.data.loader import BatchReader
from library.data.report_lines import WARNING, report_lines
from library.families import create_family
from library.families.protocols import ModelFamily
from library.io.atomic import write_text
from library.sampling.prompts import PromptRequest
from library.sampling.requests import requested_samples
from library.training import data as training_data
from library.training import hooks
from library.training.attention import AUTO, settle_attention
from library.training.before_start import starting_lines, with_found_swaps
from library.training.checks import check_run
from library.training.ema import WeightAverage
from library.training.encode_ahead import encode_ahead
from library.training.encoders import LatentPreparation, TextSide, prepare_text
from library.training.fused_backward import refuse_processes
from library.training.host_memory import check_host_memory
from library.training.jobs import job_of
from library.training.launch import check_started
from library.training.leftovers import clear_leftovers
from library.training.loop import train
from library.training.losses import LossHistory
from library.training.metadata import run_metadata
from library.training.model_side import component_types, load_model_side
from library.training.precision import Precision, resolve_precision
from library.training.prepare_data import PreparedData, prepare_data
from library.training.quantized_matmul import matmul_facts, saved_matmul
from library.training.report import run_facts, run_lines
from library.training.resume_from import Resumed, RunIsComplete, agree_on_resumed
from library.training.run import Run, StepHook
from library.training.save_errors import starting_files
from library.training.saving_hooks import finish_step, saving_hooks
from library.training.schedules import create_schedule
from library.training.sharding import uncached_autocast
from library.training.sharding_settings import ShardingSettings, asked_sharding, forget_plugins
from library.training.states import restore_state
from library.training.step import encoded
from library.training.stopping import Stopper
from library.training.trackers import Trackers, log_in, logging_folder, start_trackers
from library.training.updates import prepare_updates
from library.training.validation import Validation

log = logging.getLogger(__name__)


def run_training(config: RunConfig) -> int:
    """This sets a run up, trains, and returns the exit code."""
    started = time.monotonic()
    try:
        run, taker = set_up(config)
    except RunIsComplete as told:
        log.info("%s; there is nothing to do", told)
        return 0
    run.stopper = Stopper(config.training.max_train_seconds, started)
    try:
        if taker is not None and config.sampling.sample_at_first and run.first_step == 0:
            taker.take(run, 0, "e000000")
        with run.stopper.listening():
            train(run)
        if run.compiling is not None:
            log.info(run.compiling.report)
    finally:
        run.close()
    return run.stop_code


def set_up(config: RunConfig) -> tuple[Run, hooks.SampleTaker | None]:
    """Everything that a run needs, made in the order that keeps the least in memory.

    Raises:
        ConfigError: Something can't work.
        RunIsComplete: ``--resume auto``, and no step is left to do.
    """
    job = job_of(config)
    family: ModelFamily = create_family(config.family_name, config)
    check_run(config, family, accelerator_available=has_accelerator())
    log_in(config.logging)
    precision = resolve_precision(config, accelerator_available=has_accelerator())
    sharding = asked_sharding(config, os.environ)
    accelerator = start_accelerator(config, precision, sharding)
    if sharding is not None and accelerator.num_processes == 1:
        log.warning(
            "accelerate's configuration asks for %s, but one process has nobody to share with", sharding.asked_by
        )
        sharding = None
    if config.memory.fused_backward_pass:
        refuse_processes(accelerator.num_processes)
    config, found = with_found_swaps(config, family, precision, accelerator.device)
    check_host_memory(config, family, precision, accelerator.device)
    log.info("resolved configuration:\n%s", resolved_toml(config, with_defaults=False))
    if accelerator.is_main_process:
        clear_leftovers(config.saving)
    resumed = agree_on_resumed(config, accelerator)
    if config.memory.attn_mode == AUTO:
        config = settle_attention(config, family, resumed, accelerator)
        family = create_family(config.family_name, config)
    seed = resolve_seed(config, resumed, accelerator)
    for name, folder in (("output_dir", config.saving.output_dir), ("cache_dir", config.local_cache_dir)):
        make_folder(name, folder)
    for line in (*found, *precision.notes, *(sharding.notes if sharding is not None else ())):
        log.log(logging.WARNING if line.startswith(WARNING) else logging.INFO, line.removeprefix(WARNING))
    if warning := family.description.precision_warnings.get(precision.mixed):
        log.warning(warning)
    for warning in config.model_warnings(family.description):
        log.warning(warning)
    text = family.text_strategy()
    requests = sample_requests(config, family, seed)
    preparation = LatentPreparation(config, family, precision, accelerator)
    prepared = prepare_data(config, family, text, resumed, accelerator, seed=seed, fill=preparation.fill)
    data, plan, latent_side = prepared.data, prepared.plan, preparation.finish(keep=bool(requests))
    _, trained = component_types(config, family, job, precision)
    text_side = prepare_text(config, data, family, text, requests, precision, accelerator, trained=trained)
    forecast = foreseen(config, family, precision, prepared, accelerator, sharding)
    model = load_model_side(
        config,
        family,
        job,
        text_side.encoders,
        accelerator.device,
        precision,
        seed=seed,
        sharding=sharding,
        matmul=saved_matmul(resumed.progress) if resumed is not None else None,
    )
    created = model.created
    reader = BatchReader(
        samples=data.discovery.samples,
        placements=data.placements,
        datasets=config.datasets,
        seed=seed,
        latent_format=family.latents.format,
        text_strategy=text,
        latents=latent_side.store,
        latents_signature=latent_side.signature,
        masks=latent_side.masks,
        texts=text_side.store,
        text_signature=text_side.signature,
        caption_variants=config.caching.caption_variants,
        max_steps=prepared.max_steps,
        prior_loss_weight=config.data.prior_loss_weight,
    )
    micro_batches = training_data.own_micro_batches(
        plan,
        prepared.first_step,
        prepared.max_steps,
        rank=accelerator.process_index,
        accumulation=config.training.gradient_accumulation_steps,
        together=sharding is not None,
    )
    with starting_files(config.saving.output_dir):
        start_trackers(accelerator, config.logging, config.as_dict(), output_dir=config.saving.output_dir)
        trackers = Trackers(accelerator, log_path(config), first_step=prepared.first_step)
    run = Run(
        config=config,
        seed=seed,
        job=job,
        family=family,
        accelerator=accelerator,
        plan=plan,
        batches=training_data.loader(config, reader, micro_batches, accelerator),
        denoiser=model.denoiser,
        trainable=model.trainable,
        text=text,
        text_encoders=text_side.encoders,
        vae=latent_side.vae,
        optimizer=accelerator.prepare(created.optimizer),
        schedule=create_schedule(config.optimizer, created.optimizer, max_steps=prepared.max_steps),
        max_steps=prepared.max_steps,
        first_step=prepared.first_step,
        weight_dtype=precision.frozen,
        trackers=trackers,
        history=LossHistory(),
        swap=model.swap,
        sharded=sharding is not None,
        metadata=run_metadata(
            config,
            family.description,
            config.datasets,
            data.discovery.samples,
            [data.buckets(index) for index in range(len(config.datasets))],
            {
                **run_facts(config, plan, prepared.max_steps, created.label, seed),
                "num_validation_images": len(data.discovery.validation) or None,
                "quantized_matmul": model.matmul and f"{model.matmul.forward} {model.matmul.backward}",
            },
        ),
        origin={**prepared.origin, **matmul_facts(model.matmul)},
        compiling=model.compiling,
    )
    if config.ema.use_ema:
        on_host = config.ema.ema_device == "cpu"
        run.average = WeightAverage(trained_parameters(run), config.ema.ema_decay, on_host=on_host, swap=run.swap)
    if config.caching.vae_cache_disable:
        run.batches = encode_ahead(run.batches, functools.partial(encoded, run), run.device)
    if resumed is not None:
        restore_state(run, resumed.folder, resumed.progress)
        run.last_state = Path(resumed.folder)
        log.info("resumed from %s after step %d", resumed.folder, run.first_step)
    prepare_updates(run)
    taker = sample_taker(config, requests, text_side)
    run.hooks = make_hooks(run, taker, training_data.make_validation(config, data, reader, seed))
    if resumed is not None:
        finish_step(run, resumed.folder)
    lines = run_lines(run)
    for line in lines:
        log.info(line)
    if prepared.report is not None:
        comments = "".join(f"# {line}\n" for line in [*lines, *forecast, *report_lines(prepared.report)])
        with starting_files(config.saving.output_dir):
            write_text(resolved_path(config), f"{resolved_toml(config, seed=seed)}\n{comments}")
    return run, taker


def foreseen(
    config: RunConfig,
    family: ModelFamily,
    precision: Precision,
    prepared: PreparedData,
    accelerator: Accelerator,
    sharding: ShardingSettings | None,
) -> list[str]:
    """Log what the run will take, on the main process, and return it in lines; a sharded run isn't foreseen."""
    if sharding is not None or not accelerator.is_main_process:
        return []
    data = prepared.data
    lines = starting_lines(
        config, family, precision, accelerator.device, data.discovery.samples, data.placements, prepared.report
    )
    for line in lines:
        log.log(logging.WARNING if line.startswith(WARNING) else logging.INFO, line.removeprefix(WARNING))
    return lines


def make_folder(name: str, folder: str) -> None:
    """Make a folder that the option ``name`` gives.

    Raises:
        ConfigError: It can't be made.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--{name} {folder}: can't be made ({error.strerror})") from None


def has_accelerator() -> bool:
    """Whether training runs on a GPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")


def start_accelerator(config: RunConfig, precision: Precision, sharding: ShardingSettings | None = None) -> Accelerator:
    """The device, processes and precision. Accumulation and sharding are ours: it sees one step and whole models."""
    forget_plugins(os.environ)
    handlers: list[KwargsHandler] = [] if sharding is None else [uncached_autocast()]
    if config.training.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=config.training.ddp_timeout)))
    trackers = list(config.logging.trackers)
    accelerator = Accelerator(
        mixed_precision=precision.mixed,
        log_with=trackers or None,
        project_dir=logging_folder(config.logging),
        kwargs_handlers=handlers,
    )
    check_started(accelerator.num_processes, os.environ)
    if not accelerator.is_main_process:
        logging.getLogger("library").setLevel(logging.WARNING)
        logging.getLogger("networks").setLevel(logging.WARNING)
    return accelerator


def resolve_seed(config: RunConfig, resumed: Resumed | None, accelerator: Accelerator) -> int:
    """The run's seed: the typed one, the resumed run's, or a fresh one that all processes share."""
    typed = config.training.seed
    if typed is not None:
        return typed  # whether it is the state's is looked at with everything else that may differ
    if resumed is not None:
        return int(resumed.progress["seed"])
    return (
        broadcast_object_list([secrets.randbelow(2**31)])[0]
        if accelerator.num_processes > 1
        else secrets.randbelow(2**31)
    )


def sample_requests(config: RunConfig, family: ModelFamily, seed: int) -> list[PromptRequest]:
    """The sample pictures; none unless something asks for samples."""
    step = family.latents.format.resolution_step
    steered = config.control_net is not None
    return requested_samples(config.sampling, family.description, resolution_step=step, seed=seed, steered=steered)


def trained_parameters(run: Run) -> dict[str, nn.Parameter]:
    """What the optimizer changes, by the names of the state for resuming."""
    changed = {id(parameter) for parameter in run.parameters}
    named = {name: value for name, value in run.trainable.named_parameters() if id(value) in changed}
    assert len(named) == len(changed), "the optimizer changes what has no name in the state"
    return named


def sample_taker(config: RunConfig, requests: Sequence[PromptRequest], text_side: TextSide) -> hooks.SampleTaker | None:
    """What draws the samples; None when there are no prompts."""
    if not requests:
        return None
    skip = SkipLayerGuidance.of(config.sampling)
    return hooks.SampleTaker(requests, text_side.prompts, skip, config.sampling.preview_every)


def make_hooks(run: Run, taker: hooks.SampleTaker | None, validation: Validation | None) -> list[StepHook]:
    """The hooks in the order in which they act: what changes weights, then what looks at them, then what saves them."""
    config = run.config
    made: list[StepHook] = []
    if config.network is not None and config.network.scale_weight_norms:
        made.append(hooks.scale_weight_norms(config.network.scale_weight_norms))
    if run.average is not None:
        made.append(hooks.average(run.average, config.ema.ema_update_interval))
    made.append(hooks.log_numbers())
    if validation is not None:
        steps, epochs = config.validation.validate_every_n_steps, config.validation.validate_every_n_epochs
        made.append(hooks.validate(validation, steps=steps, epochs=epochs if steps or epochs else 1))
    if taker is not None:
        steps, epochs = config.sampling.sample_every_n_steps, config.sampling.sample_every_n_epochs
        made.append(hooks.take_samples(taker, steps=steps, epochs=epochs))
    return made + saving_hooks(run)


def log_path(config: RunConfig) -> str:
    """The JSON-lines file with every step's numbers."""
    return os.path.join(config.saving.output_dir, f"{config.saving.output_name}-log.jsonl")


def resolved_path(config: RunConfig) -> str:
    """The resolved configuration, to run again with ``--config_file``."""
    return os.path.join(config.saving.output_dir, f"{config.saving.output_name}-run.toml")
