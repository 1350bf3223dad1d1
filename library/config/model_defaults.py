"""What a model's files decide of the options: defaults, guesses, and statements about a model that stays itself."""

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
    return (f"{given}: {said}; remove it" for given, said in _contradicted(values, description))


def stated_changes(values: Iterable[tuple[Option, Any]], description: ModelDescription) -> Iterator[str]:
    """The same of a run that trains the whole model, which may become another one.

    Args:
        values: Options with their values.
        description: What the model's files say about it.
    """
    for given, said in _contradicted(values, description):
        yield f"{given}: {said}; this run teaches it otherwise, and what it saves says so"


def _contradicted(values: Iterable[tuple[Option, Any]], description: ModelDescription) -> Iterator[tuple[str, str]]:
    """What was given, and what the files say of it."""
    for declared, value in values:
        said = description.stated.get(declared.name)
        if said is not None and value is not None and value != description.defaults[declared.name]:
            given = f"--{declared.name} {value}"
            if isinstance(value, bool):
                given = f"--{declared.name}" if value else f"--no-{declared.name}"
            yield given, said


def _shown(value: float | bool | str) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else f"{value:g}"
