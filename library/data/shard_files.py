"""Where shards lie: in a folder of this machine, or behind a URL. What differs between the two is here alone.

A shard appears whole or not at all, and what a name stands for never changes. Where a storage can't promise the first,
the length that a shard's header gives tells of those that are not complete.
"""

import contextlib
import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from library.config.urls import is_remote
from library.data.shards import (
    Bytes,
    Entries,
    NewShard,
    StoredEntry,
    header_length,
    is_shard,
    is_unfinished,
    plan_copy,
    plan_shard,
    read_entries,
)
from library.io import places
from library.io.atomic import atomic_path

_BLOCK_BYTES = 1 << 23
_FIRST_READ = 1 << 18  # holds the header of most shards, so that a remote one is asked for once
_MOST_OPEN = 128  # systems allow a process as few as 256 open files
_ABANDONED_SECONDS = 3600  # an unfinished file this old belongs to a writer that was killed


class OpenShard(Protocol):
    """A shard that can be read."""

    def read_into(self, begin: int, buffers: Sequence[Bytes]) -> None:
        """Fills the buffers, one after the other, with the bytes from ``begin`` on. Threads may do so at once.

        Raises:
            FileNotFoundError: The shard is gone.
            OSError: It can't be read, or ends before.
        """
        ...


class ShardFiles(Protocol):
    """The shards of one store."""

    place: str
    """The folder, or its URL."""

    remote: bool
    """Whether machines share it that have indexes of their own: then nobody may tidy up for the others."""

    def sizes(self) -> dict[str, int]:
        """Every shard there is, with the bytes it has."""
        ...

    def open(self, name: str, size: int) -> OpenShard:
        """A shard; ``FileNotFoundError`` when it is gone or known to have another size. Calls take turns."""
        ...

    def write(self, name: str, parts: Iterable[Bytes]) -> None:
        """Makes a new shard of these bytes, one part after the other; ``OSError`` when that fails."""
        ...

    def remove(self, name: str) -> None:
        """Removes a shard that nothing refers to; where that can't be done now (Windows), a later run does it."""
        ...

    def tidy(self) -> None:
        """Removes what killed writers left unfinished."""
        ...

    def close(self) -> None:
        """Releases what is open; the next use opens it again."""
        ...


def shard_files(place: str | os.PathLike[str]) -> ShardFiles:
    """The shards of the store in the folder, or at the URL, ``place``."""
    return RemoteShards(str(place)) if is_remote(str(place)) else LocalShards(place)


class LocalShards:
    """Shards in a folder; those that are read stay open.

    Args:
        folder: The folder; it is made when something is written.
    """

    remote = False

    def __init__(self, folder: str | os.PathLike[str]):
        self.place = str(folder)
        self._folder = Path(folder)
        self._open: OrderedDict[str, _LocalShard] = OrderedDict()

    def sizes(self) -> dict[str, int]:
        """See ``ShardFiles``."""
        sizes = {}
        with os.scandir(self._folder) as files:
            for file in files:
                if is_shard(file.name):
                    with contextlib.suppress(FileNotFoundError):  # merged while we looked
                        sizes[file.name] = file.stat().st_size
        return sizes

    def open(self, name: str, size: int) -> OpenShard:
        """See ``ShardFiles``."""
        shard = self._open.pop(name, None) or _LocalShard(self._folder / name)
        if shard.size != size:
            raise FileNotFoundError(errno.ENOENT, "a shard has another size", str(self._folder / name))
        self._open[name] = shard
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)  # closed once no thread reads from it
        return shard

    def write(self, name: str, parts: Iterable[Bytes]) -> None:
        """See ``ShardFiles``."""
        with atomic_path(self._folder / name) as temporary, open(temporary, "wb") as file:
            for part in parts:
                file.write(part)

    def remove(self, name: str) -> None:
        """See ``ShardFiles``."""
        self._open.pop(name, None)
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def tidy(self) -> None:
        """See ``ShardFiles``."""
        with os.scandir(self._folder) as files:
            for file in files:
                if is_unfinished(file.name):
                    with contextlib.suppress(OSError):
                        if file.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                            os.unlink(file.path)

    def close(self) -> None:
        """See ``ShardFiles``."""
        self._open.clear()


class _LocalShard:
    """A file that is open until nothing refers to it."""

    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._turn = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read_into(self, begin: int, buffers: Sequence[Bytes]) -> None:
        """See ``OpenShard``."""
        wanted = sum(map(len, buffers))
        if hasattr(os, "preadv"):
            done = os.preadv(self._file.fileno(), buffers, begin)
            if done == wanted:
                return
        # The system has no such call, or took only a part: it stops at 2 GiB.
        with self._turn:
            self._file.seek(begin)
            for buffer in buffers:
                view = memoryview(buffer)
                while len(view):
                    done = self._file.readinto(view) or 0
                    if not done:
                        raise OSError(errno.EIO, "a shard ended while it was read", self._file.name)
                    view = view[done:]

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the file wasn't there to open
            self._file.close()


class RemoteShards:
    """Shards behind a URL that fsspec knows, such as ``s3://bucket/cache``; each read is a request for a range.

    Args:
        url: The folder.
    """

    remote = True

    def __init__(self, url: str):
        self.place = url.rstrip("/")

    def sizes(self) -> dict[str, int]:
        """See ``ShardFiles``."""
        listed = places.list_files(self.place, recursive=False)
        return {file.name: file.bytes for file in listed if is_shard(file.name)}

    def open(self, name: str, size: int) -> OpenShard:
        """See ``ShardFiles``."""
        return _RemoteShard(places.join(self.place, name))

    def write(self, name: str, parts: Iterable[Bytes]) -> None:
        """See ``ShardFiles``."""
        places.write_bytes(places.join(self.place, name), b"".join(parts))

    def remove(self, name: str) -> None:
        """See ``ShardFiles``."""
        places.remove(places.join(self.place, name))

    def tidy(self) -> None:
        """See ``ShardFiles``: there is nothing to tell a writer that was killed from one that is slow."""

    def close(self) -> None:
        """See ``ShardFiles``."""


class _RemoteShard:
    def __init__(self, url: str):
        self._url = url

    def read_into(self, begin: int, buffers: Sequence[Bytes]) -> None:
        """See ``OpenShard``."""
        data = memoryview(places.open_range(self._url, begin, sum(map(len, buffers))))
        for buffer in buffers:
            memoryview(buffer)[:] = data[: len(buffer)]
            data = data[len(buffer) :]


def entries_of(files: ShardFiles, name: str, size: int) -> dict[str, StoredEntry]:
    """This reads a shard's header.

    Raises:
        UnreadableShard: It is no shard, is damaged, or has the format of another version.
        FileNotFoundError: It is gone.
        OSError: It can't be read.
    """
    shard = files.open(name, size)
    start = bytearray(min(size, _FIRST_READ))
    shard.read_into(0, [start])
    length = min(size, header_length(start))
    if length > len(start):
        rest = bytearray(length - len(start))
        shard.read_into(len(start), [rest])
        start += rest
    return read_entries(name, bytes(start), size)


def write_entries(files: ShardFiles, entries: Mapping[str, Mapping[str, Tensor]]) -> NewShard:
    """This writes entries as a new shard; it appears complete or not at all.

    Args:
        files: Where it goes.
        entries: Tensors by name, by key of the entry; contiguous, on the CPU.

    Raises:
        OSError: It can't be written.
    """
    shard, data = plan_shard(entries)
    files.write(shard.name, [shard.header, *data])
    return shard


def copy_entries(files: ShardFiles, sources: Mapping[str, tuple[int, Entries]]) -> NewShard:
    """This copies entries of several shards into a new one, without loading all of them; the sources stay.

    Args:
        files: Where they lie.
        sources: The size of a shard and which of its entries to copy, by its name. No key occurs twice.

    Raises:
        OSError: A source can't be read, or the new one not written.
    """
    shard, ranges = plan_copy([entries for _, entries in sources.values()])
    opened = [files.open(name, size) for name, (size, _) in sources.items()]

    def parts() -> Iterator[Bytes]:
        yield shard.header
        for number, begin, length in ranges:
            yield from blocks(opened[number], begin, length)

    files.write(shard.name, parts())
    return shard


def blocks(shard: OpenShard, begin: int, length: int) -> Iterator[bytearray]:
    """The bytes of a range of a shard in blocks of a few MiB."""
    for start in range(begin, begin + length, _BLOCK_BYTES):
        block = bytearray(min(_BLOCK_BYTES, begin + length - start))
        shard.read_into(start, [block])
        yield block
