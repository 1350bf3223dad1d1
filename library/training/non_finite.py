"""Steps whose numbers are none: what is raised, what is counted."""

from dataclasses import dataclass
from typing import Any

from library.config.errors import ConfigError


class NonFiniteLoss(ConfigError):
    """A loss or gradient was not a number: nothing more of the step reaches the weights.

    Attributes:
        value: What it was.
        parameter: The parameter whose gradient it was; None: the loss, or the norm of all gradients.
    """

    def __init__(self, message: str, value: float, parameter: str | None = None):
        super().__init__(message)
        self.value, self.parameter = value, parameter


@dataclass
class DroppedSteps:
    """The steps that the run went on after although their loss or gradient was no number.

    Attributes:
        skipped: How many updates were dropped.
        rollbacks: How often the run went back to a state.
        last: The step that was dropped last, counted from 1; 0: none was.
        in_a_row: How many steps up to that one were dropped without one between them that was not.
        to_one_state: How often the run went back to ``state``.
        state: The state that the run went back to last. A state that is saved later takes its place, so that neither
            of the two needs to be kept over a restart.
    """

    skipped: int = 0
    rollbacks: int = 0
    last: int = 0
    in_a_row: int = 0
    to_one_state: int = 0
    state: str | None = None

    def note(self, number: int) -> None:
        """Count step ``number`` (from 1) as dropped."""
        self.in_a_row = self.in_a_row + 1 if self.last == number - 1 and self.last else 1
        self.last = number

    def row_before(self, number: int) -> int:
        """How many steps right before step ``number`` were dropped."""
        return self.in_a_row if self.last and self.last == number - 1 else 0

    def times_to(self, state: str) -> int:
        """How often the run went back to this state."""
        return self.to_one_state if state == self.state else 0

    def note_rollback(self, state: str) -> None:
        """Count a way back to ``state``."""
        self.to_one_state, self.state = self.times_to(state) + 1, state
        self.rollbacks += 1

    def as_dict(self) -> dict[str, int]:
        """What a run state keeps."""
        return {
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "last": self.last,
            "in_a_row": self.in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; one that was written before steps were counted has none."""
        for name in self.as_dict():
            setattr(self, name, int(state.get(name, 0)))
