"""Files that list pictures with their captions and tags: json, jsonl, csv and parquet."""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from json import JSONDecodeError
from typing import Any, NamedTuple

from library.config.dataset import SubsetConfig
from library.config.documents import MEBIBYTE, parse_json, size_text
from library.config.errors import ConfigError
from library.config.messages import holds_secret, name_shown, shown
from library.io.garbage import paused_collection
from library.io.places import read_bytes

NAME_COLUMNS = ("file_name", "filename", "image_path", "path")
CAPTION_COLUMNS = ("caption", "text", "prompt")
_TAGS = "tags"
_DELIMITERS = ",;\t"
_MOST_PROBLEMS = 20
_MOST_BYTES = 1024 * MEBIBYTE
"""Of a list of pictures, and of what a packed one unpacks to; ten million pictures with captions have as many."""

_MOST_VALUES = 50_000_000
_LONGEST_CAPTION = MEBIBYTE
"""Characters that a caption may have; text encoders read some hundreds."""

_LONGEST_NAME = 4096
_MOST_COLUMNS = 10_000
_ROWS_AT_ONCE = 1024
"""Of a packed list; a few bytes of it can be many rows."""

_LONGEST_CELL = 16 * MEBIBYTE


class MetadataEntry(NamedTuple):
    """What a metadata file says about one picture.

    Attributes:
        captions: Its captions with its tags at their ends: all of them with ``enable_wildcard``, else the first alone;
            none when it has neither caption nor tags.
    """

    captions: tuple[str, ...]


class _Row(NamedTuple):
    """One picture as the file has it; ``where`` is its place in the file, for messages."""

    where: str
    name: Any
    caption: Any
    tags: Any


@paused_collection()
def read_metadata(path: str, subset: SubsetConfig) -> dict[str, MetadataEntry]:
    """This reads a metadata file.

    Args:
        path: A file or a URL; its ending says its kind.
        subset: Has the names of the columns, and how captions and tags are put together.

    Returns:
        Picture -> what is said about it, in the order of the file; pictures are named as the file names them.

    Raises:
        ConfigError: What is wrong with the file, one line per mistake.
    """
    try:
        data = read_bytes(path, most=_MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror or error})") from None
    kind = os.path.splitext(path)[1].lower()
    separator = f"{subset.caption_separator.rstrip(' ')} "
    entries: dict[str, MetadataEntry] = {}
    places: dict[str, str] = {}
    problems: list[str] = []
    try:
        for row in _READERS[kind](data, subset):
            try:
                entries[_name(row, places)] = MetadataEntry(_captions(row, separator, subset.enable_wildcard))
            except ValueError as error:
                problems.append(f"{path}: {row.where}: {error}")
    except ValueError as error:
        problems.append(f"{path}: {error}")
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        raise ConfigError(
            "\n".join(problems[:_MOST_PROBLEMS] + ([f"{path}: {more} more mistakes"] if more > 0 else []))
        )
    return entries


def _name(row: _Row, places: dict[str, str]) -> str:
    """The picture's name, which nothing before had; ``places`` knows where each stood."""
    if not isinstance(row.name, str) or not row.name:
        raise ValueError(f"no name of a picture, but {shown(row.name)}" if row.name else "names no picture")
    if len(row.name) > _LONGEST_NAME or "\x00" in row.name or not _can_be_written(row.name):
        raise ValueError(f"{name_shown(row.name)} can't be the name of a picture")
    if holds_secret(row.name):
        raise ValueError(
            "the address has a login or a signature in it, which would be written into caches and logs; give them in "
            "the storage's own configuration"
        )
    first = places.setdefault(row.name, row.where)
    if first is not row.where:
        raise ValueError(f"{name_shown(row.name)} stands in {first} already; keep one of the two")
    return row.name


def _lines(caption: Any) -> list[str]:
    """The lines of a caption, or of several, that say something."""
    if isinstance(caption, str):
        if len(caption) > _LONGEST_CAPTION:
            raise ValueError(f"a text of {len(caption):,} characters; at most {_LONGEST_CAPTION:,}")
        if "\x00" in caption or not _can_be_written(caption):
            raise ValueError("a text with characters that no text has")
        lines = caption.strip().splitlines()
        return lines if len(lines) < 2 else [line.strip() for line in lines if line.strip()]
    if caption is None:
        return []
    if not isinstance(caption, list) or not all(isinstance(one, str) for one in caption):
        raise ValueError(f"the caption must be a text or a list of texts, got {shown(caption)}")
    return [line for one in caption for line in _lines(one)]


def _captions(row: _Row, separator: str, several: bool) -> tuple[str, ...]:
    """The captions that can be used, each with the tags at its end."""
    lines = _lines(row.caption)
    if not several:
        del lines[1:]
    if row.tags is None:
        return tuple(lines)
    try:
        tags = separator.join(_lines(row.tags))
    except ValueError:
        raise ValueError(f"tags must be a text or a list of texts, got {shown(row.tags)}") from None
    if not tags:
        return tuple(lines)
    return tuple([line + separator + tags for line in lines] or [tags])


def _json(data: bytes, subset: SubsetConfig) -> Iterator[_Row]:
    """``{picture: {caption, tags, ...}}``."""
    text = _text(data)
    try:
        pictures = parse_json(text, most_values=_MOST_VALUES, pairs=_unique)
    except JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(pictures, dict):
        raise ValueError('expected {"picture": {"caption": "..."}, ...}, got ' + type(pictures).__name__)
    for name, values in pictures.items():
        if not isinstance(values, dict):
            raise ValueError(f'{name_shown(name)}: expected {{"caption": "..."}}, got {shown(values)}')
        yield _Row(name_shown(name) or '""', name, _first(values, CAPTION_COLUMNS), values.get(_TAGS))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name_shown(twice)} stands twice in one table; keep one of the two")
    return values


def _jsonl(data: bytes, subset: SubsetConfig) -> Iterator[_Row]:
    """A line of JSON for each picture."""
    for number, line in enumerate(_text(data).split("\n"), 1):
        if not line or line.isspace():
            continue
        where = f"line {number}"
        try:
            values = parse_json(line, most_values=_MOST_VALUES)
        except JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(
                f"{where}: expected a table with {NAME_COLUMNS[0]} and {CAPTION_COLUMNS[0]}, got {shown(values)}"
            )
        yield _Row(where, _first(values, NAME_COLUMNS), _first(values, CAPTION_COLUMNS), values.get(_TAGS))


def _csv(data: bytes, subset: SubsetConfig) -> Iterator[_Row]:
    """A header and a row for each picture, with commas, semicolons or tabs between the cells."""
    text = _text(data)
    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count)
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = next((row for row in reader if row), [])
        name, caption, tags = _columns([column.strip() for column in columns], subset)
        begin = reader.line_num + 1
        for row in reader:
            where, begin = f"line {begin}", reader.line_num + 1
            if not row:
                continue
            if len(row) != len(columns):
                raise ValueError(
                    f"{where}: expected {len(columns)} cells as in the header, got {len(row)}; put text with "
                    f'{delimiter!r} in it into quotes "..."'
                )
            yield _Row(where, row[name], None if caption is None else row[caption], None if tags is None else row[tags])
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: not valid CSV: {error}") from None


def _parquet(data: bytes, subset: SubsetConfig) -> Iterator[_Row]:
    """A table with a row for each picture."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError("parquet files need the package pyarrow; pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        columns = file.schema_arrow.names
        if len(columns) > _MOST_COLUMNS:
            raise ValueError(f"{len(columns):,} columns; at most {_MOST_COLUMNS:,}")
        chosen = [None if index is None else columns[index] for index in _columns(columns, subset)]
        wanted = [column for column in chosen if column is not None]
        unpacked = 0
        values: list[list[Any]] = [[] for _ in chosen]
        # no threads: nobody waits for this small file, and forks would not have them
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted, use_threads=False):
            unpacked += batch.nbytes
            if unpacked > _MOST_BYTES:
                raise ValueError(f"more than {size_text(_MOST_BYTES)} when it is unpacked")
            for place, column in zip(values, chosen):
                place += [None] * batch.num_rows if column is None else batch.column(column).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"not a parquet file that can be read: {' '.join(str(error).split())}") from None
    for number, row in enumerate(zip(*values), 1):
        yield _Row(f"row {number}", *row)


def _columns(columns: Sequence[str], subset: SubsetConfig) -> tuple[int, int | None, int | None]:
    """Which columns hold the picture's name, its caption and its tags."""
    name = _column(columns, subset.filename_column, NAME_COLUMNS)
    if name is None:
        raise ValueError(_missing("the picture", "filename_column", subset.filename_column, NAME_COLUMNS, columns))
    caption = _column(columns, subset.caption_column, CAPTION_COLUMNS)
    tags = columns.index(_TAGS) if _TAGS in columns else None
    from_here = f".{subset.captions_from}" in _READERS
    if caption is None and (subset.caption_column is not None or (from_here and tags is None)):
        raise ValueError(_missing("the caption", "caption_column", subset.caption_column, CAPTION_COLUMNS, columns))
    return name, caption, tags if tags != caption else None


def _column(columns: Sequence[str], chosen: str | None, usual: Iterable[str]) -> int | None:
    return next((columns.index(column) for column in ([chosen] if chosen else usual) if column in columns), None)


def _missing(what: str, key: str, chosen: str | None, usual: Sequence[str], columns: Sequence[str]) -> str:
    expected = chosen or f"{', '.join(usual[:-1])} or {usual[-1]}"
    hint = "correct" if chosen else "set"
    return f"no column for {what} ({expected}); it has {', '.join(columns) or 'none'}; {hint} {key}"


def _first(values: Mapping[str, Any], names: Iterable[str]) -> Any:
    for name in names:
        value = values.get(name)
        if value is not None:
            return value
    return None


def _can_be_written(text: str) -> bool:
    """Whether it has no half of a character, which JSON's escapes can name."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None


_READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
