"""Folders and files, on this machine or behind a URL such as ``s3://bucket/folder``, through the same few functions.

Names that begin with a dot are other programs' notes (``._cat.jpg`` of macOS) and are never listed.
"""

import errno
import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from library.config.urls import is_remote
from library.io.atomic import atomic_path
from library.io.garbage import paused_collection
from library.io.remote import start_method, storage_of

__all__ = [
    "FileEntry",
    "exists",
    "join",
    "list_files",
    "open_range",
    "read_bytes",
    "remove",
    "start_method",
    "write_bytes",
]


class FileEntry(NamedTuple):
    """A file of a listing.

    Attributes:
        path: The file's path, or its URL.
        name: The path from the listed folder on, with ``/`` between its parts.
        bytes: The file's size.
        version: Changes when the file does: the time of its last change in nanoseconds, or a text that a remote storage
            has for it; empty when nothing is known.
    """

    path: str
    name: str
    bytes: int
    version: int | str


@paused_collection()
def list_files(folder: str, *, recursive: bool) -> list[FileEntry]:
    """The files in a folder, sorted by name.

    Args:
        folder: A folder or a URL.
        recursive: Whether files in its sub-folders are listed too. Links to folders are followed.

    Raises:
        OSError: The folder can't be read; ``strerror`` is a reason of one line.
    """
    if is_remote(folder):
        storage, key = storage_of(folder)
        found = [
            FileEntry(join(folder, file.name), file.name, file.bytes, file.version)
            for file in storage.list(key, recursive=recursive)
            if file.name and not file.name.startswith(".") and "/." not in file.name
        ]
    else:
        found = list(_walk(folder, recursive))
    found.sort(key=attrgetter("name"))
    return found


def _walk(folder: str, recursive: bool) -> Iterator[FileEntry]:
    new = tuple.__new__  # a NamedTuple's own constructor takes twice the time, and there are many files
    waiting = [(folder, "")]
    visited: set[tuple[int, int]] = set()
    while waiting:
        path, prefix = waiting.pop()
        start = os.path.join(path, "")
        # through the folder's descriptor the system needn't resolve the whole path for every file
        descriptor = os.open(path, os.O_RDONLY) if os.scandir in os.supports_fd else None
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(path if descriptor is None else descriptor) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    if entry.is_dir():
                        if recursive:
                            waiting.append((start + name, f"{prefix}{name}/"))
                        continue
                    try:
                        status = entry.stat()
                    except OSError:  # a link to nowhere: whoever reads it learns why it can't be read
                        yield FileEntry(start + name, prefix + name, 0, "")
                        continue
                    yield new(FileEntry, (start + name, prefix + name, status.st_size, status.st_mtime_ns))
        finally:
            if descriptor is not None:
                os.close(descriptor)


def join(folder: str, name: str) -> str:
    """The path of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def exists(path: str) -> bool:
    """Whether there is such a file or folder.

    Raises:
        OSError: A remote storage can't be asked.
    """
    if not is_remote(path):
        return os.path.exists(path)
    storage, key = storage_of(path)
    return storage.exists(key)


def read_bytes(path: str, *, most: int | None = None) -> bytes:
    """The bytes of a file.

    Args:
        path: A path or a URL.
        most: How many bytes it may have; by default any number. No more are read of a local file.

    Raises:
        OSError: It can't be read, or is larger; ``strerror`` is a reason of one line.
    """
    try:
        if is_remote(path):
            storage, key = storage_of(path)
            data = storage.read(key)
        else:
            with open(path, "rb") as file:
                data = file.read() if most is None else file.read(most + 1)
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error), path) from None
    if most is not None and len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes, the most that such a file may have", path)
    return data


def open_range(path: str, begin: int, length: int) -> bytes:
    """A part of a file: ``length`` bytes from ``begin`` on.

    Raises:
        OSError: It can't be read, or ends before.
    """
    if is_remote(path):
        storage, key = storage_of(path)
        data = storage.read(key, begin, length) if length else b""
    else:
        with open(path, "rb") as file:
            file.seek(begin)
            data = file.read(length)
    if len(data) != length:
        raise OSError(errno.EIO, f"the file ends before byte {begin + length}", path)
    return data


def write_bytes(path: str, data: bytes) -> None:
    """This writes a file, which appears complete or not at all; missing folders are made.

    Raises:
        OSError: It can't be written.
    """
    if is_remote(path):
        storage, key = storage_of(path)
        storage.write(key, data)
        return
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def remove(path: str) -> None:
    """This removes a file, which need not exist.

    Raises:
        OSError: It can't be removed.
    """
    if is_remote(path):
        storage, key = storage_of(path)
        storage.remove(key)
    else:
        Path(path).unlink(missing_ok=True)
