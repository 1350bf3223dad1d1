"""The dataset TOML: ``[general]`` -> ``[[datasets]]`` -> ``[[datasets.subsets]]``, inherited once and checked.

A value is looked up in the subset, its dataset, ``[general]`` and the command line, and is the option's default
otherwise.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.data import DataConfig
from library.config.dataset_file import INVALID, Scopes, Table, read_tables
from library.config.errors import ConfigError
from library.config.options import option, options_of
from library.records import Resolution

_NAMED_FOLDER = re.compile(r"(\d+)(?:_(.*))?")


@dataclass(frozen=True, kw_only=True)
class FolderKeys:
    """Keys of a subset that are no command line options."""

    image_dir: str | None = option(None, "Folder with the pictures; its sub-folders are not read.")
    is_reg: bool = option(False, "The pictures are regularisation pictures.")
    class_tokens: str | None = option(None, "Caption of pictures that have no caption file.")


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """One folder of pictures; the attributes are the keys of ``[[datasets.subsets]]``."""

    image_dir: str
    is_reg: bool = False
    class_tokens: str | None = None
    num_repeats: int = DataConfig.dataset_repeats
    caption_extension: str = DataConfig.caption_extension
    caption_separator: str = DataConfig.caption_separator
    shuffle_caption: bool = DataConfig.shuffle_caption
    keep_tokens: int = DataConfig.keep_tokens
    keep_tokens_separator: str = DataConfig.keep_tokens_separator
    secondary_separator: str | None = DataConfig.secondary_separator
    enable_wildcard: bool = DataConfig.enable_wildcard
    caption_prefix: str | None = DataConfig.caption_prefix
    caption_suffix: str | None = DataConfig.caption_suffix
    token_warmup_min: int = DataConfig.token_warmup_min
    token_warmup_step: float = DataConfig.token_warmup_step
    caption_dropout_rate: float = DataConfig.caption_dropout_rate
    caption_dropout_every_n_epochs: int = DataConfig.caption_dropout_every_n_epochs
    caption_tag_dropout_rate: float = DataConfig.caption_tag_dropout_rate
    flip_aug: bool = DataConfig.flip_aug


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Pictures that share sizes and a batch size; the attributes are the keys of ``[[datasets]]``."""

    resolution: Resolution
    batch_size: int = DataConfig.train_batch_size
    enable_bucket: bool = DataConfig.enable_bucket
    min_bucket_reso: int = DataConfig.min_bucket_reso
    max_bucket_reso: int = DataConfig.max_bucket_reso
    bucket_reso_steps: int = DataConfig.bucket_reso_steps
    bucket_no_upscale: bool = DataConfig.bucket_no_upscale
    validation_split: float = DataConfig.validation_split
    validation_seed: int | None = DataConfig.validation_seed
    subsets: tuple[SubsetConfig, ...]

    def without_augmentation(self) -> "DatasetConfig":
        """The dataset as validation reads it: nothing is left to chance but the choice between wildcards."""
        calm: dict[str, Any] = {
            "shuffle_caption": False,
            "token_warmup_step": 0.0,
            "caption_dropout_rate": 0.0,
            "caption_dropout_every_n_epochs": 0,
            "caption_tag_dropout_rate": 0.0,
            "flip_aug": False,
        }
        return dataclasses.replace(self, subsets=tuple(dataclasses.replace(subset, **calm) for subset in self.subsets))


_OPTION_NAMES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
"""TOML key -> option, where they differ."""


def read_datasets(data: DataConfig, *, resolution_step: int) -> tuple[DatasetConfig, ...]:
    """This reads the datasets of a run and checks all that can be checked without opening a picture.

    Args:
        data: Where the datasets are described, and the values for what they leave unsaid.
        resolution_step: Both sides of a picture must be multiples of this many pixels.

    Returns:
        The datasets, with the limits of their buckets rounded to multiples of the bucket step.

    Raises:
        ConfigError: One line per mistake, all at once.
    """
    problems: list[str] = []
    if data.dataset_config is not None:
        problems += [
            f"--{name} does nothing beside --dataset_config; remove one of the two"
            for name in ("train_data_dir", "reg_data_dir")
            if getattr(data, name) is not None
        ]
        general, tables = read_tables(Path(data.dataset_config), _scopes(), problems)
    elif data.train_data_dir is not None:
        general, tables = {}, (_table_of_folders(data, problems),)
    else:
        what = (
            "no pictures to train on" if data.reg_data_dir is None else "--reg_data_dir alone gives nothing to train on"
        )
        raise ConfigError(f"{what}: give --dataset_config (a dataset TOML) or --train_data_dir (folders named 10_cat)")
    datasets = []
    for table in tables:
        values = _filled(DatasetConfig, [table.values, general], data)
        subsets = [_filled(SubsetConfig, [inner.values, table.values, general], data) for inner in table.inner]
        prefix = "--" if data.dataset_config is None else f"{table.place}."
        problems += _size_problems(prefix, values, resolution_step)
        problems += _folder_problems(table, subsets)
        if not problems:
            datasets.append(DatasetConfig(**values, subsets=tuple(SubsetConfig(**subset) for subset in subsets)))
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(_with_whole_steps(dataset) for dataset in datasets)


def _scopes() -> Scopes:
    options = {declared.name: declared for group in (DataConfig, FolderKeys) for declared in options_of(group)}
    dataset_keys = [field.name for field in dataclasses.fields(DatasetConfig) if field.name != "subsets"]
    subset_keys = [field.name for field in dataclasses.fields(SubsetConfig)]
    declared = {key: options[_OPTION_NAMES.get(key, key)] for key in [*dataset_keys, *subset_keys]}
    return Scopes(
        inherited={key: value for key, value in declared.items() if key not in ("image_dir", "is_reg")},
        subset={key: declared[key] for key in subset_keys},
    )


def _filled(record: type, scopes: Sequence[Mapping[str, Any]], data: DataConfig) -> dict[str, Any]:
    """The record's values, each from the first scope that has it, else from the command line or its default."""
    defaults = {**vars(FolderKeys()), **vars(data)}
    values = {}
    for field in dataclasses.fields(record):
        if field.name != "subsets":
            fallback = {field.name: defaults[_OPTION_NAMES.get(field.name, field.name)]}
            values[field.name] = next(scope[field.name] for scope in [*scopes, fallback] if field.name in scope)
    return values


def _folder_problems(table: Table, subsets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is wrong with the folders of a dataset."""
    seen: dict[str, str] = {}
    for inner, subset in zip(table.inner, subsets):
        folder = subset["image_dir"]
        if folder is INVALID:
            continue
        if folder is None:
            yield f"{inner.place}.image_dir: missing; name the folder with the pictures"
        elif not os.path.isdir(folder):
            what = "is a file, not a folder" if os.path.exists(folder) else "no such folder"
            hint = "" if os.path.isabs(folder) else f"; relative paths start at {os.getcwd()}"
            yield f"{inner.place}.image_dir: {folder}: {what}{hint}"
        elif (real := os.path.realpath(folder)) in seen:
            yield (
                f"{inner.place}.image_dir: {folder} is the folder of {seen[real]} too; raise num_repeats there, or add "
                "a [[datasets]] for another size"
            )
        else:
            seen[real] = inner.place
    if subsets and all(subset["is_reg"] is True for subset in subsets):
        yield f"{table.place}: all subsets are is_reg; add one with the pictures to learn"


def _size_problems(prefix: str, values: Mapping[str, Any], resolution_step: int) -> Iterator[str]:
    """What is wrong with the sizes of a dataset."""
    if any(values[key] is INVALID for key in values):
        return
    resolution, step = values["resolution"], values["bucket_reso_steps"]
    if resolution is None:
        yield f"{prefix}resolution: missing; give the size of the pictures, such as 1024"
        return
    if any(side % resolution_step for side in resolution):
        fitting = Resolution(*(max(1, round(side / resolution_step)) * resolution_step for side in resolution))
        yield f"{prefix}resolution: {resolution} is not a multiple of {resolution_step} on both sides; {fitting} is"
    if not values["enable_bucket"]:
        return
    if step % resolution_step:
        fitting_step = -(-step // resolution_step) * resolution_step
        yield (
            f"{prefix}bucket_reso_steps: {step} is not a multiple of {resolution_step}, which this model needs; "
            f"{fitting_step} is"
        )
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


def _with_whole_steps(dataset: DatasetConfig) -> DatasetConfig:
    step = dataset.bucket_reso_steps
    return dataclasses.replace(
        dataset,
        min_bucket_reso=max(1, dataset.min_bucket_reso // step) * step,
        max_bucket_reso=-(-dataset.max_bucket_reso // step) * step,
    )


def _table_of_folders(data: DataConfig, problems: list[str]) -> Table:
    """The dataset that ``--train_data_dir`` and ``--reg_data_dir`` describe by their folders' names."""
    inner: list[Table] = []
    for name, is_reg in (("train_data_dir", False), ("reg_data_dir", True)):
        parent = getattr(data, name)
        if parent is None:
            continue
        if not os.path.isdir(parent):
            problems.append(f"--{name}: {parent}: no such folder")
            continue
        folders = sorted(
            entry.name for entry in os.scandir(parent) if entry.is_dir() and not entry.name.startswith(".")
        )
        if not folders:
            problems.append(
                f"--{name}: {parent} has no folders; put the pictures into one named 10_cat (repeats, caption)"
            )
        for folder in folders:
            match = _NAMED_FOLDER.fullmatch(folder)
            if match is None or int(match[1]) < 1:
                problems.append(f"--{name}: folder {folder}: its name must start with its repeats, such as 10_{folder}")
                continue
            values = {"image_dir": os.path.join(parent, folder), "num_repeats": int(match[1]), "is_reg": is_reg}
            inner.append(Table(f"--{name}: {folder}", {**values, "class_tokens": match[2] or None}))
    return Table("--train_data_dir", {}, tuple(inner))
