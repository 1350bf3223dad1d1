"""The error that a person can fix without reading code."""

import difflib
from collections.abc import Iterable


class ConfigError(Exception):
    """A wrong option, key or file: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
