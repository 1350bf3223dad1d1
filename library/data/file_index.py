"""What is known about picture and caption files: each is read once, and again when it changes.

A file is recognised by its folder, name, byte count and version (see ``io.places``). What was found is kept in SQLite,
where several processes may look and write at the same time and any of them may be killed.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from library.config.urls import is_remote
from library.data.index_database import IndexDatabase, name_id, transaction
from library.data.picture_facts import Face, Known, Wanted, decoder, face_in_name, look_at
from library.data.remembered_files import RememberedFiles
from library.io.garbage import paused_collection
from library.io.places import FileEntry, read_bytes
from library.records import Resolution

_BATCH = 256
_MOST_THREADS = 8
_REMOTE_THREADS = 32
"""A read from far away is mostly waiting."""

_MOST_TEXT_BYTES = 1 << 20
"""Of a caption file; text encoders read some hundreds of words."""

_SETTLED_NS = 2_000_000_000
"""A file changed this recently may change again within the same tick of its file system's clock."""

Progress = Callable[[int, int], None]
_Seen = TypeVar("_Seen")


class FileFacts(NamedTuple):
    """What is known about one picture file.

    Attributes:
        content: Hash of the file's bytes; empty when it can't be read.
        size: The picture's size, its orientation applied; 0x0 when it has none.
        problem: Why the picture can't be used, or None.
        face: Where a face is, when faces were asked for and there is one.
        near: A hash that look-alikes nearly share (64 bits), when it was asked for.
    """

    content: str
    size: Resolution
    problem: str | None = None
    face: Face | None = None
    near: int | None = None


@dataclass(frozen=True, slots=True)
class TextProblem:
    """Why a text file can't be used; ``str()`` gives the reason."""

    reason: str

    def __str__(self) -> str:
        return self.reason


class FileIndex:
    """Facts about files, remembered in a database file or, without one, as long as the index lives.

    Only files without a problem are remembered; the others are looked at again each time.
    """

    def __init__(self, path: str | Path | None, *, threads: int | None = None):
        """This opens nothing yet.

        Args:
            path: The database, created when it is missing; None keeps the facts in memory.
            threads: How many local files are read at a time; by default one per CPU core, at most 8.
        """
        self._database = IndexDatabase(None if path is None else Path(path))
        self._threads = threads or min(_MOST_THREADS, os.cpu_count() or 1)

    def facts(
        self,
        entries: Sequence[FileEntry],
        *,
        decode: bool = False,
        faces: bool = False,
        near: bool = False,
        progress: Progress | None = None,
    ) -> list[FileFacts]:
        """This looks picture files up, and reads those that are new or changed.

        Args:
            entries: Picture files, as they were listed.
            decode: Decode each picture completely once, and not only look at its header and its end.
            faces: Say where a face is: as the file's name has it, else as it is found in the picture.
            near: Compute the hashes by which look-alikes are found.
            progress: Is told how many of how many files have been read, when any must be.

        Returns:
            The facts of each entry.

        Raises:
            ConfigError: The database can't be used, or the package that finds faces is missing.
        """
        wanted = Wanted(decode, faces, near)
        problems: dict[int, str] = {}
        with self._database.open() as database:
            with paused_collection():
                files = RememberedFiles("pictures", Known._fields, entries)
                known = {position: Known._make(row) for position, row in files.rows(database)}
            incomplete = {
                position
                for position, now in (known.items() if any(wanted) else ())
                if not wanted.met_by(now, entries[position].path)
            }
            unread = [
                position
                for position in range(len(entries))
                if (position not in known or position in incomplete) and position not in files.copies
            ]
            for part, seen, settled in self._read(
                entries, unread, lambda position: look_at(entries[position], wanted, known.get(position)), progress
            ):
                known.update((position, now) for position, (now, _) in zip(part, seen))
                problems.update((position, why) for position, (_, why) in zip(part, seen) if why is not None)
                whole = [(position, now) for position, (now, why) in zip(part, seen) if why is None]
                files.keep(database, whole, settled_before=settled)
            marked = database.execute("SELECT content, problem, decoder FROM bad").fetchall()
        bad = {content: problem for content, problem, by in marked if by == decoder()}
        return _facts_of(entries, files, known, problems, bad, wanted)

    def mark_bad(self, problems: Mapping[str, str]) -> None:
        """This remembers pictures that can't be used although nothing was found when they were looked at.

        It holds for all files of that content, and until the package that decodes pictures is another version.

        Args:
            problems: Content -> why.
        """
        with self._database.open() as database, transaction(database):
            database.executemany(
                "INSERT OR REPLACE INTO bad (content, problem, decoder) VALUES (?, ?, ?)",
                [(content, problem, decoder()) for content, problem in problems.items()],
            )

    def texts(self, entries: Sequence[FileEntry]) -> list[str | TextProblem]:
        """The whole text of each file, or why there is none.

        Args:
            entries: Text files, as they were listed.

        Raises:
            ConfigError: The database can't be used.
        """
        texts: dict[int, str | TextProblem] = {}
        with self._database.open() as database:
            with paused_collection():
                files = RememberedFiles("texts", ("text",), entries)
                texts.update((position, text) for position, (text,) in files.rows(database))
            unread = [
                position for position in range(len(entries)) if position not in texts and position not in files.copies
            ]
            for part, seen, settled in self._read(entries, unread, lambda position: _text_of(entries[position]), None):
                texts.update(zip(part, seen))
                whole = [(position, (text,)) for position, text in zip(part, seen) if isinstance(text, str)]
                files.keep(database, whole, settled_before=settled)
        return [texts[files.copies.get(position, position)] for position in range(len(entries))]

    def kept(self, identity: str, captions: Sequence[str]) -> list[int | None]:
        """How many characters of each caption a tokenizer's window keeps; None where it isn't remembered.

        Args:
            identity: Names the tokenizer and its window.
            captions: The captions.

        Raises:
            ConfigError: The database can't be used.
        """
        with self._database.open() as database:
            query = "SELECT caption, characters FROM kept WHERE tokenizer = ?"
            remembered = dict(database.execute(query, (name_id(database, identity),)))
        return [remembered.get(_digest(caption)) for caption in captions] if remembered else [None] * len(captions)

    def remember_kept(self, identity: str, captions: Sequence[str], kept: Sequence[int]) -> None:
        """This remembers how many characters of each caption a tokenizer's window keeps.

        Args:
            identity: Names the tokenizer and its window.
            captions: The captions.
            kept: The number for each of them.

        Raises:
            ConfigError: The database can't be used.
        """
        with self._database.open() as database, transaction(database):
            number = name_id(database, identity, add=True)
            rows = ((number, _digest(caption), count) for caption, count in zip(captions, kept))
            database.executemany("INSERT OR REPLACE INTO kept (tokenizer, caption, characters) VALUES (?, ?, ?)", rows)

    def _read(
        self,
        entries: Sequence[FileEntry],
        positions: Sequence[int],
        look: Callable[[int], _Seen],
        progress: Progress | None,
    ) -> Iterator[tuple[Sequence[int], list[_Seen], int]]:
        """This looks at files in batches: their positions, what was seen, and from when on a change isn't settled."""
        if not positions:
            return
        remote = any(is_remote(entries[position].path) for position in positions)
        threads = _REMOTE_THREADS if remote else self._threads
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(positions), _BATCH):
                settled = time.time_ns() - _SETTLED_NS
                part = positions[start : start + _BATCH]
                share = -(-len(part) // (4 * threads))
                shares = [part[begin : begin + share] for begin in range(0, len(part), share)]
                seen = pool.map(lambda share: [look(position) for position in share], shares)
                yield part, [one for some in seen for one in some], settled
                if progress is not None:
                    progress(start + len(part), len(positions))


@paused_collection()
def _facts_of(
    entries: Sequence[FileEntry],
    files: RememberedFiles,
    known: Mapping[int, Known],
    problems: Mapping[int, str],
    bad: Mapping[str, str],
    wanted: Wanted,
) -> list[FileFacts]:
    """What was asked for, of what is known; few sizes are shared by many pictures."""
    facts = []
    sizes: dict[tuple[int, int], Resolution] = {}
    for position, entry in enumerate(entries):
        first = files.copies.get(position, position)
        now = known[first]
        shape = now.width, now.height
        size = sizes.get(shape) or sizes.setdefault(shape, Resolution(*shape))
        problem = problems.get(first) or bad.get(now.content)
        face = face_in_name(entry.path) or now.face_box() if wanted.faces else None
        facts.append(FileFacts(now.content, size, problem, face, now.near_hash() if wanted.near else None))
    return facts


def _text_of(entry: FileEntry) -> str | TextProblem:
    if entry.bytes > _MOST_TEXT_BYTES:
        return TextProblem(f"{entry.bytes:,} bytes are no caption; at most {_MOST_TEXT_BYTES:,}")
    try:
        text = read_bytes(entry.path, most=_MOST_TEXT_BYTES).decode("utf-8-sig")
        return text if "\x00" not in text else TextProblem("it has NULs in it; save the caption as UTF-8")
    except OSError as error:
        return TextProblem(f"can't be read ({error.strerror or error})")
    except UnicodeDecodeError as error:
        return TextProblem(f"byte {error.start + 1} is not UTF-8; save the caption as UTF-8")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
