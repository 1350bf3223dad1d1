"""Which state a run goes on from. The main process decides for all."""

import logging
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.config.training import AUTO
from library.training.state_files import DamagedState, find_states, has_average, read_progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """A state that a run goes on from.

    Attributes:
        folder: The state.
        progress: Its light part.
    """

    folder: str
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return int(self.progress["step"])


class RunIsComplete(Exception):
    """``--resume auto`` found a run that has nothing left to do."""


def find_resumed(config: RunConfig) -> Resumed | None:
    """The state that ``--resume`` means, checked to its last byte; None: the run is a fresh one.

    Raises:
        ConfigError: It is no run state, a file of it is damaged, or it lacks something that the run needs.
        RunIsComplete: Nothing is left to do.
    """
    wanted = config.training.resume
    if not wanted:
        return None
    found = _newest_whole(config) if wanted == AUTO else Resumed(wanted, read_progress(wanted))
    if found is None:
        return None
    if config.ema.use_ema and not has_average(found.progress):
        raise ConfigError(
            f"--resume {found.folder}: --use_ema, but the state was saved without a moving average; leave it out, or "
            "start a new run"
        )
    if wanted == AUTO and _is_complete(config, found.progress):
        raise complete(found)
    return found


def agree_on_resumed(config: RunConfig, accelerator: Accelerator) -> Resumed | None:
    """What ``find_resumed`` finds, once: each state's files are read by the main process alone.

    Raises:
        ConfigError: See there. Only the main process's has words.
        RunIsComplete: See there.
    """
    if accelerator.num_processes == 1:
        return find_resumed(config)
    found: Resumed | None = None
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            found = find_resumed(config)
        except (ConfigError, RunIsComplete) as error:
            failure = error
    kind = type(failure).__name__ if failure is not None else ""
    folder, progress, kind = broadcast_object_list(
        [found and found.folder, found and found.progress, kind], from_process=0
    )
    if failure is not None:
        raise failure
    if kind:
        raise RunIsComplete if kind == RunIsComplete.__name__ else ConfigError
    return None if folder is None else Resumed(folder, progress)


def complete(found: Resumed) -> RunIsComplete:
    """What is raised when a state's run is over and nobody has asked for that state by name."""
    return RunIsComplete(f"--resume auto: the run is complete, {found.folder} is its last step {found.step}")


def _newest_whole(config: RunConfig) -> Resumed | None:
    output_dir, output_name = config.saving.output_dir, config.saving.output_name
    states = find_states(output_dir, output_name)
    for state in states:
        try:
            found = Resumed(str(state.path), read_progress(state.path))
        except DamagedState as error:
            log.warning("%s", str(error).replace("resume from an older state", "looking at the one before it"))
            continue
        log.info("--resume auto: %s, step %d", found.folder, found.step)
        return found
    if states:
        raise ConfigError(
            f"--resume auto: every state of {output_name} in {output_dir} is damaged; remove them to begin anew"
        )
    log.info("--resume auto: no state of %s in %s, a fresh run begins", output_name, output_dir)
    return None


def _is_complete(config: RunConfig, progress: dict[str, Any]) -> bool:
    """Whether it is plain without looking at the data that no step is left; the plan of the steps knows the rest."""
    epochs, done = config.training.max_train_epochs, progress["step"]
    if epochs is None:
        return bool(done >= config.training.max_train_steps)
    return bool(epochs == progress["settings"].get("max_train_epochs") and done >= progress.get("max_steps", done + 1))
