"""The tokenizer of Stable Diffusion 1.x and 2.x: where it lies, and how captions become chunks. It loads no torch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.model import ModelConfig
from library.families.sd.files import SdFiles
from library.families.sd.options import SdOptions
from library.families.sd.weighted_captions import weighted_pieces
from library.text_encoders.tokenizers import (
    CLIP_L_HUB_ID,
    CLIP_LENGTH,
    CaptionTokenizer,
    TokenizerPlaces,
    is_clip_folder,
    load_clip_tokenizer,
    tokenizer_places,
)

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = CLIP_LENGTH - 2
"""Tokens of a caption that the encoder reads at a time, between start and end."""

_FOLDERS = ("tokenizer", "clip", "clip_l")
_V2_PAD_ID = 0


@dataclass(frozen=True)
class SdTokenizer:
    """CLIP's tokenizer, and the chunks that captions are cut into.

    Attributes:
        tokenizer: Its window is that of all chunks together.
        chunks: How many there are.
        weighted: Whether brackets in captions are weights.
    """

    tokenizer: CaptionTokenizer
    chunks: int
    weighted: bool

    def __call__(self, captions: Sequence[str]) -> "tuple[Tensor, Tensor | None]":
        """Token ids (B, chunks, 77), int64, each chunk with start, end and padding; the weights of the tokens (B, N).

        N is ``chunks`` * 75 and 2, for start and end. Weights are None where brackets are plain.
        """
        import torch

        start, end = self.tokenizer.backend.encode("").ids
        ids = torch.full((len(captions), self.chunks, CLIP_LENGTH), self.tokenizer.pad_id, dtype=torch.long)
        weights = torch.ones(len(captions), self.chunks * CHUNK + 2)
        for row, caption in enumerate(captions):
            tokens, own = self._tokens(caption)
            weights[row, 1 : len(own) + 1] = torch.tensor(own)
            for chunk in range(self.chunks):
                inside = [start, *tokens[chunk * CHUNK : (chunk + 1) * CHUNK], end]
                ids[row, chunk, : len(inside)] = torch.tensor(inside)
        return ids, weights if self.weighted else None

    def _tokens(self, caption: str) -> tuple[list[int], list[float]]:
        """The ids of a caption, as many as fit, and their weights."""
        pieces = weighted_pieces(caption) if self.weighted else [(caption, 1.0)]
        tokens: list[int] = []
        weights: list[float] = []
        for text, weight in pieces:
            own = self.tokenizer.backend.encode(text).ids[1:-1]
            tokens += own
            weights += [weight] * len(own)
        most = self.chunks * CHUNK
        return tokens[:most], weights[:most]

    @property
    def length(self) -> int:
        """Tokens per caption, with start and end."""
        return self.tokenizer.length

    def may_cut(self, caption: str) -> bool:
        """Whether the caption may be too long; False is certain. Brackets count as if they were tokens."""
        return self.tokenizer.may_cut(caption)

    def seen(self, captions: Sequence[str]) -> list[int]:
        """How many characters of each caption are read. Brackets count as if they were tokens."""
        return self.tokenizer.seen(captions)

    def identity(self) -> str:
        """A name for everything that shapes ids and weights."""
        words = f"{self.tokenizer.identity()}:{self.chunks}:{self.weighted}"
        return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()

    def window_identity(self) -> str:
        """A name for everything that ``seen`` depends on."""
        return self.tokenizer.window_identity()


def load_tokenizer(places: TokenizerPlaces, options: SdOptions, *, is_v2: bool, download: bool = True) -> SdTokenizer:
    """This finds and loads the tokenizer.

    Args:
        places: Where to look.
        options: Settings of the family.
        is_v2: Whether the model is of the second generation, which pads with another token.
        download: Whether to fetch from the hub what isn't on disk.

    Raises:
        ConfigError: It is nowhere, or unreadable.
    """
    folder = tokenizer_folder(places, download=download)
    length = int(options.max_token_length)
    tokenizer = load_clip_tokenizer(folder, pad_id=_V2_PAD_ID if is_v2 else None, length=length + 2)
    return SdTokenizer(tokenizer, length // CHUNK, options.weighted_captions)


def tokenizer_folder(places: TokenizerPlaces, *, download: bool = True) -> Path:
    """Where the tokenizer lies.

    Args:
        places: Where to look.
        download: Whether to fetch from the hub what isn't on disk.

    Raises:
        ConfigError: It is nowhere.
    """
    return places.find(_FOLDERS, CLIP_L_HUB_ID, is_clip_folder, download=download)


def find_windows(model: ModelConfig, options: SdOptions, files: SdFiles | None) -> dict[str, SdTokenizer]:
    """This gives the tokenizer that is on disk, by the name of its encoder; nothing is downloaded.

    Args:
        model: Where to look.
        options: Settings of the family.
        files: The model's parts; None: it isn't known.

    Raises:
        ConfigError: It isn't on disk, or is unreadable.
    """
    is_v2 = files is not None and files.is_v2
    return {"CLIP": load_tokenizer(tokenizer_places(model), options, is_v2=is_v2, download=False)}
