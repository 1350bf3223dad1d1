"""Captions for the report: which pictures have none, and what is cut because an encoder reads no further."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.captions import caption_versions
from library.data.file_index import FileIndex
from library.records import Sample

_FEW_BARS = 8
_SOME_VERSIONS = 16
_CHUNK = 4096


class Window(Protocol):
    """How much of a caption a text encoder reads: what the report needs of its tokenizer."""

    @property
    def length(self) -> int:
        """Tokens per caption."""
        ...

    def may_cut(self, caption: str) -> bool:
        """Whether the caption may be too long; False is certain."""
        ...

    def seen(self, captions: Sequence[str]) -> list[int]:
        """How many characters of each caption are kept."""
        ...

    def window_identity(self) -> str:
        """A name for everything that ``seen`` depends on."""
        ...


@dataclass(frozen=True)
class Cuts:
    """What encoders with equal windows don't read.

    Attributes:
        encoders: Their names.
        length: Tokens per caption.
        kept: Caption that is cut -> how many of its characters are read.
        samples: Key of each sample that has such a caption -> the one of which most is lost.
    """

    encoders: tuple[str, ...]
    length: int
    kept: Mapping[str, int]
    samples: Mapping[str, str]


def whole_captions(captions: Sequence[str], subset: SubsetConfig) -> tuple[str, ...]:
    """The captions that encoders may get, with all tags in their written order; dropout's empty one apart.

    Where wildcards make very many, they are some of those.
    """
    return _versions(captions, _in_order(subset))


def _in_order(subset: SubsetConfig) -> SubsetConfig:
    """The subset with all tags in their written order."""
    return dataclasses.replace(subset, shuffle_caption=False, caption_tag_dropout_rate=0.0, token_warmup_step=0.0)


def _versions(captions: Sequence[str], subset: SubsetConfig) -> tuple[str, ...]:
    # every bar between choices at most doubles the number of captions
    bars = sum(line.count("|") for line in captions) if subset.enable_wildcard else 0
    return caption_versions(captions, subset, None if bars <= _FEW_BARS else _SOME_VERSIONS)


def find_cuts(
    samples: Sequence[Sample],
    datasets: Sequence[DatasetConfig],
    windows: Mapping[str, Window],
    index: FileIndex | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Cuts, ...]:
    """This finds the captions that are too long for a text encoder.

    Args:
        samples: The pictures.
        datasets: What becomes of their captions.
        windows: Name of each encoder -> its window.
        index: Remembers what is known about captions.
        progress: Is told how many of how many captions have been looked at, where any must be.

    Returns:
        One entry per group of encoders that cut the same; none where nothing is cut.
    """
    if not windows:
        return ()
    in_order = [[_in_order(subset) for subset in dataset.subsets] for dataset in datasets]
    captions = [_versions(sample.captions, in_order[sample.dataset][sample.subset]) for sample in samples]
    distinct = dict.fromkeys(caption for texts in captions for caption in texts)
    by_window: dict[str, dict[str, int]] = {}
    groups: list[tuple[list[str], int, dict[str, int]]] = []
    for name, window in windows.items():
        identity = window.window_identity()
        if identity not in by_window:
            by_window[identity] = _kept(window, identity, distinct, index, progress)
        kept = by_window[identity]
        if not kept:
            continue
        same = next((names for names, length, others in groups if (length, others) == (window.length, kept)), None)
        if same is None:
            groups.append(([name], window.length, kept))
        else:
            same.append(name)
    return tuple(
        Cuts(tuple(names), length, kept, _samples_with(kept, samples, captions)) for names, length, kept in groups
    )


def _samples_with(
    kept: Mapping[str, int], samples: Sequence[Sample], captions: Sequence[tuple[str, ...]]
) -> dict[str, str]:
    """Sample key -> the caption of which most is lost, for samples that lose anything."""
    found = {}
    for sample, texts in zip(samples, captions):
        cut = [text for text in texts if text in kept]
        if cut:
            found[sample.key] = max(cut, key=lambda text: len(text) - kept[text])
    return found


def _kept(
    window: Window,
    identity: str,
    captions: Iterable[str],
    index: FileIndex | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, int]:
    """The captions that are cut, and how many characters of them are kept. Each is tokenized once and remembered."""
    long = [caption for caption in captions if window.may_cut(caption)]
    known = [None] * len(long) if index is None else index.kept(identity, long)
    counts = {caption: count for caption, count in zip(long, known) if count is not None}
    unknown = [caption for caption, count in zip(long, known) if count is None]
    for start in range(0, len(unknown), _CHUNK):
        part = unknown[start : start + _CHUNK]
        kept = window.seen(part)
        counts.update(zip(part, kept))
        if index is not None:
            index.remember_kept(identity, part, kept)
        if progress is not None:
            progress(start + len(part), len(unknown))
    return {caption: counts[caption] for caption in long if counts[caption] < len(caption)}
