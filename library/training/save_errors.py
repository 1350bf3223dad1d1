"""Weights and states that can't be written: one line that says so, and the same end on every process."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from library.config.errors import ConfigError
from library.training.run import Run

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FINE, _NOT_WRITTEN, _REFUSED = 0, 1, 2


class SaveFailed(ConfigError):
    """Something can't be written. It has words on the process that met it, and none on the others.

    Args:
        what: Which file, and why.
        remedy: What to do.
    """

    def __init__(self, what: str = "", remedy: str = ""):
        super().__init__(f"{what}. {remedy}" if what else "")
        self.what = what


@contextlib.contextmanager
def saving_together(run: Run, needed: Callable[[], int]) -> Iterator[None]:
    """Inside, files are written, by one process or several. When one can't, every process leaves with an error.

    All processes enter; it waits for all of them at its end.

    Args:
        run: The run.
        needed: Gives about how many bytes are written.

    Raises:
        SaveFailed: A process couldn't write.
        ConfigError: A process refused to.
    """
    failure: ConfigError | None = None
    try:
        yield
    except OSError as error:
        failure = _explained(error, run, needed)
    except ConfigError as error:
        failure = error
    status = _FINE if failure is None else _NOT_WRITTEN if isinstance(failure, SaveFailed) else _REFUSED
    worst = int(run.accelerator.gather(torch.tensor([status], device=run.device)).max())
    if failure is not None:
        raise failure
    if worst == _NOT_WRITTEN:
        raise SaveFailed
    if worst == _REFUSED:
        raise ConfigError("")


def could_not_write(error: OSError, otherwise: str | os.PathLike[str]) -> str:
    """This says which file can't be written and why, with the room that there is.

    Args:
        error: What the system said.
        otherwise: The file, where that names none.
    """
    path = Path(error.filename if isinstance(error.filename, str) else otherwise)
    return f"{path} can't be written: {error.strerror or error}, {_size(_free(path))} free"


@contextlib.contextmanager
def starting_files(folder: str) -> Iterator[None]:
    """Inside, the files are written that a run begins with.

    Raises:
        ConfigError: One can't be.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(could_not_write(error, folder)) from None


def _explained(error: OSError, run: Run, needed: Callable[[], int]) -> SaveFailed:
    remedy = "Make room there" if error.errno in _NO_ROOM else "Put that right"
    then = f"go on with --resume {run.last_state}" if run.last_state is not None else "start again"
    where = could_not_write(error, run.config.saving.output_dir)
    return SaveFailed(
        f"{where}, about {_size(needed())} needed; what was saved before is whole", f"{remedy}, then {then}"
    )


def _free(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
