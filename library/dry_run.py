"""What a run would do, as far as file headers and a scan of the datasets tell; it loads no torch."""

import os
from collections import Counter
from collections.abc import Iterator

from library.config.run import RunConfig
from library.data.buckets import place_all
from library.data.discovery import Discovery, discover
from library.data.file_index import FileIndex
from library.data.plan import BatchPlan
from library.families import family_files, family_options
from library.records import ModelDescription


def report(config: RunConfig) -> list[str]:
    """This describes the model, the datasets and the length of the run, one line each.

    Raises:
        ConfigError: What a run would stop at: pictures or captions that can't be read.
    """
    files = family_files(config.family_name)
    description = files.describe(files.locate(config.model, config.family), config.family)
    index = os.path.join(config.cache_dir, "files.sqlite")
    seed = config.training.seed or 0
    discovery = discover(
        config.datasets,
        FileIndex(index if os.path.isfile(index) else None),
        skip_bad_images=config.data.skip_bad_images,
        validation_seed=seed if config.data.validation_seed is None else config.data.validation_seed,
    )
    return [
        *_model_lines(description),
        *(f"note: {note}" for note in discovery.notes),
        *_plan_lines(config, discovery, seed, description.largest_side),
    ]


def _model_lines(description: ModelDescription) -> Iterator[str]:
    sizes = ", ".join(f"{name} {value}" for name, value in description.sizes.items())
    yield f"model: {description.title}, {description.parameters:,} parameters in the denoiser ({sizes})"


def _plan_lines(config: RunConfig, discovery: Discovery, seed: int, largest_side: int | None) -> Iterator[str]:
    step = family_options(config.family_name).RESOLUTION_STEP
    samples, datasets = discovery.samples, config.datasets
    placements = place_all(samples, datasets, step, largest_side)
    for number, dataset in enumerate(datasets):
        buckets: Counter[str] = Counter()
        for sample, placement in zip(samples, placements):
            if sample.dataset == number:
                buckets[str(placement.bucket)] += sample.num_repeats
        pictures = sum(sample.dataset == number for sample in samples)
        visits = sum(buckets.values())
        listed = ", ".join(f"{bucket} ({visits})" for bucket, visits in sorted(buckets.items()))
        yield (
            f"datasets[{number}]: {pictures} pictures at {dataset.resolution}, {visits} visits per epoch in "
            f"batches of {dataset.batch_size}; buckets (visits): {listed}"
        )
    if discovery.validation:
        yield f"validation: {len(discovery.validation)} pictures held out"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = config.training.gradient_accumulation_steps
    plan = BatchPlan(samples, placements, datasets, seed=seed, micro_batches_per_step=processes * accumulation)
    epochs = config.training.max_train_epochs
    steps = config.training.max_train_steps if epochs is None else epochs * plan.steps_per_epoch
    shared = f"{_counted(processes, 'process', 'processes')}, {_counted(accumulation, 'micro-batch', 'micro-batches')}"
    yield (
        f"steps: {steps} optimizer steps, {plan.steps_per_epoch} per epoch, {steps / plan.steps_per_epoch:.4g} epochs; "
        f"{shared} per step each"
    )


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
