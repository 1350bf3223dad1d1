"""A trained model's file or folder."""

from collections.abc import Callable
from pathlib import Path

from library.config.errors import ConfigError
from library.config.saving import SavingConfig
from library.io.atomic import atomic_folder


def write_model_files(saving: SavingConfig, stem: str, what: str, write: Callable[[Path], None]) -> Path:
    """This has a model written where ``--save_model_as`` says: into a file, or into a folder that appears whole.

    Args:
        saving: Where to, and in which layout.
        stem: Of the name.
        what: Is written, for people.
        write: Writes to a path.

    Returns:
        The file or the folder.

    Raises:
        ConfigError: A number has no place in the type that it is saved in.
    """
    layout, folder = saving.save_model_as, Path(saving.output_dir)
    path = folder / (stem if layout == "diffusers" else f"{stem}.{layout}")
    try:
        if layout == "diffusers":
            with atomic_folder(path) as temporary:
                write(temporary)
        else:
            write(path)
    except ValueError as error:  # fp16 has no number above 65504
        raise ConfigError(f"the {what} can't be saved: {error}; use another --save_precision") from error
    return path
