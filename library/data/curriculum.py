"""When the pictures of a subset are used: from which step or epoch to which, and which of them in an epoch that doesn't
use them all.

Steps and epochs are counted from 0 here, and an end is the first one after.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from library.config.dataset import SubsetConfig
from library.data.spread import shuffled
from library.randomness import python_random


class Window(NamedTuple):
    """When a subset is used.

    Attributes:
        first_epoch: Its first epoch.
        end_epoch: The epoch after its last.
        first_step: Its first optimizer step.
        end_step: The step after its last.
    """

    first_epoch: int = 0
    end_epoch: float = math.inf
    first_step: int = 0
    end_step: float = math.inf

    @classmethod
    def of(cls, subset: SubsetConfig) -> "Window":
        """What a subset's configuration says."""
        return cls(
            (subset.start_epoch or 1) - 1,
            math.inf if subset.end_epoch is None else subset.end_epoch,
            (subset.start_step or 1) - 1,
            math.inf if subset.end_step is None else subset.end_step,
        )

    def holds(self, epoch: int, step: int) -> bool:
        """Whether the subset is used in an epoch that begins with this step."""
        return self.first_epoch <= epoch < self.end_epoch and self.first_step <= step < self.end_step


ALWAYS = Window()
"""The window of a subset that is used from the first step to the last."""


class Timetable:
    """Where each epoch begins and which subsets are active in it, found as far as it was asked for.

    An epoch lasts as long as it takes to use what is active once. Where a subset's first or last step falls into it, it
    ends there, and the next one begins with the subsets that are active then. An epoch without any is a gap; it lasts
    until a step in which a subset begins, or for one step where none does.
    """

    def __init__(self, windows: Sequence[Window], steps_of: Callable[[int, tuple[int, ...]], int]):
        """This starts with nothing known.

        Args:
            windows: One per subset.
            steps_of: How many steps it takes to use the subsets with these indices, in this epoch.
        """
        self._windows, self._steps_of = windows, steps_of
        changes = {step for window in windows for step in (window.first_step, window.end_step)}
        self._changes = sorted(int(step) for step in changes if 0 < step < math.inf)
        epochs = {epoch for window in windows for epoch in (window.first_epoch, window.end_epoch) if epoch < math.inf}
        self._last_epoch_change = max(epochs, default=0)
        self._starts = [0]
        self._active: list[tuple[int, ...]] = []
        self._began: dict[int, int] = {}

    def first_step(self, epoch: int) -> int:
        """The step with which an epoch begins."""
        while len(self._starts) <= epoch:
            self._extend()
        return self._starts[epoch]

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to."""
        while self._starts[-1] <= step:
            self._extend()
        return bisect_right(self._starts, step) - 1

    def active(self, epoch: int) -> tuple[int, ...]:
        """The subsets of an epoch, as indices."""
        self.first_step(epoch + 1)
        return self._active[epoch]

    def turn(self, epoch: int, subset: int) -> int:
        """How many epochs an active subset had been used in before."""
        return epoch - self._began[subset]

    def gap(self, max_steps: int) -> str | None:
        """Where within so many steps no subset is active, in words; None: nowhere."""
        epoch = 0
        while self.first_step(epoch) < max_steps:
            if not self.active(epoch):
                return self._in_words(epoch)
            if self._is_final(epoch):
                break
            epoch += 1
        return None

    def _extend(self) -> None:
        epoch, start = len(self._active), self._starts[-1]
        active = self._active_at(epoch, start)
        for subset in active:
            self._began.setdefault(subset, epoch)
        self._active.append(active)  # before its steps are asked for: that needs the subset's turn
        end = start + self._steps_of(epoch, active) if active else math.inf
        later = self._changes[bisect_right(self._changes, start) :]
        change = next((step for step in later if self._active_at(epoch, step) != active), end)
        self._starts.append(int(min(end, change)) if min(end, change) < math.inf else start + 1)

    def _active_at(self, epoch: int, step: int) -> tuple[int, ...]:
        return tuple(number for number, window in enumerate(self._windows) if window.holds(epoch, step))

    def _is_final(self, epoch: int) -> bool:
        """Whether all later epochs have the same subsets."""
        return epoch >= self._last_epoch_change and self.first_step(epoch) >= max(self._changes, default=0)

    def _in_words(self, first: int) -> str:
        last = first
        while not self.active(last) and not self._is_final(last):
            last += 1
        start, end = self.first_step(first), self.first_step(last)
        if not self.active(last):
            where = f"from step {start + 1} (epoch {first + 1}) on"
        elif end in self._changes:
            where = f"in steps {start + 1} to {end}"
        else:
            where = f"in epoch {first + 1}" if last == first + 1 else f"in epochs {first + 1} to {last}"
        remedy = "close the gap with start_step, end_step, start_epoch or end_epoch"
        return f"no subset is used {where}; {remedy}" + (f", or train for {start} steps" if start else "")


class Share:
    """The visits of a subset of which each epoch makes so many: ``probability``.

    They are taken in turn from an endless row of shuffles of all of them. So after any number of epochs each was made
    equally often, give or take one.

    Attributes:
        count: Visits per epoch.
    """

    def __init__(self, repeats: dict[int, int], count: int, seed: tuple[int | str, ...]):
        """This shuffles nothing yet.

        Args:
            repeats: Sample -> its visits in each shuffle.
            count: Visits per epoch, fewer than all.
            seed: Of the shuffles.
        """
        self.count, self._repeats, self._seed = count, repeats, seed
        self._visits = [sample for sample, visits in repeats.items() for _ in range(visits)]
        self._shuffles: dict[int, list[int]] = {}

    def visits(self, turn: int) -> list[int]:
        """The sample of each visit that the subset's epoch ``turn`` makes."""
        number, start = divmod(turn * self.count, len(self._visits))
        taken = self._shuffle(number)[start : start + self.count]
        return taken + self._shuffle(number + 1)[: self.count - len(taken)] if len(taken) < self.count else taken

    def earlier_uses(self, turn: int) -> Counter[int]:
        """How often each sample had been visited before the subset's epoch ``turn``."""
        number, start = divmod(turn * self.count, len(self._visits))
        uses = Counter(self._shuffle(number)[:start])
        for sample, visits in self._repeats.items():
            uses[sample] += number * visits
        return uses

    def _shuffle(self, number: int) -> list[int]:
        if number not in self._shuffles:
            self._shuffles = {kept: order for kept, order in self._shuffles.items() if abs(kept - number) == 1}
            self._shuffles[number] = shuffled(self._visits, python_random(*self._seed, number))
        return self._shuffles[number]
