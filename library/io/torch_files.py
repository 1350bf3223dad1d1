"""Files in torch's own format, written so that a full disk is an ``OSError`` as everywhere else."""

import os
from typing import Any, BinaryIO, cast

import torch

from library.io.atomic import atomic_path


def save_torch(value: Any, path: str | os.PathLike[str]) -> None:
    """This writes ``value`` as ``torch.save`` does, atomically.

    Args:
        value: What torch can pickle.
        path: The file; it is replaced only when the new one is complete.

    Raises:
        OSError: It can't be written.
    """
    with atomic_path(path) as temporary, open(temporary, "wb", buffering=0) as file:
        watched = _Watched(file)
        try:
            torch.save(value, cast(BinaryIO, watched))
        except RuntimeError:
            # torch's zip writer only says that its position is another than it expected
            if watched.error is not None:
                raise watched.error from None
            raise


class _Watched:
    """A file that writes all it is given, and remembers why it couldn't."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        length, done = len(view), 0
        try:
            while done < length:
                done += self._file.write(view[done:]) or 0
        except OSError as error:
            self.error = self.error or error
            raise
        return length

    def flush(self) -> None:
        """Nothing waits here."""
