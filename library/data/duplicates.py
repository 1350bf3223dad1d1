"""Pictures that a dataset holds several times: the same bytes, or nearly the same to the eye."""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from library.records import Sample

if TYPE_CHECKING:
    import numpy

MOST_DIFFERENT_BITS = 4
"""Pictures are nearly the same when so many of the 64 bits of their perceptual hashes differ, or fewer."""

_BITS = 64
_BANDS = 6

Groups = tuple[tuple[str, ...], ...]


def same_content(samples: Sequence[Sample]) -> Groups:
    """The groups of two and more files of one dataset with the same content; samples come by dataset."""
    return _groups(samples, attrgetter("content"))


def look_alikes(samples: Sequence[Sample], hashes: Mapping[str, int]) -> Groups:
    """The groups of two and more pictures of one dataset that look nearly the same, each content once.

    A picture belongs to a group when it is near to any member of it.

    Args:
        samples: All samples, by dataset.
        hashes: Content -> perceptual hash.
    """
    seen: set[tuple[int, str]] = set()
    distinct = []
    for sample in samples:
        if sample.content in hashes and (sample.dataset, sample.content) not in seen:
            seen.add((sample.dataset, sample.content))
            distinct.append(sample)
    cluster = _clusters(sorted({hashes[sample.content] for sample in distinct}))
    return _groups(distinct, lambda sample: cluster[hashes[sample.content]])


def _groups(samples: Sequence[Sample], of: Callable[[Sample], Hashable]) -> Groups:
    found: dict[tuple[str, ...], None] = {}  # a folder that two datasets use has the same groups in both
    for _, part in itertools.groupby(samples, key=attrgetter("dataset")):
        own = list(part)
        keys = [of(sample) for sample in own]
        if len(set(keys)) == len(keys):
            continue
        groups: dict[Hashable, dict[str, None]] = {}
        for key, sample in zip(keys, own):
            groups.setdefault(key, {})[sample.path] = None
        found |= {tuple(paths): None for paths in groups.values() if len(paths) > 1}
    return tuple(found)


def _clusters(hashes: Sequence[int]) -> dict[int, int]:
    """Hash -> the lowest hash of those that it hangs together with by steps of few bits.

    Two hashes that differ in at most 4 bits agree in at least 2 of 6 bands of bits, so only hashes that do are
    compared. A band takes its bits from all over the picture: all pictures with a white border would share one of
    neighbouring bits.
    """
    import numpy

    values = numpy.array(hashes, dtype=numpy.uint64)
    cluster = numpy.arange(len(values))
    bands = [sum(1 << bit for bit in range(band, _BITS, _BANDS)) for band in range(_BANDS)]
    for pair in itertools.combinations(bands, _BANDS - MOST_DIFFERENT_BITS):
        _join_near(values, cluster, numpy.uint64(sum(pair)))
    return {value: hashes[lowest] for value, lowest in zip(hashes, cluster.tolist())}


def _join_near(values: "numpy.ndarray", cluster: "numpy.ndarray", mask: "numpy.uint64") -> None:
    """This joins the clusters of near values among those that agree in the bits of a mask."""
    import numpy

    order = numpy.argsort(values & mask, kind="stable")
    ordered, keys = values[order], (values & mask)[order]
    rows = numpy.arange(len(values))
    shift = 0
    while len(rows):
        shift += 1
        rows = rows[rows + shift < len(values)]
        rows = rows[keys[rows] == keys[rows + shift]]
        near = rows[numpy.bitwise_count(ordered[rows] ^ ordered[rows + shift]) <= MOST_DIFFERENT_BITS]
        one, other = order[near], order[near + shift]
        while True:
            apart = cluster[one] != cluster[other]
            if not apart.any():
                break
            low = numpy.minimum(cluster[one[apart]], cluster[other[apart]])
            high = numpy.maximum(cluster[one[apart]], cluster[other[apart]])
            target = numpy.arange(len(values))
            numpy.minimum.at(target, high, low)
            cluster[:] = target[cluster]
