"""An option is declared once, as a field of a frozen dataclass.

From the field come the argparse entry, its place in ``--help``, the TOML key, the type and choice checks, the metadata
key and its row in ``docs/options/``.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.errors import ConfigError, nearest_name
from library.config.messages import shown

TYPED = "typed"
DEFAULT = "default"

_LARGEST = 2**63
"""No whole number beyond it is an option's value: nothing outside Python could hold it."""


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    aliases: Sequence[str] = (),
    metadata_key: str | None = None,
    parse: Callable[[Any], Any] | None = None,
    secret: bool = False,
) -> Any:
    """This declares one option as a dataclass field; the field's annotation is its type.

    Args:
        default: What happens when nobody says anything.
        help: One or two sentences for ``--help``. It says what the option does, its unit and what happens by default.
        choices: The allowed values; light strings only, so that ``--help`` loads nothing heavy.
        minimum: The smallest allowed number.
        maximum: The largest allowed number.
        metavar: The placeholder in ``--help``.
        aliases: Other names that mean the same (SimpleTuner's, older spellings), without dashes.
        metadata_key: The key under which the value is written into saved files (``ss_...``).
        parse: Turns the typed text or the TOML value into the field's value; raises ``ValueError`` with the reason.
            For ``tuple[X, ...]`` it turns each element.
        secret: The value never reaches logs, metadata or saved configurations.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices) if choices is not None else None,
        "minimum": minimum,
        "maximum": maximum,
        "metavar": metavar,
        "aliases": tuple(aliases),
        "metadata_key": metadata_key,
        "parse": parse,
        "secret": secret,
    }
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def redeclared(
    group: type, name: str, default: Any, help: str | None = None, *, choices: Sequence[str] | None = None
) -> Any:
    """This declares an option of ``group`` once more, for a group derived from it that has another default.

    Args:
        group: Where it was declared first; it keeps its aliases and the rest.
        name: The option.
        default: What happens when nobody says anything.
        help: What is said of it; by default the same.
        choices: The allowed values; by default the same.
    """
    field = group.__dataclass_fields__[name]  # type: ignore[attr-defined]
    metadata = {**field.metadata, "help": field.metadata["help"] if help is None else help}
    if choices is not None:
        metadata["choices"] = tuple(choices)
    return dataclasses.field(default=default, metadata=metadata, repr=field.repr)


@dataclass(frozen=True)
class Option:
    """One option as its field declares it.

    Attributes:
        name: The field's name: ``--name`` on the command line, the key in a TOML.
        group: The attribute of the configuration that holds the option's group.
        kind: The type of the value, or of each element: ``str``, ``int``, ``float``, ``bool``, ``Path``, or any other
            type that ``parse`` returns.
        many: Whether the value is a tuple of any length.
        optional: Whether the value may be None.

    The rest is as in ``option``.
    """

    name: str
    group: str
    kind: Any
    many: bool
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None
    minimum: float | None
    maximum: float | None
    metavar: str | None
    aliases: tuple[str, ...]
    metadata_key: str | None
    parse: Callable[[Any], Any] | None
    secret: bool

    @property
    def is_switch(self) -> bool:
        """Whether it is typed without a value: ``--name`` and ``--no-name``."""
        return self.kind is bool and not self.many and self.parse is None

    @property
    def expected(self) -> str:
        """What a value must be, for error messages and documents."""
        if self.choices:
            one = "one of " + ", ".join(self.choices)
        else:
            one = {int: "a whole number", float: "a number", bool: "true or false"}.get(self.kind, "text")
        if self.minimum is not None and self.maximum is not None:
            one += f" from {self.minimum:g} to {self.maximum:g}"
        elif self.minimum is not None:
            one += f" of at least {self.minimum:g}"
        elif self.maximum is not None:
            one += f" of at most {self.maximum:g}"
        return f"a list, each {one}" if self.many else one

    def from_words(self, words: Sequence[str] | bool) -> Any:
        """The value of what was typed after ``--name``; raises ``ValueError`` with the reason."""
        if isinstance(words, bool):
            return words
        if self.many:
            return tuple(self._element(word, typed=True) for word in words)
        if len(words) != 1:
            counted = "no value" if not words else f"{len(words)} values ({self._shown(' '.join(words))})"
            raise ValueError(f"expected {self.expected}, got {counted}")
        return self._element(words[0], typed=True)

    def from_toml(self, value: Any) -> Any:
        """The value of a TOML key; raises ``ValueError`` with the reason."""
        if self.many:
            return tuple(
                self._element(element, typed=False) for element in (value if isinstance(value, list) else [value])
            )
        return self._element(value, typed=False)

    def _element(self, value: Any, *, typed: bool) -> Any:
        if self.parse is not None:
            try:
                value = self.parse(value)
            except (ValueError, TypeError, ConfigError) as error:
                raise ValueError(str(error) if not self.secret else "not a usable value") from None
        else:
            value = self._plain(value, typed=typed)
        if self.choices and value not in self.choices and value is not None:
            near = nearest_name(str(value), self.choices)
            raise self._unexpected(value, f"; did you mean {near}?" if near else "")
        if isinstance(value, int | float) and not isinstance(value, bool) and not self._in_range(value):
            raise self._unexpected(value)
        return value

    def _plain(self, value: Any, *, typed: bool) -> Any:
        if self.kind in (int, float):
            if typed:
                try:
                    value = self.kind(value)
                except ValueError:
                    raise self._unexpected(value) from None
            is_number = isinstance(value, int) or (isinstance(value, float) and self.kind is float)
            if isinstance(value, bool) or not is_number or not _is_usable(value):
                raise self._unexpected(value)
            return self.kind(value)
        if self.kind is Path and isinstance(value, str):
            return Path(value)
        if not isinstance(value, self.kind):
            raise self._unexpected(value)
        return value

    def _in_range(self, value: float) -> bool:
        return not (
            (self.minimum is not None and value < self.minimum) or (self.maximum is not None and value > self.maximum)
        )

    def _unexpected(self, value: Any, hint: str = "") -> ValueError:
        return ValueError(f"expected {self.expected}, got {self._shown(value)}{hint}")

    def _shown(self, value: Any) -> str:
        return "a value that is not shown" if self.secret else shown(value)


def _is_usable(number: float) -> bool:
    """Whether it is finite, and small enough for a fraction, and for whatever counts with it."""
    return -_LARGEST < number < _LARGEST if isinstance(number, int) else math.isfinite(number)


@functools.cache
def options_of(group: type, attribute: str = "") -> tuple[Option, ...]:
    """This reads the options that a group class declares, in order.

    Args:
        group: A dataclass whose fields were made by ``option``.
        attribute: The attribute of the configuration that holds the group.
    """
    annotations, found = typing.get_type_hints(group), list[Option]()
    for field in dataclasses.fields(group):
        kind, many, optional = _understand(annotations[field.name])
        declared = Option(field.name, attribute, kind, many, optional, field.default, **field.metadata)
        if declared.parse is None and kind not in (str, int, float, bool, Path):
            raise TypeError(f"{group.__name__}.{field.name}: {kind} needs a parse function")
        found.append(declared)
    return tuple(found)


def all_options(groups: Mapping[str, type]) -> dict[str, Option]:
    """This collects the options of several groups by name; a name or alias that occurs twice is our own mistake."""
    options: dict[str, Option] = {}
    seen: set[str] = set()
    for attribute, group in groups.items():
        for declared in options_of(group, attribute):
            names = {declared.name, *declared.aliases}
            if twice := names & seen:
                raise TypeError(f"two options are called {', '.join(sorted(twice))}")
            seen |= names
            options[declared.name] = declared
    return options


def canonical_names(options: Mapping[str, Option]) -> dict[str, str]:
    """This maps every name an option may be given by, aliases included, to its own name."""
    return {name: declared.name for declared in options.values() for name in (declared.name, *declared.aliases)}


def group_title(group: type) -> str:
    """The group's title in ``--help``: the first line of its docstring."""
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")


@dataclass(frozen=True)
class Built:
    """What became of the options that somebody gave.

    Attributes:
        groups: The group instances by attribute. Options in ``unusable`` hold their defaults.
        provenance: Per option: ``typed``, ``from <file>`` or ``default``.
        problems: One line per wrong value or contradiction inside a group.
        unusable: The options whose given value could not be used.
    """

    groups: Mapping[str, Any]
    provenance: Mapping[str, str]
    problems: tuple[str, ...]
    unusable: frozenset[str]


def build(
    groups: Mapping[str, type],
    typed: Mapping[str, Sequence[str] | bool],
    from_file: Mapping[str, Any] = types.MappingProxyType({}),
    file: str = "",
) -> Built:
    """This makes the group instances: typed > TOML > default. All that is wrong is collected, nothing is raised.

    Args:
        groups: The group classes by attribute.
        typed: What was typed after each option: words, or True and False for switches.
        from_file: The values of the configuration file, by option name.
        file: The configuration file's name, for messages.
    """
    options = all_options(groups)
    values: dict[str, dict[str, Any]] = {attribute: {} for attribute in groups}
    provenance = dict.fromkeys(options, DEFAULT)
    problems: list[str] = []
    unusable: set[str] = set()
    for name, declared in options.items():
        if name not in typed and name not in from_file:
            continue
        try:
            if name in typed:
                provenance[name], where = TYPED, f"--{name}"
                values[declared.group][name] = declared.from_words(typed[name])
            else:
                provenance[name], where = f"from {file}", f"{file}: {name}"
                values[declared.group][name] = declared.from_toml(from_file[name])
        except ValueError as error:
            problems.append(f"{where}: {error}")
            unusable.add(name)
    built: dict[str, Any] = {}
    for attribute, group in groups.items():
        try:
            built[attribute] = group(**values[attribute])
        except ConfigError as error:
            problems.extend(str(error).splitlines())
            unusable.update(values[attribute])
            built[attribute] = group()
    return Built(built, provenance, tuple(problems), frozenset(unusable))


def option_values(config: Any) -> Iterator[tuple[Option, Any]]:
    """This walks the options of all groups of a configuration with their values, in the order of ``--help``.

    Args:
        config: A dataclass whose attributes are, among others, group instances.
    """
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        if dataclasses.is_dataclass(group) and not isinstance(group, type):
            for declared in options_of(type(group), field.name):
                yield declared, getattr(group, declared.name)


def acting_metadata(config: Any) -> dict[str, str]:
    """What the options write into saved files: metadata key -> value as text.

    Left out is what didn't act: options without a value, and those that their group names in ``idle_options``.
    """
    written = {}
    for declared, value in option_values(config):
        idle = getattr(getattr(config, declared.group), "idle_options", ())
        if declared.metadata_key and not declared.secret and value not in (None, ()) and declared.name not in idle:
            written[declared.metadata_key] = json.dumps(value) if isinstance(value, tuple | list) else str(value)
    return written


def _understand(annotation: Any) -> tuple[Any, bool, bool]:
    optional = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        optional = len(parts) < len(typing.get_args(annotation))
        annotation = parts[0] if len(parts) == 1 else annotation
    if typing.get_origin(annotation) is tuple and typing.get_args(annotation)[1:] == (Ellipsis,):
        return typing.get_args(annotation)[0], True, optional
    return annotation, False, optional
