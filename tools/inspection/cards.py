"""What the dataset page says about single pictures: which are shown, how they are cut, what encoders read of them."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.buckets import Placement
from library.data.captions import caption_for_visit
from library.data.report import DataReport
from library.data.report_captions import Window, whole_captions
from library.data.report_facts import enlargement, has_mask
from library.randomness import python_random
from library.records import Resolution, Sample

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Part:
    """A stretch of a caption.

    Attributes:
        text: The stretch.
        unread: The encoders that don't read it, since it lies behind their window.
        lost: Whether none reads it.
    """

    text: str
    unread: tuple[str, ...] = ()
    lost: bool = False


@dataclass(frozen=True)
class Frame:
    """A rectangle as shares of a picture's sides."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Card:
    """One picture of the page.

    Attributes:
        sample: The picture.
        placement: How it is scaled and cropped.
        held_out: Whether the loss is measured on it, instead of training on it.
        kinds: Kinds of the remarks about it.
        caption: What the encoders get at its first visit, dropout apart.
        changes: Whether the caption is another at other visits.
        same: Keys of the pictures with the same content, or nearly the same look.
        flips: Whether it is mirrored at half of its visits.
        moves: Whether it is cropped elsewhere at every visit.
        masked: Whether it has a loss mask.
    """

    sample: Sample
    placement: Placement
    held_out: bool
    kinds: tuple[str, ...]
    caption: tuple[Part, ...]
    changes: bool
    same: tuple[str, ...]
    flips: bool
    moves: bool
    masked: bool

    @property
    def crop(self) -> Frame:
        """The part of the whole picture that is trained on."""
        (width, height), box = self.placement.resized, self.placement.crop
        return Frame(
            box.left / width, box.top / height, (box.right - box.left) / width, (box.bottom - box.top) / height
        )

    @property
    def enlargement(self) -> float:
        """By which factor its longer side grows; below 1 it shrinks."""
        return enlargement(self.sample, self.placement)


@dataclass(frozen=True)
class Shelf:
    """The pictures of one dataset and one bucket.

    Attributes:
        dataset: Index of the dataset.
        bucket: Their size.
        pictures: How many there are, those that aren't shown included.
        cards: Those that are shown.
    """

    dataset: int
    bucket: Resolution
    pictures: int
    cards: tuple[Card, ...]


def make_shelves(
    report: DataReport,
    datasets: Sequence[DatasetConfig],
    trained: Sequence[tuple[Sample, Placement]],
    held_out: Sequence[tuple[Sample, Placement]],
    duplicates: Sequence[Sequence[str]],
    windows: Mapping[str, Window],
    *,
    seed: int,
    variants: int | None,
    most: int,
) -> tuple[Shelf, ...]:
    """This chooses the pictures that are shown, and finds out what the page says of them.

    Args:
        report: What was remarked.
        datasets: The datasets.
        trained: What is trained on.
        held_out: What the loss is measured on.
        duplicates: Groups of paths of equal or similar pictures.
        windows: Text encoder -> its tokenizer.
        seed: Of the run, for what is random in captions.
        variants: How many versions of each caption are cached; None: every visit makes its own.
        most: Pictures per dataset; those that something is remarked of come first, the others are spread evenly.

    Returns:
        By dataset, then from upright to wide.
    """
    kinds = _kinds(report)
    everything = [(sample, placement, False) for sample, placement in trained]
    everything += [(sample, placement, True) for sample, placement in held_out]
    shelves: dict[tuple[int, Resolution], list[tuple[Sample, Placement, bool]]] = defaultdict(list)
    for entry in everything:
        shelves[entry[0].dataset, entry[1].bucket].append(entry)
    shown = _chosen(shelves, kinds, most)
    same = _same([sample for sample, _, _ in everything], duplicates)
    entries = [entry for members in shelves.values() for entry in members if entry[0].key in shown]
    texts = [_caption(sample, datasets, seed, variants) for sample, _, _ in entries]
    parts = dict(zip((sample.key for sample, _, _ in entries), split_captions(texts, windows)))

    def card(sample: Sample, placement: Placement, is_held_out: bool) -> Card:
        dataset = datasets[sample.dataset].without_augmentation() if is_held_out else datasets[sample.dataset]
        subset = dataset.subsets[sample.subset]
        return Card(
            sample=sample,
            placement=placement,
            held_out=is_held_out,
            kinds=kinds.get(sample.key, ()),
            caption=parts[sample.key],
            changes=_changes(sample, subset),
            same=same.get(sample.key, ()),
            flips=subset.flip_aug,
            moves=subset.random_crop or (subset.face_crop_aug_range is not None and sample.focus is not None),
            masked=has_mask(sample, datasets),
        )

    return tuple(
        Shelf(number, bucket, len(members), tuple(card(*entry) for entry in members if entry[0].key in shown))
        for (number, bucket), members in sorted(shelves.items(), key=lambda item: _shelf_order(*item[0]))
    )


def split_captions(captions: Sequence[str], windows: Mapping[str, Window]) -> list[tuple[Part, ...]]:
    """This cuts captions where an encoder stops to read."""
    kept = {name: window.seen(captions) for name, window in windows.items()}
    split = []
    for row, caption in enumerate(captions):
        ends = {name: counts[row] for name, counts in kept.items()}
        bounds = [0, *sorted({end for end in ends.values() if end < len(caption)}), len(caption)]
        parts = []
        for start, end in itertools.pairwise(bounds):
            unread = tuple(name for name, last in ends.items() if last <= start < len(caption))
            if end > start:
                parts.append(Part(caption[start:end], unread, bool(ends) and len(unread) == len(ends)))
        split.append(tuple(parts))
    return split


def _shelf_order(number: int, bucket: Resolution) -> tuple[int, float, int]:
    return number, bucket.width / bucket.height, bucket.area


def _kinds(report: DataReport) -> dict[str, tuple[str, ...]]:
    kinds: dict[str, tuple[str, ...]] = {}
    for remark in report.remarks:
        for key in remark.samples:
            kinds[key] = tuple(dict.fromkeys((*kinds.get(key, ()), remark.kind)))
    return kinds


def _chosen(
    shelves: Mapping[tuple[int, Resolution], Sequence[tuple[Sample, Placement, bool]]],
    kinds: Mapping[str, object],
    most: int,
) -> set[str]:
    """Keys of the pictures that are shown."""
    ranks: dict[int, list[tuple[bool, float, str]]] = defaultdict(list)
    for (number, _), members in shelves.items():
        for row, (sample, _, _) in enumerate(members):
            # multiples of the golden ratio spread evenly: however many are taken, they are from all over the bucket
            ranks[number].append((sample.key not in kinds, row * _GOLDEN % 1, sample.key))
    return {key for ranked in ranks.values() for _, _, key in sorted(ranked)[:most]}


def _same(samples: Sequence[Sample], groups: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Sample key -> keys of the same dataset's pictures that are the same or nearly."""
    paths = {path for group in groups for path in group}
    keys: dict[tuple[int, str], list[str]] = defaultdict(list)
    for sample in samples:
        if sample.path in paths:
            keys[sample.dataset, sample.path].append(sample.key)
    same: dict[str, tuple[str, ...]] = {}
    for group in groups:
        for number in {number for number, path in keys if path in group}:
            members = [key for path in group for key in keys.get((number, path), ())]
            for key in members:
                others = (other for other in members if other != key)
                same[key] = tuple(dict.fromkeys((*same.get(key, ()), *others)))
    return same


def _caption(sample: Sample, datasets: Sequence[DatasetConfig], seed: int, variants: int | None) -> str:
    """The caption of a picture's first visit, were it not dropped, with as many tags as at the end of a warm-up."""
    subset = dataclasses.replace(
        datasets[sample.dataset].subsets[sample.subset],
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        token_warmup_step=0.0,
    )
    rng = python_random(seed, "caption", sample.key, 0)
    return caption_for_visit(sample.captions, subset, rng, epoch=0, step=0, max_steps=1, variants=variants)[0]


def _changes(sample: Sample, subset: SubsetConfig) -> bool:
    """Whether visits differ in their captions, dropout apart."""
    tags = subset.shuffle_caption or subset.caption_tag_dropout_rate > 0 or subset.token_warmup_step > 0
    return (tags and any(sample.captions)) or len(whole_captions(sample.captions, subset)) > 1
