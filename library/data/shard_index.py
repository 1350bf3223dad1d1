"""The index of a packed store: an SQLite database that says in which shard, and where in it, each entry lies.

The shards are the truth and the index is a copy of their headers: a shard is complete before the index knows it, a
shard that the index doesn't know is read and added, and rows whose shard is gone or has another size are forgotten.

The database keeps SQLite's rollback journal rather than a write-ahead log, because the latter doesn't work on network
drives, where the processes of several machines share one folder.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.config.errors import ConfigError
from library.config.urls import is_remote
from library.data.entries import Layout, Location
from library.data.shard_files import ShardFiles, copy_entries, entries_of
from library.data.shards import Entries, NewShard, StoredEntry, UnreadableShard

INDEX_NAME = "index.sqlite"

_VERSION = 2
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS shards (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, size INTEGER NOT NULL)",
    # Names, types and shapes of an entry's tensors: few, whatever the number of entries.
    "CREATE TABLE IF NOT EXISTS layouts (id INTEGER PRIMARY KEY, tensors TEXT NOT NULL UNIQUE)",
    "CREATE TABLE IF NOT EXISTS entries (key TEXT NOT NULL, shard INTEGER NOT NULL, layout INTEGER NOT NULL, "
    "begins BLOB NOT NULL, PRIMARY KEY (key, shard)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS entries_by_shard ON entries (shard)",
    f"PRAGMA user_version = {_VERSION}",
)
_LOCATE = (
    "SELECT name, size, layout, begins FROM entries JOIN shards ON shards.id = entries.shard WHERE key = ? "
    "ORDER BY shard LIMIT 1"
)
_PRESENT = (
    "SELECT wanted.value FROM json_each(?) wanted WHERE EXISTS (SELECT 1 FROM entries WHERE entries.key = wanted.value)"
)
_ONLY_HERE = (
    "SELECT 1 FROM entries one WHERE shard = ? AND NOT EXISTS "
    "(SELECT 1 FROM entries other WHERE other.key = one.key AND other.shard != one.shard) LIMIT 1"
)
_ELSEWHERE = (
    "SELECT key FROM entries one WHERE shard IN (SELECT value FROM json_each(?1)) AND EXISTS "
    "(SELECT 1 FROM entries other WHERE other.key = one.key AND other.shard NOT IN (SELECT value FROM json_each(?1)))"
)
_LOCK_SECONDS = 300  # another process may hold the lock while it merges a shard's worth of bytes
_MERGE_COUNT = 16
_READERS = 8  # headers of remote shards that are read at once

_log = logging.getLogger(__name__)


def index_folder(place: str, index_dir: str | os.PathLike[str] | None) -> Path:
    """Where the index of a store lies.

    Args:
        place: The store's folder, where the index is too; or its URL.
        index_dir: The folder on this machine for indexes of remote stores, each in a folder of its own.

    Raises:
        ValueError: The store is remote, and there is no ``index_dir``.
    """
    if not is_remote(place):
        return Path(place)
    if index_dir is None:
        raise ValueError(f"the store at {place} needs a folder on this machine for its index")
    readable = re.sub(r"[^A-Za-z0-9]+", "-", place).strip("-")[:80]
    return Path(index_dir) / f"{readable}-{hashlib.blake2b(place.encode(), digest_size=4).hexdigest()}"


class ShardIndex:
    """The index of one store's shards. Each process opens its own; threads take turns from outside.

    Args:
        files: The shards.
        folder: Where the index lies. Every machine that shares a remote store has its own.
        shard_bytes: Small shards are merged into ones of about this size, unless the store is remote.
    """

    def __init__(self, files: ShardFiles, folder: Path, shard_bytes: int):
        self._files = files
        self._folder = folder
        self._path = folder / INDEX_NAME
        self._shard_bytes = shard_bytes
        self._connection: sqlite3.Connection | None = None
        self._layouts: dict[int, Layout] = {}
        self._left_out: dict[str, int] = {}

    def locate(self, key: str) -> Location | None:
        """Where the entry ``key`` lies, or None. Its shard isn't looked at."""
        try:
            row = self._database().execute(_LOCATE, (key,)).fetchone()
            if row is None:
                return None
            shard, size, id, begins = row
            layout = self._layouts.get(id) or self._read_layout(id)
        except (sqlite3.Error, OSError) as error:
            raise self._explained(error) from error
        return Location(shard, size, layout, layout.unpack(begins))

    def present(self, keys: Iterable[str]) -> set[str]:
        """Which of ``keys`` have an entry in a shard that is there now."""
        self.refresh()
        with self._explained_errors():
            wanted = json.dumps(sorted(keys))  # neighbours lie on one page of the database
            return {key for (key,) in self._database().execute(_PRESENT, (wanted,))}

    def refresh(self) -> None:
        """Looks which shards there are: forgets those that are gone or damaged, and adds those it didn't know."""
        with self._explained_errors():
            # What is known first: a shard that another process adds in between is then new, not gone.
            known = dict(self._database().execute("SELECT name, size FROM shards"))
            sizes = self._files.sizes()
            new = [(name, size) for name, size in sizes.items() if known.get(name) != size]
            if any(sizes.get(name) != size for name, size in known.items()):
                self._update({}, {})
            for start in range(0, len(new), _READERS):  # a few at a time: headers take more memory than rows
                some = dict(new[start : start + _READERS])
                if read := self._read_headers(some):
                    self._update(some, read)
            self._files.tidy()

    def _update(self, sizes: Mapping[str, int], read: Mapping[str, Entries]) -> None:
        """Adds shards, given their sizes and entries, and forgets those that are gone."""
        with self._writing() as database:
            present = self._files.sizes()  # another process may have merged some in the meantime
            for id, name, size in database.execute("SELECT id, name, size FROM shards").fetchall():
                if present.get(name) != size:
                    self._forget(database, id)
            useless = [
                gone
                for name, entries in read.items()
                if present.get(name) == sizes[name]
                for gone in self._register(database, name, sizes[name], entries)
            ]
        self._remove(useless)

    def add(self, shard: NewShard) -> None:
        """Makes a new shard's entries known."""
        with self._explained_errors():
            with self._writing() as database:
                useless = self._register(database, shard.name, shard.size, shard.entries)
            self._remove(useless)

    def rebuild(self) -> None:
        """Forgets everything and reads the headers of all shards again."""
        with self._explained_errors(), self._writing() as database:
            for (id,) in database.execute("SELECT id FROM shards").fetchall():
                self._forget(database, id)
        self._left_out.clear()
        self.refresh()

    def merge_small(self) -> None:
        """Merges small shards where there are many, so that a large store stays a small number of files."""
        while not self._files.remote and self._merge_once():
            pass

    def keep(self, name: str, keys: Collection[str]) -> None:
        """Drops the entries of one shard that are not among ``keys``; the others move to a new one."""
        self._replace(lambda database: [name], keys)

    def drop(self, name: str) -> None:
        """Removes one shard with all its entries."""
        with self._explained_errors():
            with self._writing() as database:
                self._forget(database, self._id_of(database, name))
            self._remove([name])

    def close(self) -> None:
        """Closes the database; the next use opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._layouts.clear()  # numbers of another database, should this one be deleted

    def _merge_once(self) -> bool:
        with self._explained_errors():
            if len(self._small_shards(self._database())) < _MERGE_COUNT:
                return False

        def group(database: sqlite3.Connection) -> list[str]:
            small = self._small_shards(database)  # again: another process may have merged them in the meantime
            if len(small) < _MERGE_COUNT:
                return []
            chosen: list[str] = []
            total = 0
            for size, name in small:
                if len(chosen) > 1 and total + size > self._shard_bytes:
                    break
                chosen.append(name)
                total += size
            return chosen

        return self._replace(group, None)

    def _small_shards(self, database: sqlite3.Connection) -> list[tuple[int, str]]:
        sizes = self._files.sizes()
        rows = database.execute("SELECT size, name FROM shards WHERE size < ? ORDER BY size", (self._shard_bytes // 2,))
        return [(size, name) for size, name in rows if sizes.get(name) == size]

    def _replace(self, choose: Callable[[sqlite3.Connection], Sequence[str]], keys: Collection[str] | None) -> bool:
        """Puts one new shard in place of those that ``choose`` gives, with the entries among ``keys`` (None: all)."""
        # The lock is held while bytes are copied, so that nobody else replaces the same shards. Readers aren't held up.
        with self._explained_errors():
            with self._writing() as database:
                sizes = self._files.sizes()
                headers = self._read_headers({name: sizes[name] for name in choose(database) if name in sizes})
                ids = [self._id_of(database, name) for name in headers]
                taken = {key for (key,) in database.execute(_ELSEWHERE, (json.dumps(ids),))} if keys is None else set()
                sources: dict[str, tuple[int, Entries]] = {}
                for name, entries in headers.items():
                    wanted = {k: e for k, e in entries.items() if k not in taken and (keys is None or k in keys)}
                    taken |= wanted.keys()
                    if wanted:
                        sources[name] = sizes[name], wanted
                shard = copy_entries(self._files, sources) if sources else None
                for id in ids:
                    self._forget(database, id)
                if shard is not None:
                    self._register(database, shard.name, shard.size, shard.entries)
            self._remove(headers)
        return bool(headers)

    def _read_headers(self, sizes: Mapping[str, int]) -> dict[str, dict[str, StoredEntry]]:
        """The entries of these shards; those that can't be read are left out, with a warning once."""

        def read(name: str) -> dict[str, StoredEntry] | None:
            try:
                return entries_of(self._files, name, sizes[name])
            except FileNotFoundError:  # another process replaced it in the meantime
                return None
            except UnreadableShard as error:
                if self._left_out.get(name) != sizes[name]:
                    _log.warning("cache: in %s, %s; it is left out and can be deleted", self._files.place, error)
                self._left_out[name] = sizes[name]
                return None

        if self._files.remote and len(sizes) > 1:
            with ThreadPoolExecutor(_READERS, thread_name_prefix="headers") as pool:
                found = list(pool.map(read, sizes))
        else:
            found = [read(name) for name in sizes]
        return {name: entries for name, entries in zip(sizes, found) if entries is not None}

    def _register(self, database: sqlite3.Connection, name: str, size: int, entries: Entries) -> list[str]:
        """Adds the shard's entries; returns its name where all of them are elsewhere too, so that the file can go."""
        if database.execute("INSERT OR IGNORE INTO shards (name, size) VALUES (?, ?)", (name, size)).rowcount == 0:
            return []  # another process added it in the meantime
        id = self._id_of(database, name)
        layouts: dict[str, tuple[int, Layout]] = {}
        rows = []
        for key, entry in entries.items():
            described = json.dumps([[t.name, t.dtype, t.shape, t.length] for t in entry.tensors])
            if described not in layouts:
                layouts[described] = self._layout_of(database, described)
            number, layout = layouts[described]
            rows.append((key, id, number, layout.pack([tensor.begin for tensor in entry.tensors])))
        database.executemany("INSERT INTO entries (key, shard, layout, begins) VALUES (?, ?, ?, ?)", rows)
        if self._files.remote:
            return []  # the indexes of other machines may rely on this copy
        if database.execute(_ONLY_HERE, (id,)).fetchone() is not None:
            return []
        self._forget(database, id)
        return [name]

    def _id_of(self, database: sqlite3.Connection, name: str) -> int | None:
        row = database.execute("SELECT id FROM shards WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def _layout_of(self, database: sqlite3.Connection, described: str) -> tuple[int, Layout]:
        database.execute("INSERT OR IGNORE INTO layouts (tensors) VALUES (?)", (described,))
        (id,) = database.execute("SELECT id FROM layouts WHERE tensors = ?", (described,)).fetchone()
        return id, Layout(json.loads(described))

    def _read_layout(self, id: int) -> Layout:
        (described,) = self._database().execute("SELECT tensors FROM layouts WHERE id = ?", (id,)).fetchone()
        self._layouts[id] = Layout(json.loads(described))
        return self._layouts[id]

    def _forget(self, database: sqlite3.Connection, id: int | None) -> None:
        database.execute("DELETE FROM entries WHERE shard = ?", (id,))
        database.execute("DELETE FROM shards WHERE id = ?", (id,))

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._files.remove(name)

    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                self._path, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False
            )
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise ConfigError(
                    f"{self._path} has the format of another version ({version}; this one reads {_VERSION}). Delete "
                    f"the folder {self._folder}, or name another with --cache_dir"
                )
            if version == 0:
                connection.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute("COMMIT")
            self._connection = connection
        return self._connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        database = self._database()
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back by itself, as on a full disk
                database.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _explained_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> ConfigError:
        if isinstance(error, sqlite3.OperationalError):
            problem = f"the cache index {self._path} can't be used: {error}. Check the disk"
        elif isinstance(error, sqlite3.Error):
            remedy = "Delete this one file; it is remade from the shards"
            return ConfigError(f"the cache index {self._path} is damaged ({error}). {remedy}")
        else:
            reason = getattr(error, "strerror", None) or error
            problem = f"the cache in {self._files.place} can't be used: {reason}. Check it"
        return ConfigError(f"{problem}, or name another folder with --cache_dir")
