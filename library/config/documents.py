"""Text files that may come from anywhere: read up to a limit, and parsed as TOML or JSON without surprises.

Python's parsers take the nesting of a file as deep as the stack goes, and time or memory that grows with the square of
some files' size. What could do that is found by one look over the text, and refused before it is parsed.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from library.config.errors import ConfigError
from library.config.messages import printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MEBIBYTE = 1 << 20
MOST_TOML_BYTES = 8 * MEBIBYTE
"""A dataset file with twenty thousand folders has two."""

MOST_JSON_BYTES = 64 * MEBIBYTE
"""Of a file that isn't a list of pictures."""

_MOST_VALUES = 2_000_000
"""Of such a file."""

_DEEPEST = 50
"""How many tables or lists may stand in one another; ours need five."""

_LONGEST_KEY = 20
"""Parts of a dotted key."""

_UNCOUNTED_BYTES = MEBIBYTE
"""So much JSON can't become so much memory that its values must be counted first."""

_TOML_TOKEN = re.compile("\"\"\"|'''|[\"'#\\[\\]{}.,=\n]")
_ENDS = {
    '"': re.compile(r'\\.|"|\n', re.DOTALL),
    "'": re.compile(r"'|\n"),
    '"""': re.compile(r'\\.|"""', re.DOTALL),
    "'''": re.compile("'''"),
    "#": re.compile("\n"),
}
"""What opens a text or a comment -> what can end it; an escaped character ends nothing."""

_JSON_TOKEN = re.compile(r'"[^"]*"?|[\[\]{},:]')
"""Of a text whose escaped quotes were taken out."""


def read_text(path: Path, most: int, *, kind: str = "a file of this kind") -> str:
    """This reads a text file in UTF-8.

    Args:
        path: The file.
        most: Bytes that it may have; no more are read.
        kind: What it should be, for the message.

    Raises:
        ConfigError: It can't be read, is larger, or is not text; the message begins with the path.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except ValueError as error:  # a path with a NUL in it
        raise ConfigError(f"{path}: can't be read ({error})") from None
    if len(data) > most:
        raise ConfigError(f"{path}: larger than the {size_text(most)} that {kind} may have")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None


def size_text(count: int) -> str:
    """A number of bytes in the unit that limits are given in."""
    return f"{count // MEBIBYTE} MiB" if count % MEBIBYTE == 0 else f"{count:,} bytes"


def parse_toml(text: str) -> dict[str, Any]:
    """This parses TOML.

    Raises:
        ValueError: It isn't TOML, or is nested as no honest file is; the message says where.
    """
    _refuse_nesting(text)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(printable(str(error))) from None
    except ValueError:  # Python's own limit for numbers
        raise ValueError("a number of thousands of digits") from None
    except RecursionError:
        raise ValueError("tables or lists are nested too deep") from None


def _refuse_nesting(text: str) -> None:
    depth = position = 0
    parts = 1
    while match := _TOML_TOKEN.search(text, position):
        token, position = match[0], match.end()
        if token in _ENDS:
            position = _after(text, position, _ENDS[token])
        elif token in "[{":
            depth, parts = depth + 1, 1
            if depth > _DEEPEST:
                raise ValueError(f"tables or lists nested more than {_DEEPEST} deep{_line_of(text, position)}")
        elif token in "]}":
            depth -= 1
        elif token == ".":
            parts += 1
            if parts > _LONGEST_KEY:
                raise ValueError(f"a key of more than {_LONGEST_KEY} parts{_line_of(text, position)}")
        else:
            parts = 1


def _after(text: str, position: int, ends: re.Pattern[str]) -> int:
    """Where a text or a comment that began before ``position`` has ended. A line's end stays, as it ends keys too."""
    for match in ends.finditer(text, position):
        if match[0][0] != "\\":
            return match.start() if match[0] == "\n" else match.end()
    return len(text)


def _line_of(text: str, position: int) -> str:
    return f" (at line {text.count(chr(10), 0, position) + 1})"


def parse_json(
    text: str,
    *,
    most_values: int | None = None,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
    constants: bool = False,
) -> Any:
    """This parses JSON.

    Args:
        text: The document.
        most_values: How many values it may have; by default as many as its bytes allow.
        pairs: Makes a table of its names and values; its ``ValueError`` goes on.
        constants: Whether NaN and Infinity, which are no JSON but Python writes them, are read.

    Raises:
        ValueError: It isn't JSON, or is nested too deep, or has more values; the message is one line.
    """
    if most_values is not None and len(text) > _UNCOUNTED_BYTES:
        count_values(text, most_values)
    try:
        if pairs is None and not constants:
            return _READER.decode(text)  # making one for each line of a long list would take longer than reading it
        return json.loads(text, object_pairs_hook=pairs, parse_constant=None if constants else _no_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "digits" in str(error):
            raise ValueError("a number of thousands of digits") from None
        raise


def read_json(path: Path) -> Any:
    """This reads a small JSON file, such as the settings of a model.

    Raises:
        ConfigError: It can't be read, or isn't JSON; the message begins with the path.
    """
    text = read_text(path, MOST_JSON_BYTES, kind="a JSON file")
    try:
        return parse_json(text, most_values=_MOST_VALUES)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def count_values(text: str, most: int) -> None:
    """This looks over JSON, which may be very large, and builds nothing.

    Raises:
        ValueError: It has more than ``most`` values.
    """
    if "\\" in text:
        text = text.replace("\\\\", "").replace('\\"', "")
    count = 0
    for match in _JSON_TOKEN.finditer(text):
        if match[0][0] != '"':
            count += 1
            if count > most:
                raise ValueError(f"more than {most:,} values")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON knows")


_READER = json.JSONDecoder(parse_constant=_no_constant)
