"""What a person should know of the data before a run: one record, which is printed and shown.

The start-up report and ``--dry_run`` print it (``report_lines``); ``tools/inspect_dataset.py`` makes a page of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from library.config.run import RunConfig
from library.data import report_remarks
from library.data.buckets import Placement
from library.data.discovery import Discovery
from library.data.file_index import FileIndex
from library.data.plan import BatchPlan
from library.data.report_cache import CacheNeeds, cache_needs
from library.data.report_captions import Cuts, Window, find_cuts
from library.data.report_facts import DatasetFacts, Steps, count_steps, dataset_facts, first_epoch
from library.data.report_remarks import Remark
from library.records import LatentFormat


@dataclass(frozen=True)
class DataReport:
    """Everything that is said about the data of a run.

    Attributes:
        remarks: What to look at, the gravest first.
        notes: What else happened to the data.
        datasets: One entry per dataset.
        cuts: Captions that are too long for an encoder.
        windows: Text encoder -> tokens that it reads; empty: not known.
        cache: What cached latents and text features take; None: nothing is cached.
        steps: How long the run is.
    """

    remarks: tuple[Remark, ...]
    notes: tuple[str, ...]
    datasets: tuple[DatasetFacts, ...]
    cuts: tuple[Cuts, ...]
    windows: Mapping[str, int]
    cache: CacheNeeds | None
    steps: Steps


def report_data(
    config: RunConfig,
    discovery: Discovery,
    placements: Sequence[Placement],
    validation_placements: Sequence[Placement],
    plan: BatchPlan,
    *,
    latents: LatentFormat,
    text_numbers: int = 0,
    windows: Mapping[str, Window] | None = None,
    processes: int = 1,
    index: FileIndex | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """This counts what the datasets hold, and finds what a person should look at.

    Args:
        config: The run.
        discovery: What was found.
        placements: Of the training samples.
        validation_placements: Of the validation samples.
        plan: Of the training samples.
        latents: Format of the family's latents.
        text_numbers: Numbers in the features of one caption; 0: not known.
        windows: Text encoder -> its tokenizer; None: not known.
        processes: Processes that train together.
        index: Remembers what is known about captions.
        progress: Is told how many of how many new captions have been tokenized.
    """
    samples, validation = discovery.samples, discovery.validation
    everything = (*samples, *validation)
    datasets = dataset_facts(config.datasets, discovery, placements, validation_placements, first_epoch(plan))
    cuts = find_cuts(everything, config.datasets, windows or {}, index, progress)
    cache = cache_needs(config, samples, placements, validation, validation_placements, latents, text_numbers)
    steps = count_steps(config, plan, processes)
    idle = plan.problem(steps.total)
    return DataReport(
        remarks=(
            *report_remarks.left_out(discovery.skipped),
            *([] if idle is None else [Remark("idle steps", idle)]),
            *report_remarks.cache_too_large(cache),
            *report_remarks.captionless(everything),
            *report_remarks.cut_captions(everything, cuts, windows or {}),
            *report_remarks.copies(everything, discovery.duplicates, near=False),
            *report_remarks.copies(everything, discovery.near_duplicates, near=True),
            *report_remarks.strongly_enlarged(samples, placements),
            *report_remarks.short_batches(datasets),
        ),
        notes=report_remarks.other_notes(discovery.notes, discovery.skipped),
        datasets=datasets,
        cuts=cuts,
        windows={name: window.length for name, window in (windows or {}).items()},
        cache=cache,
        steps=steps,
    )
