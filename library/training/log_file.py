"""The JSON-lines file with the numbers of every step. What a full disk doesn't take waits in memory."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.io.atomic import write_text

log = logging.getLogger(__name__)


class LogFile:
    """A log that is appended to.

    Args:
        path: The file.
        first_step: Steps that were done before; what it holds of later ones is dropped.
    """

    def __init__(self, path: str | os.PathLike[str], *, first_step: int):
        keep_lines_up_to(Path(path), first_step)
        self._path = path
        self._waiting = b""
        self._warned = False
        # unbuffered: a buffer that can't be emptied loses lines
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write one line, with what waits from before; when it can't be written, it waits too."""
        self._waiting += json.dumps(dict(entry), allow_nan=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                log.warning("%s can't be written (%s); its lines wait in memory", self._path, error.strerror)
            self._warned = True

    def sync(self) -> None:
        """Put every line onto the disk.

        Raises:
            OSError: One can't be written; ``filename`` is the file.
        """
        try:
            self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = os.fspath(self._path)
            raise

    def close(self) -> None:
        """Write what waits, as far as it can be, and close the file."""
        try:
            self._write()
        except OSError as error:
            lines = self._waiting.count(b"\n")
            log.warning("%s lacks its last %d lines: %s", self._path, lines, error.strerror)
        self._file.close()

    def _write(self) -> None:
        while self._waiting:
            written = self._file.write(self._waiting)
            self._waiting = self._waiting[written or 0 :]


def keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the log's lines after ``step``: a resumed run writes them again. A fresh run starts a fresh log."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step and step > 0:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break  # a line that a killed process left half-written
    write_text(path, "".join(kept))
