"""The SQLite database in which an index of files remembers what it saw.

Several processes may look and write at the same time, and any of them may be killed. It is only a memory: a database of
another layout is made anew. It keeps SQLite's rollback journal: a write-ahead log doesn't work on network drives, and
two processes that switch it on at once lock each other out.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from library.config.errors import ConfigError

_BUSY_SECONDS = 60.0
_LAYOUT = 2
_TABLES = (
    "CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    "CREATE TABLE pictures (folder INTEGER, name TEXT, bytes INTEGER, version, content TEXT, width INTEGER, "
    "height INTEGER, decoded INTEGER, face TEXT, near INTEGER, PRIMARY KEY (folder, name)) WITHOUT ROWID",
    "CREATE TABLE texts (folder INTEGER, name TEXT, bytes INTEGER, version, text TEXT, "
    "PRIMARY KEY (folder, name)) WITHOUT ROWID",
    "CREATE TABLE bad (content TEXT PRIMARY KEY, problem TEXT, decoder TEXT) WITHOUT ROWID",
    "CREATE TABLE kept (tokenizer INTEGER, caption BLOB, characters INTEGER, PRIMARY KEY (tokenizer, caption)) "
    "WITHOUT ROWID",
)
"""``names`` has folders and tokenizers, which many rows share."""


class IndexDatabase:
    """A database file, or one in memory that lives as long as this object."""

    def __init__(self, path: Path | None):
        """This opens nothing yet."""
        self._path = path
        self._in_memory: sqlite3.Connection | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """The database with its tables, outside any transaction.

        Raises:
            ConfigError: It can't be used.
        """
        if self._path is None:
            if self._in_memory is None:
                self._in_memory = sqlite3.connect(":memory:", check_same_thread=False)
                _make_tables(self._in_memory)
            yield self._in_memory
            return
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=_BUSY_SECONDS)) as database:
                database.execute("PRAGMA synchronous=NORMAL")
                if _layout(database) != _LAYOUT:
                    _make_tables(database)
                yield database
        except sqlite3.Error as error:
            raise ConfigError(
                f"{self._path}: can't be used as the index of pictures ({error}); {_advice(error)}"
            ) from error


def name_id(database: sqlite3.Connection, name: str, *, add: bool = False) -> int | None:
    """The number of a folder or tokenizer; None when there is none yet.

    Args:
        database: Where to look.
        name: A name that UTF-8 can't express has no number.
        add: Give it a number, in the transaction under way.
    """
    if not expressible(name):
        return None
    if add:
        database.execute("INSERT OR IGNORE INTO names (name) VALUES (?)", (name,))
    row = database.execute("SELECT id FROM names WHERE name = ?", (name,)).fetchone()
    return None if row is None else int(row[0])


def expressible(text: str) -> bool:
    """Whether the database can keep a text: a file's name need not be UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing of what is written inside; other writers wait."""
    database.execute("BEGIN IMMEDIATE")
    with database:
        yield


def _layout(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _make_tables(database: sqlite3.Connection) -> None:
    with transaction(database):
        if _layout(database) == _LAYOUT:  # another process was first
            return
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            database.execute(f'DROP TABLE "{name}"')
        for table in _TABLES:
            database.execute(table)
        database.execute(f"PRAGMA user_version = {_LAYOUT}")


def _advice(error: sqlite3.Error) -> str:
    if "locked" in str(error):
        return "another process holds it; end that one, or wait"
    if isinstance(error, sqlite3.OperationalError):
        return "see to its disk and to the permissions of its folder"
    return "delete it, it will be made anew"
