"""Tokenizers of captions: found on disk or on the hub, and kept as the bare ``tokenizers`` object.

The bare object pickles into workers, which then need not import transformers. Nothing here imports torch when it is
loaded: the start-up report asks what a window keeps before a model is there.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config.documents import MOST_JSON_BYTES, parse_json, read_text, size_text
from library.config.errors import ConfigError
from library.config.model import ModelConfig

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from torch import Tensor

CLIP_L_HUB_ID = "openai/clip-vit-large-patch14"
CLIP_G_HUB_ID = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
T5_XXL_HUB_ID = "google/t5-v1_1-xxl"
GEMMA_HUB_ID = "Efficient-Large-Model/gemma-2-2b-it"

CLIP_LENGTH = 77
"""Token ids per caption that every CLIP reads."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model")
_GEMMA_START = "<bos>"
_CHUNK = 256
_MOST_VALUES = 10_000_000
"""Of a tokenizer.json; Gemma's has two millions."""

_MOST_THREADS = 8


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

    def __call__(self, captions: Sequence[str]) -> "tuple[Tensor, Tensor]":
        """Token ids (B, length), int64, and which of them are the caption's (B, length), bool."""
        import torch

        # One by one: encode_batch starts threads, which a forked worker must not do.
        rows = [self.backend.encode(caption).ids for caption in captions]
        ids = torch.full((len(rows), self.length), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), self.length), dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[index, : len(row)] = True
        return ids, mask

    def seen(self, captions: Sequence[str]) -> list[int]:
        """How many characters of each caption the window keeps: all of them where it fits.

        Of a word that is cut, the part that is kept counts. A character that becomes several tokens counts when all of
        them are kept.
        """
        longer = [caption for caption in dict.fromkeys(captions) if self.may_cut(caption)]
        # Threads of our own: after those of the package, every process that is forked prints a warning.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            chunks = pool.map(self._seen, [longer[start : start + _CHUNK] for start in range(0, len(longer), _CHUNK)])
            kept = dict(zip(longer, (count for chunk in chunks for count in chunk)))
        return [kept.get(caption, len(caption)) for caption in captions]

    def may_cut(self, caption: str) -> bool:
        """Whether the caption may be too long for the window, told without reading it: False is certain."""
        # A token holds at least one byte, and the window gives one to the start of a word and a few to start and end.
        # Characters outside ASCII may become more than they were when they are normalised.
        return len(caption) > self._certain or not caption.isascii()

    @functools.cached_property
    def _certain(self) -> int:
        """So many characters always fit."""
        return self.length - self.backend.num_special_tokens_to_add(is_pair=False) - 1

    def _seen(self, captions: list[str]) -> list[int]:
        encodings = self.backend.encode_batch(captions)
        return [_kept(encoding, len(caption)) for encoding, caption in zip(encodings, captions)]

    def identity(self) -> str:
        """A name for everything that shapes the ids: equal tokenizers have equal identities, wherever they lie."""
        return f"{self.window_identity()}:{self.pad_id}"

    def window_identity(self) -> str:
        """A name for everything that ``seen`` depends on: how the rest is filled doesn't matter."""
        content = hashlib.blake2b(self.backend.to_str().encode(), digest_size=16).hexdigest()
        return f"{content}:{self.length}"


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

    def find(self, names: Sequence[str], hub_id: str, fits: Callable[[Path], bool], *, download: bool = True) -> Path:
        """The folder of one tokenizer.

        Args:
            names: The sub-folders that may hold it, best first. ``--tokenizer_dir`` may also be its folder itself.
            hub_id: Its name on the hub, and with ``_`` for ``/`` in ``--tokenizer_cache_dir``.
            fits: Whether a folder holds a tokenizer of the right kind.
            download: Whether to fetch it from the hub where it isn't on disk.

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
        return _from_hub(hub_id, cached, download=download)


def tokenizer_places(model: ModelConfig) -> TokenizerPlaces:
    """This says where the tokenizers of a model may lie."""
    base = model.pretrained_model_name_or_path
    checkpoint = None if base is None else Path(base)
    return TokenizerPlaces(
        directory=None if model.tokenizer_dir is None else Path(model.tokenizer_dir),
        beside=checkpoint.parent if checkpoint is not None and not checkpoint.is_dir() else checkpoint,
        cache=None if model.tokenizer_cache_dir is None else Path(model.tokenizer_cache_dir),
    )


def is_clip_folder(folder: Path) -> bool:
    """This tells whether the folder holds a CLIP tokenizer."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return True
    return _model_type(folder) == "BPE"


def is_t5_folder(folder: Path) -> bool:
    """This tells whether the folder holds a T5 tokenizer."""
    return (folder / "spiece.model").is_file() or _model_type(folder) == "Unigram"


def is_gemma_folder(folder: Path) -> bool:
    """This tells whether the folder holds a Gemma tokenizer."""
    if (folder / "tokenizer.model").is_file():
        return True
    model = _model(folder)
    return model is not None and model.get("type") == "BPE" and _GEMMA_START in model.get("vocab", ())


def load_clip_tokenizer(folder: Path, *, pad_id: int | None, length: int = CLIP_LENGTH) -> CaptionTokenizer:
    """This loads a CLIP tokenizer.

    Args:
        folder: Holds ``vocab.json`` and ``merges.txt``, or ``tokenizer.json``.
        pad_id: Fills short captions; None: the end token.
        length: Ids per caption.

    Raises:
        ConfigError: Its files can't be read.
    """

    def load() -> "Tokenizer":
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer

    backend = _readable(load, folder)
    end_id = backend.encode("").ids[-1]
    return _windowed(backend, length, end_id if pad_id is None else pad_id)


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


def load_gemma_tokenizer(folder: Path, *, after: str, length: int) -> CaptionTokenizer:
    """This loads a Gemma tokenizer; it starts with ``<bos>``, adds no end and pads with ``<pad>``.

    Args:
        folder: Holds ``tokenizer.json`` or ``tokenizer.model`` (which needs the sentencepiece package).
        after: A text whose ids, the start among them, are counted with this tokenizer.
        length: So many more ids are the window.

    Raises:
        ConfigError: Its files can't be read.
    """

    def load() -> "Tokenizer":
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        from transformers import GemmaTokenizer

        return GemmaTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer

    backend = _readable(load, folder)
    start_id, pad_id = backend.token_to_id(_GEMMA_START), backend.token_to_id("<pad>")
    if start_id is None or pad_id is None:
        raise ConfigError(
            f"the tokenizer in {folder} has no <bos> or no <pad>, so it is not Gemma's; give the folder of Gemma's"
        )
    from tokenizers.processors import TemplateProcessing

    # whatever the files say: some add no start
    backend.post_processor = TemplateProcessing(single=f"{_GEMMA_START} $A", special_tokens=[(_GEMMA_START, start_id)])
    backend.no_padding()
    backend.no_truncation()
    return _windowed(backend, len(backend.encode(after).ids) + length, pad_id)


def _kept(encoding: "Encoding", characters: int) -> int:
    """How many characters of a caption stand before the first one that is lost."""
    if not encoding.overflowing:
        return characters
    ends = [end for (_, end), special in zip(encoding.offsets, encoding.special_tokens_mask) if not special]
    rest = encoding.overflowing[0]
    lost = next(start for (start, _), special in zip(rest.offsets, rest.special_tokens_mask) if not special)
    return min(max(ends, default=0), lost)


def _windowed(backend: "Tokenizer", length: int, pad_id: int) -> CaptionTokenizer:
    backend.no_padding()
    backend.enable_truncation(length)
    return CaptionTokenizer(backend, length, pad_id)


def _readable(load: "Callable[[], Tokenizer]", folder: Path) -> "Tokenizer":
    for path in (folder / name for name in _FILES):
        if path.is_file() and path.stat().st_size > MOST_JSON_BYTES:
            raise ConfigError(f"{path} is larger than any tokenizer ({size_text(MOST_JSON_BYTES)}); replace the file")
    # The tokenizers package raises bare Exception for files it can't parse.
    try:
        return load()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"the tokenizer in {folder} can't be read: {reason}; replace its files") from error


def _model_type(folder: Path) -> str | None:
    model = _model(folder)
    return None if model is None else model["type"]


def _model(folder: Path) -> dict[str, Any] | None:
    """What ``tokenizer.json`` says of the model inside; None: there is no such file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        model = parse_json(read_text(path, MOST_JSON_BYTES, kind="a tokenizer"), most_values=_MOST_VALUES)["model"]
        model["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a tokenizer; replace the file") from error
    return model


def _from_hub(hub_id: str, destination: Path | None, *, download: bool) -> Path:
    """The tokenizer's folder in the hub's own cache, or in ``destination`` once it was fetched."""
    from huggingface_hub import snapshot_download

    where = {"local_dir": destination} if download else {"local_files_only": True}
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_FILES), **where))
    except (OSError, ValueError) as error:
        reason = ", and it can't be downloaded" if download else ""
        raise ConfigError(
            f"no tokenizer of {hub_id} was found on disk{reason}; put its files into a folder and "
            f"name it with --tokenizer_dir, or copy {hub_id.replace('/', '_')} into --tokenizer_cache_dir"
        ) from error
