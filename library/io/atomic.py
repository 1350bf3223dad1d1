"""Files that appear complete or not at all: a temporary name in the same folder, synced, then renamed."""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_HIDDEN = re.compile(r"\.(.+)\.[0-9a-f]{32}\.(partial|old)", re.DOTALL)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """This yields a temporary path to write a file to; leaving the block puts that file in place of ``path``.

    Missing folders are made. On any error, a kill by Ctrl-C included, the temporary file is removed and ``path`` stays
    as it was.

    Args:
        path: Where the file belongs.

    Raises:
        FileNotFoundError: Nothing was written to the temporary path.
        OSError: The file can't be written; its ``filename`` is ``path``.
    """
    target = Path(path)
    temporary = _hidden(target, "partial")
    with _named_after(temporary, target):
        target.parent.mkdir(parents=True, exist_ok=True)
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
    one is complete and synced. Folders can't be exchanged in one go: a process that is killed between the two renames
    leaves the old one under a hidden name, from where ``repair`` brings it back.

    Args:
        path: Where the folder belongs.

    Raises:
        OSError: It can't be written; ``filename`` is ``path``, or the path in it of the file that can't be written.
    """
    target = Path(path)
    temporary, old = _hidden(target, "partial"), _hidden(target, "old")
    with _named_after(temporary, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            yield temporary
            _sync_tree(temporary)
            if target.exists():
                os.rename(target, old)
            os.rename(temporary, target)
        except BaseException:
            if old.exists() and not target.exists():
                os.rename(old, target)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_directory(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """This removes a folder so that it is never seen half empty: it leaves its name first.

    Raises:
        OSError: It can't be renamed.
    """
    hidden = _hidden(Path(path), "partial")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def repair(folder: str | os.PathLike[str], belongs: Callable[[str], bool]) -> list[str]:
    """This clears away what killed writers left in a folder under hidden names.

    A folder that was on its way out while its successor was not there yet goes back to its place.

    Args:
        folder: Where to look; its sub-folders are left alone. It need not exist.
        belongs: Whether the leftovers of a file or folder of this name may be touched: no other process is writing it.

    Returns:
        What was done, in a few words each.
    """
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    done = []
    for name in names:
        match = _HIDDEN.fullmatch(name)
        if match is None or not belongs(match[1]):
            continue
        path, target = Path(folder, name), Path(folder, match[1])
        if match[2] == "old" and not target.exists():
            os.rename(path, target)
            done.append(f"{target.name} put back")
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        done.append(f"a half-written {target.name} removed")
    return done


def _hidden(target: Path, ending: str) -> Path:
    return target.parent / f".{target.name}.{uuid.uuid4().hex}.{ending}"


@contextlib.contextmanager
def _named_after(temporary: Path, target: Path) -> Iterator[None]:
    """An ``OSError`` from inside names the place that people know: the target, or what belongs into it."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, str) else temporary
        if named == temporary or temporary in named.parents:
            error.filename = str(target / named.relative_to(temporary))
        raise


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(parent, name), "rb+") as file:
                os.fsync(file.fileno())
        fsync_directory(parent)
