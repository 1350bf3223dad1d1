"""Sizes that pictures can get and which of them is nearest in shape, in whole numbers, so that no machine decides
otherwise.
"""

import functools
import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction

from library.records import Resolution


@functools.lru_cache(maxsize=64)
def bucket_resolutions(resolution: Resolution, minimum: int, maximum: int, step: int) -> tuple[Resolution, ...]:
    """This lists the buckets of at most ``resolution``'s area, sorted.

    Args:
        resolution: Its area is the most that a bucket has.
        minimum: Shortest side, a multiple of ``step``.
        maximum: Longest side, a multiple of ``step``.
        step: All sides are multiples of it.

    Raises:
        ValueError: No bucket fits, or a limit is no multiple of the step.
    """
    if minimum < step or minimum % step or maximum % step:
        raise ValueError(f"bucket sides from {minimum} to {maximum} are not multiples of the step {step}")
    buckets = {square_of(resolution.area, step)}
    for width in range(minimum, maximum + 1, step):
        height = min(maximum, resolution.area // width // step * step)
        if height >= minimum:
            buckets |= {Resolution(width, height), Resolution(height, width)}
    return tuple(sorted(buckets))


def square_of(area: int, step: int) -> Resolution:
    """The largest square of at most this area whose side is a multiple of the step.

    Raises:
        ValueError: There is none.
    """
    side = math.isqrt(area) // step * step
    if side < step:
        raise ValueError(f"no bucket with sides of {step} pixels has an area of at most {area} pixels")
    return Resolution(side, side)


def with_short_side(shape: Resolution, side: int, longest: int, step: int) -> Resolution:
    """The size of about this shape whose short side is ``side``, in multiples of the step.

    Args:
        shape: Only its ratio counts.
        side: The short side, rounded down to the step.
        longest: The most that the long side may have; it is never shorter than the short one.
        step: Both sides are multiples of it.
    """
    short = floored(side, step)
    long = max(short, min(longest, short * max(shape) // min(shape)) // step * step)
    return Resolution(long, short) if shape.width > shape.height else Resolution(short, long)


def nearest_shape(size: Resolution, buckets: Sequence[Resolution], selection: str) -> Resolution:
    """The bucket whose shape differs least from the picture's.

    Args:
        size: The picture's.
        buckets: To choose from.
        selection: ``log`` compares the logarithms of width divided by height. Of two equally near shapes it takes the
            one nearer to a square, and of equal shapes the largest; so a picture and the same one turned get the same
            bucket, turned, where the buckets have all their turned forms. ``ratio`` compares width divided by height
            itself; of equals it takes the first in order of width.
    """
    shapes = _by_ratio(tuple(buckets), selection)
    above = bisect_left(shapes, True, key=lambda shape: shape.width * size.height >= size.width * shape.height)
    if above in (0, len(shapes)):
        return shapes[max(0, above - 1)]
    low, high = shapes[above - 1], shapes[above]
    lead = _lead(size, low, high, selection)
    low_wins_ties = size.width >= size.height if selection == "log" else low < high
    return low if lead > 0 or (lead == 0 and low_wins_ties) else high


def _lead(size: Resolution, one: Resolution, other: Resolution, selection: str) -> int:
    """Above 0 where the first of two shapes is nearer to the picture's, below 0 where the second is."""

    def difference(shape: Resolution) -> tuple[int, int]:  # numerator and denominator
        here, there = size.width * shape.height, shape.width * size.height
        if selection == "log":  # the ratio of the ratios, whose logarithm is the difference of theirs
            return max(here, there), min(here, there)
        return abs(here - there), size.height * shape.height

    (numerator, denominator), (other_numerator, other_denominator) = difference(one), difference(other)
    return other_numerator * denominator - numerator * other_denominator


@functools.lru_cache(maxsize=1024)
def _by_ratio(buckets: tuple[Resolution, ...], selection: str) -> tuple[Resolution, ...]:
    """The buckets in order of width divided by height, one of each ratio."""
    by_ratio: dict[Fraction, Resolution] = {}
    for bucket in sorted(buckets, key=lambda bucket: -bucket.area if selection == "log" else bucket.width):
        by_ratio.setdefault(Fraction(bucket.width, bucket.height), bucket)
    return tuple(by_ratio[ratio] for ratio in sorted(by_ratio))


def without_upscale(size: Resolution, area: int, step: int, selection: str) -> tuple[Resolution, Resolution]:
    """The bucket of a picture that isn't enlarged, and the size that the picture is resized to.

    A picture of more than ``area`` is shrunk to about that; others keep their size. The bucket is that size, rounded
    down to the step. Only a side below one step is enlarged, to that step.

    Args:
        size: The picture's.
        area: See above.
        step: The bucket's sides are multiples of it.
        selection: How to judge the two ways to shrink, see ``nearest_shape``.
    """
    if selection == "log" and size.height > size.width:
        bucket, resized = without_upscale(swapped(size), area, step, selection)
        return swapped(bucket), swapped(resized)
    resized = size
    if size.area > area:
        by_width, at_width = _shrunk(size, area, step)
        by_height, at_height = map(swapped, _shrunk(swapped(size), area, step))
        resized = at_width if _lead(size, by_width, by_height, selection) > 0 else at_height
    bucket = Resolution(*(floored(side, step) for side in resized))
    return bucket, resized if covers(resized, bucket) else cover(resized, bucket)


def _shrunk(size: Resolution, area: int, step: int) -> tuple[Resolution, Resolution]:
    """The bucket of about ``area`` whose width is rounded first, and the picture's size at that width."""
    width = floored(_side(area, size.width, size.height), step)
    exact_height = rounded(width * size.height, size.width)
    return Resolution(width, floored(exact_height, step)), Resolution(width, exact_height)


def scaled_to_area(size: Resolution, area: int) -> Resolution:
    """The picture's size when it is scaled to about this area."""
    return Resolution(_side(area, size.width, size.height), _side(area, size.height, size.width))


def _side(area: int, own: int, other: int) -> int:
    """One side of a rectangle of this area and shape, rounded, and at least 1."""
    return max(1, (math.isqrt(4 * area * own // other) + 1) // 2)


def cover(size: Resolution, bucket: Resolution) -> Resolution:
    """The picture's size when it is scaled to just cover the bucket."""
    if size.width * bucket.height > bucket.width * size.height:
        return Resolution(rounded(size.width * bucket.height, size.height), bucket.height)
    return Resolution(bucket.width, rounded(size.height * bucket.width, size.width))


def covers(size: Resolution, bucket: Resolution) -> bool:
    """Whether the bucket can be cut from a picture of this size."""
    return size.width >= bucket.width and size.height >= bucket.height


def floored(side: int, step: int) -> int:
    """The largest multiple of the step that isn't longer, and at least one step: a side is never 0."""
    return max(1, side // step) * step


def rounded(numerator: int, denominator: int) -> int:
    """The quotient, rounded half up."""
    return (2 * numerator + denominator) // (2 * denominator)


def swapped(size: Resolution) -> Resolution:
    """The size of the picture when it is turned."""
    return Resolution(size.height, size.width)
