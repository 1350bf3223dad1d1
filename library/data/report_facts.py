"""The datasets of a run in numbers: pictures, buckets, batches, steps."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.config.dataset import DatasetConfig
from library.config.run import RunConfig
from library.data.buckets import Placement
from library.data.discovery import Discovery
from library.data.plan import BatchPlan
from library.records import Resolution, Sample

BatchSizes = Mapping[tuple[int, Resolution], Counter[int]]
"""Dataset and bucket -> how many micro-batches of which size the first epoch has."""


@dataclass(frozen=True)
class BucketFacts:
    """The pictures of one dataset that get one size.

    Attributes:
        size: That size.
        pictures: How many there are.
        visits: How often they are used in the run's first epoch.
        batches: In how many micro-batches.
        short: How many of those are smaller than the batch size.
    """

    size: Resolution
    pictures: int
    visits: int
    batches: int
    short: int


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset, counted.

    Attributes:
        number: Index in the configuration.
        config: Its settings.
        pictures: How many are trained on, regularisation pictures of either kind included.
        regularisation: How many of them are regularisation pictures.
        held_out: How many the loss is measured on.
        buckets: From upright to wide. Those of a dataset that is only measured have no visits.
        masks: How many of the pictures have a loss mask.
        captionless: How many have no caption.
        enlarged: How many get more pixels than they have.
        enlargement: The largest factor by which the sides of one grow; 1: none is enlarged.
        cut_away: The largest share of a picture that is cropped away.
    """

    number: int
    config: DatasetConfig
    pictures: int
    regularisation: int
    held_out: int
    buckets: tuple[BucketFacts, ...]
    masks: int
    captionless: int
    enlarged: int
    enlargement: float
    cut_away: float

    @property
    def visits(self) -> int:
        """Uses of its pictures in the first epoch."""
        return sum(bucket.visits for bucket in self.buckets)

    @property
    def batches(self) -> int:
        """Micro-batches of the first epoch, over all processes."""
        return sum(bucket.batches for bucket in self.buckets)

    @property
    def short(self) -> int:
        """How many of them are smaller than the batch size."""
        return sum(bucket.short for bucket in self.buckets)


@dataclass(frozen=True)
class Steps:
    """How long the run is.

    Attributes:
        total: Optimizer steps.
        first_epoch: Optimizer steps of the first epoch.
        epochs: How many epochs that is.
        varies: Whether later epochs may be longer or shorter.
        processes: Processes that train together.
        accumulation: Micro-batches of each per optimizer step.
    """

    total: int
    first_epoch: int
    epochs: float
    varies: bool
    processes: int
    accumulation: int


def enlargement(sample: Sample, placement: Placement) -> float:
    """By which factor the longer side of a picture grows; below 1 it shrinks."""
    return max(placement.resized) / max(sample.size)


def has_mask(sample: Sample, datasets: Sequence[DatasetConfig]) -> bool:
    """Whether a loss mask acts on the picture, its own transparency included."""
    return sample.mask is not None or datasets[sample.dataset].subsets[sample.subset].alpha_mask


def first_epoch(plan: BatchPlan) -> BatchSizes:
    """The micro-batches of a run's first epoch; none when nothing is used in it."""
    sizes: dict[tuple[int, Resolution], Counter[int]] = defaultdict(Counter)
    steps = plan.first_step(1)
    for step in range(steps if plan.problem(steps) is None else 0):
        for micro_batch in plan.step(step):
            sizes[micro_batch.dataset, micro_batch.bucket][len(micro_batch.visits)] += 1
    return sizes


def dataset_facts(
    datasets: Sequence[DatasetConfig],
    discovery: Discovery,
    placements: Sequence[Placement],
    validation_placements: Sequence[Placement],
    batches: BatchSizes,
) -> tuple[DatasetFacts, ...]:
    """This counts the pictures of each dataset.

    Args:
        datasets: Their settings.
        discovery: What was found.
        placements: Of the training samples.
        validation_placements: Of the validation samples.
        batches: From ``first_epoch``.
    """
    counts: list[Counter[str]] = [Counter() for _ in datasets]
    buckets: list[Counter[Resolution]] = [Counter() for _ in datasets]
    largest, cut_away = [1.0] * len(datasets), [0.0] * len(datasets)
    for sample, placement in zip(discovery.samples, placements):
        number = sample.dataset
        subset, count = datasets[number].subsets[sample.subset], counts[number]
        buckets[number][placement.bucket] += 1
        factor = enlargement(sample, placement)
        count["regularisation"] += sample.is_reg or subset.is_regularisation_data
        count["masks"] += sample.mask is not None or subset.alpha_mask
        count["captionless"] += not any(sample.captions)
        count["enlarged"] += factor > 1
        largest[number] = max(largest[number], factor)
        cut_away[number] = max(cut_away[number], 1 - placement.bucket.area / placement.resized.area)
    held_out = Counter(sample.dataset for sample in discovery.validation)
    trained = [buckets[number].total() for number in range(len(datasets))]
    for sample, placement in zip(discovery.validation, validation_placements):
        if datasets[sample.dataset].role == "validation":
            buckets[sample.dataset][placement.bucket] += 1
    return tuple(
        DatasetFacts(
            number=number,
            config=dataset,
            pictures=trained[number],
            held_out=held_out[number],
            buckets=_bucket_facts(number, dataset.batch_size, buckets[number], batches),
            enlargement=largest[number],
            cut_away=cut_away[number],
            **{name: counts[number][name] for name in ("regularisation", "masks", "captionless", "enlarged")},
        )
        for number, dataset in enumerate(datasets)
    )


def _bucket_facts(
    number: int, batch_size: int, pictures: Mapping[Resolution, int], batches: BatchSizes
) -> tuple[BucketFacts, ...]:
    made = []
    for size in sorted(pictures, key=lambda size: (size.width / size.height, size.area)):
        sizes: Mapping[int, int] = batches.get((number, size), {})
        made.append(
            BucketFacts(
                size=size,
                pictures=pictures[size],
                visits=sum(length * count for length, count in sizes.items()),
                batches=sum(sizes.values()),
                short=sum(count for length, count in sizes.items() if length < batch_size),
            )
        )
    return tuple(made)


def count_steps(config: RunConfig, plan: BatchPlan, processes: int) -> Steps:
    """This says how many optimizer steps and epochs the run has.

    Args:
        config: How long it shall be.
        plan: Of its training samples.
        processes: Processes that train together.
    """
    asked = config.training.max_train_epochs
    total = config.training.max_train_steps if asked is None else plan.first_step(asked)
    begun = plan.epoch_of(total - 1)
    start, end = plan.first_step(begun), plan.first_step(begun + 1)
    return Steps(
        total=total,
        first_epoch=plan.first_step(1),
        epochs=begun + (total - start) / (end - start),
        varies=plan.varies,
        processes=processes,
        accumulation=config.training.gradient_accumulation_steps,
    )
