"""The configuration file: a TOML whose keys are option names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.config.documents import MOST_TOML_BYTES, parse_toml, read_text
from library.config.errors import ConfigError, nearest_name
from library.config.messages import name_shown
from library.config.options import Option, canonical_names

_MOST_UNKNOWN = 20
"""Unknown keys that are told one by one; looking for the nearest name takes long."""


def read_toml(path: Path) -> dict[str, Any]:
    """This parses a TOML file.

    Raises:
        ConfigError: The file can't be read, or isn't TOML; the message holds the line.
    """
    text = read_text(path, MOST_TOML_BYTES, kind="a TOML file")
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def read_config_file(
    path: Path, options: Mapping[str, Option], refusals: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """This reads option values by option name, flat or in sections of any name.

    Returns:
        The values by option name, and one line per mistake.

    Raises:
        ConfigError: The file can't be read, or isn't TOML.
    """
    document = read_toml(path)
    known = canonical_names(options)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    problems: list[str] = []
    unknown = 0
    for place, key, value in _entries(document):
        name = known.get(key)
        if name is None:
            unknown += 1
            if unknown <= _MOST_UNKNOWN:
                problems.append(_unknown_key(path.name, key, value, known, refusals))
        elif name in places:
            problems.append(f"{path.name}: {name} stands {places[name]} and {place}; keep one")
        else:
            values[name], places[name] = value, place
    if unknown > _MOST_UNKNOWN:
        problems.append(f"{path.name}: {unknown - _MOST_UNKNOWN:,} more unknown keys")
    return values, problems


def _entries(document: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """The keys of the file with where they stand, sections opened."""
    entries = []
    for key, value in document.items():
        if isinstance(value, dict):
            entries += [(f"in [{name_shown(key)}]", inner, inner_value) for inner, inner_value in value.items()]
        else:
            entries.append(("at the top", key, value))
    return entries


def _unknown_key(file: str, key: str, value: Any, known: Mapping[str, str], refusals: Mapping[str, str]) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{file}: [[{name_shown(key)}]] belongs in the dataset TOML; name that file by dataset_config"
    if key in refusals:
        return f"{file}: {key} {refusals[key]}"
    near = nearest_name(key, known)
    return f"{file}: unknown key {name_shown(key)}" + (
        f"; did you mean {near}?" if near else "; see --help for the known names"
    )
