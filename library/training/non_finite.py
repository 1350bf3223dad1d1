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
        to_one_state: How often the run went back to one state. A state that is saved later counts as another once a
            step was applied before it.
    """

    skipped: int = 0
    rollbacks: int = 0
    last: int = 0
    in_a_row: int = 0
    to_one_state: int = 0

    def note(self, number: int) -> None:
        """Count step ``number`` (from 1) as dropped."""
        self.in_a_row = self.in_a_row + 1 if self.last == number - 1 and self.last else 1
        self.last = number

    def row_before(self, number: int) -> int:
        """How many steps right before step ``number`` were dropped."""
        return self.in_a_row if self.last and self.last == number - 1 else 0

    def times_back_to(self, done: int) -> int:
        """How often the run went back to the state that was saved after ``done`` steps, or to one with its weights."""
        return self.to_one_state if self.last >= done else 0

    def note_rollback(self, number: int, done: int) -> None:
        """Count step ``number`` as dropped on a way back to the state that was saved after ``done`` steps."""
        self.to_one_state = self.times_back_to(done) + 1
        self.rollbacks += 1
        self.note(number)

    def as_dict(self) -> dict[str, int]:
        """What a run state keeps."""
        return {
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "last": self.last,
            "in_a_row": self.in_a_row,
            "to_one_state": self.to_one_state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; one that was written before steps were counted has none."""
        for name in self.as_dict():
            setattr(self, name, int(state.get(name, 0)))
