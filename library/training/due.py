"""When something happens: after which optimizer steps."""

from collections.abc import Callable

from library.training.run import Run

Due = Callable[[Run, int], bool]
"""Takes the run and the number of optimizer steps done."""


def every(steps: int | None, epochs: int | None) -> Due:
    """Due every so many steps, or at the end of every so many epochs; None: never."""

    def due(run: Run, done: int) -> bool:
        at_step = steps is not None and done % steps == 0
        return at_step or (epochs is not None and run.epoch_ended(done) and run.epoch_number(done) % epochs == 0)

    return due


def always(run: Run, done: int) -> bool:
    """Due after every step."""
    return True


def at_end(run: Run, done: int) -> bool:
    """Due after the last step."""
    return done == run.max_steps


def before_end(due: Due) -> Due:
    """Due when ``due`` is, the last step apart, which the final save covers."""
    return lambda run, done: done != run.max_steps and due(run, done)


def unless_dropped(due: Due) -> Due:
    """Due when ``due`` is, unless the step was dropped: then the weights are as they were before it."""
    return lambda run, done: run.dropped.last != done and due(run, done)
