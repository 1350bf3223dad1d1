"""The files that a run reads and the folders that it writes to: whether they are there and can be used."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.config_file import read_toml
from library.config.errors import ConfigError
from library.config.saving import thumbnail_address
from library.config.training import AUTO
from library.config.urls import is_remote

if TYPE_CHECKING:
    from library.config.run import RunConfig

_FILES = (
    ("logging", "log_tracker_config"),
    ("saving", "metadata_thumbnail"),
    ("network", "network_weights"),
    ("network", "base_weights"),
)


def folder_problem(path: str | os.PathLike[str]) -> str | None:
    """This says why nothing can be written into a folder, which need not exist yet; None: something can."""
    existing = os.path.abspath(path)
    while not os.path.exists(existing) and existing != os.path.dirname(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        return f"{existing} is a file, not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} can't be written to: permission denied"
    return None


def path_problems(config: "RunConfig") -> Iterator[str]:
    """This checks the paths of a run's configuration, those of the model and of the datasets apart; one line each."""
    missing = list(_missing(config))
    yield from missing
    folders = {
        "output_dir": config.saving.output_dir,
        "cache_dir": config.caching.cache_dir,
        "logging_dir": config.logging.logging_dir,
    }
    for name, folder in folders.items():
        if folder is not None and not is_remote(folder) and (problem := folder_problem(folder)):
            yield f"--{name} {folder}: {problem}"
    if not missing:
        yield from _unusable(config)


def _missing(config: "RunConfig") -> Iterator[str]:
    for attribute, name in _FILES:
        value = getattr(getattr(config, attribute), name, None)
        for path in [value] if isinstance(value, str) else value or ():
            if not os.path.isfile(path):
                yield f"--{name} {path}: no such file"
    resume = config.training.resume
    if resume and resume != AUTO and not os.path.isdir(resume):
        yield f"--resume {resume}: no such folder; it is one that ends in -state, or auto"


def _unusable(config: "RunConfig") -> Iterator[str]:
    """Files that are there and hold something else."""
    try:
        if config.saving.metadata_thumbnail is not None:
            thumbnail_address(config.saving.metadata_thumbnail)
    except ConfigError as error:
        yield str(error)
    path, trackers = config.logging.log_tracker_config, config.logging.trackers
    if path is None:
        return
    try:
        sections = read_toml(Path(path))
    except ConfigError as error:
        yield f"--log_tracker_config {error}"
        return
    for name, section in sections.items():
        if name not in trackers or not isinstance(section, dict):
            yield f"--log_tracker_config {path}: [{name}] is no tracker in use; in use: {', '.join(trackers)}"
