"""Options of the data: where the pictures are, and what the dataset TOML leaves unsaid.

Every key of the dataset TOML that has a default is an option here, so a run without a TOML can do the same.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

from library.config.options import option
from library.records import Resolution

_SIZE = re.compile(r"\s*(\d+)\s*(?:[,x]\s*(\d+)\s*)?")


def parse_resolution(value: Any) -> Resolution:
    """This reads a size: ``512``, ``"512"``, ``"512,768"``, ``"512x768"`` or ``[512, 768]``, width first."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        sides = [int(side) for side in match.groups() if side is not None]
    elif isinstance(value, list | tuple) and len(value) in (1, 2):
        sides = list(value)
    else:
        sides = [value]
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"expected a size such as 1024 or 832,1216 (width,height), got {value!r}")
    return Resolution(sides[0], sides[-1])


def parse_extension(value: Any) -> str:
    """This reads a file name's ending, with or without its dot."""
    if not isinstance(value, str) or not value.strip("."):
        raise ValueError(f"expected a file name's ending such as .txt, got {value!r}")
    return value if value.startswith(".") else f".{value}"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Pictures and captions (what the dataset TOML says goes first)."""

    dataset_config: str | None = option(
        None, "Dataset description, TOML or JSON: folders, sizes, repeats, captions.", metavar="FILE.toml"
    )
    train_data_dir: str | None = option(
        None,
        "Folder of folders named like 10_cat: repeats, then the caption of pictures without a caption file. The short "
        "form of a dataset TOML.",
        metavar="DIR",
    )
    reg_data_dir: str | None = option(
        None, "Regularisation pictures for --train_data_dir, in folders named the same way.", metavar="DIR"
    )
    train_batch_size: int = option(1, "Pictures per micro-batch. In the TOML: batch_size.", minimum=1)
    dataset_repeats: int = option(1, "How often each picture is used per epoch. In the TOML: num_repeats.", minimum=1)
    resolution: Resolution | None = option(
        None,
        "Size in pixels: 1024, or 832,1216 for width,height. With buckets it says the area that each picture gets, not "
        "its shape. There is no default.",
        metavar="SIZE",
        parse=parse_resolution,
    )
    enable_bucket: bool = option(
        True,
        "Keep each picture's shape: it goes into the bucket of the nearest aspect ratio. Without, all are cut to the "
        "shape of --resolution from their centre. (kohya's default is off.)",
    )
    min_bucket_reso: int = option(
        256,
        "Shortest side of a bucket in pixels, rounded down to --bucket_reso_steps. --bucket_no_upscale doesn't use it.",
        minimum=1,
    )
    max_bucket_reso: int = option(
        2048,
        "Longest side of a bucket in pixels, rounded up to --bucket_reso_steps; --bucket_no_upscale doesn't use it. "
        "kohya's 1024 leaves wide and tall pictures at 1024 px as little as a quarter of the area.",
        minimum=1,
    )
    bucket_reso_steps: int = option(64, "Bucket sides are multiples of this many pixels.", minimum=1)
    bucket_no_upscale: bool = option(
        False,
        "Never enlarge a picture: smaller ones get a bucket of their own size. Only a side below one bucket step is "
        "enlarged, to that step.",
    )
    caption_extension: str = option(
        ".txt",
        "Ending of caption files, which are named like their picture. With .txt, a file ending in .caption is read "
        "where there is no .txt.",
        parse=parse_extension,
        aliases=("caption_extention",),
        metavar=".EXT",
    )
    caption_separator: str = option(",", "What separates the tags of a caption; shuffled tags are joined by ', '.")
    shuffle_caption: bool = option(False, "Shuffle the tags of a caption anew at every visit.")
    keep_tokens: int = option(0, "How many leading tags stay where they are and are never dropped.", minimum=0)
    keep_tokens_separator: str = option(
        "",
        "Marks the fixed tags inside a caption, instead of --keep_tokens: fixed ||| shuffled ||| fixed at the end. The "
        "mark itself never reaches the model.",
    )
    secondary_separator: str | None = option(
        None, "Separates parts of one tag that stay together; it becomes --caption_separator in the end."
    )
    enable_wildcard: bool = option(
        False,
        "{a|b} in a caption becomes a or b, {{ and }} become plain brackets, and of several lines in a caption file "
        "one is chosen at every visit.",
    )
    caption_prefix: str | None = option(None, "Put before every caption, with a space.")
    caption_suffix: str | None = option(None, "Put behind every caption, with a space.")
    token_warmup_min: int = option(1, "How many tags are used at first while --token_warmup_step runs.", minimum=0)
    token_warmup_step: float = option(
        0.0,
        "Step from which all tags are used; before, their number grows evenly. Below 1: a fraction of all steps. "
        "0: off.",
        minimum=0,
    )
    caption_dropout_rate: float = option(0.0, "Probability that a caption is empty at a visit.", minimum=0, maximum=1)
    caption_dropout_every_n_epochs: int = option(
        0, "All captions are empty in every n-th epoch, counted from 1. 0: never.", minimum=0
    )
    caption_tag_dropout_rate: float = option(
        0.0, "Probability of each tag (except the fixed ones) to be left out at a visit.", minimum=0, maximum=1
    )
    flip_aug: bool = option(False, "Mirror each picture left to right at half of its visits, at random.")
    prior_loss_weight: float = option(1.0, "Weight of the loss of regularisation pictures.", minimum=0)
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
        "Leave out pictures that can't be read, and list them. Without, one such picture stops the run at its start.",
    )
    validation_split: float = option(
        0.0,
        "Fraction of each dataset's pictures to measure the loss on instead of training on them, chosen by their "
        "content. Regularisation pictures are not among them.",
        minimum=0,
        maximum=1,
    )
    validation_seed: int | None = option(None, "Seed of that choice. By default --seed.")

    @property
    def loader_workers(self) -> int:
        """How many reader processes there are."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(self.max_data_loader_n_workers, cores)


_FILES_ONLY = "captions come from text files beside the pictures. Write one per picture, or set class_tokens"
_NO_MASKS = "every pixel of a picture counts the same. Remove it"

UNSUPPORTED: dict[str, str] = {
    "in_json": _FILES_ONLY,
    "metadata_file": _FILES_ONLY,
    "dataset_class": "datasets are described by --dataset_config, not by code. Remove it",
    "cache_info": "sizes and content are always remembered, and looked at again when a file changes. Remove it",
    "debug_dataset": "--dry_run lists what the dataset holds and stops. Use that",
    "color_aug": "colours stay as they are, so that latents can be cached. Put recoloured copies into a subset",
    "random_crop": "pictures are cropped at their centre, so that latents can be cached. Put crops into a subset",
    "face_crop_aug_range": "pictures are cropped at their centre. Put crops of the faces into a subset",
    "resize_interpolation": "pictures are shrunk by area averaging and enlarged by Lanczos. Remove it",
    "skip_image_resolution": "every picture of a folder is used. Move the small ones into a folder of their own",
    "alpha_mask": _NO_MASKS,
    "masked_loss": _NO_MASKS,
    "conditioning_data_dir": _NO_MASKS,
    "weighted_captions": "the text encoders read a caption as it stands. Remove it, and (word:1.2) from the captions",
    "custom_attributes": "nothing here reads it. Remove it",
    "network_multiplier": "the adapter trains at full strength. Remove it",
}
"""Option or TOML key of other trainers -> the end of ``--name is not supported: ...``."""
