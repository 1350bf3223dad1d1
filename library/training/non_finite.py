"""The end of a run whose numbers are none."""

from library.config.errors import ConfigError


class NonFiniteLoss(ConfigError):
    """A loss or gradient was not a number: the run stops before anything of it reaches the weights."""
