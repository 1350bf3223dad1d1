"""Stable Diffusion 3's tokenizers: where they lie, and which encoder reads how much of a caption. It loads no torch."""

from pathlib import Path
from typing import NamedTuple

from library.config.errors import ConfigError
from library.config.model import ModelConfig
from library.families.sd3.files import Sd3Files
from library.families.sd3.options import Sd3Options
from library.text_encoders.tokenizers import (
    CLIP_G_HUB_ID,
    CLIP_L_HUB_ID,
    T5_XXL_HUB_ID,
    CaptionTokenizer,
    TokenizerPlaces,
    is_clip_folder,
    is_t5_folder,
    load_clip_tokenizer,
    load_t5_tokenizer,
    tokenizer_places,
)

# The CLIPs share one vocabulary, so either's folder serves both.
_CLIP_L_FOLDERS = ("tokenizer", "clip_l", "clip", "tokenizer_2", "clip_g")
_CLIP_G_FOLDERS = ("tokenizer_2", "clip_g", "clip", "tokenizer", "clip_l")
_T5_FOLDERS = ("tokenizer_3", "t5xxl", "t5")
_CLIP_G_PAD_ID = 0


class Sd3Tokenizers(NamedTuple):
    """One tokenizer per text encoder; T5's is None without a T5."""

    clip_l: CaptionTokenizer
    clip_g: CaptionTokenizer
    t5: CaptionTokenizer | None

    def windows(self) -> dict[str, CaptionTokenizer]:
        """Name of each encoder, for people -> its tokenizer, which cuts what is too long."""
        clips = {"CLIP-L": self.clip_l, "CLIP-G": self.clip_g}
        return clips if self.t5 is None else {**clips, "T5": self.t5}


def load_tokenizers(
    places: TokenizerPlaces, options: Sd3Options, *, has_t5: bool, download: bool = True
) -> Sd3Tokenizers:
    """This finds and loads the tokenizers.

    Args:
        places: Where to look.
        options: Settings of the family.
        has_t5: Whether there is a T5.
        download: Whether to fetch from the hub what isn't on disk.

    Raises:
        ConfigError: A tokenizer is nowhere, or unreadable.
    """
    folders = tokenizer_folders(places, has_t5=has_t5, download=download)
    t5 = folders.get("tokenizer_3")
    return Sd3Tokenizers(
        clip_l=load_clip_tokenizer(folders["tokenizer"], pad_id=None),
        clip_g=load_clip_tokenizer(folders["tokenizer_2"], pad_id=_CLIP_G_PAD_ID),
        t5=None if t5 is None else load_t5_tokenizer(t5, length=options.t5xxl_max_token_length),
    )


def tokenizer_folders(places: TokenizerPlaces, *, has_t5: bool, download: bool = True) -> dict[str, Path]:
    """Where the tokenizers lie, by the names of their sub-folders in diffusers' layout.

    Args:
        places: Where to look.
        has_t5: Whether there is a T5.
        download: Whether to fetch from the hub what isn't on disk.

    Raises:
        ConfigError: A tokenizer is nowhere.
    """
    folders = {
        "tokenizer": places.find(_CLIP_L_FOLDERS, CLIP_L_HUB_ID, is_clip_folder, download=download),
        "tokenizer_2": places.find(_CLIP_G_FOLDERS, CLIP_G_HUB_ID, is_clip_folder, download=download),
    }
    if has_t5:
        folders["tokenizer_3"] = places.find(_T5_FOLDERS, T5_XXL_HUB_ID, is_t5_folder, download=download)
    return folders


def find_windows(model: ModelConfig, options: Sd3Options, files: Sd3Files | None) -> dict[str, CaptionTokenizer]:
    """This gives the tokenizers that are on disk, by the name of their encoder; nothing is downloaded.

    Args:
        model: Where to look.
        options: Settings of the family.
        files: The model's parts; None: it isn't known, and T5 counts where its tokenizer is found.

    Raises:
        ConfigError: A tokenizer isn't on disk, or is unreadable.
    """
    places = tokenizer_places(model)
    has_t5 = files is None or files.t5xxl is not None
    try:
        return load_tokenizers(places, options, has_t5=has_t5, download=False).windows()
    except ConfigError:
        if files is not None:
            raise
        return load_tokenizers(places, options, has_t5=False, download=False).windows()
