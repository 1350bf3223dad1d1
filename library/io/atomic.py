"""Files that appear complete or not at all: a temporary name in the same folder, synced, then renamed."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """This yields a temporary path to write a file to; leaving the block puts that file in place of ``path``.

    Missing folders are made. On any error, a kill by Ctrl-C included, the temporary file is removed and ``path`` stays
    as it was.

    Args:
        path: Where the file belongs.

    Raises:
        FileNotFoundError: Nothing was written to the temporary path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """This writes ``text`` as UTF-8 with plain line feeds, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """This makes renames inside the folder ``path`` survive a power cut, where the system can do that."""
    if os.name == "nt":  # folders can't be opened there; NTFS journals renames itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """This yields a temporary folder to fill; leaving the block puts it in place of the folder ``path``.

    On any error the temporary folder is removed and ``path`` stays as it was. An old folder leaves only once the new
    one is complete and synced.

    Args:
        path: Where the folder belongs.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        old = target.parent / f".{target.name}.{uuid.uuid4().hex}.old"
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(parent, name), "rb+") as file:
                os.fsync(file.fileno())
        fsync_directory(parent)
