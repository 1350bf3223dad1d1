"""What is known about picture files: content hash, size, and whether they decode. Each file is read once.

A file is recognised by its path, byte count and modification time. What was found is kept in SQLite, where several
processes may look and write at the same time and any of them may be killed.
"""

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from library.config.errors import ConfigError
from library.records import Resolution

_BATCH = 256
_SETTLED_NS = 2_000_000_000
"""A file changed this recently may change again within the same tick of its file system's clock."""

_BUSY_SECONDS = 60.0
_TABLE = """CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY, bytes INTEGER, mtime_ns INTEGER, content TEXT, width INTEGER, height INTEGER
) WITHOUT ROWID"""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What is known about one picture file.

    Attributes:
        content: Hash of the file's bytes; empty when it can't be read.
        size: The picture's size, its orientation applied; 0x0 when it can't be decoded.
        problem: Why the picture can't be used, or None.
    """

    content: str
    size: Resolution
    problem: str | None = None


class FileIndex:
    """Facts about picture files, remembered in a database file or, without one, as long as the index lives.

    Only pictures that decode are remembered; the others are looked at again each time.
    """

    def __init__(self, path: str | Path | None, *, threads: int | None = None):
        """This opens nothing yet.

        Args:
            path: The database, created when it is missing; None keeps the facts in memory.
            threads: How many files are read at a time; by default one per CPU core, at most 8.
        """
        self._path = None if path is None else Path(path)
        self._threads = threads or min(8, os.cpu_count() or 1)
        self._memory: dict[tuple[str, int, int], FileFacts] = {}

    def facts(self, paths: Iterable[str], progress: Callable[[int, int], None] | None = None) -> dict[str, FileFacts]:
        """This looks the files up, and reads those that are new or changed.

        Args:
            paths: Picture files.
            progress: Is told how many of how many files have been read, when any must be.

        Returns:
            The facts of each path.
        """
        found: dict[str, FileFacts] = {}
        unknown: list[tuple[str, os.stat_result]] = []
        with self._database() as database:
            for path in dict.fromkeys(paths):
                try:
                    status = os.stat(path)
                except OSError as error:
                    found[path] = FileFacts("", Resolution(0, 0), error.strerror or str(error))
                    continue
                known = self._look_up(database, path, status)
                if known is None:
                    unknown.append((path, status))
                else:
                    found[path] = known
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(unknown), _BATCH):
                part = unknown[start : start + _BATCH]
                facts = list(pool.map(lambda entry: read_facts(entry[0]), part))
                found |= {path: fact for (path, _), fact in zip(part, facts)}
                self._remember(part, facts)
                if progress is not None:
                    progress(start + len(part), len(unknown))
        return found

    def _look_up(self, database: sqlite3.Connection | None, path: str, status: os.stat_result) -> FileFacts | None:
        key = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
        if database is None:
            return self._memory.get(key)
        query = "SELECT content, width, height FROM files WHERE path = ? AND bytes = ? AND mtime_ns = ?"
        row = database.execute(query, key).fetchone()
        return None if row is None else FileFacts(row[0], Resolution(row[1], row[2]))

    def _remember(self, entries: Sequence[tuple[str, os.stat_result]], facts: Sequence[FileFacts]) -> None:
        newest = time.time_ns() - _SETTLED_NS
        rows = [
            (os.path.abspath(path), status.st_size, status.st_mtime_ns, fact.content, *fact.size)
            for (path, status), fact in zip(entries, facts)
            if fact.problem is None and status.st_mtime_ns < newest
        ]
        if self._path is None:
            self._memory |= {row[:3]: FileFacts(row[3], Resolution(*row[4:])) for row in rows}
            return
        with self._database() as database:
            assert database is not None
            database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", rows)

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection | None]:
        """The database inside one transaction; None for an index in memory."""
        if self._path is None:
            yield None
            return
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=_BUSY_SECONDS)) as database:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=NORMAL")
                with database:
                    database.execute(_TABLE)
                    yield database
        except sqlite3.Error as error:
            raise ConfigError(
                f"{self._path}: can't be used as the index of pictures ({error}); delete it, it will be made anew"
            ) from error


def read_facts(path: str) -> FileFacts:
    """This reads and decodes one picture file completely."""
    from library.data.images import open_picture  # Pillow is loaded only when a file must be read

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        return FileFacts("", Resolution(0, 0), error.strerror or str(error))
    content = hashlib.blake2b(data, digest_size=20).hexdigest()
    if not data:
        return FileFacts(content, Resolution(0, 0), "the file is empty")
    try:
        picture = open_picture(BytesIO(data))
    except OSError as error:
        unknown = "cannot identify" in str(error)
        reason = "not a picture, or of an unknown kind" if unknown else " ".join(str(error).split())
        return FileFacts(content, Resolution(0, 0), reason)
    return FileFacts(content, Resolution(*picture.size))
