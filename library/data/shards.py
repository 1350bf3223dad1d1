"""Shards: ordinary safetensors files that hold many entries. A tensor is called ``<key of the entry>/<its name>``.

Their metadata have a checksum per entry, ``crc32/<key of the entry>``, over the key, the tensors' names, types and
shapes, and their bytes. Entries are copied from shard to shard with it, so it tells of damage since they were made.
"""

import json
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.config.errors import ConfigError
from library.io.header import DTYPE_BITS, parse_header
from library.io.safetensors import dtype_name

_FORMAT, _FORMAT_VERSION = "atelier.tensor_store", "2"
_CHECKSUM = "crc32/"
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_UNFINISHED_NAME = re.compile(r"\.[0-9a-f]{32}\.safetensors\..*")

Bytes = Any
"""Something with the buffer protocol: bytes, a memoryview, a NumPy array."""


class StoredTensor(NamedTuple):
    """Where one tensor of an entry lies.

    Attributes:
        name: Its name in the entry.
        dtype: The format's name of the element type: ``BF16``.
        shape: Its sizes.
        begin: First byte, counted from the start of the file.
        length: Bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    length: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.begin + self.length


class StoredEntry(NamedTuple):
    """One entry of a shard: its tensors in the order in which they lie, and its checksum."""

    tensors: tuple[StoredTensor, ...]
    checksum: int


Entries = Mapping[str, StoredEntry]
"""The entries of one shard by key."""


class NewShard(NamedTuple):
    """A shard to be written.

    Attributes:
        name: Its file name.
        header: The bytes that come first.
        entries: Where its entries will lie.
        size: Bytes of the whole file.
    """

    name: str
    header: bytes
    entries: Entries
    size: int


class UnreadableShard(ValueError):
    """A file is no shard, is damaged, or has the format of another version; the message says which.

    Attributes:
        foreign: Whether it is an intact file of somebody else's.
    """

    def __init__(self, message: str, *, foreign: bool = False):
        super().__init__(message)
        self.foreign = foreign


def is_shard(name: str) -> bool:
    """Whether a file name is one that shards get."""
    return _NAME.fullmatch(name) is not None


def is_unfinished(name: str) -> bool:
    """Whether a file name is one that a shard has while it is written."""
    return _UNFINISHED_NAME.fullmatch(name) is not None


def plan_shard(entries: Mapping[str, Mapping[str, Tensor]]) -> tuple[NewShard, list[Bytes]]:
    """This lays out a new shard.

    Args:
        entries: Tensors by name, by key of the entry; contiguous, on the CPU.

    Returns:
        The shard, and the bytes that follow its header.
    """
    data = {
        (key, name): tensor.view(-1).view(torch.uint8).numpy()
        for key, tensors in entries.items()
        for name, tensor in tensors.items()
    }
    described = {
        key: [StoredTensor(name, dtype_name(t.dtype), tuple(t.shape), 0, t.nbytes) for name, t in tensors.items()]
        for key, tensors in entries.items()
    }
    checksums = {
        key: checksum(key, tensors, (data[key, tensor.name] for tensor in by_name(tensors)))
        for key, tensors in described.items()
    }
    parts = [(key, tensor) for key, tensors in described.items() for tensor in tensors]
    # Wide types first keep every tensor aligned, which mapping a file relies on.
    parts.sort(key=lambda part: -DTYPE_BITS[part[1].dtype])
    return _laid_out(parts, checksums), [data[key, tensor.name] for key, tensor in parts]


def plan_copy(sources: Sequence[Entries]) -> tuple[NewShard, list[tuple[int, int, int]]]:
    """This lays out a shard of entries that are copied from other shards.

    Args:
        sources: Which entries to copy from each shard. No key occurs twice.

    Returns:
        The shard, and the ranges that follow its header: the number of the source, the first byte and the length.
    """
    parts = [
        (number, key, tensor)
        for number, entries in enumerate(sources)
        for key, entry in entries.items()
        for tensor in entry.tensors
    ]
    # Within a type, copying goes forward through each source.
    parts.sort(key=lambda part: (-DTYPE_BITS[part[2].dtype], part[0], part[2].begin))
    checksums = {key: entry.checksum for entries in sources for key, entry in entries.items()}
    shard = _laid_out([(key, tensor) for _, key, tensor in parts], checksums)
    ranges = []
    for number, group in groupby(parts, key=lambda part: part[0]):
        for run in adjacent([tensor for _, _, tensor in group]):
            ranges.append((number, run[0].begin, run[-1].end - run[0].begin))
    return shard, ranges


def read_entries(name: str, start: bytes, size: int) -> dict[str, StoredEntry]:
    """This lists the entries of a shard.

    Args:
        name: The file's name, for messages.
        start: Its first bytes, at least ``header_length`` of them.
        size: Its size.

    Raises:
        UnreadableShard: It is no shard, is damaged, or has the format of another version.
    """
    try:
        header = parse_header(Path(name), BytesIO(start), size)
    except ConfigError as error:
        raise UnreadableShard(str(error).removesuffix("; download it again")) from None
    version = header.metadata.get(_FORMAT)
    if version != _FORMAT_VERSION:
        kind = "not a shard of a cache" if version is None else f"a shard of format {version}, not {_FORMAT_VERSION}"
        raise UnreadableShard(f"{name} is {kind}", foreign=version is None)
    found: dict[str, list[StoredTensor]] = {}
    for full_name, info in header.tensors.items():
        key, _, short = full_name.partition("/")
        stored = StoredTensor(short, info.dtype, info.shape, header.data_start + info.begin, info.end - info.begin)
        found.setdefault(key, []).append(stored)
    checksums = {
        text.removeprefix(_CHECKSUM): value for text, value in header.metadata.items() if text.startswith(_CHECKSUM)
    }
    if found.keys() != checksums.keys():
        raise UnreadableShard(f"{name} has a damaged safetensors header (checksums of other entries than it holds)")
    try:
        return {key: StoredEntry(tuple(tensors), int(checksums[key], 16)) for key, tensors in found.items()}
    except ValueError as error:
        raise UnreadableShard(f"{name} has a damaged safetensors header ({error})") from None


def header_length(start: bytes | bytearray) -> int:
    """How many bytes of a file ``read_entries`` needs, told by its first eight; a file may be shorter."""
    return 8 + int.from_bytes(start[:8], "little")


def checksum(key: str, tensors: Iterable[StoredTensor], data: Iterable[Bytes]) -> int:
    """The checksum of an entry.

    Args:
        key: The entry's.
        tensors: Its tensors.
        data: Their bytes in the order of ``by_name``, in blocks of any length.
    """
    described = [[tensor.name, tensor.dtype, *tensor.shape] for tensor in by_name(tensors)]
    value = zlib.crc32(json.dumps([key, described]).encode())
    for block in data:
        value = zlib.crc32(block, value)
    return value


def by_name(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The tensors in the order in which a checksum takes them. Where they lie may change when they are copied."""
    return sorted(tensors, key=lambda tensor: tensor.name)


def adjacent(tensors: Iterable[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """Runs of tensors that lie one right after the other, so that each run can be read at once."""
    run: list[StoredTensor] = []
    for tensor in tensors:
        if run and tensor.begin != run[-1].end:
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def _laid_out(parts: Sequence[tuple[str, StoredTensor]], checksums: Mapping[str, int]) -> NewShard:
    metadata = {_FORMAT: _FORMAT_VERSION} | {_CHECKSUM + key: f"{value:08x}" for key, value in checksums.items()}
    content: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for key, tensor in parts:
        offsets = [position, position + tensor.length]
        content[f"{key}/{tensor.name}"] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        position += tensor.length
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    stored: dict[str, list[StoredTensor]] = {key: [] for key in checksums}
    begin = len(header)
    for key, tensor in parts:
        stored[key].append(tensor._replace(begin=begin))
        begin += tensor.length
    # A name of its own for every shard: writers never meet, and a name always means the same bytes.
    name = f"{uuid.uuid4().hex}.safetensors"
    entries = {key: StoredEntry(tuple(tensors), checksums[key]) for key, tensors in stored.items()}
    return NewShard(name, header, entries, begin)
