"""Which size each picture gets: buckets of similar area, and how a picture is resized and cropped into one.

Whole-number arithmetic throughout, so that a placement is the same on every machine.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from library.config.dataset import DatasetConfig
from library.config.errors import ConfigError
from library.records import Box, Resolution, Sample


class Placement(NamedTuple):
    """How a picture becomes its bucket's size.

    Attributes:
        bucket: The size that it ends with.
        resized: The size that it is resized to first; it covers the bucket.
        crop: The part of the resized picture that stays: its centre.
    """

    bucket: Resolution
    resized: Resolution
    crop: Box


def place(size: Resolution, dataset: DatasetConfig, step: int) -> Placement:
    """This chooses the bucket of a picture, and how the picture is resized and cropped into it.

    Args:
        size: The picture's size, its orientation applied.
        dataset: Size and bucket settings.
        step: Both sides of a bucket must be multiples of this many pixels; what the model needs.

    Raises:
        ValueError: The picture has no pixels, or the dataset's sizes are no multiples of ``step``.
    """
    if min(size) < 1:
        raise ValueError(f"a picture of {size} has no pixels")
    if not dataset.enable_bucket:
        if any(side % step for side in dataset.resolution):
            raise ValueError(f"resolution {dataset.resolution} is not a multiple of {step} on both sides")
        return _centred(dataset.resolution, _cover(size, dataset.resolution))
    if dataset.bucket_reso_steps % step:
        raise ValueError(f"bucket_reso_steps {dataset.bucket_reso_steps} is not a multiple of {step}")
    if dataset.bucket_no_upscale:
        return _place_without_upscale(size, dataset.resolution.area, dataset.bucket_reso_steps)
    buckets = bucket_resolutions(
        dataset.resolution, dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps
    )
    bucket = size if size in buckets else nearest_shape(size, buckets)
    return _centred(bucket, _cover(size, bucket))


def place_all(
    samples: Sequence[Sample], datasets: Sequence[DatasetConfig], step: int, largest_side: int | None = None
) -> tuple[Placement, ...]:
    """This places every picture.

    Args:
        samples: The pictures.
        datasets: The datasets that they belong to.
        step: See ``place``.
        largest_side: The longest side in pixels that the model can take; None: any.

    Raises:
        ConfigError: Pictures get a longer side than that; one line per dataset.
    """
    placements = tuple(place(sample.size, datasets[sample.dataset], step) for sample in samples)
    beyond: dict[int, list[str]] = {}
    for sample, placement in zip(samples, placements):
        if largest_side is not None and max(placement.bucket) > largest_side:
            beyond.setdefault(sample.dataset, []).append(f"{sample.path} ({placement.bucket})")
    if beyond:
        raise ConfigError(
            "\n".join(_beyond(number, datasets[number], found, largest_side) for number, found in beyond.items())
        )
    return placements


def _beyond(number: int, dataset: DatasetConfig, found: Sequence[str], largest_side: int | None) -> str:
    assert largest_side is not None
    step = dataset.bucket_reso_steps
    remedy = "lower resolution" if dataset.bucket_no_upscale else f"set max_bucket_reso = {largest_side // step * step}"
    return (
        f"datasets[{number}]: the model's table of positions ends at {largest_side} pixels per side, and {len(found)} "
        f"of its pictures get more, such as {found[0]}; {remedy}"
    )


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
    square = math.isqrt(resolution.area) // step * step
    if square < step:
        raise ValueError(f"no bucket with sides of {step} pixels has an area of at most {resolution}")
    buckets = {Resolution(square, square)}
    for width in range(minimum, maximum + 1, step):
        height = min(maximum, resolution.area // width // step * step)
        if height >= minimum:
            buckets |= {Resolution(width, height), Resolution(height, width)}
    return tuple(sorted(buckets))


def nearest_shape(size: Resolution, buckets: Sequence[Resolution]) -> Resolution:
    """The bucket whose width to height ratio differs least from the picture's; the first of equals."""
    common = math.lcm(*(bucket.height for bucket in buckets))  # brings the differences to one denominator

    def difference(bucket: Resolution) -> int:
        return abs(size.width * bucket.height - bucket.width * size.height) * (common // bucket.height)

    return min(buckets, key=difference)


def _place_without_upscale(size: Resolution, area: int, step: int) -> Placement:
    resized = size
    if size.area > area:
        by_width, at_width = _shrunk(size, area, step)
        by_height, at_height = map(_swapped, _shrunk(_swapped(size), area, step))
        resized = at_height if nearest_shape(size, (by_height, by_width)) == by_height else at_width
    bucket = Resolution(*(_floored(side, step) for side in resized))
    if resized.width < bucket.width or resized.height < bucket.height:  # a side below one step
        resized = _cover(resized, bucket)
    return _centred(bucket, resized)


def _shrunk(size: Resolution, area: int, step: int) -> tuple[Resolution, Resolution]:
    """The bucket of about ``area`` whose width is rounded first, and the picture's size at that width."""
    ideal = (math.isqrt(4 * area * size.width // size.height) + 1) // 2  # sqrt(area * ratio), rounded
    width = _floored(ideal, step)
    exact_height = _rounded(width * size.height, size.width)
    return Resolution(width, _floored(exact_height, step)), Resolution(width, exact_height)


def _cover(size: Resolution, bucket: Resolution) -> Resolution:
    """The picture's size when it is scaled to just cover the bucket."""
    if size.width * bucket.height > bucket.width * size.height:
        return Resolution(_rounded(size.width * bucket.height, size.height), bucket.height)
    return Resolution(bucket.width, _rounded(size.height * bucket.width, size.width))


def _centred(bucket: Resolution, resized: Resolution) -> Placement:
    left, top = (resized.width - bucket.width) // 2, (resized.height - bucket.height) // 2
    return Placement(bucket, resized, Box(left, top, left + bucket.width, top + bucket.height))


def _floored(side: int, step: int) -> int:
    """The largest multiple of the step that isn't longer, and at least one step: a side is never 0."""
    return max(1, side // step) * step


def _rounded(numerator: int, denominator: int) -> int:
    """The quotient, rounded half up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _swapped(size: Resolution) -> Resolution:
    return Resolution(size.height, size.width)
