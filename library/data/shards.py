"""Shards: ordinary safetensors files that hold many entries. A tensor is called ``<key of the entry>/<its name>``."""

import contextlib
import itertools
import json
import os
import re
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from library.io.atomic import atomic_path
from library.io.header import DTYPE_BITS, read_header
from library.io.safetensors import save_tensors, torch_dtype

_METADATA = {"atelier.tensor_store": "1"}
_SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_UNFINISHED_NAME = re.compile(r"\.[0-9a-f]{32}\.safetensors\..*")
_COPY_BYTES = 1 << 23
_MOST_OPEN_SHARDS = 128  # systems allow a process as few as 256 open files


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


Entries = Mapping[str, Sequence[StoredTensor]]
"""The entries of one shard by key."""


def is_shard(name: str) -> bool:
    """Whether a file name is one that ``write_shard`` and ``merge_shards`` give."""
    return _SHARD_NAME.fullmatch(name) is not None


def is_unfinished(name: str) -> bool:
    """Whether a file name is one that a shard has while it is written."""
    return _UNFINISHED_NAME.fullmatch(name) is not None


def write_shard(directory: Path, entries: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """This writes a new shard; it appears complete or not at all.

    Args:
        directory: The folder.
        entries: Tensors by name, by key of the entry.

    Returns:
        The new file.
    """
    path = _new_path(directory)
    named = {f"{key}/{name}": tensor for key, tensors in entries.items() for name, tensor in tensors.items()}
    save_tensors(named, path, _METADATA)
    return path


def read_entries(path: Path) -> dict[str, list[StoredTensor]]:
    """This lists the entries of a shard from its header.

    Raises:
        ConfigError: The file is missing, truncated or not a safetensors file.
        ValueError: The file was not written by this module.
    """
    header = read_header(path)
    if dict(header.metadata) != _METADATA:
        raise ValueError(f"{path} is not a shard of a tensor store")
    entries: dict[str, list[StoredTensor]] = {}
    for full_name, info in header.tensors.items():
        key, _, name = full_name.partition("/")
        stored = StoredTensor(name, info.dtype, info.shape, header.data_start + info.begin, info.end - info.begin)
        entries.setdefault(key, []).append(stored)
    return entries


def merge_shards(directory: Path, sources: Iterable[tuple[Path, Entries]]) -> Path:
    """This copies entries of several shards into a new one, without loading them.

    Args:
        directory: The folder.
        sources: Shards, and which of their entries to copy. No key occurs twice.

    Returns:
        The new file; the sources stay.
    """
    parts = [
        (f"{key}/{stored.name}", stored, source)
        for source, entries in sources
        for key, tensors in entries.items()
        for stored in tensors
    ]
    # Wide types first keep every tensor aligned; within a type, copying goes forward through each source.
    parts.sort(key=lambda part: (-DTYPE_BITS[part[1].dtype], part[2], part[1].begin))
    path = _new_path(directory)
    with atomic_path(path) as temporary, open(temporary, "wb") as target:
        target.write(_header((name, stored) for name, stored, _ in parts))
        for source, group in itertools.groupby(parts, key=lambda part: part[2]):
            with open(source, "rb") as file:
                for _, stored, _ in group:
                    _copy(file, target, stored)
    return path


class OpenShards:
    """The shards of a folder that this process reads, held open. Calls take turns from outside, reading needn't.

    Args:
        directory: The folder.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._shards: OrderedDict[str, OpenShard] = OrderedDict()

    def get(self, name: str, size: int) -> "OpenShard | None":
        """The shard called ``name``, or None when it is gone or its size isn't ``size``."""
        shard = self._shards.pop(name, None)
        if shard is None:
            try:
                shard = OpenShard(self._directory / name)
            except FileNotFoundError:
                return None
            if shard.size != size:
                return None
        self._shards[name] = shard
        if len(self._shards) > _MOST_OPEN_SHARDS:
            self._shards.popitem(last=False)  # closed once no thread reads from it
        return shard

    def close(self) -> None:
        """Closes them."""
        self._shards.clear()


class OpenShard:
    """A shard open for reading, until nothing refers to it."""

    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, tensors: Iterable[StoredTensor]) -> dict[str, Tensor]:
        """The tensors by name, in memory of their own. Threads take turns, since a file has one position."""
        found = {}
        for stored in tensors:
            data = torch.empty(stored.length, dtype=torch.uint8)
            with self._lock:
                self._file.seek(stored.begin)
                done = self._file.readinto(data.numpy().data)
            if done != stored.length:
                raise OSError(f"{self._file.name} ended while it was read")
            found[stored.name] = data.view(torch_dtype(stored.dtype)).view(stored.shape)
        return found

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the file wasn't there to open
            self._file.close()


def _new_path(directory: Path) -> Path:
    # A name of its own for every shard: writers never meet, and a name always means the same bytes.
    return directory / f"{uuid.uuid4().hex}.safetensors"


def _header(parts: Iterable[tuple[str, StoredTensor]]) -> bytes:
    content: dict[str, object] = {"__metadata__": _METADATA}
    position = 0
    for name, stored in parts:
        offsets = [position, position + stored.length]
        content[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": offsets}
        position += stored.length
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(source: BinaryIO, target: BinaryIO, stored: StoredTensor) -> None:
    source.seek(stored.begin)
    left = stored.length
    while left:
        block = source.read(min(left, _COPY_BYTES))
        if not block:
            raise OSError(f"{source.name} ended while it was copied")
        target.write(block)
        left -= len(block)
