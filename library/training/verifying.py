"""Whether a configuration resumes exactly on this machine: 2k steps, against k steps, a stop, and the rest."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.config.errors import ConfigError
from library.training.comparing import Comparison, compare_runs
from library.training.state_files import PROGRESS

WHOLE, PARTS, NAME = "whole", "parts", "check"
_ENDING_SECONDS = 300
_LOOK_SECONDS = 0.05
_SHOWN_LINES = 20

REFUSED = {
    "resume": "the check makes a state of its own",
    "max_train_epochs": "the check decides how many steps there are, see --steps",
    "max_train_seconds": "the check needs runs that end by themselves",
    "save_every_n_steps": "the check decides when something is saved",
    "save_every_n_epochs": "the check decides when something is saved",
    "save_n_epoch_ratio": "the check decides when something is saved",
    "save_last_n_steps": "the check decides what is kept",
    "save_last_n_steps_state": "the check decides what is kept",
    "save_last_n_epochs": "the check decides what is kept",
    "save_last_n_epochs_state": "the check decides what is kept",
    "log_with": "the runs of a check would stand among your real ones",
}
"""Options that a check can't be made with -> why."""


class RunFailed(ConfigError):
    """A run of the check ended with an error.

    Attributes:
        said: The end of what it printed.
    """

    def __init__(self, code: int | None, said: Sequence[str]):
        super().__init__(f"a run of the check ended with exit code {code}")
        self.said = said


@dataclass(frozen=True)
class Check:
    """What is to be checked.

    Attributes:
        command: Starts the training script, its path included.
        options: The user's own options.
        steps: After how many optimizer steps the run stops; it has twice as many.
        folder: For the outputs of the runs.
        before_resuming: Called with the state, before the run goes on from it.
    """

    command: Sequence[str]
    options: Sequence[str]
    steps: int
    folder: Path
    before_resuming: Callable[[Path], None] | None = None

    def run_command(self, output: str, *more: str) -> list[str]:
        """The command of one of the runs, which writes into the folder ``output``."""
        own = [
            *("--output_dir", str(self.folder / output), "--output_name", NAME),
            *("--max_train_steps", str(2 * self.steps), "--save_state_on_train_end"),
        ]
        return [*self.command, *self.options, *own, *more]


def verify_resume(check: Check, say: Callable[[str], None]) -> Comparison:
    """Train without a stop; train, stop, and go on; compare.

    Args:
        check: What is to be checked.
        say: Takes a line for each run.

    Raises:
        RunFailed: One fails.
    """
    state = check.folder / PARTS / f"{NAME}-step{check.steps:08d}-state"
    saving = ("--save_every_n_steps", str(check.steps), "--save_state")
    say(f"1 of 3: {2 * check.steps} steps without a stop")
    _finish(check.run_command(WHOLE), check.folder / "whole.log")
    say(f"2 of 3: {check.steps} steps, then stopped")
    _stop_at(state, check.run_command(PARTS, *saving), check.folder / "stopped.log")
    _forget_what_came_after(state)
    if check.before_resuming is not None:
        check.before_resuming(state)
    say(f"3 of 3: resumed, the other {check.steps} steps")
    _finish(check.run_command(PARTS, "--resume", str(state)), check.folder / "resumed.log")
    return compare_runs(check.folder / WHOLE, check.folder / PARTS)


def _forget_what_came_after(state: Path) -> None:
    """Delete the weights, and what the run did between that state and its end: the resumed run has to do it again."""
    for path in state.parent.glob(f"{NAME}*"):
        if path.suffix in (".safetensors", ".pth"):
            path.unlink()
        elif path.is_dir() and path != state:
            shutil.rmtree(path)
    written = (state / PROGRESS).stat().st_mtime
    for picture in state.parent.glob("sample/*"):
        if picture.stat().st_mtime > written:
            picture.unlink()


def _start(command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    try:
        with open(log, "wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=os.name != "nt")
    except OSError as error:
        raise ConfigError(f"{command[0]} can't be started: {error.strerror}") from None


def _finish(command: Sequence[str], log: Path) -> None:
    process = _start(command, log)
    try:
        code = process.wait()
    except BaseException:
        _ask_to_stop(process)
        raise
    if code:
        raise RunFailed(code, _said(log))


def _stop_at(state: Path, command: Sequence[str], log: Path) -> None:
    """Let a run go on until it has written ``state``, then stop it."""
    process = _start(command, log)
    try:
        while process.poll() is None and not (state / PROGRESS).exists():
            time.sleep(_LOOK_SECONDS)
    finally:
        code = process.poll()
        _ask_to_stop(process)
    if not (state / PROGRESS).exists():
        raise RunFailed(code, _said(log))


def _ask_to_stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a run and all that it has started; launchers that pass no signal on make this a matter of the group."""
    if process.poll() is not None:
        return
    _signal(process, signal.SIGTERM)
    try:
        process.wait(_ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
        process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    if os.name == "nt":
        process.terminate()
        return
    os.killpg(process.pid, number)


def _said(log: Path) -> list[str]:
    """What a run printed: its errors, or where it has none to show, its last lines."""
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return [line for line in said if line.startswith("error")] or said[-_SHOWN_LINES:]


def verdict(comparison: Comparison, check: Check) -> list[str]:
    """What people are told, the first line first."""
    counts = ", ".join(f"{count:,} of {kind}" for kind, count in sorted(comparison.equal.items()))
    if not comparison.differences:
        return ["equal", f"compared bit for bit: {counts}"]
    first = comparison.differences[0]
    lines = [f"not equal: {first}"]
    kinds = Counter(one.kind for one in comparison.differences)
    lines.append("differ: " + ", ".join(f"{count:,} of {kind}" for kind, count in kinds.items()))
    if counts:
        lines.append(f"equal: {counts}")
    if early := _early(check):
        lines.append(early)
    return lines


def _early(check: Check) -> str | None:
    """What to say when the runs differ before the stop: then it isn't resuming that differs."""
    whole, parts = (_log_until(check.folder / output / f"{NAME}-log.jsonl", check.steps) for output in (WHOLE, PARTS))
    for one, other in zip(whole, parts):
        if one != other:
            return (
                "the runs differ in what they logged before the stop already: this training doesn't repeat exactly "
                "here (on GPUs some kernels sum in any order), so this says nothing about resuming"
            )
    return None


def _log_until(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if json.loads(line)["step"] <= step]
