"""The index of a packed store: an SQLite database that says in which shard, and where in it, each entry lies.

The shards are the truth and the index is a copy of their headers: a shard is complete before the index knows it, a
shard that the index doesn't know is read and added, and a row whose shard is gone or has another size doesn't count.

The database keeps SQLite's rollback journal rather than a write-ahead log, because the latter doesn't work on network
drives, where the processes of several machines share one cache.
"""

import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from library.config.errors import ConfigError
from library.data.shards import StoredTensor, is_shard, is_unfinished, merge_shards, read_entries

INDEX_NAME = "index.sqlite"

_VERSION = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS shards (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, size INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS entries "
    "(key TEXT PRIMARY KEY, shard INTEGER NOT NULL, tensors TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS entries_by_shard ON entries (shard)",
    f"PRAGMA user_version = {_VERSION}",
)
_LOCK_SECONDS = 300  # another process may hold the lock while it merges a shard's worth of bytes
_ABANDONED_SECONDS = 3600  # an unfinished file this old belongs to a writer that was killed
_MERGE_COUNT = 16

_log = logging.getLogger(__name__)


class Location(NamedTuple):
    """Where an entry lies.

    Attributes:
        shard: The shard's file name.
        size: The size that the file must have.
        tensors: The entry's tensors.
    """

    shard: str
    size: int
    tensors: tuple[StoredTensor, ...]


class ShardIndex:
    """The index of the shards in one folder. Each process opens its own; threads take turns from outside.

    Args:
        directory: The store's folder.
        shard_bytes: Small shards are merged into ones of about this size.
    """

    def __init__(self, directory: Path, shard_bytes: int):
        self._directory = directory
        self._path = directory / INDEX_NAME
        self._shard_bytes = shard_bytes
        self._connection: sqlite3.Connection | None = None

    def locate(self, key: str) -> Location | None:
        """Where the entry ``key`` lies, or None. Its shard isn't looked at."""
        query = "SELECT name, size, tensors FROM entries JOIN shards ON shards.id = entries.shard WHERE key = ?"
        with self._explained_errors():
            row = self._database().execute(query, (key,)).fetchone()
        return None if row is None else Location(row[0], row[1], _decode(row[2]))

    def present(self, keys: Iterable[str]) -> set[str]:
        """Which of ``keys`` have an entry in a shard that is there; shards the index didn't know are added first."""
        self.adopt_orphans()
        with self._explained_errors():
            database = self._database()
            sizes = self._files()
            live = [id for id, name, size in database.execute("SELECT * FROM shards") if sizes.get(name) == size]
            query = (
                "SELECT key FROM entries WHERE key IN (SELECT value FROM json_each(?)) "
                "AND shard IN (SELECT value FROM json_each(?))"
            )
            return {key for (key,) in database.execute(query, (json.dumps(list(keys)), json.dumps(live)))}

    def add(self, path: Path) -> None:
        """Makes a new shard's entries known. Keys that are known already keep their place."""
        with self._explained_errors():
            with self._writing() as database:
                self._purge(database)
                useless = self._register(database, path)
            if useless:
                _remove(path)

    def adopt_orphans(self) -> None:
        """Adds the shards that a killed writer didn't get to add, and removes what it left unfinished."""
        with self._explained_errors():
            known = {name for (name,) in self._database().execute("SELECT name FROM shards")}
            unknown = [self._directory / name for name in self._files() if name not in known]
            useless = []
            if unknown:
                with self._writing() as database:
                    self._purge(database)
                    useless = [path for path in unknown if self._register(database, path)]
            for path in useless:
                _remove(path)
        for entry in os.scandir(self._directory):
            with contextlib.suppress(FileNotFoundError):
                if is_unfinished(entry.name) and time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS:
                    _remove(Path(entry.path))

    def rebuild(self) -> None:
        """Forgets everything and reads the headers of all shards again."""
        with self._explained_errors():
            with self._writing() as database:
                database.execute("DELETE FROM entries")
                database.execute("DELETE FROM shards")
                paths = [self._directory / name for name in sorted(self._files())]
                useless = [path for path in paths if self._register(database, path)]
            for path in useless:
                _remove(path)

    def merge_small(self) -> None:
        """Merges small shards where there are many, so that a large store stays a small number of files."""
        while self._merge_once():
            pass

    def close(self) -> None:
        """Closes the database; the next use opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _merge_once(self) -> bool:
        # The lock is held while bytes are copied, so that nobody else merges the same shards. Readers aren't held up.
        with self._explained_errors():
            small = self._small_shards(self._database())
            if len(small) < _MERGE_COUNT:
                return False
            with self._writing() as database:
                small = self._small_shards(database)
                if len(small) < _MERGE_COUNT:
                    return False
                group: list[tuple[int, Path]] = []
                total = 0
                for size, id, name in small:
                    if len(group) > 1 and total + size > self._shard_bytes:
                        break
                    group.append((id, self._directory / name))
                    total += size
                rows = "SELECT key, tensors FROM entries WHERE shard = ?"
                sources = [
                    (path, {key: _decode(tensors) for key, tensors in database.execute(rows, (id,))})
                    for id, path in group
                ]
                merged = merge_shards(self._directory, sources)
                for id, _ in group:
                    self._forget(database, id)
                self._register(database, merged)
        for _, path in group:
            _remove(path)
        return True

    def _small_shards(self, database: sqlite3.Connection) -> list[tuple[int, int, str]]:
        sizes = self._files()
        rows = database.execute(
            "SELECT size, id, name FROM shards WHERE size < ? ORDER BY size", (self._shard_bytes // 2,)
        )
        return [(size, id, name) for size, id, name in rows if sizes.get(name) == size]

    def _register(self, database: sqlite3.Connection, path: Path) -> bool:
        """Adds the shard's entries; returns whether the file has nothing new, so that it can go."""
        try:
            entries = read_entries(path)
            size = path.stat().st_size
        except (ConfigError, ValueError, FileNotFoundError):
            if path.exists():  # else another process merged it in the meantime
                _log.warning("cache: %s is damaged or of another version and is left out; it can be deleted", path)
            return False
        if database.execute("INSERT OR IGNORE INTO shards (name, size) VALUES (?, ?)", (path.name, size)).rowcount == 0:
            return False  # another process added it in the meantime
        (id,) = database.execute("SELECT id FROM shards WHERE name = ?", (path.name,)).fetchone()
        rows = ((key, id, json.dumps(tensors)) for key, tensors in entries.items())
        database.executemany("INSERT OR IGNORE INTO entries (key, shard, tensors) VALUES (?, ?, ?)", rows)
        if database.execute("SELECT 1 FROM entries WHERE shard = ? LIMIT 1", (id,)).fetchone() is None:
            self._forget(database, id)
            return True
        return False

    def _purge(self, database: sqlite3.Connection) -> None:
        """Forgets shards that are gone or damaged, so that their entries can be written again."""
        sizes = self._files()
        for id, name, size in database.execute("SELECT * FROM shards").fetchall():
            if sizes.get(name) != size:
                self._forget(database, id)

    def _forget(self, database: sqlite3.Connection, id: int) -> None:
        database.execute("DELETE FROM entries WHERE shard = ?", (id,))
        database.execute("DELETE FROM shards WHERE id = ?", (id,))

    def _files(self) -> dict[str, int]:
        """The shards in the folder with their sizes."""
        sizes = {}
        for entry in os.scandir(self._directory):
            with contextlib.suppress(FileNotFoundError):  # merged while we looked
                if is_shard(entry.name):
                    sizes[entry.name] = entry.stat().st_size
        return sizes

    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                self._path, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False
            )
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise ConfigError(
                    f"{self._path} has the format of another version ({version}; this one reads {_VERSION}). Delete "
                    f"the folder {self._directory}, or name another with --cache_dir"
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
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"the cache index {self._path} can't be used: {error}. Check the disk, or name another folder with "
                "--cache_dir"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"the cache index {self._path} is damaged ({error}). Delete this one file; it is remade from the shards"
            ) from error


def _decode(tensors: str) -> tuple[StoredTensor, ...]:
    return tuple(
        StoredTensor(name, dtype, tuple(shape), begin, length)
        for name, dtype, shape, begin, length in json.loads(tensors)
    )


def _remove(path: Path) -> None:
    """Removes a file that nothing refers to; where another process has it open (Windows), a later run does it."""
    with contextlib.suppress(OSError):
        path.unlink()
