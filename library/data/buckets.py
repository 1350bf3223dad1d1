"""Which size each picture gets, how it is resized and what is cut off; and which pictures are left out for their size.

The arithmetic of sizes is in ``shapes``, the published tables in ``bucket_tables``.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import NamedTuple

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.errors import ConfigError
from library.data.bucket_tables import table_resolutions, table_step
from library.data.shapes import (
    bucket_resolutions,
    cover,
    covers,
    nearest_shape,
    rounded,
    scaled_to_area,
    square_of,
    with_short_side,
    without_upscale,
)
from library.randomness import seed_for
from library.records import Box, Resolution, Sample

Face = tuple[int, int, int, int]
"""Centre and size of a face (x, y, width, height) in pixels of the upright picture."""


class Placement(NamedTuple):
    """How a picture becomes its bucket's size.

    Attributes:
        bucket: The size that it ends with.
        resized: The size that it is resized to first; it covers the bucket.
        crop: The part of the resized picture that stays.
    """

    bucket: Resolution
    resized: Resolution
    crop: Box


def place(
    size: Resolution, dataset: DatasetConfig, step: int, *, content: str = "", focus: Face | None = None
) -> Placement:
    """This chooses the bucket of a picture, and how the picture is resized and cropped into it.

    Args:
        size: The picture's size, its orientation applied.
        dataset: Size, bucket and crop settings.
        step: Both sides of a bucket must be multiples of this many pixels; what the model needs.
        content: Hash of the picture's file. What is random about its placement depends on this alone.
        focus: A face in it, for ``crop_style`` face.

    Raises:
        ValueError: The picture has no pixels, or the dataset's sizes are no multiples of ``step``.
    """
    bucket, resized = _fit(size, dataset, step, content)
    return Placement(bucket, resized, _styled_crop(size, bucket, resized, dataset.crop_style, content, focus))


def place_all(
    samples: Sequence[Sample], datasets: Sequence[DatasetConfig], step: int, largest_side: int | None = None
) -> tuple[Placement, ...]:
    """This places every picture. Equal placements are one object.

    Args:
        samples: The pictures.
        datasets: The datasets that they belong to.
        step: See ``place``.
        largest_side: The longest side in pixels that the model can take; None: any.

    Raises:
        ConfigError: Pictures get a longer side than that; one line per dataset.
    """
    random_shapes = [dataset.crop and dataset.crop_aspect == "random" for dataset in datasets]
    fits: dict[tuple[int, Resolution], tuple[Resolution, Resolution]] = {}
    known: dict[tuple[int, Resolution, str, Face | None], Placement] = {}
    shared: dict[Placement, Placement] = {}
    placements = []
    for sample in samples:
        number, size = sample.dataset, sample.size
        style = datasets[number].crop_style
        content = sample.content if style == "random" or random_shapes[number] else ""
        focus = sample.focus if style == "face" else None
        key = (number, size, content, focus)
        placement = known.get(key)
        if placement is None:
            fit_key = (number, size)
            fit = fits.get(fit_key)
            if fit is None:
                fit = _fit(size, datasets[number], step, content)
                if style in ("random", "face") and not random_shapes[number]:  # the next crop is another, its size not
                    fits[fit_key] = fit
            bucket, resized = fit
            placement = Placement(bucket, resized, _styled_crop(size, bucket, resized, style, content, focus))
            placement = known[key] = shared.setdefault(placement, placement)
        placements.append(placement)
    if largest_side is not None and any(max(placement.bucket) > largest_side for placement in shared):
        raise ConfigError("\n".join(_beyond(samples, placements, datasets, largest_side)))
    return tuple(placements)


def vary(
    placement: Placement,
    size: Resolution,
    dataset: DatasetConfig,
    subset: SubsetConfig,
    focus: Face | None,
    rng: Random,
) -> Placement:
    """This gives the placement for one visit: another crop where ``random_crop`` or ``face_crop_aug_range`` ask for it.

    Args:
        placement: What ``place`` gave.
        size: The picture's size.
        dataset: Its dataset.
        subset: Its subset.
        focus: A face in the picture. Without one, ``face_crop_aug_range`` changes nothing.
        rng: For this visit alone.
    """
    bucket = placement.bucket
    if subset.random_crop:
        return placement._replace(crop=_crop_at(bucket, placement.resized, rng.random(), rng.random()))
    if subset.face_crop_aug_range is None or focus is None:
        return placement
    low, high = subset.face_crop_aug_range
    short = max(1, round((low + (high - low) * rng.random()) * max(focus[2:])))
    if dataset.bucket_no_upscale:
        short = max(short, min(bucket))
    resized = Resolution(*(rounded(side * min(bucket), short) for side in size))
    if not covers(resized, bucket):  # the window would be larger than the picture
        resized = cover(size, bucket)
    return Placement(bucket, resized, _crop_around(focus, size, bucket, resized))


def exclusion(size: Resolution, dataset: DatasetConfig) -> str | None:
    """Why a picture is left out for its size or shape, with the numbers; None: it isn't."""
    skip, smallest = dataset.skip_image_resolution, dataset.minimum_image_size
    if skip is not None and size.area <= skip.area:
        return f"{size} has at most the area of skip_image_resolution {skip}"
    if smallest is not None and (measure := _measure(size, dataset.resolution_type)) < smallest:
        what = {
            "pixel_area": f"the area of a square of {measure:g}",
            "pixel": f"a short side of {measure:g}",
            "area": f"{measure:g} megapixels",
        }
        return f"{size} has {what[dataset.resolution_type]}, below minimum_image_size {smallest:g}"
    ratio, low, high = size.width / size.height, dataset.minimum_aspect_ratio, dataset.maximum_aspect_ratio
    if low is not None and ratio < low:
        return f"{size} has the aspect ratio {ratio:.4g}, below minimum_aspect_ratio {low:g}"
    if high is not None and ratio > high:
        return f"{size} has the aspect ratio {ratio:.4g}, above maximum_aspect_ratio {high:g}"
    return None


def _fit(size: Resolution, dataset: DatasetConfig, step: int, content: str) -> tuple[Resolution, Resolution]:
    """The picture's bucket, and the size that it is resized to."""
    if min(size) < 1:
        raise ValueError(f"a picture of {size} has no pixels")
    one_shape = dataset.crop and dataset.crop_aspect != "preserve"
    if one_shape or dataset.enable_bucket:
        _check_steps(dataset, step)
    elif any(side % step for side in dataset.resolution):
        raise ValueError(f"resolution {dataset.resolution} is not a multiple of {step} on both sides")
    if dataset.enable_bucket and dataset.bucket_no_upscale and not one_shape:
        bucket, resized = without_upscale(
            size, dataset.resolution.area, dataset.bucket_reso_steps, dataset.bucket_selection
        )
    else:
        if one_shape:
            bucket = _crop_bucket(size, dataset, content)
        elif dataset.enable_bucket:
            bucket = _nearest_bucket(size, dataset, dataset.bucket_selection)
        else:
            bucket = dataset.resolution
        resized = cover(size, bucket)
    if dataset.crop and dataset.maximum_image_size is not None:
        resized = _downsampled(size, bucket, dataset)
    return bucket, resized


def _check_steps(dataset: DatasetConfig, step: int) -> None:
    if dataset.bucket_table is None:
        if dataset.bucket_reso_steps % step:
            raise ValueError(f"bucket_reso_steps {dataset.bucket_reso_steps} is not a multiple of {step}")
    elif table_step(dataset.bucket_table) % step:
        raise ValueError(f"sides in bucket_table {dataset.bucket_table} are not all multiples of {step}")


def _nearest_bucket(shape: Resolution, dataset: DatasetConfig, selection: str) -> Resolution:
    """The bucket of a picture, or of any shape. No two have the same shape, so a picture of a bucket's size gets it."""
    if dataset.resolution_type == "pixel":
        return with_short_side(shape, dataset.resolution.width, dataset.max_bucket_reso, dataset.bucket_reso_steps)
    if dataset.bucket_table is not None:
        buckets = table_resolutions(dataset.bucket_table)
    else:
        buckets = bucket_resolutions(
            dataset.resolution, dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps
        )
    return nearest_shape(shape, buckets, selection)


def _crop_bucket(size: Resolution, dataset: DatasetConfig, content: str) -> Resolution:
    """The bucket that ``crop`` gives a picture."""
    if dataset.crop_aspect == "square":
        return square_of(dataset.resolution.area, dataset.bucket_reso_steps)
    shapes = _shapes_of(dataset.crop_aspect_buckets)
    if dataset.crop_aspect == "random":
        chosen = shapes[seed_for("crop aspect", content) * len(shapes) >> 63]
    else:
        chosen = nearest_shape(size, shapes, "log")
    return _nearest_bucket(chosen, dataset, "log")


@functools.lru_cache(maxsize=64)
def _shapes_of(aspects: tuple[float, ...]) -> tuple[Resolution, ...]:
    """The smallest sizes of these aspect ratios, as they are written."""
    ratios = [Fraction(str(aspect)) for aspect in aspects]
    return tuple(Resolution(ratio.numerator, ratio.denominator) for ratio in ratios)


def _downsampled(size: Resolution, bucket: Resolution, dataset: DatasetConfig) -> Resolution:
    """The size of a picture before it is cropped: larger ones than the maximum are shrunk, others keep theirs."""
    maximum, target, kind = dataset.maximum_image_size, dataset.target_downsample_size, dataset.resolution_type
    assert maximum is not None and target is not None
    if _measure(size, kind) <= maximum:
        resized = size
    elif kind == "pixel":
        resized = cover(size, Resolution(round(target), round(target)))
    else:
        resized = scaled_to_area(size, round(target * 1e6 if kind == "area" else target * target))
    return resized if covers(resized, bucket) else cover(size, bucket)


def _measure(size: Resolution, resolution_type: str) -> float:
    """How large a picture is, in what ``resolution_type`` counts."""
    if resolution_type == "pixel":
        return min(size)
    return size.area / 1e6 if resolution_type == "area" else math.sqrt(size.area)


def _styled_crop(
    size: Resolution, bucket: Resolution, resized: Resolution, style: str, content: str, focus: Face | None
) -> Box:
    """The part of the resized picture that stays."""
    if style == "corner":
        return _box(0, 0, bucket)
    if style == "random":
        seed = seed_for("crop", content)  # 63 bits
        return _crop_at(bucket, resized, (seed >> 32) / 2**31, seed % 2**32 / 2**32)
    if style == "face" and focus is not None:
        return _crop_around(focus, size, bucket, resized)
    return _box((resized.width - bucket.width) // 2, (resized.height - bucket.height) // 2, bucket)


def _crop_at(bucket: Resolution, resized: Resolution, across: float, down: float) -> Box:
    """One of the bucket's places in the resized picture; each is as likely for two draws from [0, 1)."""
    left = int(across * (resized.width - bucket.width + 1))
    return _box(left, int(down * (resized.height - bucket.height + 1)), bucket)


def _crop_around(focus: Face, size: Resolution, bucket: Resolution, resized: Resolution) -> Box:
    """The bucket's place whose middle is as near to the face's as the borders allow."""
    left, top = (
        min(max(0, rounded(2 * centre * scaled - side * own, 2 * own)), scaled - side)
        for centre, own, side, scaled in zip(focus, size, bucket, resized)
    )
    return _box(left, top, bucket)


def _box(left: int, top: int, bucket: Resolution) -> Box:
    return Box(left, top, left + bucket.width, top + bucket.height)


def _beyond(
    samples: Sequence[Sample], placements: Sequence[Placement], datasets: Sequence[DatasetConfig], largest_side: int
) -> list[str]:
    """One line for each dataset whose pictures get longer sides than the model can take."""
    found: dict[int, list[str]] = {}
    for sample, placement in zip(samples, placements):
        if max(placement.bucket) > largest_side:
            found.setdefault(sample.dataset, []).append(f"{sample.path} ({placement.bucket})")
    return [
        f"datasets[{number}]: the model's table of positions ends at {largest_side} pixels per side, and {len(names)} "
        f"of its pictures get more, such as {names[0]}; {_remedy(datasets[number], largest_side)}"
        for number, names in sorted(found.items())
    ]


def _remedy(dataset: DatasetConfig, largest_side: int) -> str:
    limit = largest_side // dataset.bucket_reso_steps * dataset.bucket_reso_steps
    if dataset.bucket_table is not None:
        return "choose a bucket_table of smaller sizes"
    if not dataset.enable_bucket or dataset.bucket_no_upscale or limit < max(dataset.resolution):
        return "lower resolution"
    return f"set max_bucket_reso = {limit}"
