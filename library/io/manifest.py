"""A list of a folder's files with their checksums, so that a damaged or missing file is found and named."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from library.io.atomic import write_text

MANIFEST = "manifest.json"
"""The list's name inside the folder."""

_BLOCK = 1 << 20
_LONGEST = 1 << 26
"""Bytes of a list that is read: that of a million files."""


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """This lists all files in ``folder``, those of its sub-folders too, and writes the list beside them.

    Raises:
        OSError: A file can't be read, or the list can't be written.
    """
    listed = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            listed[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "blake2b": _checksum(path)}
    listed.pop(MANIFEST, None)
    write_text(Path(folder, MANIFEST), _spelled(dict(sorted(listed.items()))))


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, int] | None:
    """This reads the list: file -> size in bytes. None: it is missing or damaged; every byte of it counts."""
    listed = _read(Path(folder, MANIFEST))
    return None if listed is None else {name: entry["size"] for name, entry in listed.items()}


def find_damage(folder: str | os.PathLike[str]) -> str | None:
    """This compares the files with the list, each read once.

    Returns:
        The first file that is missing or not as it was written, by its name inside the folder; None: all are whole.
    """
    listed = _read(Path(folder, MANIFEST))
    if listed is None:
        return MANIFEST
    for name, entry in listed.items():
        path = Path(folder, name)
        try:
            if path.stat().st_size != entry["size"] or _checksum(path) != entry["blake2b"]:
                return name
        except OSError:
            return name
    return None


def looks_whole(folder: str | os.PathLike[str]) -> bool:
    """Whether the list is whole and every file is there in its size; what is in them is not read."""
    listed = read_manifest(folder)
    if listed is None:
        return False
    try:
        return all(Path(folder, name).stat().st_size == size for name, size in listed.items())
    except OSError:
        return False


def _read(path: Path) -> dict[str, dict[str, Any]] | None:
    try:
        if path.stat().st_size > _LONGEST:
            return None
        text = path.read_bytes()
        listed = json.loads(text)["files"]
        # one spelling only, so that no byte of the list can change unnoticed
        if text != _spelled(listed).encode():
            return None
        if not all(_is_inside(name) and {"size", "blake2b"} == entry.keys() for name, entry in listed.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return listed


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name


def _spelled(listed: Mapping[str, Mapping[str, Any]]) -> str:
    checksum = hashlib.blake2b(json.dumps(listed).encode(), digest_size=16).hexdigest()
    return json.dumps({"files": listed, "checksum": checksum}, indent=1) + "\n"


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
