"""When the loss on held-out pictures is measured."""

from dataclasses import dataclass

from library.config.errors import ConfigError
from library.config.options import option


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation loss."""

    validate_every_n_steps: int | None = option(
        None,
        "Measure the loss on the held-out pictures (--validation_split) every n optimizer steps. By default at the end "
        "of every epoch.",
        minimum=1,
        metadata_key="ss_validate_every_n_steps",
    )
    validate_every_n_epochs: int | None = option(
        None,
        "Measure it every n epochs. By default every epoch, unless --validate_every_n_steps is given.",
        minimum=1,
        metadata_key="ss_validate_every_n_epochs",
    )
    max_validation_steps: int | None = option(
        None,
        "Use at most this many batches of held-out pictures. By default all.",
        minimum=1,
        metadata_key="ss_max_validation_steps",
    )

    def __post_init__(self) -> None:
        if self.validate_every_n_steps and self.validate_every_n_epochs:
            raise ConfigError("--validate_every_n_steps and --validate_every_n_epochs exclude each other; keep one")
