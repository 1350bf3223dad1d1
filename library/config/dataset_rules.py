"""What may not stand together in a dataset, and what the model doesn't allow; one line per mistake.

Values that were reported already (``INVALID``) are not judged again.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from library.config.dataset_file import INVALID, Table
from library.config.pictures import BUCKET_TABLES, Megapixels
from library.config.urls import is_remote
from library.records import Resolution

METADATA_KINDS = ("json", "jsonl", "csv", "parquet")


def dataset_problems(
    prefix: str,
    table: Table,
    values: Mapping[str, Any],
    subsets: Sequence[Mapping[str, Any]],
    resolution_step: int,
) -> Iterator[str]:
    """What is wrong with a dataset and its subsets.

    Args:
        prefix: What stands before the name of a key of the dataset: ``dataset.toml: datasets[0].`` or ``--``.
        table: Where the dataset and its subsets stand.
        values: The dataset's values, inherited.
        subsets: The subsets' values, inherited.
        resolution_step: Both sides of a picture must be multiples of this many pixels.
    """
    if INVALID not in values.values():
        yield from _size_problems(prefix, values, resolution_step)
        yield from _crop_problems(prefix, values)
    seen: dict[tuple[str, ...], str] = {}
    for inner, subset in zip(table.inner, subsets):
        if INVALID not in (subset[key] for key in ("image_dir", "metadata_file", "conditioning_data_dir")):
            yield from _folder_problems(inner.place, subset, seen)
        if INVALID in subset.values():
            continue
        yield from _metadata_problems(inner, subset)
        yield from _use_problems(inner, subset)
        if values["role"] == "validation":
            yield from _validation_problems(inner)
        if subset["random_crop"] and values["crop_style"] != "center":
            yield (
                f"{inner.place}.random_crop: crops anywhere, but crop_style {values['crop_style']} says where; "
                "remove one"
            )
    if subsets and all(subset["is_reg"] is True for subset in subsets):
        yield f"{table.place}: all subsets are is_reg; add one with the pictures to learn"


def _size_problems(prefix: str, values: Mapping[str, Any], resolution_step: int) -> Iterator[str]:
    """What is wrong with the sizes of a dataset."""
    resolution, step, table = values["resolution"], values["bucket_reso_steps"], values["bucket_table"]
    if table is not None:
        yield from _table_problems(prefix, values, resolution_step)
        return
    if resolution is None:
        yield f"{prefix}resolution: missing; give the size of the pictures, such as 1024"
        return
    if (values["resolution_type"] == "area") != isinstance(resolution, Megapixels):
        wanted = "area" if isinstance(resolution, Megapixels) else "pixel_area or pixel"
        yield (
            f"{prefix}resolution: {resolution} with resolution_type {values['resolution_type']}; megapixels have a "
            f"decimal point and need resolution_type area, pixels have none. This value needs {wanted}"
        )
        return
    if values["resolution_type"] != "pixel_area" and values["bucket_no_upscale"]:
        yield f"{prefix}bucket_no_upscale: works with resolution_type pixel_area alone; remove one"
    if values["resolution_type"] == "pixel" and resolution.width != resolution.height:
        yield f"{prefix}resolution: {resolution} is not one short side, as resolution_type pixel wants; give one number"
    if values["enable_bucket"] and step % resolution_step:
        fitting_step = -(-step // resolution_step) * resolution_step
        yield (
            f"{prefix}bucket_reso_steps: {step} is not a multiple of {resolution_step}, which this model needs; "
            f"{fitting_step} is"
        )
    if isinstance(resolution, Megapixels):
        if (resolution * 1e6) ** 0.5 < step:
            yield f"{prefix}resolution: {resolution:g} megapixels is smaller than one bucket step ({step})"
        return
    if any(side % resolution_step for side in resolution):
        fitting = Resolution(*(max(1, round(side / resolution_step)) * resolution_step for side in resolution))
        yield f"{prefix}resolution: {resolution} is not a multiple of {resolution_step} on both sides; {fitting} is"
    if not values["enable_bucket"]:
        return
    if math.isqrt(resolution.area) < step:
        yield f"{prefix}resolution: {resolution} is smaller than one bucket step ({step}); lower bucket_reso_steps"
    if values["bucket_no_upscale"]:
        return
    low, high = values["min_bucket_reso"], values["max_bucket_reso"]
    if low > high:
        yield f"{prefix}min_bucket_reso: {low} is more than max_bucket_reso {high}"
    elif low > min(resolution):
        yield f"{prefix}min_bucket_reso: {low} is above the short side of {resolution}; at most {min(resolution)}"
    elif high < max(resolution):
        yield f"{prefix}max_bucket_reso: {high} is below the long side of {resolution}; at least {max(resolution)}"


def _table_problems(prefix: str, values: Mapping[str, Any], resolution_step: int) -> Iterator[str]:
    table, resolution = values["bucket_table"], values["resolution"]
    side = BUCKET_TABLES[table]
    if resolution is not None and resolution != Resolution(side, side):
        yield f"{prefix}bucket_table: {table} has pictures of {side}x{side}, but resolution is {resolution}; remove it"
    # the sides of the table for 1024 are multiples of 64, the others are it scaled, but for 2880, whose are too
    if math.gcd(64, side // 16) % resolution_step and side != 2880:
        yield f"{prefix}bucket_table: sides in {table} are not all multiples of {resolution_step}, as this model needs"
    for key, wrong in (("enable_bucket", False), ("bucket_no_upscale", True)):
        if values[key] is wrong:
            yield f"{prefix}bucket_table: does nothing with {key} = {str(wrong).lower()}; remove one"
    if values["resolution_type"] != "pixel_area":
        yield f"{prefix}bucket_table: does nothing with resolution_type {values['resolution_type']}; remove one"


def _crop_problems(prefix: str, values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with crops and limits of sizes and shapes."""
    maximum, target = values["maximum_image_size"], values["target_downsample_size"]
    if (maximum is None) != (target is None):
        yield f"{prefix}maximum_image_size: goes together with target_downsample_size; give both or none"
    elif maximum is not None and target > maximum:
        yield f"{prefix}target_downsample_size: {target:g} is above maximum_image_size {maximum:g}"
    low, high = values["minimum_aspect_ratio"], values["maximum_aspect_ratio"]
    if low is not None and high is not None and low > high:
        yield f"{prefix}minimum_aspect_ratio: {low:g} is above maximum_aspect_ratio {high:g}"
    if not values["crop"]:
        for key, default in (("maximum_image_size", None), ("crop_aspect", "square"), ("crop_aspect_buckets", ())):
            if values[key] != default:
                yield f"{prefix}{key}: does nothing without crop = true; add that or remove it"
        return
    if values["crop_aspect"] in ("closest", "random") and not values["crop_aspect_buckets"]:
        yield f"{prefix}crop_aspect: {values['crop_aspect']} needs crop_aspect_buckets, such as [1.0, 0.75, 1.5]"
    if values["crop_aspect"] in ("square", "preserve") and values["crop_aspect_buckets"]:
        yield f"{prefix}crop_aspect_buckets: does nothing with crop_aspect {values['crop_aspect']}; remove it"
    if values["crop_aspect"] == "preserve":
        return
    for key, wrong in (("enable_bucket", False), ("bucket_no_upscale", True)):
        if values[key] is wrong:
            yield f"{prefix}crop: gives every picture the shape of crop_aspect; remove {key} = {str(wrong).lower()}"
    if values["bucket_table"] is not None:
        yield f"{prefix}crop: gives every picture the shape of crop_aspect; remove bucket_table"


def _folder_problems(place: str, subset: Mapping[str, Any], seen: dict[tuple[str, ...], str]) -> Iterator[str]:
    """What is wrong with the folders and files that a subset names."""
    folder, metadata, masks = subset["image_dir"], subset["metadata_file"], subset["conditioning_data_dir"]
    if folder is None and metadata is None:
        yield f"{place}.image_dir: missing; name the folder with the pictures"
        return
    for key, path, is_there, kind in (
        ("image_dir", folder, os.path.isdir, "folder"),
        ("metadata_file", metadata, os.path.isfile, "file"),
        ("conditioning_data_dir", masks, os.path.isdir, "folder"),
    ):
        if path is not None and not is_remote(path) and not is_there(path):
            other = "a file, not a folder" if kind == "folder" else "a folder, not a file"
            what = f"is {other}" if os.path.exists(path) else f"no such {kind}"
            hint = "" if os.path.isabs(path) else f"; relative paths start at {os.getcwd()}"
            yield f"{place}.{key}: {path}: {what}{hint}"
            return
    identity = tuple("" if path is None else _real(path) for path in (folder, metadata, masks))
    if identity in seen:
        yield (
            f"{place}.image_dir: {folder or metadata} is the folder of {seen[identity]} too; raise num_repeats there, "
            "or add a [[datasets]] for another size"
        )
    seen.setdefault(identity, place)


def _real(path: str) -> str:
    return path if is_remote(path) else os.path.realpath(path)


def _metadata_problems(inner: Table, subset: Mapping[str, Any]) -> Iterator[str]:
    place, strategy, metadata = inner.place, subset["caption_strategy"], subset["metadata_file"]
    kind = None if metadata is None else os.path.splitext(metadata)[1][1:].lower()
    if kind is not None and kind not in METADATA_KINDS:
        yield f"{place}.metadata_file: {metadata} is none of {', '.join(METADATA_KINDS)}"
    elif strategy in METADATA_KINDS and kind != strategy:
        has = "there is no metadata_file" if metadata is None else f"metadata_file is {metadata}"
        yield f"{place}.caption_strategy: {strategy} needs a metadata_file of that kind, but {has}"
    if kind not in ("csv", "parquet"):
        for key in ("filename_column", "caption_column"):
            if inner.values.get(key) is not None:
                yield f"{place}.{key}: does nothing without a metadata_file that is csv or parquet; remove it"
    if strategy == "instanceprompt" and subset["class_tokens"] is None:
        yield f"{place}.caption_strategy: instanceprompt needs class_tokens, the caption of all pictures"


def _use_problems(inner: Table, subset: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with how a subset's pictures are used. What it inherits may be meant for its neighbours."""
    place, own = inner.place, inner.values
    has_masks = subset["alpha_mask"] or subset["conditioning_data_dir"] is not None
    if own.get("unmasked_weight") and not has_masks:
        yield f"{place}.unmasked_weight: does nothing without masks (conditioning_data_dir or alpha_mask); remove it"
    if subset["is_reg"] and subset["is_regularisation_data"]:
        yield f"{place}.is_reg: excludes is_regularisation_data; keep one kind of regularisation"
    if "regularisation_weight" in own and not subset["is_regularisation_data"]:
        yield f"{place}.regularisation_weight: does nothing without is_regularisation_data = true; remove it"
    if subset["random_crop"] and subset["face_crop_aug_range"] is not None:
        yield f"{place}.random_crop: excludes face_crop_aug_range; keep one"
    for name in ("start", "end"):
        if subset[f"{name}_epoch"] is not None and subset[f"{name}_step"] is not None:
            yield f"{place}.{name}_step: excludes {name}_epoch; keep one"
    for unit in ("epoch", "step"):
        first, last = subset[f"start_{unit}"], subset[f"end_{unit}"]
        if first is not None and last is not None and last < first:
            yield f"{place}.end_{unit}: {last} is before start_{unit} {first}"


def _validation_problems(inner: Table) -> Iterator[str]:
    """What a subset says that isn't trained on, and that would act in training alone."""
    idle = ("is_reg", "is_regularisation_data", "validation_split", "num_repeats", "probability")
    for key in (*idle, "start_epoch", "end_epoch", "start_step", "end_step"):
        if inner.values.get(key):
            yield f'{inner.place}.{key}: does nothing in a dataset with role = "validation"; remove it'
