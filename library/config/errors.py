"""The error that a person can fix without reading code."""

import difflib
from collections.abc import Iterable

from library.config.messages import printable

_LONGEST_NAME = 200


class ConfigError(Exception):
    """A wrong option, key or file: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2. What it quotes of files is made fit to be
    printed: no control characters, no secrets, lines that aren't endless.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None when nothing is close."""
    if len(name) > _LONGEST_NAME:  # comparing takes time that grows with its square
        return None
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
