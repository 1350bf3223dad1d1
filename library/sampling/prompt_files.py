"""What prompt files say: ``.txt``, ``.toml`` or ``.json``.

A ``.txt`` has one prompt per line, with inline options behind it: ``a cat --w 768 --h 512 --d 7``. An option is two
hyphens and a name after white space; anything else is text. Nothing is guessed, clamped or skipped.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.config_file import read_toml
from library.config.documents import MOST_TOML_BYTES, parse_json, read_text
from library.config.errors import ConfigError, nearest_name
from library.config.messages import name_shown, shown
from library.config.samplers import SAMPLERS, parse_sampler

_MOST_PROMPTS = 100_000
_LONGEST_NAME = 150
"""Characters of what becomes part of a file name."""

_MOST_VALUES = 2_000_000


@dataclass(frozen=True)
class PromptEntry:
    """What a prompt file says about one prompt.

    Attributes:
        where: For messages: the file and the line.
        said: A line with inline options, or a table with keys.
        name: What a library calls it.
    """

    where: str
    said: "str | Mapping[str, Any]"
    name: str = ""


def read_entries(path: str | Path) -> list[PromptEntry]:
    """This reads what a prompt file says, without judging it.

    Args:
        path: A ``.txt``, ``.toml`` or ``.json`` file.

    Raises:
        ConfigError: The file is missing, empty, or not of its form.
    """
    path = Path(path)
    readers = {".txt": _txt_entries, ".toml": _toml_entries, ".json": _json_entries}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"{path}: a prompt file ends in .txt, .toml or .json")
    entries = readers[path.suffix.lower()](path)
    if not entries:
        raise ConfigError(f"{path}: no prompts in it; write one per line")
    if len(entries) > _MOST_PROMPTS:
        raise ConfigError(f"{path}: {len(entries):,} prompts; a file may have {_MOST_PROMPTS:,}")
    return entries


def given_fields(entry: PromptEntry, samplers: Sequence[str] = SAMPLERS) -> dict[str, Any]:
    """The fields of ``PromptRequest`` that an entry says.

    Args:
        entry: The entry.
        samplers: Those that the model has.

    Raises:
        ConfigError: It says something that isn't understood.
    """
    said = entry.said
    given = _inline(said, entry.where) if isinstance(said, str) else _from_keys(said, entry.where)
    if "sampler" in given and given["sampler"] not in samplers:
        name = "--ss" if isinstance(said, str) else "sample_sampler"
        raise ConfigError(
            f"{entry.where}: {name}: expected one of {', '.join(samplers)}, got {shown(given['sampler'])}"
        )
    return {**given, "name": _checked_name(entry)} if entry.name else given


def _checked_name(entry: PromptEntry) -> str:
    if (
        re.search(r'[/\\:*?"<>|\x00-\x1f]', entry.name)
        or len(entry.name) > _LONGEST_NAME
        or not _can_be_written(entry.name)
        or entry.name.startswith(".")
    ):
        raise ConfigError(
            f'{entry.where}: the name becomes part of a file name; leave out a dot at the start and / \\ : * ? " < > |'
        )
    return entry.name


@dataclass(frozen=True)
class _Key:
    """One thing that a prompt can say.

    Attributes:
        field: Of ``PromptRequest``.
        convert: Turns text (inline) or a value (TOML, JSON) into the field's; its ``ValueError`` says what it must be.
    """

    field: str
    convert: Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\x00" in value or not _can_be_written(value):
        raise ValueError("text")
    return value


def _can_be_written(text: str) -> bool:
    """Whether it has no half of a character, which JSON's escapes can name."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,30}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return convert


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError("a number of at least 0")
    return number


_KEYS = {
    "prompt": _Key("prompt", _text),
    "negative_prompt": _Key("negative_prompt", _text),
    "width": _Key("width", _whole(1, 2**16)),
    "height": _Key("height", _whole(1, 2**16)),
    "seed": _Key("seed", _whole(0, 2**63 - 1)),
    "sample_steps": _Key("steps", _whole(1, 1000)),
    "scale": _Key("scale", _number),
    "controlnet_image": _Key("control", _text),
    "sample_sampler": _Key("sampler", lambda value: parse_sampler(_text(value))),
}
_INLINE = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "ss": "sample_sampler",
    "cn": "controlnet_image",
}
_NO_GUIDANCE_INPUT = "the model has no guidance input; write the guidance scale as {scale}"
_REFUSED = {
    "g": _NO_GUIDANCE_INPUT.format(scale="--l"),
    "guidance_scale": _NO_GUIDANCE_INPUT.format(scale="scale"),
    "ctr": "guidance acts in every step. Remove it",
    "cfg_trunc_ratio": "guidance acts in every step. Remove it",
    "rcfg": "guidance isn't renormalised. Remove it",
    "renorm_cfg": "guidance isn't renormalised. Remove it",
    "fs": "the model's own shift is used. Remove it",
    "flow_shift": "the model's own shift is used. Remove it",
}
_OPTION = re.compile(r"(?:^|(?<=\s))--([A-Za-z][\w-]*)=?")


def _inline(line: str, where: str) -> dict[str, Any]:
    """The fields of ``PromptRequest`` that a line says."""
    found = list(_OPTION.finditer(line))
    prompt = line[: found[0].start()] if found else line
    if not prompt.strip():
        raise ConfigError(f"{where}: the prompt is missing; write it before the options")
    said: dict[str, Any] = {"prompt": _converted("prompt", prompt.strip(), f"{where}: the prompt")}
    for match, following in zip(found, [*found[1:], None]):
        name = match.group(1)
        if name in _REFUSED:
            raise ConfigError(f"{where}: --{name} does nothing: {_REFUSED[name]}")
        if name not in _INLINE:
            raise ConfigError(f"{where}: unknown option --{name_shown(name)}{_inline_hint(name)}")
        key = _INLINE[name]
        if _KEYS[key].field in said:
            raise ConfigError(f"{where}: --{name} stands twice; keep one")
        text = line[match.end() : following.start() if following else None].strip()
        said[_KEYS[key].field] = _converted(key, text, f"{where}: --{name}")
    return said


def _inline_hint(name: str) -> str:
    by_key = {key: inline for inline, key in _INLINE.items()} | {"steps": "s", "cfg": "l", "sampler": "ss"}
    near = by_key.get(name) or by_key.get(nearest_name(name, by_key) or "")
    known = " ".join(f"--{inline}" for inline in _INLINE)
    return (
        f"; did you mean --{near}?" if near else f"; known are {known}. Text with hyphens can stand in a .toml or .json"
    )


def _from_keys(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of ``PromptRequest`` that a TOML table or a JSON object says."""
    for key in table:
        if key in _REFUSED:
            raise ConfigError(f"{where}: {key} does nothing: {_REFUSED[key]}")
        if key not in _KEYS:
            near = nearest_name(key, _KEYS)
            hint = f"did you mean {near}?" if near else f"known are {', '.join(_KEYS)}"
            raise ConfigError(f"{where}: unknown key {name_shown(key)}; {hint}")
    if "prompt" not in table:
        raise ConfigError(f"{where}: the key prompt is missing")
    return {_KEYS[key].field: _converted(key, value, f"{where}: {key}", inline=False) for key, value in table.items()}


def _converted(key: str, value: Any, where: str, *, inline: bool = True) -> Any:
    numeric = key not in ("prompt", "negative_prompt", "sample_sampler", "controlnet_image")
    try:
        if not inline and numeric and isinstance(value, str):
            return _KEYS[key].convert(None)
        return _KEYS[key].convert(value)
    except ValueError as error:
        raise ConfigError(f"{where}: expected {error}, got {shown(value)}") from None


def _read_text(path: Path) -> str:
    return read_text(path, MOST_TOML_BYTES, kind="a prompt file")


def _txt_entries(path: Path) -> list[PromptEntry]:
    lines = [(number, line) for number, line in enumerate(_read_text(path).splitlines(), start=1) if line.strip()]
    return [PromptEntry(f"{path.name}, line {number}", line) for number, line in lines if not line.startswith("#")]


def _toml_entries(path: Path) -> list[PromptEntry]:
    document = read_toml(path)
    if unknown := set(document) - {"prompt"}:
        raise ConfigError(
            f"{path.name}: unknown table {name_shown(sorted(unknown)[0])}; prompts stand in [[prompt.subset]]"
        )
    shared = document.get("prompt", {})
    if not isinstance(shared, dict):
        raise ConfigError(f"{path.name}: prompt must be one table [prompt] with [[prompt.subset]] in it")
    shared = dict(shared)
    subsets = shared.pop("subset", [])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise ConfigError(f"{path.name}: subset must be a list of tables: [[prompt.subset]]")
    tables = [{**shared, **subset} for subset in subsets]
    return [PromptEntry(f"{path.name}, prompt {number}", table) for number, table in enumerate(tables, start=1)]


def _json_entries(path: Path) -> list[PromptEntry]:
    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise ConfigError(f"{path.name}: {_quoted(twice)} stands twice; rename or remove one")
        return dict(pairs)

    try:
        document = parse_json(_read_text(path), most_values=_MOST_VALUES, pairs=without_twins)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    prompts = document.values() if isinstance(document, dict) else document
    is_list = isinstance(document, dict | list) and all(isinstance(entry, str | dict) for entry in prompts)
    if not is_list or (isinstance(document, dict) and isinstance(document.get("prompt"), str)):
        raise ConfigError(
            f"{path.name}: expected a list of prompts, each a text or an object, or an object of names and prompts"
        )
    if isinstance(document, dict):
        return [PromptEntry(f"{path.name}, {_quoted(name)}", said, name) for name, said in document.items()]
    return [PromptEntry(f"{path.name}, prompt {number}", said) for number, said in enumerate(document, start=1)]


def _quoted(name: str) -> str:
    return json.dumps(name_shown(name), ensure_ascii=False)
