"""What is written, when, and what it says about itself."""

import base64
from dataclasses import dataclass
from typing import Any

from library.config.documents import MEBIBYTE, size_text
from library.config.errors import ConfigError
from library.config.options import option

SAVE_LAYOUTS = ("safetensors", "diffusers", "pth")


def parse_save_model_as(value: Any) -> str:
    """This accepts the layouts, and says why not pickles."""
    if value in ("pt", "ckpt"):
        raise ValueError(f"{value} files are pickles, which can run code when they are opened; use safetensors")
    if value == "diffusers_safetensors":  # kohya's name: diffusers' folders are safetensors here, always
        return "diffusers"
    if value not in SAVE_LAYOUTS:
        raise ValueError(f"expected {', '.join(SAVE_LAYOUTS)}, got {value!r}")
    return str(value)


def parse_output_name(value: Any) -> str:
    """This refuses names that are paths."""
    text = str(value)
    if not text or "/" in text or "\\" in text:
        raise ValueError(f"expected a file name without folder, got {value!r}; the folder goes to --output_dir")
    return text.removesuffix(".safetensors")


def parse_save_precision(value: Any) -> str:
    """This reads fp32 as the older name ``float``."""
    return "float" if value == "fp32" else str(value)


_PICTURES = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"RIFF", "webp"))


MOST_THUMBNAIL_BYTES = 8 * MEBIBYTE


def thumbnail_address(path: str) -> str:
    """This turns a picture file into the ``data:`` address that holds it whole, as ``modelspec.thumbnail`` wants it.

    Raises:
        ConfigError: The file can't be read, or is no picture of a kind that browsers show.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_THUMBNAIL_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--metadata_thumbnail {path}: can't be read ({error.strerror})") from None
    if len(content) > MOST_THUMBNAIL_BYTES:
        raise ConfigError(
            f"--metadata_thumbnail {path}: larger than {size_text(MOST_THUMBNAIL_BYTES)}, which would stand at the "
            "start of every saved file; make it smaller"
        )
    kind = next((kind for start, kind in _PICTURES if content.startswith(start)), None)
    if kind is None:
        raise ConfigError(f"--metadata_thumbnail {path}: not a picture in PNG, JPEG or WebP")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True, kw_only=True)
class SavingConfig:
    """Saving."""

    output_dir: str = option("output", "Folder for everything that the run writes.", metavar="FOLDER")
    output_name: str = option(
        "last",
        "Stem of the files: <name>.safetensors at the end, <name>-000001.safetensors after an epoch, "
        "<name>-step00000100.safetensors after a step.",
        parse=parse_output_name,
        metavar="NAME",
        metadata_key="ss_output_name",
    )
    save_model_as: str = option(
        "safetensors",
        "What is written: one file (safetensors); in a full fine-tune, and of a ControlNet, also a folder that "
        "diffusers loads (diffusers), and for Sana NVlabs' own checkpoint (pth). Other pickles are refused.",
        parse=parse_save_model_as,
        metavar="LAYOUT",
    )
    save_precision: str | None = option(
        None,
        "The type of the saved weights; fp32 is the same as float. By default the type they are trained in.",
        choices=("float", "fp16", "bf16"),
        parse=parse_save_precision,
    )
    save_every_n_epochs: int | None = option(
        None, "Also save after every n epochs. By default only at the end.", minimum=1
    )
    save_every_n_steps: int | None = option(
        None,
        "Also save after every n optimizer steps. By default only at the end.",
        minimum=1,
        aliases=("checkpointing_steps",),
    )
    save_n_epoch_ratio: int | None = option(
        None,
        "Save about this many times over the run, at ends of epochs, instead of --save_every_n_epochs. By default not.",
        minimum=1,
    )
    save_last_n_epochs: int | None = option(
        None, "Of the files saved after epochs keep those of the last n epochs. By default all.", minimum=1
    )
    save_last_n_steps: int | None = option(
        None,
        "Of the files saved after steps keep those of the last n steps (steps, not files). By default all.",
        minimum=1,
    )
    save_last_n_epochs_state: int | None = option(
        None, "The same for states saved after epochs. By default --save_last_n_epochs.", minimum=1
    )
    save_last_n_steps_state: int | None = option(
        None, "The same for states saved after steps. By default --save_last_n_steps.", minimum=1
    )
    save_state: bool = option(False, "Save the state for --resume whenever weights are saved, the end included.")
    on_save_error: str = option(
        "stop",
        "What happens when weights or a state can't be written, as on a full disk. The run ends with exit code 2 "
        "(stop), or goes on with a warning and tries again at the next save (continue). At the end of the run it is an "
        "error in any case. What was saved before stays as it is.",
        choices=("stop", "continue"),
    )
    save_state_on_train_end: bool = option(False, "Save the state at the end of the run, to train on later.")
    no_metadata: bool = option(
        False, "Write only what loaders need into the file's metadata. By default all settings that acted."
    )
    training_comment: str | None = option(
        None, "Free text for the metadata. By default none.", metadata_key="ss_training_comment"
    )
    metadata_title: str | None = option(None, "modelspec.title. By default --output_name.")
    metadata_author: str | None = option(None, "modelspec.author. By default left out.")
    metadata_description: str | None = option(None, "modelspec.description. By default left out.")
    metadata_license: str | None = option(None, "modelspec.license. By default left out.")
    metadata_tags: str | None = option(None, "modelspec.tags, separated by commas. By default left out.")
    metadata_usage_hint: str | None = option(None, "modelspec.usage_hint. By default left out.")
    metadata_thumbnail: str | None = option(
        None, "modelspec.thumbnail: a picture file, stored inside the metadata. By default left out.", metavar="FILE"
    )
    metadata_merged_from: str | None = option(None, "modelspec.merged_from. By default left out.")
    metadata_trigger_phrase: str | None = option(None, "modelspec.trigger_phrase. By default left out.")
    metadata_preprocessor: str | None = option(None, "modelspec.preprocessor. By default left out.")
    metadata_is_negative_embedding: str | None = option(None, "modelspec.is_negative_embedding. By default left out.")

    def __post_init__(self) -> None:
        problems = []
        if self.save_every_n_epochs and self.save_n_epoch_ratio:
            problems.append("--save_every_n_epochs and --save_n_epoch_ratio exclude each other; keep one")
        by_epochs = self.save_every_n_epochs or self.save_n_epoch_ratio
        for name, interval, wanted in (
            ("save_last_n_epochs", by_epochs, "--save_every_n_epochs"),
            ("save_last_n_steps", self.save_every_n_steps, "--save_every_n_steps"),
        ):
            if getattr(self, name) and not interval:
                problems.append(f"--{name} does nothing without {wanted}; add it or remove --{name}")
            if getattr(self, f"{name}_state") and not (interval and self.save_state):
                problems.append(f"--{name}_state does nothing without {wanted} and --save_state; add them")
        if self.on_save_error == "continue" and not (self.save_every_n_steps or by_epochs):
            problems.append(
                "--on_save_error continue does nothing when the run is saved at its end alone; add "
                "--save_every_n_steps, or remove it"
            )
        if problems:
            raise ConfigError("\n".join(problems))

    def epoch_interval(self, num_epochs: int) -> int | None:
        """Epochs between two saves in a run of ``num_epochs``, or None."""
        if self.save_n_epoch_ratio:
            return max(1, num_epochs // self.save_n_epoch_ratio)
        return self.save_every_n_epochs
