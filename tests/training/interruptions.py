"""Ways to end a run before its time, and how to go on from what it left."""

import os
import signal
from collections.abc import Callable

from library.training import caching, hooks, loop, saving_hooks
from library.training.hooks import StepHook


class Killed(BaseException):
    """Ends the run where it is raised, as a SIGKILL would: nothing of the project catches it."""


class Stop:
    """A way to end a run.

    Attributes:
        name: What it is called in messages.
        code: The exit code that the run then has; None: it doesn't come to that, it is killed.
    """

    def __init__(self, name: str, install: Callable, code: int | None = None):
        self.name, self._install, self.code = name, install, code

    def __call__(self, patch) -> None:
        """Make the next run end so, until ``patch`` is undone."""
        self._install(patch)

    def __repr__(self) -> str:
        return self.name


def before_optimizing(patch, number: int, act: Callable) -> None:
    """Calls ``act`` with the run at the beginning of a step (from 1), until ``patch`` is undone."""
    optimize = loop.optimize

    def patched(run, step):
        if step + 1 == number:
            act(run)
        optimize(run, step)

    patch.setattr(loop, "optimize", patched)


def _die(*_) -> None:
    raise Killed


def before_step(number: int) -> Stop:
    """Killed between two steps."""
    return Stop(f"before step {number}", lambda patch: before_optimizing(patch, number, _die))


def in_micro_batch(number: int, micro_batch: int) -> Stop:
    """Killed in a step, after the forward pass of its so-manieth micro-batch and the backward passes before it."""

    def install(patch):
        training_loss, count = loop.training_loss, [0]

        def patched(run, batch, **settings):
            share = training_loss(run, batch, **settings)
            count[0] += 1
            if count[0] == micro_batch:
                raise Killed
            return share

        before_optimizing(patch, number, lambda run: patch.setattr(loop, "training_loss", patched))

    return Stop(f"in micro-batch {micro_batch} of step {number}", install)


def after(hook: str, number: int) -> Stop:
    """Killed after a hook has acted on a step: ``log_numbers``, ``validate``, ``take_samples``, ..."""

    def install(patch):
        made = getattr(hooks, hook)

        def patched(*arguments, **settings):
            inner = made(*arguments, **settings)

            def act(run, done):
                inner.act(run, done)
                if done == number:
                    raise Killed

            return StepHook(inner.due, act)

        patch.setattr(hooks, hook, patched)

    return Stop(f"after {hook} of step {number}", install)


def after_save(number: int) -> Stop:
    """Killed after the state of a step is written."""
    return _around_save_state(f"after the save of step {number}", number, before=False)


def between_weights_and_state(number: int) -> Stop:
    """Killed in a save, when the weights are written and the state is not."""
    return _around_save_state(f"in the save of step {number}", number, before=True)


def _around_save_state(name: str, number: int, *, before: bool) -> Stop:
    def install(patch):
        save_state = saving_hooks.save_state

        def patched(run, stem, done):
            if done == number and before:
                raise Killed
            folder = save_state(run, stem, done)
            if done == number:
                raise Killed
            return folder

        patch.setattr(saving_hooks, "save_state", patched)

    return Stop(name, install)


def in_picture(number: int) -> Stop:
    """Killed while a sample is drawn, with its preview on disk."""

    def install(patch):
        from library.sampling import drawing

        take = hooks.SampleTaker.take

        def patched(taker, run, done, label):
            if done == number:
                patch.setattr(drawing, "save_picture", _die)
            return take(taker, run, done, label)

        patch.setattr(hooks.SampleTaker, "take", patched)

    return Stop(f"in the samples of step {number}", install)


def while_caching() -> Stop:
    """Killed when the cache has some captions and lacks others."""

    def install(patch):
        packed, count = caching._packed, [0]

        def patched(*arguments):
            count[0] += 1
            return _die() if count[0] == 2 else packed(*arguments)

        patch.setattr(caching, "_packed", patched)

    return Stop("while caching", install)


def sigterm(number: int) -> Stop:
    """The first process is asked to stop in the middle of a step."""

    def ask(run):
        if run.accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGTERM)

    return Stop(f"SIGTERM in step {number}", lambda patch: before_optimizing(patch, number, ask), code=143)
