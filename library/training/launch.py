"""Whether as many processes run as were asked for. It loads nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.errors import ConfigError

# What launchers tell each process about how many there are, in the order in which accelerate looks
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCH_MODULES = ("accelerate.commands.launch", "accelerate.commands.accelerate_cli")


@dataclass(frozen=True)
class AskedProcesses:
    """How many processes ``accelerate launch`` was asked for.

    Attributes:
        processes: On all machines together.
        machines: How many machines.
        source: Where that was said: an option or a file.
    """

    processes: int
    machines: int
    source: str


def check_launch(own: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuse a launch that runs fewer processes than it was asked for, which ``accelerate launch --cpu`` does silently.

    Args:
        own: This process's script and arguments, as in ``sys.argv``.
        environment: Of this process.

    Raises:
        ConfigError: Fewer run.
    """
    asked, runs = asked_processes(parent_command(), own, environment), world_size(environment)
    if asked is None or runs >= asked.processes:
        return
    if runs > 1:
        raise ConfigError(
            f"{asked.source} asks for {asked.processes} processes, and {runs} run: {asked.machines} machines get "
            f"equally many; give a multiple of {asked.machines}"
        )
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    why = "starts one on a CPU" if on_cpu else "starts one without --multi_gpu"
    torchrun = f"torchrun --nproc_per_node {asked.processes // asked.machines} {Path(own[0]).name} ..."
    on_a_cpu = f"ACCELERATE_USE_CPU=true {torchrun}"
    remedy = on_a_cpu if on_cpu else f"{torchrun}, or on a CPU {on_a_cpu}"
    raise ConfigError(
        f"{asked.source} asks for {asked.processes} processes, and 1 runs: accelerate launch {why}; use {remedy}"
    )


def check_started(processes: int, environment: Mapping[str, str]) -> None:
    """Refuse to train alone in each of several processes that were started together.

    Args:
        processes: How many work together now.
        environment: Of this process.

    Raises:
        ConfigError: More were started.
    """
    started = world_size(environment)
    if processes < started and "RANK" in environment:
        raise ConfigError(
            f"{started} processes were started (WORLD_SIZE), and each would train alone; on a CPU set "
            "ACCELERATE_USE_CPU=true, otherwise start them by torchrun or accelerate launch, and to train in one "
            "process unset WORLD_SIZE and RANK"
        )


def world_size(environment: Mapping[str, str]) -> int:
    """How many processes the launcher started, by what it told this one; 1 where none did."""
    told = next((environment[name] for name in _WORLD_SIZES if environment.get(name)), "1")
    return int(told) if told.isdigit() else 1


def parent_command() -> list[str]:
    """The command line of the process that started this one; empty where it can't be read."""
    import psutil  # accelerate needs it, too

    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except (psutil.Error, OSError):
        return []


def asked_processes(
    command: Sequence[str], own: Sequence[str], environment: Mapping[str, str]
) -> AskedProcesses | None:
    """How many processes a launcher was asked for.

    Args:
        command: The launcher's command line.
        own: This process's script and arguments.
        environment: Tells where accelerate keeps its configuration.

    Returns:
        None when the command is not ``accelerate launch`` of this script, or says no number, or can't be understood.
    """
    words = _launch_words(command)
    script_arguments = list(own[1:])
    end = len(words) - len(script_arguments)
    if end < 1 or words[end:] != script_arguments:
        return None  # it starts something else, which started this
    options = _options(words[: end - 1])
    if any(name.startswith(("tpu", "mpirun")) for name in options):
        return None  # these start processes in another way
    processes, machines = options.get("num_processes"), options.get("num_machines")
    source = f"accelerate launch --num_processes {processes}"
    if processes is None or machines is None:
        path = _configuration_file(options, environment)
        configured = _read_configuration(path) if path is not None else {}
        if processes is None:
            processes, source = configured.get("num_processes"), f"accelerate's configuration {path}"
        machines = configured.get("num_machines") if machines is None else machines
    count, machine_count = _number(processes), _number(machines) or 1
    return None if count is None else AskedProcesses(count, machine_count, source)


def _launch_words(command: Sequence[str]) -> list[str]:
    """What stands after ``accelerate launch``, in any of the ways to call it; empty for other commands."""
    for index, word in enumerate(command[:4]):
        parts = Path(word).with_suffix("").parts if word.endswith((".py", ".exe")) else Path(word).parts
        name = ".".join(parts[-3:]) if parts[-3:-1] == ("accelerate", "commands") else (parts[-1] if parts else "")
        after = list(command[index + 1 :])
        if name in ("accelerate-launch", _LAUNCH_MODULES[0]):
            return after
        if name in ("accelerate", _LAUNCH_MODULES[1]):
            return after[1:] if after[:1] == ["launch"] else []
    return []


def _options(words: Sequence[str]) -> dict[str, str]:
    """The options among a launcher's words: name with underscores -> value, empty for a switch."""
    options: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name.replace("-", "_")] = value if equals else "" if following.startswith("--") else following
    return options


def _configuration_file(options: Mapping[str, str], environment: Mapping[str, str]) -> Path | None:
    """The file whose settings ``accelerate launch`` takes; with ``--cpu`` only one that was named."""
    if "config_file" in options:
        return Path(options["config_file"])
    if "cpu" in options:
        return None
    cache = environment.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(environment.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "accelerate"
    found = (home / name for name in ("default_config.yaml", "default_config.json"))
    return next((path for path in found if path.is_file()), None)


def _read_configuration(path: Path) -> dict[str, Any]:
    import yaml  # accelerate needs it, too; it reads JSON as well

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return read if isinstance(read, dict) else {}


def _number(value: Any) -> int | None:
    return int(value) if str(value).isdigit() and int(value) > 0 else None
