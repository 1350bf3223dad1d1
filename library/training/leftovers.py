"""What a killed run left half-written where it writes: cleared away when it is started again."""

import logging
import re
from pathlib import Path

from library.config.saving import SavingConfig
from library.io.atomic import repair
from library.training.saved_weights import RAW

log = logging.getLogger(__name__)


def clear_leftovers(saving: SavingConfig) -> None:
    """Remove the half-written files of this run's names, and put back a folder that was being replaced.

    Other runs may be writing into the same folder: what isn't named as this run names it is left alone.
    """
    stem = re.escape(saving.output_name)
    written = rf"{stem}(-step\d{{8}}|-\d{{6}})?(-state|({RAW})?(_diffusers)?(\.safetensors|\.pth)?)"
    beside = rf"{stem}-(log\.jsonl|run\.toml)"
    pictures = rf"{stem}_e?\d{{6}}({RAW})?_\d+_.*\.png"
    folder = Path(saving.output_dir)
    done = repair(folder, lambda name: re.fullmatch(rf"{written}|{beside}", name) is not None)
    done += repair(folder / "sample", lambda name: re.fullmatch(pictures, name, re.DOTALL) is not None)
    if done:
        log.warning("%s: left by a process that was killed: %s", saving.output_dir, "; ".join(done))
