"""Looking after a packed store: what it holds, whether that is intact, and making room.

All of it reads the shards' own headers, the truth, and can be done while other processes read and write: shards that
appear in the meantime are theirs, and one that is not complete is not there yet.
"""

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from library.config.errors import ConfigError
from library.config.urls import is_remote
from library.data.shard_files import OpenShard, blocks, entries_of, shard_files
from library.data.shard_index import ShardIndex, index_folder
from library.data.shards import Bytes, StoredEntry, UnreadableShard, by_name, checksum
from library.io import places

STORES = ("latents", "masks", "text")
"""The stores of a cache, each in a folder of this name."""

Progress = Callable[[int], None]
"""Told how many more bytes are done."""


class Contents(NamedTuple):
    """What a store holds.

    Attributes:
        entries: How many entries; copies count once.
        bytes: Size of all shards.
        shards: How many shards.
    """

    entries: int
    bytes: int
    shards: int


class Damage(NamedTuple):
    """Something in a shard that is not as it was written.

    Attributes:
        shard: The shard's file name.
        key: The entry; None: the whole shard can't be read.
        problem: What is wrong.
    """

    shard: str
    key: str | None
    problem: str


class Spare(NamedTuple):
    """What one shard holds for nothing.

    Attributes:
        shard: The shard's file name.
        size: Its bytes.
        kept: The keys of the entries that are wanted.
        entries: How many are not.
        bytes: How much less there is without them.
    """

    shard: str
    size: int
    kept: frozenset[str]
    entries: int
    bytes: int


class StoreCare:
    """One store, for those who look after it.

    Args:
        place: The store's folder, or its URL.
    """

    def __init__(self, place: str):
        self.place = place
        self._files = shard_files(place)

    @classmethod
    def of_cache(cls, place: str) -> "dict[str, StoreCare]":
        """The stores below the folder of a cache, by name; or the one in the folder, where it is a store itself.

        Raises:
            ConfigError: There is none, or the folder can't be read.
        """
        below = {name: cls(places.join(place, name)) for name in STORES}
        found = {name: store for name, store in below.items() if store.shards()}
        itself = cls(place)
        if not found and itself.shards():
            found = {os.path.basename(place.rstrip("/" + os.sep)): itself}
        if not found:
            raise ConfigError(f"{place} holds no cache: no shard lies in it, nor below it in {', '.join(STORES)}")
        return found

    def shards(self) -> dict[str, int]:
        """Every shard with its bytes; none where there is no such folder.

        Raises:
            ConfigError: The folder can't be read.
        """
        if not is_remote(self.place) and not os.path.isdir(self.place):
            return {}
        with self._explained():
            return self._files.sizes()

    def contents(self, progress: Progress) -> Contents:
        """What the store holds; shards that can't be read count with their bytes alone."""
        keys: set[str] = set()
        sizes = self.shards()
        for name, size in sizes.items():
            keys |= (self._entries(name, size) or {}).keys()
            progress(size)
        return Contents(len(keys), sum(sizes.values()), len(sizes))

    def damages(self, progress: Progress) -> Iterator[Damage]:
        """Everything that is not as it was written: each entry's checksum is computed anew."""
        checked: set[str] = set()
        # Shards that another process merges while this one looks have other names afterwards
        while new := {name: size for name, size in self.shards().items() if name not in checked}:
            for name, size in new.items():
                yield from self._damages_of(name, size)
                checked.add(name)
                progress(size)

    def spares(self, keys: Collection[str], progress: Progress) -> list[Spare]:
        """What is stored besides the entries ``keys``, by shard; second copies of them too."""
        found = []
        seen: set[str] = set()
        for name, size in self.shards().items():
            entries = self._entries(name, size)
            if entries is not None:
                kept = frozenset(key for key in entries if key in keys and key not in seen)
                seen |= kept
                spare = sum(tensor.length for key in entries.keys() - kept for tensor in entries[key].tensors)
                if len(kept) < len(entries):
                    found.append(Spare(name, size, kept, len(entries) - len(kept), spare if kept else size))
            progress(size)
        return found

    def remove_damage(self, damages: Iterable[Damage], progress: Progress, index_dir: str | None = None) -> None:
        """Drops entries and shards that are damaged, so that they are missing; what else such a shard holds is kept."""
        by_shard: dict[str, set[str | None]] = {}
        for damage in damages:
            by_shard.setdefault(damage.shard, set()).add(damage.key)
        sizes = self.shards()
        kept = {}
        for name, keys in by_shard.items():
            entries = None if None in keys else self._entries(name, sizes.get(name, 0))
            kept[name] = frozenset(entries or ()) - keys
        self._keep(kept, sizes, progress, index_dir)

    def remove_spares(self, spares: Sequence[Spare], progress: Progress, index_dir: str | None = None) -> None:
        """Makes the room: shards without wanted entries go, others are written again without the rest.

        Args:
            spares: From ``spares``.
            progress: Told of the bytes of each shard.
            index_dir: As of ``PackedStore``.
        """
        self._keep({spare.shard: spare.kept for spare in spares}, self.shards(), progress, index_dir)

    def _keep(
        self, kept: dict[str, frozenset[str]], sizes: dict[str, int], progress: Progress, index_dir: str | None
    ) -> None:
        with self._index(index_dir) as index:
            for name, keys in kept.items():
                if keys:
                    index.keep(name, keys)
                else:
                    index.drop(name)
                progress(sizes.get(name, 0))
        if left := kept.keys() & self.shards().keys():
            raise ConfigError(f"{len(left)} shards in {self.place} can't be removed; look who else holds or owns them")

    @contextmanager
    def _index(self, index_dir: str | None) -> Iterator[ShardIndex]:
        with tempfile.TemporaryDirectory() as nowhere:  # an index that nobody has learns of the change by a listing
            index = ShardIndex(self._files, index_folder(self.place, index_dir or nowhere), shard_bytes=0)
            try:
                yield index
            finally:
                index.close()

    def _entries(self, name: str, size: int) -> dict[str, StoredEntry] | None:
        """What a shard holds; None where it can't be read or is gone."""
        try:
            with self._explained():
                return entries_of(self._files, name, size)
        except (UnreadableShard, FileNotFoundError):
            return None

    def _damages_of(self, name: str, size: int) -> Iterator[Damage]:
        try:
            with self._explained():
                entries = entries_of(self._files, name, size)
                shard = self._files.open(name, size)
                if self._files.remote:  # one long read instead of a request per tensor
                    shard = _Loaded(b"".join(blocks(shard, 0, size)))
            for key, entry in entries.items():
                if problem := self._problem(shard, key, entry):
                    yield Damage(name, key, problem)
        except FileNotFoundError:  # replaced by another process
            return
        except UnreadableShard as error:
            if not error.foreign:
                yield Damage(name, None, str(error))

    def _problem(self, shard: OpenShard, key: str, entry: StoredEntry) -> str | None:
        data = (block for tensor in by_name(entry.tensors) for block in blocks(shard, tensor.begin, tensor.length))
        try:
            intact = checksum(key, entry.tensors, data) == entry.checksum
        except FileNotFoundError:
            raise
        except OSError as error:
            return f"it can't be read: {error.strerror or error}"
        return None if intact else "its bytes are not those that were written"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConfigError(f"the cache in {self.place} can't be read: {error.strerror or error}") from error


class _Loaded:
    """A shard in memory."""

    def __init__(self, data: bytes):
        self._data = memoryview(data)

    def read_into(self, begin: int, buffers: Sequence[Bytes]) -> None:
        """See ``OpenShard``."""
        for buffer in buffers:
            memoryview(buffer)[:] = self._data[begin : begin + len(buffer)]
            begin += len(buffer)
