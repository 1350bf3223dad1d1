"""Tokenizers of captions: found on disk or on the hub, and kept as the bare ``tokenizers`` object.

The bare object pickles into workers, which then need not import transformers.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.config.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLIP_L_HUB_ID = "openai/clip-vit-large-patch14"
CLIP_G_HUB_ID = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
T5_XXL_HUB_ID = "google/t5-v1_1-xxl"

CLIP_LENGTH = 77
"""Token ids per caption that every CLIP reads."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model")


@dataclass(frozen=True)
class CaptionTokenizer:
    """One tokenizer with its window.

    Attributes:
        backend: Words to ids; it adds the start and end tokens and cuts at ``length``.
        length: Ids per caption.
        pad_id: Fills the rest.
    """

    backend: "Tokenizer"
    length: int
    pad_id: int

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, length), int64, and which of them are the caption's (B, length), bool."""
        # One by one: encode_batch starts threads, which a forked worker must not do.
        rows = [self.backend.encode(caption).ids for caption in captions]
        ids = torch.full((len(rows), self.length), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), self.length), dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[index, : len(row)] = True
        return ids, mask

    def identity(self) -> str:
        """A name for everything that shapes the ids: equal tokenizers have equal identities, wherever they lie."""
        content = hashlib.blake2b(self.backend.to_str().encode(), digest_size=16).hexdigest()
        return f"{content}:{self.length}:{self.pad_id}"


@dataclass(frozen=True)
class TokenizerPlaces:
    """Where tokenizers may lie, in the order in which they are looked for. The hub comes last.

    Attributes:
        directory: ``--tokenizer_dir``; when it is given, nothing else is looked at.
        beside: The checkpoint's folder.
        cache: ``--tokenizer_cache_dir``; what comes from the hub is kept there.
    """

    directory: Path | None = None
    beside: Path | None = None
    cache: Path | None = None

    def find(self, names: Sequence[str], hub_id: str, fits: Callable[[Path], bool]) -> Path:
        """The folder of one tokenizer.

        Args:
            names: The sub-folders that may hold it, best first. ``--tokenizer_dir`` may also be its folder itself.
            hub_id: Its name on the hub, and with ``_`` for ``/`` in ``--tokenizer_cache_dir``.
            fits: Whether a folder holds a tokenizer of the right kind.

        Raises:
            ConfigError: It is nowhere.
        """
        if self.directory is not None:
            for folder in (*(self.directory / name for name in names), self.directory):
                if fits(folder):
                    return folder
            raise ConfigError(
                f"--tokenizer_dir {self.directory} holds no tokenizer of {hub_id}; "
                f"put its files into a sub-folder {' or '.join(names)}"
            )
        beside = [] if self.beside is None else [self.beside / name for name in names]
        cached = None if self.cache is None else self.cache / hub_id.replace("/", "_")
        for folder in (*beside, *([] if cached is None else [cached])):
            if fits(folder):
                return folder
        return _download(hub_id, cached)


def is_clip_folder(folder: Path) -> bool:
    """This tells whether the folder holds a CLIP tokenizer."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return True
    return _model_type(folder) == "BPE"


def is_t5_folder(folder: Path) -> bool:
    """This tells whether the folder holds a T5 tokenizer."""
    return (folder / "spiece.model").is_file() or _model_type(folder) == "Unigram"


def load_clip_tokenizer(folder: Path, *, pad_id: int | None) -> CaptionTokenizer:
    """This loads a CLIP tokenizer.

    Args:
        folder: Holds ``vocab.json`` and ``merges.txt``, or ``tokenizer.json``.
        pad_id: Fills short captions; None: the end token.

    Raises:
        ConfigError: Its files can't be read.
    """

    def load() -> "Tokenizer":
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer

    backend = _readable(load, folder)
    end_id = backend.encode("").ids[-1]
    return _windowed(backend, CLIP_LENGTH, end_id if pad_id is None else pad_id)


def load_t5_tokenizer(folder: Path, *, length: int) -> CaptionTokenizer:
    """This loads a T5 tokenizer; it pads with ``<pad>``.

    Args:
        folder: Holds ``tokenizer.json`` or ``spiece.model`` (which needs the sentencepiece package).
        length: Ids per caption.

    Raises:
        ConfigError: Its files can't be read.
    """

    def load() -> "Tokenizer":
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        from transformers import T5Tokenizer

        return T5Tokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer

    backend = _readable(load, folder)
    pad_id = backend.token_to_id("<pad>")
    if pad_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no <pad>, so it is not T5's; give the folder of T5's")
    return _windowed(backend, length, pad_id)


def _windowed(backend: "Tokenizer", length: int, pad_id: int) -> CaptionTokenizer:
    backend.no_padding()
    backend.enable_truncation(length)
    return CaptionTokenizer(backend, length, pad_id)


def _readable(load: "Callable[[], Tokenizer]", folder: Path) -> "Tokenizer":
    # The tokenizers package raises bare Exception for files it can't parse.
    try:
        return load()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"the tokenizer in {folder} can't be read: {reason}; replace its files") from error


def _model_type(folder: Path) -> str | None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["model"]["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a tokenizer; replace the file") from error


def _download(hub_id: str, destination: Path | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_FILES), local_dir=destination))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer of {hub_id} was found on disk, and it can't be downloaded; put its files into a folder and "
            f"name it with --tokenizer_dir, or copy {hub_id.replace('/', '_')} into --tokenizer_cache_dir"
        ) from error
