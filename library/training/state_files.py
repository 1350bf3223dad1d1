"""The states of a run as they lie on disk: their files, whether those are whole, and which states there are."""

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.documents import MOST_JSON_BYTES, parse_json, read_text
from library.config.errors import ConfigError
from library.io.manifest import MANIFEST, find_damage, looks_whole

STATE_FORMAT = 2
_WITHOUT_MANIFEST = 1
"""The format whose checksums stand in its ``state.json``."""

TRAINABLE, AVERAGE, OPTIMIZER, PROGRESS = "trainable.safetensors", "ema.safetensors", "optimizer.pt", "state.json"


class DamagedState(ConfigError):
    """A file of a state is missing or isn't as it was written."""


@dataclass(frozen=True)
class StateFolder:
    """A state on disk as far as its light part tells; nothing of it has been checked.

    Attributes:
        path: The folder.
        step: Optimizer steps done; infinite when that can't be read.
        run: Which run it is of: a run and those that go on with it have one name in common.
        saved: When, in seconds since 1970.
    """

    path: Path
    step: float
    run: str
    saved: float


def read_progress(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The light part of a run state, after checking that every file of it is whole.

    Raises:
        DamagedState: A file of it is damaged, naming it.
        ConfigError: ``folder`` is no run state, or of another format.
    """
    path = Path(folder) / PROGRESS
    has_manifest = (Path(folder) / MANIFEST).is_file()
    if not path.is_file() and not has_manifest:
        raise ConfigError(f"--resume {folder}: not a run state, it has no {PROGRESS}; give a folder named ...-state")
    if has_manifest and (damaged := find_damage(folder)):
        raise _damaged(folder, damaged)
    try:
        progress = _parsed(path)
        found = progress["format"]
        checksums = progress["checksums"] if found == _WITHOUT_MANIFEST else {}
        if not isinstance(checksums, dict):
            raise TypeError("its checksums are no table")
    except (ConfigError, ValueError, KeyError, TypeError) as error:
        raise DamagedState(f"--resume {folder}: {PROGRESS} is damaged ({error}); resume from an older state") from error
    if found not in (STATE_FORMAT, _WITHOUT_MANIFEST):
        raise ConfigError(f"--resume {folder}: written in format {found}, this version reads {STATE_FORMAT}")
    if found == STATE_FORMAT and not has_manifest:
        raise _damaged(folder, MANIFEST)
    for name, checksum in checksums.items():
        file = path.parent / Path(name).name
        if "\x00" in name or not file.is_file() or _checksum(file) != checksum:
            raise _damaged(folder, name)
    return progress


def has_average(progress: dict[str, Any]) -> bool:
    """Whether a state holds a moving average of the weights; ``progress`` is its light part."""
    return bool(progress["average"] if "average" in progress else AVERAGE in progress.get("checksums", ()))


def find_states(output_dir: str | os.PathLike[str], output_name: str) -> list[StateFolder]:
    """The states of a run, from their names and light parts alone, the newest first.

    A fresh run may have been started where an older one of the same name had been: the states of the run that saved
    last come first. Among a run's own the one with more steps is newer. What can't be read comes before all others.

    Args:
        output_dir: Where the run writes.
        output_name: What it is called.
    """
    named = re.compile(rf"{re.escape(output_name)}(-step\d{{8}}|-\d{{6}})?-state")
    try:
        names = [name for name in os.listdir(output_dir) if named.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [_look_at(Path(output_dir, name)) for name in names if Path(output_dir, name).is_dir()]
    latest: dict[str, float] = {}
    for state in found:
        latest[state.run] = max(latest.get(state.run, -math.inf), state.saved)

    def age(state: StateFolder) -> tuple[bool, float, float, float, str]:
        return math.isinf(state.step), latest[state.run], state.step, state.saved, state.path.name

    return sorted(found, key=age, reverse=True)


def newest_state(output_dir: str | os.PathLike[str], output_name: str) -> Path | None:
    """The newest state that has all its files in their sizes; None: there is none.

    What is in the files is not read here: ``read_progress`` does that.
    """
    states = find_states(output_dir, output_name)
    return next((state.path for state in states if not math.isinf(state.step) and _has_all_files(state.path)), None)


def _look_at(folder: Path) -> StateFolder:
    try:
        progress = _parsed(folder / PROGRESS)
        saved = progress.get("saved")
        if saved is None:
            saved = (folder / PROGRESS).stat().st_mtime
        return StateFolder(folder, int(progress["step"]), str(progress.get("run", "")), float(saved))
    except (OSError, ConfigError, ValueError, KeyError, TypeError, AttributeError):
        return StateFolder(folder, math.inf, "", -math.inf)


def _has_all_files(folder: Path) -> bool:
    if (folder / MANIFEST).is_file():
        return looks_whole(folder)
    try:
        progress = _parsed(folder / PROGRESS)
        return progress["format"] == _WITHOUT_MANIFEST and all(
            (folder / name).is_file() for name in progress["checksums"]
        )
    except (OSError, ConfigError, ValueError, KeyError, TypeError):
        return False


def _parsed(path: Path) -> Any:
    return parse_json(read_text(path, MOST_JSON_BYTES, kind="a run state's light part"), constants=True)


def _damaged(folder: str | os.PathLike[str], name: str) -> DamagedState:
    return DamagedState(f"--resume {folder}: {name} is missing or damaged; resume from an older state")


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
