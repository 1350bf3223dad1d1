"""What a look at the datasets has to tell: what stops the run, what is left out, and what else a person should know."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from library.config.errors import ConfigError

_MOST_NAMED = 5


class Skipped(NamedTuple):
    """A picture that was found but is not used.

    Attributes:
        path: Its file, or its URL.
        dataset: Index of the dataset in the configuration.
        subset: Index of the subset in its dataset.
        reason: Why: ``smaller than minimum_image_size 512``.
    """

    path: str
    dataset: int
    subset: int
    reason: str


@dataclass
class Findings:
    """Lines that are gathered on the way.

    Attributes:
        problems: What stops the run, one line per mistake.
        notes: What doesn't, but should be known.
        skipped: Pictures that are left out.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def stop_at_problems(self) -> None:
        """This raises all problems at once, each told once.

        Raises:
            ConfigError: There are any.
        """
        if self.problems:
            raise ConfigError("\n".join(dict.fromkeys(self.problems)))


def counted(count: int, what: str, plural: str | None = None) -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{count} {what}" if count == 1 else f"{count} {plural or what + 's'}"


def named(names: Sequence[str]) -> str:
    """The first few names, and how many there are more."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
