"""A moving average of the trained weights."""

from dataclasses import dataclass

from library.config.errors import ConfigError
from library.config.options import option

EMA_VALIDATION = ("ema_only", "comparison", "none")
_SETTINGS = ("ema_decay", "ema_update_interval", "ema_device", "ema_validation", "ema_save_raw")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Moving average of the weights."""

    use_ema: bool = option(
        False,
        "Keep a moving average of the trained weights in fp32. It is what is saved and, by default, what samples and "
        "validation use; training goes on with the weights themselves.",
        metadata_key="ss_use_ema",
    )
    ema_decay: float = option(
        0.995,
        "How much of the average stays at each update; 0.9999 for long runs. The first updates keep less: "
        "(1 + n) / (10 + n) after n of them.",
        minimum=0.0,
        maximum=1.0,
        metadata_key="ss_ema_decay",
    )
    ema_update_interval: int = option(
        1, "Update the average every n optimizer steps.", minimum=1, metadata_key="ss_ema_update_interval"
    )
    ema_device: str = option(
        "cpu",
        "Where the average is kept: in host memory (cpu), updated while the device computes, or on the device "
        "(accelerator), where it takes 4 bytes per trained number.",
        choices=("cpu", "accelerator"),
    )
    ema_validation: str = option(
        "ema_only",
        "What samples and validation use: the average (ema_only), both, the second named _raw (comparison), or the "
        "weights as they are trained (none).",
        choices=EMA_VALIDATION,
    )
    ema_save_raw: bool = option(
        False, "Save the weights as they are trained too, as <name>_raw. The state for --resume always has both."
    )

    @property
    def idle_options(self) -> tuple[str, ...]:
        """What saved files don't mention without an average."""
        return () if self.use_ema else ("use_ema", *_SETTINGS)

    def __post_init__(self) -> None:
        fields = type(self).__dataclass_fields__
        problems = [
            f"--{name} does nothing without --use_ema; add it, or remove --{name}"
            for name in _SETTINGS
            if not self.use_ema and getattr(self, name) != fields[name].default
        ]
        if self.use_ema and self.ema_decay == 1:
            problems.append("--ema_decay 1 never changes the average; use 0.9999 or less")
        if problems:
            raise ConfigError("\n".join(problems))
