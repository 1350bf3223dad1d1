"""SimpleTuner's ``multidatabackend.json`` in our words: one dataset per backend."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_SAME_NAME = (
    "resolution_type",
    "crop",
    "crop_style",
    "crop_aspect",
    "crop_aspect_buckets",
    "minimum_aspect_ratio",
    "maximum_aspect_ratio",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "probability",
    "is_regularisation_data",
    "start_epoch",
    "end_epoch",
    "start_step",
    "end_step",
    "disabled",
)
_NEUTRAL: Mapping[str, Any] = {
    "crop": False,
    "minimum_image_size": 0,
    "maximum_image_size": 0,
    "target_downsample_size": 0,
    "probability": 1,
    "is_regularisation_data": False,
    "start_epoch": 1,
    "start_step": 0,
    "disabled": False,
}
"""Values that mean the same as leaving the key out."""

_NOT_NEEDED = {
    "id": None,
    "type": None,
    "dataset_type": None,
    "default": None,
    "metadata_backend": None,
    "skip_file_discovery": None,
    "preserve_data_backend_cache": None,
    "write_batch_size": None,
    "read_batch_size": None,
    "image_embeds": None,
    "text_embeds": None,
    "cache_dir": None,
    "cache_dir_vae": None,
    "hash_filenames": None,
    "config": None,
    "aws_bucket_name": None,
    "aws_data_prefix": None,
}
"""Keys that are read elsewhere, or that say how to do what is always done here."""

_REASONS = {
    "aws_access_key_id": "credentials come from the environment (AWS_ACCESS_KEY_ID)",
    "aws_secret_access_key": "credentials come from the environment (AWS_SECRET_ACCESS_KEY)",
    "aws_region_name": "it comes from the environment (AWS_REGION)",
    "aws_endpoint_url": "it comes from the environment (AWS_ENDPOINT_URL)",
    "vae_cache_clear_each_epoch": "a cached random crop stays the same; random_crop without cached latents changes it",
    "caption_filter_list": "captions are not filtered; edit the files",
    "conditioning_data": "only data of the type mask has a place here (conditioning_data_dir)",
}


@dataclass
class Datasets:
    """What became of the backends.

    Attributes:
        tables: The keys of each ``[[datasets]]``, its subset's under ``subsets``.
        names: The backend of each table.
        left_out: What has no counterpart, a line each.
        notes: What was written in another way, a line each.
    """

    tables: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def translate_backends(backends: Sequence[Mapping[str, Any]], *, adapters: bool) -> Datasets:
    """This turns the list of backends into datasets.

    Args:
        backends: The file's content; keys may carry leading dashes.
        adapters: Whether an adapter is trained; only then the base model can teach.
    """
    result = Datasets()
    plain = [{key.lstrip("-"): value for key, value in backend.items()} for backend in backends]
    by_id = {backend.get("id"): backend for backend in plain}
    masks = {backend.get("conditioning_data") for backend in plain}
    for backend in plain:
        name, kind = str(backend.get("id", "")), backend.get("dataset_type", "image")
        if kind in ("text_embeds", "image_embeds"):
            continue  # one store for all here
        if kind == "conditioning" and name in masks:
            continue
        if kind not in ("image", "eval"):
            result.left_out.append(f"{name}: dataset_type {kind}: there are pictures and masks only")
            continue
        table = _translated(backend, name, by_id, result, adapters=adapters)
        if table is not None:
            if kind == "eval":
                table["role"] = "validation"
            result.tables.append(table)
            result.names.append(name)
    return result


def _translated(
    backend: Mapping[str, Any], name: str, by_id: Mapping[Any, Mapping[str, Any]], result: Datasets, *, adapters: bool
) -> dict[str, Any] | None:
    folder = _folder(backend)
    if folder is None:
        result.left_out.append(
            f"{name}: type {backend.get('type')}: pictures come from folders, buckets (type aws) and lists of files"
        )
        return None
    table: dict[str, Any] = {}
    if "resolution" in backend:
        megapixels = backend.get("resolution_type") == "area"
        table["resolution"] = float(backend["resolution"]) if megapixels else int(backend["resolution"])
    for key in _SAME_NAME:
        if key in backend and backend[key] is not None and backend[key] != _NEUTRAL.get(key, ""):
            table[key] = backend[key]
    result.notes += [f"{name}: {line}" for line in _adjusted(table, adapters=adapters)]
    subset = dict(_subset(backend, folder, result, name))
    if backend.get("conditioning_data") is not None:
        mask = by_id.get(backend["conditioning_data"], {})
        if mask.get("conditioning_type") == "mask":
            subset["conditioning_data_dir"] = _folder(mask)
        else:
            result.left_out.append(f"{name}: conditioning_data: {_REASONS['conditioning_data']}")
    known = {"resolution", "instance_data_dir", "caption_strategy", "conditioning_data", "repeats", *_SAME_NAME}
    for key in backend:
        if key not in known and key not in _NOT_NEEDED and key not in _CAPTION_KEYS:
            result.left_out.append(f"{name}: {key}: {_REASONS.get(key, 'has no counterpart')}")
    table["subsets"] = [subset]
    return table


def _folder(backend: Mapping[str, Any]) -> str | None:
    if backend.get("type", "local") == "aws":
        parts = [backend.get("aws_bucket_name"), backend.get("aws_data_prefix") or backend.get("instance_data_dir")]
        return "s3://" + "/".join(str(part).strip("/") for part in parts if part)
    folder = backend.get("instance_data_dir") or backend.get("instance_data_root")
    return folder if backend.get("type", "local") in ("local", "csv", "parquet") else None


def _adjusted(table: dict[str, Any], *, adapters: bool) -> Iterator[str]:
    """Changes ``table`` where SimpleTuner ignores a key that would be refused here, and says so."""
    if not table.get("crop"):
        for key in ("crop_style", "crop_aspect", "crop_aspect_buckets", "maximum_image_size", "target_downsample_size"):
            if table.pop(key, None) is not None:
                yield f"{key} left out: it acts on cropped pictures alone (crop), and these keep their shape"
    else:
        if ("maximum_image_size" in table) != ("target_downsample_size" in table):
            for key in ("maximum_image_size", "target_downsample_size"):
                if table.pop(key, None) is not None:
                    yield f"{key} left out: it acts together with the other of the two"
        if table.get("crop_aspect", "square") in ("square", "preserve") and table.pop("crop_aspect_buckets", None):
            yield "crop_aspect_buckets left out: crop_aspect doesn't choose among them"
    if table.get("is_regularisation_data") and not adapters:
        del table["is_regularisation_data"]
        yield "is_regularisation_data left out: a full fine-tune has no adapter to switch off, so it acts on none"


_CAPTION_KEYS = (
    "instance_prompt",
    "prepend_instance_prompt",
    "only_instance_prompt",
    "caption_shuffle",
    "parquet",
    "csv_file",
    "csv_caption_column",
    "csv_url_column",
    "csv_cache_dir",
)


def _subset(backend: Mapping[str, Any], folder: str, result: Datasets, name: str) -> Iterator[tuple[str, Any]]:
    yield "image_dir", folder
    yield "recursive", True  # SimpleTuner always looks into sub-folders
    if (repeats := int(backend.get("repeats") or 0)) > 0:
        yield "num_repeats", repeats + 1
    strategy, prompt = backend.get("caption_strategy", "filename"), backend.get("instance_prompt")
    if backend.get("only_instance_prompt"):
        strategy = "instanceprompt"
    yield "caption_strategy", strategy
    if strategy == "instanceprompt":
        yield "class_tokens", prompt or ""
    elif prompt and backend.get("prepend_instance_prompt"):
        yield "caption_prefix", prompt
    if strategy == "parquet":
        columns = backend.get("parquet") or {}
        yield "metadata_file", columns.get("path") or os.path.join(folder, "metadata.parquet")
        yield from _columns(columns.get("filename_column"), columns.get("caption_column"))
        for key in sorted(set(columns) - {"path", "filename_column", "caption_column"}):
            result.left_out.append(f"{name}: parquet.{key}: names and captions are read, the rest is looked at itself")
    elif strategy == "csv":
        yield "metadata_file", backend.get("csv_file") or os.path.join(folder, "metadata.csv")
        yield from _columns(None, backend.get("csv_caption_column"))
        if backend.get("csv_url_column"):
            result.left_out.append(f"{name}: csv_url_column: pictures are not downloaded; put them into image_dir")
    shuffle = backend.get("caption_shuffle") or {}
    if shuffle.get("enable"):
        yield "shuffle_caption", True
        if shuffle.get("position_start"):
            yield "keep_tokens", int(shuffle["position_start"])
        if shuffle.get("split_on", "comma") not in ("comma", ","):
            yield "caption_separator", {"space": " ", "period": "."}.get(shuffle["split_on"], shuffle["split_on"])
        if shuffle.get("count"):
            result.notes.append(
                f"{name}: caption_shuffle.count {shuffle['count']}: with cached text features add "
                f"--caption_variants {shuffle['count']}; without, every visit shuffles anew"
            )


def _columns(filename: str | None, caption: str | None) -> Iterator[tuple[str, Any]]:
    if filename:
        yield "filename_column", filename
    if caption:
        yield "caption_column", caption
