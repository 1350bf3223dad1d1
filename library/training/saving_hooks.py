"""What is saved after optimizer steps: all weights, then the states, and last what is no longer kept goes.

In this order a process can die between any two of them: the state of a step is there only when everything else of that
step is.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list

from library.training.due import Due, at_end, before_end, every
from library.training.rotation import remove_old
from library.training.run import Run, StepHook
from library.training.save_errors import SaveFailed
from library.training.saved_weights import epoch_name, save_weights, step_name
from library.training.states import save_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedSave:
    """Something that is saved again and again.

    Attributes:
        due: When.
        name: The stem of its files, after so many optimizer steps.
        state: Whether the run's state is saved beside the weights.
    """

    due: Due
    name: Callable[[Run, int], str]
    state: bool


def saving_hooks(run: Run) -> list[StepHook]:
    """The hooks that ``--save_*`` ask for; the final weights are always written."""
    saves, failed = planned_saves(run), set[int]()
    hooks = [_written(_weights, save, failed) for save in saves]
    hooks += [_written(_state, save, failed) for save in saves if save.state]

    def rotate(run: Run, done: int) -> None:
        if done not in failed:  # what it would make room for isn't there
            remove_old(run, done)

    return [*hooks, StepHook(lambda run, done: any(save.due(run, done) for save in saves), rotate)]


def finish_step(run: Run, folder: str) -> None:
    """Do what the process that saved a state may have died before: other states of the same step, and the rotation.

    Args:
        run: It goes on from the state.
        folder: The state. In another folder than this run's it is left alone.
    """
    output, done = Path(run.config.saving.output_dir), run.first_step
    if Path(folder).resolve().parent != output.resolve():
        return
    due = [save for save in planned_saves(run) if save.due(run, done)]
    lacking = [name for save in due if save.state and not (output / f"{(name := save.name(run, done))}-state").exists()]
    if run.accelerator.num_processes > 1:  # one looks, before any writes
        (lacking,) = broadcast_object_list([lacking])
    for name in lacking:
        _state(run, name, done)
    if due:
        remove_old(run, done)


def planned_saves(run: Run) -> list[PlannedSave]:
    """What is saved, by its reason."""
    saving, saves = run.config.saving, []
    epochs = saving.epoch_interval(run.epoch_number(run.max_steps))
    if saving.save_every_n_steps:
        due = before_end(every(saving.save_every_n_steps, None))
        saves.append(PlannedSave(due, lambda run, done: step_name(saving, done), saving.save_state))
    if epochs:
        due = before_end(every(None, epochs))
        saves.append(PlannedSave(due, lambda run, done: epoch_name(saving, run.epoch_number(done)), saving.save_state))
    final_state = saving.save_state or saving.save_state_on_train_end
    return [*saves, PlannedSave(at_end, lambda run, done: saving.output_name, final_state)]


def _weights(run: Run, stem: str, done: int) -> None:
    for path in save_weights(run, stem, done):
        run.trackers.say(f"saved {path}")


def _state(run: Run, stem: str, done: int) -> None:
    if folder := save_state(run, stem, done):
        run.trackers.say(f"saved {folder}; resume with --resume {folder}")


def _written(write: Callable[[Run, str, int], None], save: PlannedSave, failed: set[int]) -> StepHook:
    """Writes, and goes on without where that is wanted and there will be another try."""

    def act(run: Run, done: int) -> None:
        started = time.monotonic()
        try:
            write(run, save.name(run, done), done)
        except SaveFailed as error:
            if run.config.saving.on_save_error == "stop" or done == run.max_steps:
                raise
            failed.add(done)
            if error.what:
                advice = "Training goes on (--on_save_error continue); make room before the next save"
                log.warning("step %d: %s. %s", done, error.what, advice)
        run.trackers.pause_clock(time.monotonic() - started)

    return StepHook(save.due, act)
