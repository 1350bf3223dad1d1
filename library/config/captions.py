"""Options of the captions: where they stand, and what becomes of them at every visit of their picture.

Every one is a key of the dataset TOML too.
"""

from dataclasses import dataclass
from typing import Any

from library.config.options import option

CAPTION_STRATEGIES = ("textfile", "filename", "instanceprompt", "json", "jsonl", "csv", "parquet")


def parse_extension(value: Any) -> str:
    """This reads a file name's ending, with or without its dot."""
    if not isinstance(value, str) or not value.strip("."):
        raise ValueError(f"expected a file name's ending such as .txt, got {value!r}")
    return value if value.startswith(".") else f".{value}"


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Captions (what the dataset TOML says goes first)."""

    caption_strategy: str | None = option(
        None,
        "Where captions come from. textfile: a file beside the picture. filename: the picture's name, with spaces for "
        "underscores. instanceprompt: class_tokens for all. json, jsonl, csv, parquet: metadata_file. By default the "
        "kind of metadata_file where there is one, else textfile.",
        choices=CAPTION_STRATEGIES,
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
