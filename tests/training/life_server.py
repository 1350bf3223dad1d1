"""Starts training processes quickly, and kills them at a chosen moment.

torch and the program are imported once; every life is a fork of this process, so that a hundred kills take minutes.
Each line on standard input asks for one life (see ``Life``), each line on standard output says how it ended.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"})


@dataclass(frozen=True)
class Life:
    """A training process, and when it is killed.

    Attributes:
        family: The model family.
        network: Whether an adapter is trained.
        argv: The options.
        folder: Files are counted below it.
        said: The file for what the process prints.
        after_seconds: Killed when so much time has passed; None: not by time.
        at_change: Killed at the start of its so-manyth change to a file or folder; None: not by changes.
        delay: Seconds between that change and the kill.
    """

    family: str
    job: str
    argv: Sequence[str]
    folder: str
    said: str
    after_seconds: float | None = None
    at_change: int | None = None
    delay: float = 0.0


@dataclass(frozen=True)
class Death:
    """How a life ended.

    Attributes:
        code: The exit code, or the negative number of the signal.
        seconds: How long it lasted.
        changes: How many changes to files it got to; 0 if it was killed.
    """

    code: int
    seconds: float
    changes: int


class LifeServer:
    """The process that lives are forked from, seen from the test."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def live(self, life: Life) -> Death:
        """Start a process and wait for its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(life)) + "\n")
        self._process.stdin.flush()
        return Death(**json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def life_server() -> Iterator[LifeServer]:
    """A server of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.training.life_server"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield LifeServer(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)


def serve() -> None:
    """Fork a process for every line of standard input."""
    import library.training.setup  # noqa: F401 (what takes long to import, once for all lives)

    for line in sys.stdin:
        life = Life(**json.loads(line))
        counted = Path(life.said).with_suffix(".changes")
        counted.unlink(missing_ok=True)
        started = time.monotonic()
        if (child := os.fork()) == 0:
            _run(life, counted)
        if life.after_seconds is not None:
            _kill_after(child, life.after_seconds)
        _, status = os.waitpid(child, 0)
        changes = int(counted.read_text()) if counted.exists() else 0
        death = Death(os.waitstatus_to_exitcode(status), time.monotonic() - started, changes)
        print(json.dumps(asdict(death)), flush=True)


def _kill_after(child: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(min(left, 0.005))
    os.kill(child, signal.SIGKILL)


def _run(life: Life, counted: Path) -> None:
    code = 70
    try:
        said = os.open(life.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        changes = _Changes(life)
        sys.addaudithook(changes.audit)
        from library.cli import main

        code = main(life.family, job=life.job, argv=life.argv)
        counted.write_text(str(changes.count))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Changes:
    """Counts what a process is about to do to files below a folder, and kills it at the chosen one."""

    def __init__(self, life: Life):
        self.life, self.count = life, 0

    def audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not (isinstance(mode, str) and set(mode) & set("wax+")) and not (flags or 0) & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            ):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.fsdecode(path).startswith(self.life.folder):
            return
        self.count += 1
        if self.count == self.life.at_change:
            if not self.life.delay:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(self.life.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


if __name__ == "__main__":
    serve()
