"""Which of the files that a run wrote are deleted again."""

import logging
import os
import re
from pathlib import Path

from library.io.atomic import remove_folder
from library.training.run import Run
from library.training.saved_weights import RAW
from library.training.state_files import newest_state

log = logging.getLogger(__name__)


def remove_old(run: Run, done: int) -> None:
    """Delete what the ``--save_last_n_*`` options no longer keep: only files named as this run names them.

    The newest state on the disk that has all its files stays, and so does the one that this run knows to be whole,
    whatever the options say.
    """
    if not run.accelerator.is_main_process:
        return
    saving = run.config.saving
    stem = re.escape(saving.output_name)
    epoch = run.plan.epoch_of(done)  # counted from 0: so many are complete
    written = rf"({RAW})?(_diffusers)?(\.safetensors|\.pth|)"  # without an ending: a folder
    limits = (
        (rf"{stem}-step(\d{{8}}){written}", saving.save_last_n_steps, done),
        (rf"{stem}-(\d{{6}}){written}", saving.save_last_n_epochs, epoch),
        (rf"{stem}-step(\d{{8}})-state", saving.save_last_n_steps_state or saving.save_last_n_steps, done),
        (rf"{stem}-(\d{{6}})-state", saving.save_last_n_epochs_state or saving.save_last_n_epochs, epoch),
    )
    if all(keep is None for _, keep, _ in limits):
        return
    newest = newest_state(saving.output_dir, saving.output_name)
    spared = {state.resolve() for state in (newest, run.last_state) if state is not None}
    for name in os.listdir(saving.output_dir):
        for pattern, keep, now in limits:
            match = re.fullmatch(pattern, name)
            path = Path(saving.output_dir) / name
            if match and keep is not None and int(match.group(1)) <= now - keep and path.resolve() not in spared:
                _remove(path)


def _remove(path: Path) -> None:
    try:
        remove_folder(path) if path.is_dir() else path.unlink()
    except OSError as error:
        log.warning("%s can't be deleted (%s) and stays", path, error.strerror)
