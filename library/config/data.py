"""Options of the data as a whole: where it is described, batches, regularisation, masks, validation, reader processes.

Sizes and shapes are in ``pictures``, captions in ``captions``. Every key of the dataset TOML that has a default is an
option, so a run without a TOML can do the same.
"""

import os
from dataclasses import dataclass

from library.config.options import option


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Datasets."""

    dataset_config: str | None = option(
        None, "Dataset description, TOML or JSON: folders, sizes, repeats, captions.", metavar="FILE.toml"
    )
    train_data_dir: str | None = option(
        None,
        "Folder of folders named like 10_cat: repeats, then the caption of pictures without a caption file. The short "
        "form of a dataset TOML. With --in_json: the folder of the pictures.",
        metavar="DIR",
    )
    reg_data_dir: str | None = option(
        None, "Regularisation pictures for --train_data_dir, in folders named the same way.", metavar="DIR"
    )
    in_json: str | None = option(
        None,
        "File with the pictures' captions, instead of a dataset TOML: json, jsonl, csv or parquet, as metadata_file "
        "in the TOML.",
        metavar="FILE",
    )
    conditioning_data_dir: str | None = option(
        None,
        "Folder with a mask for every picture, named like it: where it is white the loss counts, where it is black it "
        "doesn't. For a ControlNet: with the control picture of every picture, named like it.",
        metavar="DIR",
    )
    train_batch_size: int = option(1, "Pictures per micro-batch. In the TOML: batch_size.", minimum=1)
    dataset_repeats: int = option(1, "How often each picture is used per epoch. In the TOML: num_repeats.", minimum=1)
    prior_loss_weight: float = option(1.0, "Weight of the loss of regularisation pictures (is_reg).", minimum=0)
    regularisation_weight: float = option(
        1.0,
        "Weight of the loss of pictures that the base model itself teaches (is_regularisation_data).",
        minimum=0,
    )
    masked_loss: bool = option(
        False,
        "Say that the datasets have masks (conditioning_data_dir, alpha_mask), and stop if they don't. Masks act with "
        "and without it.",
    )
    masked_loss_normalize: bool = option(
        False,
        "Divide each picture's loss by the mean of its mask, so that a small masked area counts as much as a large "
        "one. By default it counts by its size.",
    )
    max_data_loader_n_workers: int = option(
        8,
        "Processes that read pictures ahead, at most one per CPU core; 0 reads in the training process. What is read "
        "doesn't depend on it.",
        minimum=0,
    )
    persistent_data_loader_workers: bool = option(
        True, "Keep those processes for the whole run. Without, they are started anew at each epoch."
    )
    skip_bad_images: bool = option(
        False,
        "Leave out pictures that can't be read, and list them. Without, one such picture stops the run before "
        "training.",
    )
    report_near_duplicates: bool = option(
        False, "Look for pictures that are nearly the same, and list them. It decodes every picture once."
    )
    validation_split: float = option(
        0.0,
        "Fraction of the pictures to measure the loss on instead of training on them, chosen by their content. "
        "Regularisation pictures are not among them.",
        minimum=0,
        maximum=1,
    )
    validation_seed: int | None = option(None, "Seed of that choice. By default --seed.")

    @property
    def loader_workers(self) -> int:
        """How many reader processes there are."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(self.max_data_loader_n_workers, cores)


UNSUPPORTED: dict[str, str] = {
    "dataset_class": "datasets are described by --dataset_config, not by code. Remove it",
    "cache_info": "sizes and content are always remembered, and looked at again when a file changes. Remove it",
    "debug_dataset": "--dry_run lists what the dataset holds, and tools/inspect_dataset.py shows it. Use those",
    "network_multiplier": "the adapter trains at full strength. Remove it",
}
"""Option or TOML key of other trainers -> the end of ``--name is not supported: ...``."""
