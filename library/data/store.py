"""Where computed tensors are kept: in memory, or packed into a few files on disk.

An entry is a handful of named tensors under a key. Keys are hashes of everything that shaped the tensors
(``cache_keys``), so an entry never changes: writing a key twice means writing the same thing, and the first one stays.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from library.config.errors import ConfigError
from library.config.urls import is_remote
from library.data.opened_store import OpenedStore
from library.data.shard_files import write_entries
from library.data.shard_index import index_folder
from library.io.safetensors import is_finite, torch_dtype

_PENDING_BYTES, _REMOTE_PENDING_BYTES = 1 << 26, 1 << 27
_MOST_PENDING_SECONDS, _MOST_REMOTE_PENDING_SECONDS = 30.0, 120.0  # a killed writer loses no more than this much work
_STORABLE = frozenset(
    torch_dtype(name)
    for name in "BOOL U8 I8 U16 I16 U32 I32 U64 I64 F8_E4M3 F8_E5M2 F16 BF16 F32 F64 C64".split()  # noqa: SIM905
)

_log = logging.getLogger(__name__)


class NonFiniteEntry(ValueError):
    """A tensor has numbers that are not finite, so its entry was not stored.

    Attributes:
        key: The entry's.
        name: The tensor's.
    """

    def __init__(self, key: str, name: str):
        super().__init__(f"{name} of the cache entry {key} has numbers that are not finite; it is not stored")
        self.key, self.name = key, name


class TensorStore(Protocol):
    """Named tensors by key. Stores pickle into worker processes and survive a fork."""

    shared: bool
    """Whether all processes of a run see one store, so that each need write only a share of it."""

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without an entry, each once, in their order."""
        ...

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, in memory of their own, on the CPU; ``KeyError`` when there is none."""
        ...

    def read_rows(self, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        """The tensors of several entries, in order; ``KeyError`` as ``read`` raises it.

        Where all have tensors of the same types and shapes, those of one name lie one after the other in memory, so
        that ``records.stack_rows`` needs no copy.
        """
        ...

    def write(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Adds copies of the tensors; ``NonFiniteEntry`` (and nothing is added) for numbers that are not finite."""
        ...

    def flush(self) -> None:
        """Makes what was written visible to other processes."""
        ...

    def close(self) -> None:
        """Flushes and releases files."""
        ...

    def __enter__(self) -> "TensorStore": ...

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None: ...


class MemoryStore:
    """Entries in this process's memory.

    The tensors lie in a few large blocks, so that forked workers share them as they are, and spawned workers get each
    block once through shared memory instead of a file handle per tensor. One thread may write while others read.

    Args:
        block_bytes: The largest size of a block, unless one tensor needs more.
    """

    shared = False

    def __init__(self, *, block_bytes: int = 1 << 28):
        self._block_bytes = block_bytes
        self._blocks: list[Tensor] = []
        self._used = 0  # bytes of the last block
        self._entries: dict[str, dict[str, _Place]] = {}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """See ``TensorStore``."""
        return [key for key in dict.fromkeys(keys) if key not in self._entries]

    def read(self, key: str) -> dict[str, Tensor]:
        """See ``TensorStore``."""
        if key not in self._entries:
            raise KeyError(f"the cache has no entry {key}")
        return {name: self._tensor(place).clone() for name, place in self._entries[key].items()}

    def read_rows(self, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        """See ``TensorStore``."""
        if missing := self.missing(keys):
            raise KeyError(f"the cache has no entry {missing[0]}")
        entries = [self._entries[key] for key in keys]
        layouts = {frozenset((name, place.dtype, place.shape) for name, place in entry.items()) for entry in entries}
        if len(layouts) > 1:
            return [self.read(key) for key in keys]
        names = entries[0] if entries else ()
        block = {name: torch.stack([self._tensor(entry[name]) for entry in entries]) for name in names}
        return [{name: tensor[row] for name, tensor in block.items()} for row in range(len(keys))]

    def write(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See ``TensorStore``."""
        for key, tensors in entries.items():
            check_entry(key, tensors)
        for key, tensors in entries.items():
            if key not in self._entries:
                self._entries[key] = {name: self._keep(tensor) for name, tensor in tensors.items()}

    def flush(self) -> None:
        """Does nothing: other processes don't see this store."""

    def close(self) -> None:
        """Does nothing: the entries go with the object."""

    def __enter__(self) -> "MemoryStore":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.close()

    def _keep(self, tensor: Tensor) -> "_Place":
        length = tensor.numel() * tensor.element_size()
        begin = -(-self._used // 16) * 16
        if not self._blocks or begin + length > len(self._blocks[-1]):
            total = sum(len(block) for block in self._blocks)
            size = max(length, min(self._block_bytes, max(total, 1 << 16)))
            self._blocks.append(torch.empty(size, dtype=torch.uint8))
            begin = 0
        self._used = begin + length
        place = _Place(len(self._blocks) - 1, begin, length, tensor.dtype, tuple(tensor.shape))
        self._tensor(place).copy_(tensor.detach())
        return place

    def _tensor(self, place: "_Place") -> Tensor:
        data = self._blocks[place.block][place.begin : place.begin + place.length]
        return data.view(place.dtype).view(place.shape)


class _Place(NamedTuple):
    """Where a tensor lies in a ``MemoryStore``. Pickling a view instead would take its whole block along."""

    block: int
    begin: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class PackedStore:
    """Entries in a few large files of one folder, found through an index.

    Entries are gathered and written as small shards, which are merged into large ones as they become many. A writer may
    be killed at any moment: what it had written by then is there, and nothing is half there. Any number of processes
    may read, and several may write, at the same time.

    The folder may be remote. Then shards are objects that are never merged, and each machine keeps an index of its own.

    Opening is lazy and per process: the object can be made anywhere, pickled, and used after a fork, where it opens its
    own files. A forked child doesn't see what its parent had not flushed; pickling flushes. Threads may share it.

    Args:
        place: The folder, or a URL that fsspec knows; a folder is made when it is first used.
        index_dir: The folder on this machine where indexes of remote stores lie, each in a folder of its own.
        shard_bytes: Size to merge shards to.
        pending_bytes: Size of the small shards, and how much is gathered in memory before one is written; by default
            64 MiB, and 128 MiB where they stay as they are.
    """

    shared = True

    def __init__(
        self,
        place: str | os.PathLike[str],
        index_dir: str | os.PathLike[str] | None = None,
        *,
        shard_bytes: int = 1 << 30,
        pending_bytes: int | None = None,
    ):
        self.place = str(place)
        remote = is_remote(self.place)
        self._index_folder = index_folder(self.place, index_dir)
        self._shard_bytes = shard_bytes
        self._pending_bytes = pending_bytes or (_REMOTE_PENDING_BYTES if remote else _PENDING_BYTES)
        self._pending_seconds = _MOST_REMOTE_PENDING_SECONDS if remote else _MOST_PENDING_SECONDS
        self._opened: OpenedStore | None = None

    def missing(self, keys: Iterable[str]) -> list[str]:
        """See ``TensorStore``. Entries whose shard is gone or damaged are missing."""
        unique = dict.fromkeys(keys)
        if not unique:
            return []
        opened = self._open()
        with opened.lock:
            present = opened.index.present(key for key in unique if key not in opened.pending)
            return [key for key in unique if key not in present and key not in opened.pending]

    def read(self, key: str) -> dict[str, Tensor]:
        """See ``TensorStore``. ``KeyError`` also when the entry's shard is gone or damaged.

        Raises:
            OSError: The entry's shard can't be read.
        """
        opened = self._open()
        tried: str | None = None
        refreshed = False
        while True:
            with opened.lock:
                if key in opened.pending:
                    return {name: tensor.clone() for name, tensor in opened.pending[key].items()}
                location = opened.index.locate(key)
                shard = None if location is None else opened.shard(location)
            if location is not None and shard is not None:
                with contextlib.suppress(FileNotFoundError):
                    return location.layout.read(shard, location.begins, location.layout.allocate())
            if location is not None and location.shard != tried:
                tried = location.shard  # another process may have merged it just now: the index knows the new place
            elif not refreshed:
                refreshed = True  # another machine may have written it just now
                with opened.lock:
                    opened.index.refresh()
            elif tried is None:
                raise KeyError(f"the cache in {self.place} has no entry {key}")
            else:
                raise KeyError(
                    f"the cache in {self.place} lost the entry {key}: its shard {tried} is gone or damaged. Start the "
                    "run again: what is missing is encoded again"
                )

    def read_rows(self, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        """See ``TensorStore``."""
        opened = self._open()
        with opened.lock:
            found = [located for key in keys if (located := opened.find(key)) is not None]
        if len(found) == len(keys) and len({location.layout for location, _ in found}) == 1:
            memory = found[0][0].layout.allocate_rows(len(keys))
            with contextlib.suppress(FileNotFoundError):
                return [at.layout.read(shard, at.begins, row) for (at, shard), row in zip(found, memory)]
        return [self.read(key) for key in keys]

    def write(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See ``TensorStore``. Entries are gathered; ``flush`` or a full shard's worth puts them on disk."""
        for key, tensors in entries.items():
            check_entry(key, tensors)
        opened = self._open()
        with opened.lock:
            opened.gather(entries)
            waited = time.monotonic() - opened.oldest
            if opened.pending_bytes >= self._pending_bytes or waited >= self._pending_seconds:
                self._flush(opened)

    def flush(self) -> None:
        """See ``TensorStore``. ``ConfigError`` when the disk is full; the entries gathered are then lost."""
        opened = self._open()
        with opened.lock:
            self._flush(opened)

    def rebuild_index(self) -> None:
        """Makes the index anew from the shards' headers. A missing index is made by itself; this is for a wrong one."""
        opened = self._open()
        with opened.lock:
            self._flush(opened)
            opened.index.rebuild()

    def close(self) -> None:
        """See ``TensorStore``. The store can be used again afterwards."""
        if self._opened is not None and self._opened.process == os.getpid():
            with self._opened.lock:
                self._flush(self._opened)
                self._opened.close()

    def __enter__(self) -> "PackedStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        if self._opened is not None:
            self.flush()
        return {**self.__dict__, "_opened": None}

    def _open(self) -> OpenedStore:
        opened = self._opened
        if opened is None or opened.process != os.getpid():
            opened = self._opened = OpenedStore(self.place, self._index_folder, self._shard_bytes, inherited=opened)
        return opened

    def _flush(self, opened: OpenedStore) -> None:
        if not opened.pending:
            return
        entries = opened.pending
        try:
            opened.index.add(write_entries(opened.files, entries))
        except OSError as error:
            remedy = "Check it" if opened.files.remote else "Free some space"
            raise ConfigError(
                f"the cache can't be written in {self.place}: {error.strerror or error}. {remedy}, or name another "
                "folder with --cache_dir; what was encoded so far is kept"
            ) from error
        finally:
            # Also on failure, so that closing the store doesn't fail again and hide the reason.
            opened.gather_anew()
        try:
            opened.index.merge_small()
        except ConfigError as error:
            _log.warning("cache: small shards were not merged: %s", error)


def check_entry(key: str, tensors: Mapping[str, Tensor]) -> None:
    """This refuses what a store must not hold.

    Raises:
        NonFiniteEntry: A number isn't finite.
        ValueError: A type is unknown, there is no tensor, or the key can't be stored.
    """
    if not key or "/" in key:
        raise ValueError(f"the cache key {key!r} is empty or contains a slash")
    if not tensors:
        raise ValueError(f"the cache entry {key} has no tensors")
    for name, tensor in tensors.items():
        if tensor.dtype not in _STORABLE:
            raise ValueError(f"{name} of the cache entry {key} has a type that can't be stored: {tensor.dtype}")
        if not is_finite(tensor):
            raise NonFiniteEntry(key, name)
