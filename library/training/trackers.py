"""Where the numbers of a run go: the progress bar, a JSON-lines file beside the output, TensorBoard, wandb."""

import contextlib
import math
import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from library.config.config_file import read_toml
from library.config.errors import ConfigError
from library.config.logging import LoggingConfig
from library.training.log_file import LogFile

# A terminal that is gone, or a full disk that the output goes to, is no reason to lose a run.
_SHOWN_OR_NOT = contextlib.suppress(OSError)


class Trackers:
    """The places where a run's numbers are logged, on the main process."""

    def __init__(self, accelerator: Accelerator, log_path: str, *, first_step: int):
        self.accelerator = accelerator
        self.samples_seen = 0
        self.started = time.monotonic()
        self.external = bool(accelerator.trackers)
        self.bar = tqdm(disable=True)
        self._file = LogFile(log_path, first_step=first_step) if accelerator.is_main_process else None

    def show_progress(self, *, first_step: int, max_steps: int) -> None:
        """Start the progress bar and its clock."""
        self.started = time.monotonic()
        hidden = not self.accelerator.is_main_process
        self.bar = tqdm(total=max_steps, initial=first_step, desc="steps", dynamic_ncols=True, disable=hidden)

    def say(self, line: str) -> None:
        """Print a line above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            with _SHOWN_OR_NOT:
                self.bar.write(line)

    def log_step(self, step: int, epoch: int, numbers: Mapping[str, float], *, samples: int) -> None:
        """Log one optimizer step; ``samples`` is how many it used."""
        self.samples_seen += samples
        seconds = time.monotonic() - self.started
        learning_rate = next((value for key, value in numbers.items() if key.startswith("lr/")), math.nan)
        self.bar.set_postfix(
            loss=f"{numbers['loss/average']:.4f}",
            lr=f"{learning_rate:.2e}",
            samples_per_s=f"{self.samples_seen / max(seconds, 1e-9):.2f}",
            refresh=False,
        )
        with _SHOWN_OR_NOT:
            self.bar.update(1)
        self.log(step, {"epoch": epoch, **numbers})

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log any numbers at an optimizer step; those that aren't finite are left out: JSON has no word for them."""
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
        if self.external:
            self.accelerator.log(dict(numbers), step=step)
        if self._file is not None:
            self._file.add({"step": step, **numbers})

    def sync(self) -> None:
        """Put every line of the file onto the disk.

        Raises:
            OSError: One can't be written.
        """
        if self._file is not None:
            self._file.sync()

    def pause_clock(self, seconds: float) -> None:
        """Leave time spent on samples, validation and saving out of the speed that the bar shows."""
        self.started += seconds
        if not self.bar.disable:
            self.bar.start_t += seconds
            self.bar.last_print_t += seconds

    def close(self) -> None:
        """Finish every tracker."""
        with _SHOWN_OR_NOT:
            self.bar.close()
        if self.external:
            self.accelerator.end_training()
        if self._file is not None:
            self._file.close()


def check_packages(config: LoggingConfig) -> None:
    """This stops early when a tracker's package is missing.

    Raises:
        ConfigError: It is, naming what to install.
    """
    for name in config.trackers:  # both trackers are named like their packages
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(f"--log_with {name} needs the package {name}; pip install {name}") from error


def log_in(config: LoggingConfig) -> None:
    """This logs in to wandb on the main process, which asks for the key where it can.

    Raises:
        ConfigError: wandb can't be used.
    """
    if "wandb" not in config.trackers or os.environ.get("RANK", "0") != "0":
        return
    try:
        import wandb
    except ImportError:
        return  # check_packages says it
    try:
        wandb.login(key=config.wandb_api_key)
    except (wandb.Error, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--log_with {config.log_with}: wandb can't log in ({reason}); run `wandb login`, give --wandb_api_key, or "
            "set WANDB_MODE=offline"
        ) from error


def logging_folder(config: LoggingConfig) -> str | None:
    """This run's folder under ``--logging_dir``: the prefix and the time it started."""
    if not config.logging_dir:
        return None
    return os.path.join(config.logging_dir, (config.log_prefix or "") + time.strftime("%Y%m%d%H%M%S"))


def start_trackers(
    accelerator: Accelerator, config: LoggingConfig, settings: Mapping[str, Any], *, output_dir: str
) -> None:
    """Start TensorBoard and wandb through accelerate; ``settings`` are logged with ``--log_config``."""
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    init: dict[str, Any] = {"wandb": {"dir": output_dir}} if "wandb" in config.trackers else {}
    if config.log_tracker_config:
        for name, arguments in read_toml(Path(config.log_tracker_config)).items():
            init.setdefault(name, {}).update(arguments)
    if config.wandb_run_name:
        init.setdefault("wandb", {})["name"] = config.wandb_run_name
    # TensorBoard takes plain values only
    plain = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in settings.items()}
    accelerator.init_trackers(
        config.log_tracker_name or "network_train", config=plain if config.log_config else {}, init_kwargs=init
    )
