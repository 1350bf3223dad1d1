"""Where the numbers and the messages of a run go."""

from dataclasses import dataclass

from library.config.errors import ConfigError
from library.config.options import option

SECRET_VARIABLES = {"wandb_api_key": "WANDB_API_KEY"}
"""Secret options -> the environment variable that the package behind them reads."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging."""

    logging_dir: str | None = option(
        None,
        "Folder for TensorBoard; each run writes a sub-folder named by its start time. By default none. Losses always "
        "go to a JSON-lines file beside the output too.",
        metavar="FOLDER",
    )
    log_with: str | None = option(
        None,
        "Where the numbers go. By default tensorboard when --logging_dir is given, else nowhere.",
        choices=("tensorboard", "wandb", "all"),
        aliases=("report_to",),
    )
    log_prefix: str | None = option(None, "Put before the sub-folder's time. By default nothing.")
    log_tracker_name: str | None = option(
        None, "Project name in wandb and TensorBoard. By default network_train.", aliases=("tracker_project_name",)
    )
    log_tracker_config: str | None = option(
        None,
        "TOML file with settings per tracker, such as a [wandb] section. By default none.",
        metavar="FILE.toml",
    )
    wandb_run_name: str | None = option(
        None, "The run's name in wandb. By default one that wandb makes up.", aliases=("tracker_run_name",)
    )
    wandb_api_key: str | None = option(
        None, "Key to log in to wandb. By default what `wandb login` stored.", secret=True, metavar="KEY"
    )
    log_config: bool = option(False, "Send the resolved options to the trackers too, secrets left out.")
    console_log_level: str = option(
        "INFO",
        "The least important messages to show.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = option(
        None, "Append the messages to this file instead of showing them. By default they are shown.", metavar="FILE"
    )
    console_log_simple: bool = option(False, "Show the messages without time, level and origin.")

    def __post_init__(self) -> None:
        problems = []
        trackers = self.trackers
        if "tensorboard" in trackers and not self.logging_dir:
            problems.append(f"--log_with {self.log_with} needs --logging_dir, the folder to write to")
        if not trackers:
            for name in ("log_tracker_name", "log_tracker_config", "log_config"):
                if getattr(self, name):
                    problems.append(f"--{name} does nothing without a tracker; add --log_with or --logging_dir")
        if "wandb" not in trackers:
            for name in ("wandb_run_name", "wandb_api_key"):
                if getattr(self, name):
                    problems.append(f"--{name} does nothing without wandb; add --log_with wandb")
        if self.log_prefix and not self.logging_dir:
            problems.append("--log_prefix does nothing without --logging_dir; add it")
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers in use: ``tensorboard``, ``wandb``, both or none."""
        if self.log_with == "all":
            return ("tensorboard", "wandb")
        if self.log_with is not None:
            return (self.log_with,)
        return ("tensorboard",) if self.logging_dir else ()
