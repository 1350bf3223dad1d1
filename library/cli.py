"""argv and TOML to a validated configuration, once; friendly errors; ``--dry_run``.

Nothing here loads torch before everything that can be checked without it has been checked.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from library.config.caching import UNSUPPORTED as UNSUPPORTED_CACHING
from library.config.command_line import CommandLine, help_text, read_command_line, without_typed_secrets
from library.config.data import UNSUPPORTED as UNSUPPORTED_DATA
from library.config.dataset import DatasetConfig, read_datasets
from library.config.errors import ConfigError
from library.config.logging import LoggingConfig
from library.config.messages import printable
from library.config.resolved import resolved_toml
from library.config.run import RunConfig, make_run_config, training_groups
from library.config.unsupported import refusals
from library.families import FAMILIES, family_files, family_options
from library.records import ModelDescription, Resolution
from library.sampling.prompts import read_prompts
from library.sampling.requests import requested_samples
from library.version import VERSION

WRONG_USAGE, INTERRUPTED = 2, 130
_ANY_SIZE = Resolution(1024, 1024)


class Script(NamedTuple):
    """A training script.

    Attributes:
        family: The model family's name in the registry.
        job: What it trains, one of ``library.config.run.JOBS``.
    """

    family: str
    job: str

    @property
    def name(self) -> str:
        """Its file name without the ending."""
        return str(family_options(self.family).SCRIPTS[self.job])

    @property
    def about(self) -> str:
        """What it does, in one sentence."""
        return f"{_ABOUT[self.job]} {family_options(self.family).TITLE}."

    @property
    def groups(self) -> dict[str, type]:
        """Its option groups, see ``training_groups``."""
        return training_groups(family_options(self.family), job=self.job)


SCRIPTS = {name: Script(family, job) for family in FAMILIES for job, name in family_options(family).SCRIPTS.items()}
"""The training scripts by name."""

_ABOUT = {
    "adapter": "Adapters (LoRA and others) on",
    "full": "Full fine-tuning of",
    "control_net": "ControlNets, which steer by a picture, for",
}


def main(family: str, *, job: str, argv: Sequence[str] | None = None) -> int:
    """This runs a training script: parse, check everything, then train.

    Args:
        family: The model family's name in the registry.
        job: What is trained, one of ``library.config.run.JOBS``.
        argv: The arguments after the script's name; by default the process's own.

    Returns:
        The exit code: 0, 2 for what the user can fix, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _run(Script(family, job), arguments)
    except ConfigError as error:
        _print_late_errors(str(error).splitlines())
        return WRONG_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if argv is None:  # else whoever calls goes on
        _leave_processes()
    return code


def _leave_processes() -> None:
    """End this process's part in a group of processes, whose threads must not outlive what they work with."""
    group: Any = sys.modules.get("torch.distributed")
    if group is not None and group.is_available() and group.is_initialized():
        group.destroy_process_group()


def _run(script: Script, arguments: Sequence[str]) -> int:
    command_line = read_command_line(script.groups, arguments, refusals=refused_options(script.family))
    if command_line.invocation.help:
        print(help_text(script.groups, program=f"{script.name}.py", description=script.about), end="")
        return 0
    if command_line.invocation.version:
        print(f"atelier {VERSION}")
        return 0
    if "config_file" in command_line.unusable:  # the rest would only say that its options are missing
        print_errors(command_line.problems)
        return WRONG_USAGE
    config, problems = checked_configuration(script, command_line)
    if problems:
        print_errors(problems)
        return WRONG_USAGE

    from library.training.launch import check_launch

    check_launch(sys.argv, os.environ)
    if command_line.invocation.dry_run or config.memory.fit is not None:
        from library.dry_run import look

        print(resolved_toml(config))
        lines, scan = look(config)
        print("\n".join(printable(line, longest=10_000) for line in lines))

        from library.training.rehearsal import rehearsal

        print("\n".join(rehearsal(config, scan.discovery.samples, scan.placements, scan.report)))
        stopped_by = "--dry_run" if command_line.invocation.dry_run else "--fit"
        print(f"nothing was loaded or written ({stopped_by})")
        return 0
    configure_logging(config.logging)
    sys.argv[1:] = without_typed_secrets(script.groups, sys.argv[1:])  # trackers write down how a run was started

    from library.training.setup import run_training

    return run_training(config)


def refused_options(family: str) -> dict[str, str]:
    """The options that people know from elsewhere -> why they are refused, as the end of ``--name ...``."""
    table = family_options(family).UNSUPPORTED
    return refusals(UNSUPPORTED_DATA, UNSUPPORTED_CACHING, family=family, family_table=table)


def checked_configuration(script: Script, command_line: CommandLine) -> tuple[RunConfig, list[str]]:
    """This joins what was parsed to a run's configuration, and checks all that needs no weights.

    Returns:
        The configuration, and one line per problem; with problems it is for messages only.
    """
    family, groups, options = script.family, command_line.groups, family_options(script.family)
    step = options.RESOLUTION_STEP
    problems: list[str] = []

    def checked(check: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return check()
        except ConfigError as error:
            problems.extend(str(error).splitlines())
            return otherwise

    datasets: tuple[DatasetConfig, ...] = checked(
        lambda: read_datasets(groups["data"], groups["pictures"], groups["captions"], resolution_step=step), ()
    )
    config = make_run_config(family, f"{script.name}.py", groups, command_line.provenance, datasets)
    problems += config.problems()
    files = family_files(family)
    description: ModelDescription | None = checked(
        lambda: files.describe(files.locate(config.model, config.family), config.family), None
    )
    if description is not None:
        config = config.with_model_defaults(description)
        problems += config.model_problems(description)
    how: dict[str, Any] = {"resolution_step": step, "seed": 0, "steered": config.control_net is not None}
    if description is not None:
        sampled = description
        checked(lambda: requested_samples(config.sampling, sampled, **how), None)
    elif prompts := config.sampling.sample_prompts:
        checked(lambda: read_prompts(prompts, native_resolution=_ANY_SIZE, **how), None)
    # What follows from an option that was refused already would only confuse
    blamed = re.compile("|".join(rf"--{name}\b" for name in command_line.unusable) or "(?!)")
    new = [problem for problem in problems if not blamed.search(problem)]
    return config, list(dict.fromkeys([*command_line.problems, *new]))


def configure_logging(config: LoggingConfig) -> None:
    """This sends the messages to the console or a file, as the options say; no random generator is touched."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if config.console_log_file:
        try:
            Path(config.console_log_file).parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(config.console_log_file, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--console_log_file {config.console_log_file}: {error.strerror}") from None
    full = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    handler.setFormatter(_SafeFormatter("%(message)s" if config.console_log_simple else full, "%H:%M:%S"))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(
        config.console_log_level if _is_main_process() else max("WARNING", config.console_log_level, key=_level)
    )


class _SafeFormatter(logging.Formatter):
    """Messages quote names and errors of others: they steer no terminal and hold no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), longest=10_000)


def print_errors(problems: Iterable[str]) -> None:
    """This prints one ``error: ...`` line per problem, once per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for problem in problems:
            print(f"error: {printable(problem)}", file=sys.stderr)


def _print_late_errors(problems: Iterable[str]) -> None:
    """This prints what stopped this process; it may be the only one that has met it, so it says which it is."""
    rank = os.environ.get("RANK", "0")
    name = "error" if rank == "0" else f"error in process {rank}"
    for problem in problems:
        print(f"{name}: {problem}", file=sys.stderr)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _level(name: str) -> int:
    return int(logging.getLevelName(name))
