"""Ending a run early, between two steps: because of a signal, or because its time is up."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

TIME_IS_UP = 124
"""The exit code of a run whose time is up, as of the command ``timeout``."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_CODES = (*(128 + number for number in _SIGNALS), TIME_IS_UP)
"""What a process that was asked to stop ends with; of several that were asked otherwise, all end with the first."""
_STDERR = 2


class Stopper:
    """Knows whether this process was asked to stop.

    Args:
        seconds: How long the run may take; None: as long as it needs.
        started: When it began, on the clock of ``time.monotonic``.
    """

    def __init__(self, seconds: int | None, started: float):
        self._ends = None if seconds is None else started + seconds
        self._signal: int | None = None

    @property
    def exit_code(self) -> int:
        """What the process should end with: 130 after Ctrl-C, 143 after SIGTERM, 124 after its time; 0: go on."""
        if self._signal is not None:
            return 128 + self._signal
        return TIME_IS_UP if self._ends is not None and time.monotonic() >= self._ends else 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first signal asks to stop, and the second ends the process at once."""
        if threading.current_thread() is not threading.main_thread():  # only there can signals be taken
            yield
            return
        before = {number: signal.signal(number, self._asked) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signal = number
        if os.environ.get("RANK", "0") == "0":
            # not through the log: its lock may be held by what this interrupts
            os.write(_STDERR, b"\nstopping after this step, with a state to resume from; once more stops at once\n")
