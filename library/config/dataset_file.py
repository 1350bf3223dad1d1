"""The tables of a dataset file, TOML or JSON: which keys may stand where, and what their values must be."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.config_file import read_toml
from library.config.data import UNSUPPORTED
from library.config.documents import MOST_TOML_BYTES, parse_json, read_text
from library.config.errors import ConfigError, nearest_name
from library.config.messages import name_shown
from library.config.options import Option

INVALID = object()
"""Stands for a value that was reported, so that nothing is derived from it."""

_MOST_VALUES = 2_000_000
_MOST_PROBLEMS = 100
"""That are told one by one."""


@dataclass(frozen=True)
class Scopes:
    """Which keys may stand where.

    Attributes:
        inherited: Keys of ``[general]`` and ``[[datasets]]``.
        subset: Keys of ``[[datasets.subsets]]``.
    """

    inherited: Mapping[str, Option]
    subset: Mapping[str, Option]


@dataclass(frozen=True)
class Table:
    """One table of the file.

    Attributes:
        place: Where it stands, for messages: ``dataset.toml: datasets[0]``.
        values: Its own values by key, checked; ``INVALID`` where one was wrong.
        inner: The tables inside it.
    """

    place: str
    values: Mapping[str, Any]
    inner: "tuple[Table, ...]" = ()


def read_tables(path: Path, scopes: Scopes, problems: list[str]) -> tuple[Mapping[str, Any], tuple[Table, ...]]:
    """This reads ``[general]`` and the datasets of a file; what is wrong is added to ``problems``.

    Raises:
        ConfigError: The file can't be read or parsed.
    """
    document = _parse(path)
    for key in list(document)[:_MOST_PROBLEMS]:
        if key not in ("general", "datasets"):
            problems.append(_misplaced(f"{path}: ", key, ("general", "datasets"), scopes))
    general = document.get("general", {})
    if not isinstance(general, dict):
        problems.append(f"{path}: general: expected a table: [general]")
        general = {}
    checked_general = _checked(f"{path}: general.", general, scopes.inherited, scopes, problems)
    entries = _list_of_tables(f"{path}: ", "datasets", "[[datasets]]", document, problems)
    if not entries:
        problems.append(f"{path}: no dataset; add [[datasets]], and inside it [[datasets.subsets]] with image_dir")
    tables = []
    for place, table in entries:
        own = {key: value for key, value in table.items() if key != "subsets"}
        subsets = _list_of_tables(f"{place}.", "subsets", "[[datasets.subsets]]", table, problems)
        if not subsets:
            problems.append(f"{place}: no subset; add [[datasets.subsets]] with image_dir")
        inner = tuple(
            Table(where, _checked(f"{where}.", values, scopes.subset, scopes, problems)) for where, values in subsets
        )
        tables.append(Table(place, _checked(f"{place}.", own, scopes.inherited, scopes, problems), inner))
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"{path}: more mistakes, not told one by one"]
    return checked_general, tuple(tables)


def _parse(path: Path) -> Mapping[str, Any]:
    if path.suffix.lower() != ".json":
        return read_toml(path)
    text = read_text(path, MOST_TOML_BYTES, kind="a dataset file")
    try:
        document = parse_json(text, most_values=_MOST_VALUES)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected an object with general and datasets")
    return document


def _list_of_tables(
    place: str, key: str, spelling: str, table: Mapping[str, Any], problems: list[str]
) -> list[tuple[str, Mapping[str, Any]]]:
    """The tables under ``key`` with where they stand; what is no table is reported and left out."""
    value = table.get(key, [])
    if not isinstance(value, list):
        problems.append(f"{place}{key}: expected a list of tables, each headed {spelling} with double brackets")
        return []
    entries: list[tuple[str, Mapping[str, Any]]] = []
    for number, entry in enumerate(value):
        if isinstance(entry, dict):
            entries.append((f"{place}{key}[{number}]", entry))
        else:
            problems.append(f"{place}{key}[{number}]: expected a table: {spelling}")
    return entries


def _checked(
    place: str, table: Mapping[str, Any], known: Mapping[str, Option], scopes: Scopes, problems: list[str]
) -> dict[str, Any]:
    values = {}
    for key, value in table.items():
        if len(problems) > _MOST_PROBLEMS:
            break
        if key not in known:
            problems.append(_misplaced(place, key, known, scopes))
            continue
        try:
            values[key] = known[key].from_toml(value)
        except ValueError as error:
            problems.append(f"{place}{key}: {error}")
            values[key] = INVALID
    return values


def _misplaced(place: str, key: str, known: Iterable[str], scopes: Scopes) -> str:
    """The message for a key that isn't known where it stands."""
    place = f"{place}{name_shown(key)}"
    if key in UNSUPPORTED:
        return f"{place}: not supported: {UNSUPPORTED[key]}"
    if key in scopes.inherited:
        homes = "[general] or [[datasets]]" + (" or [[datasets.subsets]]" if key in scopes.subset else "")
        return f"{place}: belongs in {homes}"
    if key in scopes.subset:
        return f"{place}: belongs in [[datasets.subsets]]"
    near = nearest_name(key, known)
    return f"{place}: unknown key; " + (f"did you mean {near}?" if near else f"known here: {', '.join(known)}")
