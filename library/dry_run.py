"""What a run would do, as far as file headers and a scan of the datasets tell; it loads no torch."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.data.buckets import Placement, place_all
from library.data.discovery import Discovery, discover
from library.data.file_index import FileIndex
from library.data.plan import BatchPlan
from library.data.report import DataReport, report_data
from library.data.report_captions import Window
from library.data.report_lines import WARNING, report_lines
from library.families import family_files, family_options, family_tokenizers
from library.records import ModelDescription


@dataclass(frozen=True)
class DataScan:
    """The data of a run, as it is found without loading anything.

    Attributes:
        discovery: What the datasets hold.
        placements: Of the training samples.
        validation_placements: Of the validation samples.
        seed: The run's seed; 0 where none is given.
        report: What is said about the data.
    """

    discovery: Discovery
    placements: tuple[Placement, ...]
    validation_placements: tuple[Placement, ...]
    seed: int
    report: DataReport


def report(config: RunConfig) -> list[str]:
    """This describes the model, the datasets and the length of the run in lines; see ``look``."""
    return look(config)[0]


def look(config: RunConfig) -> tuple[list[str], DataScan]:
    """This describes the model, the datasets and the length of the run in lines, and gives what was found.

    Raises:
        ConfigError: What a run would stop at: pictures or captions that can't be read, steps without pictures.
    """
    files = family_files(config.family_name)
    located = files.locate(config.model, config.family)
    description: ModelDescription = files.describe(located, config.family)
    try:
        windows = family_tokenizers(config.family_name).find_windows(config.model, config.family, located)
        later = []
    except ConfigError as error:
        windows = {}
        later = [f"captions: whether one is too long for an encoder is told when training starts, for now {error}"]
    scan = scan_data(config, description, windows)
    idle = [remark.text for remark in scan.report.remarks if remark.kind == "idle steps"]
    if idle:
        raise ConfigError("\n".join(idle))
    return [*_model_lines(description, config), *report_lines(scan.report), *later], scan


def scan_data(
    config: RunConfig,
    description: ModelDescription | None,
    windows: Mapping[str, Window],
    *,
    skip_bad_images: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DataScan:
    """This looks at all data of a run. What the run's index of files knows is used, and nothing is written.

    Args:
        config: The run.
        description: The model; None: any of the family.
        windows: Text encoder -> its tokenizer; empty: not known.
        skip_bad_images: Leave out pictures that can't be read even if the run would stop at them.
        progress: Is told how many of how many new files, or captions, have been looked at.

    Raises:
        ConfigError: What the run would stop at.
    """
    options = family_options(config.family_name)
    path = os.path.join(config.local_cache_dir, "files.sqlite")
    index = FileIndex(path if os.path.isfile(path) else None)
    seed = config.training.seed or 0
    discovery = discover(
        config.datasets,
        index,
        skip_bad_images=skip_bad_images or config.data.skip_bad_images,
        validation_seed=seed if config.data.validation_seed is None else config.data.validation_seed,
        decode=not config.caching.cache_latents,
        steered=config.control_net is not None,
        near_duplicates=config.data.report_near_duplicates,
        progress=progress,
    )
    largest_side = None if description is None else description.largest_side
    placements, validation_placements = (
        place_all(samples, config.datasets, options.RESOLUTION_STEP, largest_side)
        for samples in (discovery.samples, discovery.validation)
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = config.training.gradient_accumulation_steps
    plan = BatchPlan(
        discovery.samples, placements, config.datasets, seed=seed, micro_batches_per_step=processes * accumulation
    )
    made = report_data(
        config,
        discovery,
        placements,
        validation_placements,
        plan,
        latents=options.LATENTS,
        text_numbers=0 if description is None else description.text_numbers,
        windows=windows,
        processes=processes,
        index=index,
        progress=progress,
    )
    return DataScan(discovery, placements, validation_placements, seed, made)


def _model_lines(description: ModelDescription, config: RunConfig) -> Iterator[str]:
    sizes = ", ".join(f"{name} {value}" for name, value in description.sizes.items())
    yield f"model: {description.title}, {description.parameters:,} parameters in the denoiser ({sizes})"
    if warning := description.precision_warnings.get(config.training.mixed_precision):
        yield f"{WARNING}{warning}"
    yield from (f"{WARNING}{warning}" for warning in config.model_warnings(description))
