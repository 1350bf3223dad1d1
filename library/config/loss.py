"""Options of the loss: how the difference between answer and truth is measured."""

from dataclasses import dataclass

from library.config.errors import ConfigError
from library.config.options import option

_HUBER_OPTIONS = ("huber_schedule", "huber_c", "huber_scale")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Loss."""

    loss_type: str = option(
        "l2",
        "Loss per element. l2: d^2. l1: |d|. huber: 2 c (sqrt(d^2 + c^2) - c). smooth_l1: 2 (sqrt(d^2 + c^2) - c). "
        "d is the difference between the answer and what was asked for, in flow matching between the x_0 estimates; c "
        "comes from --huber_schedule.",
        choices=("l2", "l1", "huber", "smooth_l1"),
        metadata_key="ss_loss_type",
    )
    huber_schedule: str | None = option(
        None,
        "How c of huber and smooth_l1 depends on the noise level. constant: huber_c * huber_scale. exponential: "
        "huber_c^sigma * huber_scale. snr: by the signal-to-noise ratio, for Stable Diffusion 1.x and 2.x. By default "
        "what suits the model: snr for these, constant for flow matching.",
        choices=("constant", "exponential", "snr"),
        metadata_key="ss_huber_schedule",
    )
    huber_c: float = option(
        0.1,
        "Where huber and smooth_l1 turn from quadratic to linear; see --huber_schedule.",
        metadata_key="ss_huber_c",
    )
    huber_scale: float = option(
        1.0,
        "Factor on c of huber and smooth_l1; see --huber_schedule.",
        metadata_key="ss_huber_scale",
    )

    @property
    def has_huber_c(self) -> bool:
        """Whether the loss has a parameter c, so that the ``huber_*`` options act."""
        return self.loss_type in ("huber", "smooth_l1")

    @property
    def idle_options(self) -> tuple[str, ...]:
        """Options that have no effect beside the others, so that saved files don't mention them."""
        return () if self.has_huber_c else _HUBER_OPTIONS

    def __post_init__(self) -> None:
        for name in _HUBER_OPTIONS:
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default and not self.has_huber_c:
                raise ConfigError(
                    f"--{name} {value} does nothing with --loss_type {self.loss_type}. "
                    "Remove it or use --loss_type huber or smooth_l1"
                )
        if self.huber_c <= 0:
            raise ConfigError(f"--huber_c {self.huber_c} must be above 0")
        if self.huber_scale <= 0:
            raise ConfigError(f"--huber_scale {self.huber_scale} must be above 0")
