"""Sana's tokenizer: where it lies, the text that stands before a caption, and how much of a caption is read.

It loads no torch.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.model import ModelConfig
from library.families.sana.files import SanaFiles, read_prefix
from library.families.sana.options import SanaOptions
from library.text_encoders.tokenizers import (
    GEMMA_HUB_ID,
    CaptionTokenizer,
    TokenizerPlaces,
    is_gemma_folder,
    load_gemma_tokenizer,
    tokenizer_places,
)

if TYPE_CHECKING:
    from torch import Tensor

_FOLDERS = ("tokenizer", "gemma", "text_encoder")
_MARGIN = 8
INSTRUCTION = "\n".join(
    (
        'Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable for '
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    )
)
"""The complex human instruction (Xie et al. 2024, arXiv:2410.10629, section 3.1), as in the published training files.

Its last space is no slip: with it, the first word of a caption becomes the token that it is in the middle of a text.
"""


@dataclass(frozen=True)
class SanaTokenizer:
    """Gemma's tokenizer with the prefix, and the window that is left of its features.

    Gemma reads prefix and caption together. Of its features the denoiser gets the start token's and those from the
    prefix's last position on, where the caption's first token takes the place of the prefix's last space.

    Attributes:
        tokenizer: Its length is that of prefix and caption together.
        prefix: Stands before every caption that isn't empty; may be empty.
        length: Tokens that the denoiser sees, ``sana_max_token_length``.
        lower_case: Whether captions are lower-cased.
    """

    tokenizer: CaptionTokenizer
    prefix: str
    length: int
    lower_case: bool

    @property
    def skipped(self) -> int:
        """How many positions after the first are left out of what the denoiser sees."""
        return self.tokenizer.length - self.length

    def __call__(self, captions: Sequence[str]) -> "tuple[Tensor, Tensor]":
        """Token ids (B, length and ``skipped``), int64, and which of them are text (the same shape), bool."""
        return self.tokenizer([self._text(caption) for caption in captions])

    def without_prefix(self) -> "SanaTokenizer":
        """The same window for captions with nothing before them."""
        alone = dataclasses.replace(self.tokenizer, length=self.length)
        return dataclasses.replace(self, tokenizer=alone, prefix="")

    def may_cut(self, caption: str) -> bool:
        """Whether the caption may be too long for the window, told without reading it: False is certain."""
        return self._narrower.may_cut(caption)

    @functools.cached_property
    def _narrower(self) -> CaptionTokenizer:
        """A window for the caption alone, narrower by what may change where prefix and caption meet."""
        return dataclasses.replace(self.tokenizer, length=self.length - _MARGIN)

    def seen(self, captions: Sequence[str]) -> list[int]:
        """How many characters of each caption the window keeps: all of them where it fits."""
        longer = [caption for caption in dict.fromkeys(captions) if self.may_cut(caption)]
        kept = dict(zip(longer, self.tokenizer.seen([self._text(caption) for caption in longer])))
        return [
            self._own_characters(caption, kept[caption]) if caption in kept else len(caption) for caption in captions
        ]

    def identity(self) -> str:
        """A name for everything that shapes the ids and the window."""
        return f"{self.window_identity()}:{self.tokenizer.pad_id}"

    def window_identity(self) -> str:
        """A name for everything that ``seen`` depends on."""
        prefix = hashlib.blake2b(self.prefix.encode(), digest_size=16).hexdigest()
        return f"{self.tokenizer.window_identity()}:{prefix}:{self.length}:{self.lower_case}"

    def _text(self, caption: str) -> str:
        caption = caption.strip()
        if self.lower_case:
            caption = caption.lower()
        return f"{self.prefix}{caption}" if caption else ""

    def _own_characters(self, caption: str, kept: int) -> int:
        """Characters of the caption as it was written, from those of the text that is read."""
        if kept == len(self._text(caption)):
            return len(caption)
        before = len(caption) - len(caption.lstrip())
        return min(len(caption), before + max(0, kept - len(self.prefix)))


def load_tokenizer(
    places: TokenizerPlaces, options: SanaOptions, files: SanaFiles | None, *, download: bool = True
) -> SanaTokenizer:
    """This finds and loads the tokenizer, and measures the prefix with it.

    Args:
        places: Where to look.
        options: Settings of the family.
        files: The model's parts: the tokenizer may lie beside Gemma's weights.
        download: Whether to fetch from the hub what isn't on disk.

    Raises:
        ConfigError: The tokenizer is nowhere, or unreadable; or the prefix is.
    """
    prefix = read_prefix(options)
    prefix = INSTRUCTION if prefix is None else prefix
    folder = tokenizer_folder(places, files, download=download)
    length = options.sana_max_token_length
    # The start token is counted twice, and the prefix's last token gives its place to the caption's first.
    more = length - 2 if prefix else length - 1
    return SanaTokenizer(
        tokenizer=load_gemma_tokenizer(folder, after=prefix, length=more),
        prefix=prefix,
        length=length,
        lower_case=options.sana_lower_case,
    )


def tokenizer_folder(places: TokenizerPlaces, files: SanaFiles | None, *, download: bool = True) -> Path:
    """Where the tokenizer lies.

    Args:
        places: Where to look.
        files: See ``load_tokenizer``.
        download: Whether to fetch it from the hub where it isn't on disk.

    Raises:
        ConfigError: It is nowhere.
    """
    beside = None if files is None else files.gemma.headers[0].path.parent
    if places.directory is None and beside is not None and is_gemma_folder(beside):
        return beside
    return places.find(_FOLDERS, GEMMA_HUB_ID, is_gemma_folder, download=download)


def find_windows(model: ModelConfig, options: SanaOptions, files: SanaFiles | None) -> dict[str, SanaTokenizer]:
    """This gives the tokenizer that is on disk, by the name of its encoder; nothing is downloaded.

    Args:
        model: Where to look.
        options: Settings of the family.
        files: The model's parts; None: they aren't known.

    Raises:
        ConfigError: It isn't on disk, or is unreadable.
    """
    return {"Gemma": load_tokenizer(tokenizer_places(model), options, files, download=False)}
