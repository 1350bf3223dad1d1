"""What the names and shapes of a part's tensors tell, and whether the part is whole."""

import re
from collections.abc import Iterable, Sequence

from library.config.errors import ConfigError
from library.io.key_maps import KeyMap
from library.io.parts import Part

_NAMES_SHOWN = 3


def check_names(part: Part, expected: Iterable[str], optional: Sequence[str] = ()) -> None:
    """This checks that a part has exactly the tensors it needs.

    Args:
        part: Any part.
        expected: The names that it needs.
        optional: Names that it may have besides.

    Raises:
        ConfigError: Some are missing, or there are others.
    """
    wanted = dict.fromkeys(expected)
    missing = [name for name in wanted if name not in part.names]
    unknown = [name for name in part.names if name not in wanted and name not in optional]
    if missing:
        raise ConfigError(
            f"{part.title} is incomplete: {len(missing)} of {len(wanted)} tensors are missing ({_some(missing)})"
        )
    if unknown:
        raise ConfigError(f"{part.title} holds {len(unknown)} unknown tensors ({_some(unknown)})")


def names_in_layout(maps: Iterable[KeyMap], layout: str) -> list[str]:
    """The tensor names of one spelling: ``single`` or ``diffusers``."""
    return [name for entry in maps for name in ((entry.ours,) if layout == "single" else entry.theirs)]


def shape_of(part: Part, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor.

    Raises:
        ConfigError: It is missing, or hasn't so many dimensions.
    """
    shape = part.shapes.get(name)
    if shape is None:
        raise ConfigError(f"{part.title} is incomplete: {name} is missing")
    if len(shape) != dims:
        size = "x".join(map(str, shape))
        raise ConfigError(f"{part.title}: {name} is {size}, which has {len(shape)} dimensions rather than {dims}")
    return shape


def numbers(part: Part, pattern: str) -> set[int]:
    """The numbers that the group of a pattern finds at the start of the part's names."""
    return {int(match[1]) for name in part.names if (match := re.match(pattern, name))}


def last_number(part: Part, pattern: str) -> int:
    """The largest of ``numbers``; -1 where there is none."""
    return max(numbers(part, pattern), default=-1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
