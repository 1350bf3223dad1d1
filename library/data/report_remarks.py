"""What a person should look at before a run: pictures left out, captions cut, copies, and so on."""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from library.data.buckets import Placement
from library.data.findings import Skipped
from library.data.report_cache import CacheNeeds
from library.data.report_captions import Cuts
from library.data.report_facts import DatasetFacts, enlargement
from library.records import Sample

STRONGLY_ENLARGED = 1.5
"""Pictures whose sides grow by more than this factor are remarked."""

MOST_DETAILS = 100
"""So many single pictures are named at most."""

_MOSTLY = 0.5
_EXCERPT = 36
_EXCLUDED = re.compile(r"(?:skip_image_resolution|m\w+imum_image_size|m\w+imum_aspect_ratio) \S+$")
_GIB = 2**30
_One = TypeVar("_One")


@dataclass(frozen=True)
class Remark:
    """Something that a person should look at before training.

    Attributes:
        kind: A few words, the same for all remarks of the kind: ``caption cut``.
        text: What it is, in one line.
        details: One line per picture or so, the worst first.
        more: How many further details there would be.
        samples: Keys of the samples that it is about.
    """

    kind: str
    text: str
    details: tuple[str, ...] = ()
    more: int = 0
    samples: frozenset[str] = frozenset()


def _remark(
    kind: str,
    text: str,
    about: Sequence[_One],
    detail: Callable[[_One], str],
    *,
    worst: Callable[[_One], float] | None = None,
    samples: Iterable[str] = (),
) -> Remark:
    """A remark that names the first of what it is about, or the worst."""
    shown = about[:MOST_DETAILS] if worst is None else heapq.nlargest(MOST_DETAILS, about, key=worst)
    return Remark(kind, text, tuple(map(detail, shown)), len(about) - len(shown), frozenset(samples))


def skip_reason(reason: str) -> str:
    """Why a picture is left out, without what is its own: ``by minimum_image_size 512``."""
    setting = _EXCLUDED.search(reason)
    if setting:
        return f"by {setting[0]}"
    return reason if reason in ("not found", "its mask can't be read") else "can't be read"


def left_out(skipped: Sequence[Skipped]) -> list[Remark]:
    """Pictures that were found and aren't used, by dataset; broken ones first."""
    datasets: dict[int, list[Skipped]] = {}
    for one in skipped:
        datasets.setdefault(one.dataset, []).append(one)
    remarks = []
    for number, own in sorted(datasets.items()):
        reasons = Counter(skip_reason(one.reason) for one in own)
        causes = ", ".join(f"{count:,} {why}" for why, count in reasons.most_common())
        broken_first = sorted(own, key=lambda one: skip_reason(one.reason).startswith("by "))
        remarks.append(
            _remark(
                "left out",
                f"datasets[{number}]: {count_of(len(own), 'picture')} left out: {causes}",
                broken_first,
                lambda one: f"{one.path}: {one.reason}",
            )
        )
    return remarks


def other_notes(notes: Sequence[str], skipped: Sequence[Skipped]) -> tuple[str, ...]:
    """The notes that say something else than ``left_out`` does."""
    files = {one.path for one in skipped}
    return tuple(note for note in notes if "left out" not in note and note.partition(": ")[0] not in files)


def cache_too_large(cache: CacheNeeds | None) -> list[Remark]:
    """A cache that doesn't fit on its disk."""
    if cache is None or cache.free is None or cache.fits:
        return []
    return [
        Remark(
            "disk",
            f"the cache takes about {cache.on_disk / _GIB:.1f} GiB, but the disk of {cache.folder} has "
            f"{cache.free / _GIB:.1f} GiB left; make room, or choose another --cache_dir",
        )
    ]


def short_batches(datasets: Sequence[DatasetFacts]) -> list[Remark]:
    """Datasets most of whose micro-batches are short."""
    return [
        Remark(
            "short batches",
            f"datasets[{dataset.number}]: {dataset.short:,} of {dataset.batches:,} micro-batches per epoch have fewer "
            f"than {dataset.config.batch_size} pictures; a larger bucket_reso_steps makes fewer buckets, so that they "
            "fill up",
        )
        for dataset in datasets
        if dataset.batches > 1 and dataset.short > _MOSTLY * dataset.batches
    ]


def captionless(samples: Sequence[Sample]) -> list[Remark]:
    """Pictures without a caption."""
    empty = [sample for sample in samples if not any(sample.captions)]
    if not empty:
        return []
    keys = (sample.key for sample in empty)
    text = f"{count_of(len(empty), 'picture')} with an empty caption"
    return [_remark("no caption", text, empty, lambda sample: sample.path, samples=keys)]


def cut_captions(samples: Sequence[Sample], cuts: Sequence[Cuts], encoders: Iterable[str]) -> list[Remark]:
    """Captions that are longer than an encoder's window, with what it doesn't read."""
    paths = {sample.key: sample.path for sample in samples} if cuts else {}
    cutting = {name for cut in cuts for name in cut.encoders}
    whole = [name for name in encoders if name not in cutting]
    remarks = []
    for cut in cuts:

        def detail(key: str, cut: Cuts = cut) -> str:
            return f"{paths[key]}: {what_is_lost(cut.samples[key], cut.kept[cut.samples[key]])}"

        def lost(key: str, cut: Cuts = cut) -> float:
            return len(cut.samples[key]) - cut.kept[cut.samples[key]]

        count = len(cut.samples)
        text = (
            f"{count_of(count, 'caption')} {'is' if count == 1 else 'are'} longer than the {cut.length} tokens that "
            f"{joined(cut.encoders)} {'reads' if len(cut.encoders) == 1 else 'read'}"
        )
        if whole:
            text += f"; {joined(whole)} can take {'it' if count == 1 else 'them'}"
        remarks.append(_remark("caption cut", text, list(cut.samples), detail, worst=lost, samples=cut.samples))
    return remarks


def what_is_lost(caption: str, kept: int) -> str:
    """The end of what is read of a caption and the beginning of what isn't."""
    read, lost = caption[:kept].rstrip(), caption[kept:].lstrip()
    end = read if len(read) <= _EXCERPT else f"...{read[-_EXCERPT:]}"
    beginning = lost if len(lost) <= _EXCERPT else f"{lost[:_EXCERPT]}..."
    return f'reads "{end}", not "{beginning}" ({count_of(len(lost), "character")})'


def copies(samples: Sequence[Sample], groups: Sequence[Sequence[str]], *, near: bool) -> list[Remark]:
    """Pictures that are there several times, to the byte or nearly."""
    if not groups:
        return []
    paths = {path for group in groups for path in group}
    keys = [sample.key for sample in samples if sample.path in paths]
    kind, what = ("look-alike", "look nearly the same") if near else ("copy", "have the same content")
    more = sum(map(len, groups)) - len(groups)
    text = f"{count_of(len(paths), 'picture')} {what} as others: {more:,} more than needed"
    return [_remark(kind, text, groups, " = ".join if not near else " ~ ".join, samples=keys)]


def strongly_enlarged(samples: Sequence[Sample], placements: Sequence[Placement]) -> list[Remark]:
    """Pictures that have far fewer pixels than they are trained at."""
    grown = [
        (factor, sample, placement)
        for sample, placement in zip(samples, placements)
        if (factor := enlargement(sample, placement)) > STRONGLY_ENLARGED
    ]
    if not grown:
        return []
    return [
        _remark(
            "enlarged",
            f"{count_of(len(grown), 'picture')} enlarged more than {STRONGLY_ENLARGED:g} times; minimum_image_size "
            "leaves such pictures out, bucket_no_upscale trains them at their own size",
            grown,
            lambda one: f"{one[1].path}: {one[1].size} to {one[2].resized} ({one[0]:.2g} times)",
            worst=lambda one: one[0],
            samples=(sample.key for _, sample, _ in grown),
        )
    ]


def joined(names: Sequence[str]) -> str:
    """``CLIP-L``, ``CLIP-L and CLIP-G``, ``CLIP-L, CLIP-G and T5``."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


def count_of(count: int, one: str, many: str | None = None) -> str:
    """``1 picture``, ``1,200 pictures``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
