"""What a model's files decide of the options: defaults, statements that nothing can overrule, and guesses."""

from collections.abc import Iterable, Iterator
from typing import Any

from library.config.options import Option
from library.config.sampling import sampling_defaults
from library.records import ModelDescription


def model_defaults(description: ModelDescription) -> dict[str, tuple[Any, str]]:
    """This lists the defaults that depend on the model: option -> its value, and why it is so.

    Args:
        description: What the model's files say about it.
    """
    title = description.title
    own = {
        name: (value, description.stated.get(name) or f"the default of {title} is {_shown(value)}")
        for name, value in description.defaults.items()
    }
    sampled = sampling_defaults(description.sampling)
    return own | {name: (value, f"{title} is published with it") for name, value in sampled.items()}


def stated_problems(values: Iterable[tuple[Option, Any]], description: ModelDescription) -> Iterator[str]:
    """Options whose values the model's files contradict, one sentence each.

    Args:
        values: Options with their values.
        description: What the model's files say about it.
    """
    for declared, value in values:
        said = description.stated.get(declared.name)
        if said is not None and value is not None and value != description.defaults[declared.name]:
            word = f"--{declared.name} {value}"
            if isinstance(value, bool):
                word = f"--{declared.name}" if value else f"--no-{declared.name}"
            yield f"{word}: {said}; remove it"


def _shown(value: float | bool | str) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else f"{value:g}"
