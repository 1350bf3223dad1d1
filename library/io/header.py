"""What a weights file says about itself: names, types, shapes and offsets, read without torch and without its data.

A safetensors file is 8 bytes of length, that many bytes of JSON, then the tensors' bytes one after another.
Format: https://github.com/huggingface/safetensors#format
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from library.config.documents import count_values, parse_json
from library.config.errors import ConfigError
from library.config.messages import name_shown

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Size of one element by the name that the format gives its type."""

_LONGEST_HEADER = 100_000_000
"""The format's own limit."""

_LARGEST_NUMBER = 2**63
_MOST_VALUES = 3_000_000
"""Of a header's JSON; a tensor has about ten, and files have some thousands of tensors."""

_UNCOUNTED_BYTES = 1 << 20
_MOST_SIDES = 64
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a pickle or zip file"),
    (b"\x80", "a pickle file"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself (run `git lfs pull`)"),
    (b"<", "a web page, not a model (the download went wrong)"),
)


class TensorInfo(NamedTuple):
    """One tensor of a file.

    Attributes:
        dtype: The format's name of the element type: ``BF16``.
        shape: Its sizes.
        begin: First byte, counted from the start of the data.
        end: One past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The contents of one weights file.

    Attributes:
        path: The file.
        metadata: The free text entries that the file carries.
        tensors: Its tensors by name, in the file's order.
        data_start: Where the tensors' bytes begin. Meaningless for a pickle.
        format: ``safetensors`` or ``pickle``.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    data_start: int
    format: str = "safetensors"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes by name."""
        return {name: info.shape for name, info in self.tensors.items()}


def read_header(path: str | os.PathLike[str]) -> Header:
    """This reads and checks the header of a safetensors file.

    Args:
        path: The file.

    Raises:
        ConfigError: The file is missing, is something else, is truncated, or contradicts itself.
    """
    path = require_file(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        return parse_header(path, file, size)


def require_file(path: str | os.PathLike[str]) -> Path:
    """This checks that ``path`` is a readable, non-empty file.

    Raises:
        ConfigError: It is not.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a file")
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"{path} can't be read: permission denied")
    if path.stat().st_size == 0:
        raise ConfigError(f"{path} is empty (0 bytes); download it again")
    return path


def parse_header(path: Path, file: BinaryIO, size: int) -> Header:
    """This reads and checks the header of a safetensors file that is open, or of its first bytes.

    Args:
        path: The file's name, for messages.
        file: The file at its start; what follows the header is not read.
        size: Bytes of the whole file.

    Raises:
        ConfigError: The file is something else, is truncated, or contradicts itself.
    """
    start = file.read(32)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or length > _LONGEST_HEADER:
        known = [title for magic, title in _OTHER_FORMATS if start.startswith(magic)]
        raise ConfigError(f"{path} is not a safetensors file" + (f": it is {known[0]}" if known else ""))
    if 8 + length > size:
        raise ConfigError(_truncated(path, 8 + length - size, "at least "))
    file.seek(8)
    try:
        metadata, tensors = _contents(file.read(length))
    except ValueError as error:
        raise ConfigError(f"{path} has a damaged safetensors header ({error}); download it again") from error
    _check_offsets(path, tensors, size - 8 - length)
    return Header(path, metadata, tensors, 8 + length)


def _contents(data: bytes) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The metadata and the tensors; what they may be is checked, where they lie is not."""
    text = data.decode("utf-8")
    if len(text) > _UNCOUNTED_BYTES:
        count_values(text, _MOST_VALUES)
    content = parse_json(text, pairs=_without_twins)
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its __metadata__ is no table of texts")
    "".join([*content, *metadata, *metadata.values()]).encode()  # half a character, which nothing could write
    tensors = {}
    for name, entry in content.items():
        try:
            tensors[name] = _tensor_info(entry)
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{name_shown(name)} is no description of a tensor") from None
    return metadata, tensors


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{name_shown(twice)} stands twice in it")
    return values


def _tensor_info(entry: Mapping[str, Any]) -> TensorInfo:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    sides = (begin, end, *shape)
    # JSON's true and 1.5 would pass for whole numbers in Python
    if type(dtype) is not str or type(shape) is not list or any(type(side) is not int for side in sides):
        raise ValueError
    if min(sides) < 0 or max(sides) > _LARGEST_NUMBER or len(shape) > _MOST_SIDES or len(dtype) > _MOST_SIDES:
        raise ValueError
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_offsets(path: Path, tensors: Mapping[str, TensorInfo], available: int) -> None:
    """The tensors must fill the data exactly: no hole, no overlap, the length that type and shape ask for."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        bits = DTYPE_BITS.get(info.dtype)
        wrong_length = bits is not None and (info.end - info.begin) * 8 != info.elements * bits
        if info.begin != position or info.end < info.begin or wrong_length or min(info.shape, default=0) < 0:
            raise ConfigError(
                f"{path} has a damaged safetensors header (offsets of {name_shown(name)}); download it again"
            )
        position = info.end
    if position > available:
        raise ConfigError(_truncated(path, position - available))
    if position < available:
        raise ConfigError(f"{path} has {available - position:,} bytes after its last tensor; download it again")


def _truncated(path: Path, missing: int, qualifier: str = "") -> str:
    return f"{path} is truncated: {qualifier}{missing:,} bytes are missing at its end; download it again"
