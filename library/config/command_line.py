"""The command line and the configuration file, read into option groups.

argparse describes the options and prints ``--help``; the values are converted afterwards, so that everything that is
wrong is reported at once.
"""

import argparse
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.config_file import read_config_file
from library.config.errors import ConfigError, nearest_name
from library.config.messages import name_shown, shown
from library.config.options import Option, all_options, build, canonical_names, group_title, option

_NEGATIVE_NUMBER = re.compile(r"-\.?\d")
_MOST_UNKNOWN = 20
"""Unknown options that are told one by one."""


@dataclass(frozen=True, kw_only=True)
class InvocationConfig:
    """This run."""

    config_file: str | None = option(
        None,
        "TOML file with options: keys are option names, flat or in any [section]. What is typed wins over the file. "
        "By default only what is typed counts.",
        metavar="FILE.toml",
    )
    dry_run: bool = option(
        False,
        "Check everything that can be checked without loading a model, print the resolved configuration, and stop.",
    )
    version: bool = option(False, "Print the version and stop.")
    help: bool = option(False, "Print this and stop.")


@dataclass(frozen=True)
class CommandLine:
    """What the command line and the configuration file say.

    Attributes:
        invocation: How this run was asked for: ``--config_file``, ``--dry_run``, ``--help``, ``--version``.
        groups: The group instances by attribute.
        provenance: Per option: ``typed``, ``from <file>`` or ``default``.
        problems: One line per mistake.
        unusable: The options whose given value could not be used; their groups hold the defaults.
    """

    invocation: InvocationConfig
    groups: Mapping[str, Any]
    provenance: Mapping[str, str]
    problems: tuple[str, ...]
    unusable: frozenset[str]


def read_command_line(
    groups: Mapping[str, type], argv: Sequence[str], *, refusals: Mapping[str, str] = types.MappingProxyType({})
) -> CommandLine:
    """This reads ``argv`` and the configuration file that it names.

    Args:
        groups: The group classes by attribute, in the order of ``--help``.
        argv: The arguments after the program's name.
        refusals: Options that people know from elsewhere -> why they are refused, as the rest of the sentence that
            starts with their name.
    """
    everything = {"invocation": InvocationConfig, **groups}
    options = all_options(everything)
    words, problems = _without_switch_values([_without_exponent(word) for word in argv], options)
    namespace, rest = _argument_parser(everything, prog="", description="").parse_known_args(words)
    typed = vars(namespace)
    problems += _unknown_words(rest, options, refusals)

    from_file: Mapping[str, Any] = {}
    unreadable: set[str] = set()
    named = typed.get("config_file")
    if isinstance(named, list) and len(named) == 1:
        file_options = {name: declared for name, declared in options.items() if declared.group != "invocation"}
        try:
            from_file, file_problems = read_config_file(Path(named[0]), file_options, refusals)
        except ConfigError as error:
            file_problems, unreadable = [f"--config_file {error}"], {"config_file"}
        problems += file_problems
    built = build(everything, typed, from_file, Path(named[0]).name if named else "")
    return CommandLine(
        invocation=built.groups["invocation"],
        groups={attribute: built.groups[attribute] for attribute in groups},
        provenance={name: said for name, said in built.provenance.items() if options[name].group != "invocation"},
        problems=(*problems, *built.problems),
        unusable=built.unusable | unreadable,
    )


def without_typed_secrets(groups: Mapping[str, type], argv: Sequence[str]) -> list[str]:
    """The arguments with stars for the values of secret options: other programs write down how they were started."""
    options = all_options(groups)
    secret = {f"--{name}" for name, own in canonical_names(options).items() if options[own].secret}
    shown_words, hiding = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            hiding = name in secret
            shown_words.append(f"{name}=***" if hiding and equals else word)
        else:
            shown_words.append("***" if hiding else word)
    return shown_words


def help_text(groups: Mapping[str, type], *, program: str, description: str) -> str:
    """The manual: every option by group, with its type and what happens by default."""
    return _argument_parser(
        {"invocation": InvocationConfig, **groups}, prog=program, description=description
    ).format_help()


def default_text(declared: Option) -> str:
    """The option's default as people would type it; empty where there is no value."""
    if declared.is_switch and declared.default is not None:
        return "on" if declared.default else "off"
    if declared.many:
        return " ".join(map(str, declared.default or ()))
    return "" if declared.default is None else str(declared.default)


def describe(declared: Option) -> str:
    """The option's help with what happens by default and its other names."""
    text, default = declared.help, default_text(declared)
    says_it = "default" in text.lower()
    if default and not (declared.is_switch and says_it):
        text += f" Default: {default}."
    elif not default and not says_it:
        text += " Default: none."
    if declared.aliases:
        text += f" Also: {', '.join('--' + alias for alias in declared.aliases)}."
    return text


def placeholder(declared: Option) -> str:
    """What stands for the value in ``--help``."""
    if declared.metavar:
        one = declared.metavar
    elif declared.choices:
        one = "{" + ",".join(declared.choices) + "}"
    else:
        one = {int: "N", float: "X", Path: "PATH"}.get(declared.kind, "TEXT")
    return f"{one} ..." if declared.many else one


class _HelpFormatter(argparse.HelpFormatter):
    """Shows ``--name VALUE`` once, and ``--[no-]name`` for a switch."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.dest}"
        return f"--{action.dest} {action.metavar}" if action.nargs == "*" else ", ".join(action.option_strings)


def _argument_parser(groups: Mapping[str, type], *, prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"python {prog} --option value ...",
        description=description,
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    options = all_options(groups)
    for attribute, group in groups.items():
        section = parser.add_argument_group(group_title(group))
        for declared in options.values():
            if declared.group == attribute:
                _add_argument(section, declared)
    return parser


def _add_argument(section: Any, declared: Option) -> None:
    names = [f"--{name}" for name in (declared.name, *declared.aliases)]
    text = describe(declared).replace("%", "%%")
    common: dict[str, Any] = {"dest": declared.name, "default": argparse.SUPPRESS, "help": text}
    if declared.group == "invocation" and declared.is_switch:
        short = {"help": ["-h"]}.get(declared.name, [])
        section.add_argument(*short, *names, action="store_true", **{**common, "help": declared.help})
    elif declared.is_switch:
        section.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
    else:
        # "*" also where one value is wanted: a missing value is then one problem among others, not the end of parsing
        section.add_argument(*names, nargs="*", metavar=placeholder(declared), **common)


def _without_exponent(word: str) -> str:
    """The word, with a number such as -1e-3 written out: argparse takes it for an option."""
    if not _NEGATIVE_NUMBER.match(word) or "e" not in word.lower():
        return word
    try:
        return f"{float(word):.20f}".rstrip("0")
    except ValueError:
        return word


def _without_switch_values(words: Sequence[str], options: Mapping[str, Option]) -> tuple[list[str], list[str]]:
    """The words without ``--switch=value``, which would end argparse's reading, and one problem for each of those."""
    known = canonical_names(options)
    kept, problems = [], []
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.removeprefix("no-") if name not in known else name
        if word.startswith("--") and equals and name in known and options[known[name]].is_switch:
            problems.append(
                f"--{name} is a switch and takes no value, got {shown(value)}; write --{name} or --no-{name}"
            )
        else:
            kept.append(word)
    return kept, problems


def _unknown_words(rest: Sequence[str], options: Mapping[str, Option], refusals: Mapping[str, str]) -> list[str]:
    known = canonical_names(options)
    unknown = [word.split("=", 1)[0] for word in rest if word.startswith("-")]
    problems = []
    for word in list(dict.fromkeys(unknown))[:_MOST_UNKNOWN]:
        name = word.lstrip("-")
        if name in refusals:
            problems.append(f"--{name} {refusals[name]}")
        else:
            near = nearest_name(name, known)
            problems.append(
                f"unknown option {name_shown(word)}; " + (f"did you mean --{near}?" if near else "see --help")
            )
    if not unknown:
        problems += [f"unexpected {shown(word)}: options start with --" for word in rest[:_MOST_UNKNOWN]]
    return problems
