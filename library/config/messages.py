"""Text that others wrote, made fit for a message: nothing that steers a terminal, no secrets, not too long."""

import os
import re
from collections.abc import Mapping
from typing import Any

_LONGEST_LINE = 1000
_LONGEST_VALUE = 120
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What steers a terminal, starts a line or turns its direction, and what can't be written out; but not line and tab."""

_LOGIN = re.compile(r"(?<=://)(?:[^\s/'\"@:]*:(?!\d+/)[^\s'\"@]*|[^\s/'\"@]+)@")
_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"?]*=[^\s'\"]*")
_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|API_?KEY|SECRET_ACCESS_KEY|ACCESS_KEY_ID)$")
_SHORTEST_SECRET = 8
"""A shorter value of an environment variable stands in too many texts by chance."""

_HIDDEN = "***"


def printable(text: str, *, longest: int = _LONGEST_LINE) -> str:
    """This makes a message fit for a terminal or a log: its lines stay lines, secrets in it are hidden.

    Args:
        text: The message, with names and values in it that came from files.
        longest: Characters of a line; the rest is counted.
    """
    return "\n".join(_shortened(_escaped(line), longest) for line in without_secrets(text).split("\n"))


def shown(value: Any) -> str:
    """A value of a file as a message quotes it: on one line, and not longer than one can read."""
    try:
        text = ascii(value) if isinstance(value, str) and _CONTROL.search(value) else repr(value)
    except (RecursionError, ValueError):  # tables in tables, or a number of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}... ({len(text):,} characters)"


def name_shown(name: str) -> str:
    """A name that stands in a file, on one line; usual names stay as they are."""
    return _shortened(_escaped(name).replace("\n", "\\n"), _LONGEST_VALUE)


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """This hides logins and queries of addresses, and the values of environment variables that are named like secrets.

    Args:
        text: A message.
        environment: By default the process's own.
    """
    if "://" in text:
        text = _QUERY.sub(rf"\1?{_HIDDEN}", _LOGIN.sub(f"{_HIDDEN}@", text))
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= _SHORTEST_SECRET and value in text and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, _HIDDEN)
    return text


def holds_secret(text: str) -> bool:
    """Whether an address in it has a login, or a query such as signed addresses have."""
    return "://" in text and (_LOGIN.search(text) is not None or _QUERY.search(text) is not None)


def _escaped(line: str) -> str:
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], line)


def _shortened(line: str, longest: int) -> str:
    return line if len(line) <= longest else f"{line[:longest]}... ({len(line):,} characters)"
