"""Which of the files that a run wrote are deleted again."""

import os
import re
import shutil
from pathlib import Path

from library.training.run import Run
from library.training.saved_weights import RAW


def remove_old(run: Run, done: int) -> None:
    """Delete what the ``--save_last_n_*`` options no longer keep: only files named as this run names them."""
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
    for name in os.listdir(saving.output_dir):
        for pattern, keep, now in limits:
            match = re.fullmatch(pattern, name)
            if match and keep is not None and int(match.group(1)) <= now - keep:
                path = Path(saving.output_dir) / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
