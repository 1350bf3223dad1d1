"""What saved files say about themselves: ``modelspec.*`` and ``ss_*``. Only what acted is written."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.options import acting_metadata
from library.config.run import RunConfig
from library.config.saving import thumbnail_address
from library.records import ModelDescription, Sample
from library.training.run import Run

MODELSPEC = "1.0.1"

_ACTING = (
    "color_aug",
    "flip_aug",
    "random_crop",
    "face_crop_aug_range",
    "resize_interpolation",
    "shuffle_caption",
    "keep_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "caption_prefix",
    "caption_suffix",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "alpha_mask",
    "is_regularisation_data",
    "probability",
)
"""Settings that are written where a subset differs from their defaults."""


def run_metadata(
    config: RunConfig,
    description: ModelDescription,
    datasets: Sequence[DatasetConfig],
    samples: Sequence[Sample],
    buckets: Sequence[Mapping[str, int]],
    facts: Mapping[str, Any],
) -> dict[str, str]:
    """The facts known before training.

    Args:
        config: What acts.
        description: The base model.
        datasets: The dataset configuration.
        samples: What was found.
        buckets: Per dataset: resolution -> how many samples.
        facts: More ``ss_`` keys, without the prefix (optimizer label, steps, ...).
    """
    known: dict[str, Any] = {
        **acting_metadata(config),
        "ss_base_model_version": description.base_model_version,
        "ss_num_train_images": sum(sample.num_repeats for sample in samples if not sample.is_reg),
        "ss_num_reg_images": sum(sample.num_repeats for sample in samples if sample.is_reg),
        "ss_datasets": json.dumps(
            [_dataset_facts(index, dataset, samples, buckets[index]) for index, dataset in enumerate(datasets)]
        ),
        "ss_tag_frequency": json.dumps(_tag_frequency(datasets, samples)),
        "ss_dataset_dirs": json.dumps(_dataset_dirs(datasets, samples)),
        **{f"ss_{key}": value for key, value in facts.items()},
    }
    return {key: str(value) for key, value in known.items() if value is not None}


def checkpoint_metadata(run: Run, done: int, facts: Mapping[str, str], *, kind: str) -> dict[str, str]:
    """All metadata of a file that is saved after ``done`` optimizer steps.

    Args:
        run: The run.
        done: Optimizer steps.
        facts: More entries of this file.
        kind: What ``modelspec.architecture`` says after the model: ``/lora``, or nothing.
    """
    saving = run.config.saving
    now = time.time()
    metadata = {
        **run.metadata,
        "ss_steps": str(done),
        "ss_epoch": str(run.epoch_number(done)),
        "ss_training_finished_at": str(now),
        **_modelspec(run, now, kind),
        **facts,
    }
    if not saving.no_metadata:
        return metadata
    minimal = {
        "ss_v2",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
        "ss_base_model_version",
        "ss_steps",
    }
    return {key: value for key, value in metadata.items() if key in minimal or key.startswith("modelspec.")}


def _modelspec(run: Run, now: float, kind: str) -> dict[str, str]:
    saving, description = run.config.saving, run.family.description
    sizes = {dataset.resolution for dataset in run.config.datasets}
    largest = max(sizes, key=lambda resolution: resolution.area)
    values = {
        "sai_model_spec": MODELSPEC,
        "architecture": f"{description.architecture}{kind}",
        "implementation": description.implementation or None,
        "title": saving.metadata_title or saving.output_name,
        "resolution": str(largest),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)),
        "author": saving.metadata_author,
        "description": saving.metadata_description,
        "license": saving.metadata_license,
        "tags": saving.metadata_tags,
        "usage_hint": saving.metadata_usage_hint,
        "thumbnail": thumbnail_address(saving.metadata_thumbnail) if saving.metadata_thumbnail else None,
        "merged_from": saving.metadata_merged_from,
        "trigger_phrase": saving.metadata_trigger_phrase,
        "preprocessor": saving.metadata_preprocessor,
        "is_negative_embedding": saving.metadata_is_negative_embedding,
        **description.specification,
    }
    return {f"modelspec.{key}": str(value) for key, value in values.items() if value is not None}


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _dataset_facts(
    index: int, dataset: DatasetConfig, samples: Sequence[Sample], buckets: Mapping[str, int]
) -> dict[str, Any]:
    own = [sample for sample in samples if sample.dataset == index]
    return {
        "resolution": list(dataset.resolution),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(sample.num_repeats for sample in own if not sample.is_reg),
        "num_reg_images": sum(sample.num_repeats for sample in own if sample.is_reg),
        "enable_bucket": dataset.enable_bucket,
        "bucket_info": {"buckets": [{"resolution": name, "count": count} for name, count in sorted(buckets.items())]},
        "subsets": [
            {
                **_source(subset),
                "img_count": sum(1 for sample in own if sample.subset == number),
                "num_repeats": subset.num_repeats,
                "is_reg": subset.is_reg,
                "class_tokens": subset.class_tokens,
                **{key: value for key in _ACTING if (value := getattr(subset, key)) != getattr(SubsetConfig, key)},
            }
            for number, subset in enumerate(dataset.subsets)
        ],
    }


def _source(subset: SubsetConfig) -> dict[str, str]:
    """The names of its folder and its list, without where they lie."""
    paths = {"image_dir": subset.image_dir, "metadata_file": subset.metadata_file}
    return {key: _last_name(path) for key, path in paths.items() if path is not None}


def _last_name(path: str) -> str:
    return os.path.basename(path.rstrip("/"))


def _tag_frequency(datasets: Sequence[DatasetConfig], samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        subset = datasets[sample.dataset].subsets[sample.subset]
        counter = counts.setdefault(_last_name(subset.title), Counter())
        for tag in sample.captions[0].split(subset.caption_separator):
            if tag.strip():
                counter[tag.strip()] += 1
    return {folder: dict(counter) for folder, counter in counts.items()}


def _dataset_dirs(datasets: Sequence[DatasetConfig], samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    folders: dict[str, dict[str, int]] = {}
    for sample in samples:
        subset = datasets[sample.dataset].subsets[sample.subset]
        entry = folders.setdefault(_last_name(subset.title), {"n_repeats": subset.num_repeats, "img_count": 0})
        entry["img_count"] += 1
    return folders
