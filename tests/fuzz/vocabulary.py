"""What every fuzz test says: how many examples, within how much time and memory, and how valid documents are bent.

``FUZZ=long`` tries a hundred times as many examples.
"""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_LONG = os.environ.get("FUZZ") == "long"
_SECONDS = 5.0
_MEBIBYTES = 300

SYNTAX = [
    '"',
    "'",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    ".",
    "=",
    "#",
    "\\",
    "\n",
    "\x00",
    "\x1b",
    "--",
    "9" * 30,
    "-1",
    "1e999",
]
"""What steers the parsers."""

TEXT = st.text(st.characters(), max_size=30) | st.sampled_from(SYNTAX)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def examples(quick: int) -> settings:
    """So many examples in the default run."""
    return settings(
        max_examples=quick * (100 if _LONG else 1),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def within_limits(parse: Callable[[], object]) -> None:
    """This runs a parser, which may take neither long nor much memory, whatever it is given."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    parse()
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert seconds < _SECONDS and grown < _MEBIBYTES, f"{seconds:.1f} s, {grown:.0f} MiB"


def parses(parse: Callable[[bytes, Path], None], data: bytes, folder: Path) -> None:
    """This gives a parser a file's bytes."""
    within_limits(lambda: parse(data, folder))


@st.composite
def bent(draw: st.DrawFn, *originals: bytes) -> bytes:
    """A valid document with a few pieces replaced, put in, or taken out."""
    data = draw(st.sampled_from(originals))
    pieces = st.binary(max_size=8) | st.sampled_from([mark.encode() for mark in SYNTAX])
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.integers(0, 6)))
        data = data[:begin] + draw(pieces) + data[end:]
    return data
