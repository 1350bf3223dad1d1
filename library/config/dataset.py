"""The dataset TOML: ``[general]`` -> ``[[datasets]]`` -> ``[[datasets.subsets]]``, inherited once and checked.

A value is looked up in the subset, its dataset, ``[general]`` and the command line, and is the option's default
otherwise.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.captions import CaptionConfig
from library.config.data import DataConfig
from library.config.dataset_file import INVALID, Scopes, Table, read_tables
from library.config.dataset_rules import dataset_problems
from library.config.errors import ConfigError
from library.config.options import option, options_of
from library.config.pictures import BUCKET_TABLES, Megapixels, PictureConfig
from library.records import Resolution

_NAMED_FOLDER = re.compile(r"(\d+)(?:_(.*))?")
_TEACHER = "diff_output_preservation"


def parse_attributes(value: Any) -> Mapping[str, bool]:
    """This reads the table ``custom_attributes``, which knows one name."""
    if not isinstance(value, Mapping) or any(name != _TEACHER or type(on) is not bool for name, on in value.items()):
        raise ValueError(f"expected a table with {_TEACHER} = true, got {value!r}; nothing reads other names")
    return value


@dataclass(frozen=True, kw_only=True)
class TomlKeys:
    """Keys of the dataset TOML that are no command line options."""

    image_dir: str | None = option(None, "Folder with the pictures, or a URL such as s3://bucket/folder.")
    metadata_file: str | None = option(
        None, "File that lists pictures and captions: json, jsonl, csv or parquet. Only these pictures are used."
    )
    is_reg: bool = option(False, "The pictures are regularisation pictures.")
    class_tokens: str | None = option(None, "Caption of pictures that have no caption.")
    filename_column: str | None = option(
        None, "Column of metadata_file that names the picture. By default file_name, filename, image_path or path."
    )
    caption_column: str | None = option(
        None, "Column of metadata_file with the caption. By default caption, text or prompt."
    )
    is_regularisation_data: bool = option(
        False, "The target for these pictures is what the base model answers without the adapter."
    )
    custom_attributes: Mapping[str, bool] | None = option(
        None, "{ diff_output_preservation = true } is is_regularisation_data.", parse=parse_attributes
    )
    probability: float = option(
        1.0, "Share of the visits that each epoch makes; which ones changes in turn.", minimum=0.0001, maximum=1
    )
    start_epoch: int | None = option(None, "First epoch, counted from 1, in which the pictures are used.", minimum=1)
    end_epoch: int | None = option(None, "Last epoch in which they are used.", minimum=1)
    start_step: int | None = option(
        None, "First optimizer step, counted from 1, in which the pictures are used.", minimum=1
    )
    end_step: int | None = option(None, "Last optimizer step in which they are used.", minimum=1)
    disabled: bool = option(False, "Leave it out as if it weren't in the file.")
    role: str = option(
        "train", "What the dataset is for: training, or measuring the loss.", choices=("train", "validation")
    )


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Pictures of one folder or list; the attributes are the keys of ``[[datasets.subsets]]``."""

    image_dir: str | None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = DataConfig.conditioning_data_dir
    is_reg: bool = False
    is_regularisation_data: bool = False
    class_tokens: str | None = None
    filename_column: str | None = None
    caption_column: str | None = None
    num_repeats: int = DataConfig.dataset_repeats
    probability: float = 1.0
    start_epoch: int | None = None
    end_epoch: int | None = None
    start_step: int | None = None
    end_step: int | None = None
    validation_split: float = DataConfig.validation_split
    regularisation_weight: float = DataConfig.regularisation_weight
    caption_strategy: str | None = CaptionConfig.caption_strategy
    caption_extension: str = CaptionConfig.caption_extension
    caption_separator: str = CaptionConfig.caption_separator
    shuffle_caption: bool = CaptionConfig.shuffle_caption
    keep_tokens: int = CaptionConfig.keep_tokens
    keep_tokens_separator: str = CaptionConfig.keep_tokens_separator
    secondary_separator: str | None = CaptionConfig.secondary_separator
    enable_wildcard: bool = CaptionConfig.enable_wildcard
    caption_prefix: str | None = CaptionConfig.caption_prefix
    caption_suffix: str | None = CaptionConfig.caption_suffix
    token_warmup_min: int = CaptionConfig.token_warmup_min
    token_warmup_step: float = CaptionConfig.token_warmup_step
    caption_dropout_rate: float = CaptionConfig.caption_dropout_rate
    caption_dropout_every_n_epochs: int = CaptionConfig.caption_dropout_every_n_epochs
    caption_tag_dropout_rate: float = CaptionConfig.caption_tag_dropout_rate
    random_crop: bool = PictureConfig.random_crop
    face_crop_aug_range: tuple[float, float] | None = PictureConfig.face_crop_aug_range
    resize_interpolation: str | None = PictureConfig.resize_interpolation
    flip_aug: bool = PictureConfig.flip_aug
    color_aug: bool = PictureConfig.color_aug
    alpha_color: str = PictureConfig.alpha_color
    alpha_mask: bool = PictureConfig.alpha_mask
    unmasked_weight: float = PictureConfig.unmasked_weight
    recursive: bool = PictureConfig.recursive

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.image_dir or str(self.metadata_file)

    @property
    def has_masks(self) -> bool:
        """Whether its pictures have loss masks."""
        return self.alpha_mask or self.conditioning_data_dir is not None

    @property
    def captions_from(self) -> str:
        """The caption strategy that acts."""
        if self.caption_strategy is not None:
            return self.caption_strategy
        return "textfile" if self.metadata_file is None else os.path.splitext(self.metadata_file)[1][1:].lower()

    @property
    def varies_pixels(self) -> bool:
        """Whether a picture's pixels differ from visit to visit by more than mirroring, so that none can be kept."""
        return self.random_crop or self.color_aug or self.face_crop_aug_range is not None

    @property
    def needs_faces(self) -> bool:
        """Whether faces must be found for what is said here; the dataset's ``crop_style`` may need them too."""
        return self.face_crop_aug_range is not None


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Pictures that share sizes and a batch size; the attributes are the keys of ``[[datasets]]``."""

    resolution: Resolution
    resolution_type: str = PictureConfig.resolution_type
    batch_size: int = DataConfig.train_batch_size
    enable_bucket: bool = PictureConfig.enable_bucket
    min_bucket_reso: int = PictureConfig.min_bucket_reso
    max_bucket_reso: int = PictureConfig.max_bucket_reso
    bucket_reso_steps: int = PictureConfig.bucket_reso_steps
    bucket_no_upscale: bool = PictureConfig.bucket_no_upscale
    bucket_selection: str = PictureConfig.bucket_selection
    bucket_table: str | None = PictureConfig.bucket_table
    skip_image_resolution: Resolution | None = PictureConfig.skip_image_resolution
    minimum_image_size: float | None = PictureConfig.minimum_image_size
    maximum_image_size: float | None = PictureConfig.maximum_image_size
    target_downsample_size: float | None = PictureConfig.target_downsample_size
    minimum_aspect_ratio: float | None = PictureConfig.minimum_aspect_ratio
    maximum_aspect_ratio: float | None = PictureConfig.maximum_aspect_ratio
    crop: bool = PictureConfig.crop
    crop_style: str = PictureConfig.crop_style
    crop_aspect: str = PictureConfig.crop_aspect
    crop_aspect_buckets: tuple[float, ...] = PictureConfig.crop_aspect_buckets
    validation_seed: int | None = DataConfig.validation_seed
    role: str = "train"
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
            "random_crop": False,
            "color_aug": False,
            "face_crop_aug_range": None,
            "probability": 1.0,
            "start_epoch": None,
            "end_epoch": None,
            "start_step": None,
            "end_step": None,
        }
        return dataclasses.replace(self, subsets=tuple(dataclasses.replace(subset, **calm) for subset in self.subsets))


_OPTION_NAMES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
"""TOML key -> option, where they differ."""

_SUBSET_ONLY = ("image_dir", "metadata_file", "conditioning_data_dir", "is_reg")
_GROUPS = (DataConfig, PictureConfig, CaptionConfig, TomlKeys)


def read_datasets(
    data: DataConfig, pictures: PictureConfig, captions: CaptionConfig, *, resolution_step: int
) -> tuple[DatasetConfig, ...]:
    """This reads the datasets of a run and checks all that can be checked without opening a picture.

    Args:
        data: Where the datasets are described.
        pictures: Values for what they leave unsaid.
        captions: The same.
        resolution_step: Both sides of a picture must be multiples of this many pixels.

    Returns:
        The datasets, with the limits of their buckets rounded to multiples of the bucket step.

    Raises:
        ConfigError: One line per mistake, all at once.
    """
    problems: list[str] = []
    general, tables = _tables(data, problems)
    fallbacks = {**vars(TomlKeys()), **vars(data), **vars(pictures), **vars(captions)}
    # what a file leaves out by "disabled" is left out before anything else is asked of it
    tables = [table for table in map(lambda table: _enabled(table, general), tables) if table is not None]
    if not tables and not problems:
        problems.append(f"{data.dataset_config}: every dataset is disabled; leave one on")
    datasets = []
    for table in tables:
        values = _filled(DatasetConfig, [table.values, general], fallbacks)
        subsets = [_filled_subset([inner.values, table.values, general], fallbacks) for inner in table.inner]
        prefix = "--" if data.dataset_config is None else f"{table.place}."
        problems += dataset_problems(prefix, table, values, subsets, resolution_step)
        if not problems:
            values["resolution"] = _pixels(values)
            datasets.append(DatasetConfig(**values, subsets=tuple(SubsetConfig(**subset) for subset in subsets)))
    if datasets and not problems and all(dataset.role == "validation" for dataset in datasets):
        problems.append(f'{data.dataset_config}: every dataset has role = "validation"; add one to train on')
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(_with_whole_steps(dataset) for dataset in datasets)


def _tables(data: DataConfig, problems: list[str]) -> tuple[Mapping[str, Any], Sequence[Table]]:
    """``[general]`` and the datasets, from the file or from the options that stand for one."""
    if data.dataset_config is not None:
        problems += [
            f"--{name} does nothing beside --dataset_config; remove one of the two"
            for name in ("train_data_dir", "reg_data_dir", "in_json")
            if getattr(data, name) is not None
        ]
        return read_tables(Path(data.dataset_config), _scopes(), problems)
    if data.in_json is not None:
        if data.reg_data_dir is not None:
            problems.append("--reg_data_dir does nothing beside --in_json; describe both in a --dataset_config")
        subset = Table("--in_json", {"metadata_file": data.in_json, "image_dir": data.train_data_dir})
        return {}, [Table("--in_json", {}, (subset,))]
    if data.train_data_dir is not None:
        return {}, [_table_of_folders(data, problems)]
    what = "no pictures to train on" if data.reg_data_dir is None else "--reg_data_dir alone gives nothing to train on"
    raise ConfigError(f"{what}: give --dataset_config (a dataset TOML) or --train_data_dir (folders named 10_cat)")


def _enabled(table: Table, general: Mapping[str, Any]) -> Table | None:
    """The dataset without the subsets that are disabled; None when nothing is left of it."""
    inner = tuple(inner for inner in table.inner if not {**general, **table.values, **inner.values}.get("disabled"))
    return dataclasses.replace(table, inner=inner) if inner or not table.inner else None


def _scopes() -> Scopes:
    options = {declared.name: declared for group in _GROUPS for declared in options_of(group)}
    dataset_keys = [field.name for field in dataclasses.fields(DatasetConfig) if field.name != "subsets"]
    subset_keys = [*(field.name for field in dataclasses.fields(SubsetConfig)), "custom_attributes", "disabled"]
    declared = {key: options[_OPTION_NAMES.get(key, key)] for key in [*dataset_keys, *subset_keys]}
    return Scopes(
        inherited={key: value for key, value in declared.items() if key not in _SUBSET_ONLY},
        subset={key: declared[key] for key in subset_keys},
    )


def _filled(record: type, scopes: Sequence[Mapping[str, Any]], fallbacks: Mapping[str, Any]) -> dict[str, Any]:
    """The record's values, each from the first scope that has it, else from the command line or its default."""
    values = {}
    for field in dataclasses.fields(record):
        if field.name != "subsets":
            fallback = {field.name: fallbacks[_OPTION_NAMES.get(field.name, field.name)]}
            values[field.name] = next(scope[field.name] for scope in [*scopes, fallback] if field.name in scope)
    return values


def _filled_subset(scopes: Sequence[Mapping[str, Any]], fallbacks: Mapping[str, Any]) -> dict[str, Any]:
    """A subset's values; both spellings of ``is_regularisation_data`` become one."""
    values = _filled(SubsetConfig, scopes, fallbacks)
    attributes = next((scope["custom_attributes"] for scope in scopes if "custom_attributes" in scope), None)
    if isinstance(attributes, Mapping) and attributes.get(_TEACHER) and values["is_regularisation_data"] is False:
        values["is_regularisation_data"] = True
    return values


def _pixels(values: Mapping[str, Any]) -> Resolution:
    """The resolution in pixels, whatever it was given in."""
    resolution = values["resolution"]
    if resolution is None:
        side = BUCKET_TABLES[values["bucket_table"]]
        return Resolution(side, side)
    if isinstance(resolution, Megapixels):
        step = values["bucket_reso_steps"]
        side = max(1, round((resolution * 1e6) ** 0.5 / step)) * step
        return Resolution(side, side)
    assert isinstance(resolution, Resolution) and INVALID not in values.values()
    return resolution


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
