"""Rows of a database table about files: found folder by folder, valid while size and version are the same."""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from library.config.urls import is_remote
from library.data.index_database import expressible, name_id, transaction
from library.io.places import FileEntry


class RememberedFiles:
    """What one table knows about certain files."""

    def __init__(self, table: str, columns: Sequence[str], entries: Sequence[FileEntry]):
        """This sorts the files by folder.

        Args:
            table: The table, with the key (folder, name).
            columns: What it knows about a file, beside its name, bytes and version.
            entries: The files. A file that comes again is a copy of its first entry.
        """
        self._table, self._columns, self._entries = table, tuple(columns), entries
        self._folders: dict[str, dict[str, int]] = {}
        self.copies: dict[int, int] = {}
        """Position of an entry that comes again -> position of the first."""
        by_parent: dict[str, dict[str, int]] = {}
        for position, entry in enumerate(entries):
            parent, name = _split(entry.path)
            positions = by_parent.get(parent)
            if positions is None:
                folder = parent if is_remote(parent) else os.path.abspath(parent)
                positions = by_parent[parent] = self._folders.setdefault(folder, {})
            first = positions.setdefault(name, position)
            if first != position:
                self.copies[position] = first

    def rows(self, database: sqlite3.Connection) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """The position and the columns of each file that is known and hasn't changed."""
        columns = ", ".join(self._columns)
        query = f"SELECT name, bytes, version, {columns} FROM {self._table} WHERE folder = ?"
        for folder, positions in self._folders.items():
            number = name_id(database, folder)
            if number is None:
                continue
            for row in database.execute(query, (number,)):
                position = positions.get(row[0])
                if position is not None:
                    entry = self._entries[position]
                    if row[2] == entry.version and row[1] == entry.bytes:
                        yield position, row[3:]

    def keep(
        self, database: sqlite3.Connection, rows: Iterable[tuple[int, Sequence[Any]]], *, settled_before: int
    ) -> None:
        """This remembers columns of files, all or none.

        Args:
            database: Where.
            rows: Positions and columns.
            settled_before: Time in nanoseconds. A local file that changed later may change again without another
                version, so it isn't remembered.
        """
        fresh = []
        for position, values in rows:
            entry = self._entries[position]
            parent, name = _split(entry.path)
            if _is_settled(entry, settled_before) and expressible(name):
                fresh.append((parent, (name, entry.bytes, entry.version, *values)))
        if not fresh:
            return
        places = ", ".join("?" * (4 + len(self._columns)))
        with transaction(database):
            numbers: dict[str, int | None] = {}
            for parent in {parent for parent, _ in fresh}:
                folder = parent if is_remote(parent) else os.path.abspath(parent)
                numbers[parent] = name_id(database, folder, add=True)
            database.executemany(
                f"INSERT OR REPLACE INTO {self._table} (folder, name, bytes, version, {', '.join(self._columns)}) "
                f"VALUES ({places})",
                ((numbers[parent], *row) for parent, row in fresh if numbers[parent] is not None),
            )


def _split(path: str) -> tuple[str, str]:
    """The folder, with the separator at its end, and the name."""
    separator = "/" if os.sep == "/" or is_remote(path) else os.sep
    cut = path.rfind(separator) + 1
    return path[:cut], path[cut:]


def _is_settled(entry: FileEntry, before: int) -> bool:
    return entry.version < before if isinstance(entry.version, int) else entry.version != ""
