"""What ``--on_nonfinite`` asks for: a step whose loss or gradient is no number stops the run, or is dropped."""

import copy
import math
from collections.abc import Iterable, Iterator

from accelerate.utils import gather_object
from torch import nn

from library.config.errors import ConfigError
from library.config.training import MOST_BUNDLES, MOST_ROLLBACKS, MOST_SKIPPED_IN_A_ROW
from library.io.safetensors import is_finite
from library.training.bundle import StepNumbers, write_bundle
from library.training.non_finite import NonFiniteLoss
from library.training.optimizers import set_training_mode
from library.training.pending_step import ComputedStep
from library.training.run import Run
from library.training.state_files import read_progress
from library.training.states import restore_state
from library.training.step import training_loss

# What a schedule sets in the optimizer's groups.
_SCHEDULED = ("lr", "betas", "momentum")


def is_failed(run: Run, *, infinite_norms: float) -> bool:
    """Whether the step's numbers are none. All processes say the same, for they know the same.

    With fp16 a gradient beyond the number range is ordinary: the loss scaler drops that update and lowers its scale.
    Below a scale of 1 it isn't the scale any more.

    Args:
        run: The run, with the step's numbers.
        infinite_norms: How many processes found a gradient norm that isn't finite.
    """
    scaler = run.accelerator.scaler
    ordinary = scaler is not None and scaler.get_scale() >= 1 if infinite_norms else False
    return not math.isfinite(run.step_numbers["loss"]) or (infinite_norms > 0 and not ordinary)


def meet(run: Run, failed: ComputedStep) -> None:
    """Do what ``--on_nonfinite`` asks for; afterwards the run goes on with the next step.

    Raises:
        NonFiniteLoss: It stops, naming the step, the samples and the bundle.
    """
    policy, number = run.config.training.on_nonfinite, failed.step + 1
    what, left = _description(run, failed)
    refusal = None
    if policy == "skip" and run.dropped.row_before(number) >= MOST_SKIPPED_IN_A_ROW:
        refusal = f"{MOST_SKIPPED_IN_A_ROW} steps before it were skipped too"
    if policy == "rollback":
        refusal = _no_way_back(run)
    if policy == "stop" or refusal is not None:
        bundle = _bundle(run, failed)
        why = f" --on_nonfinite {policy} stops here: {refusal}." if refusal else ""
        value, parameter = _culprit(run, failed)
        raise NonFiniteLoss(
            f"{what}. {left}.{why} Lower --learning_rate, or look at these pictures. {bundle}", value, parameter
        )
    told = ""
    if run.dropped.skipped + run.dropped.rollbacks < MOST_BUNDLES:
        told = f" {_bundle(run, failed)}"
    run.optimizer.zero_grad(set_to_none=True)
    _forget_scaling(run)
    if policy == "skip":
        run.dropped.note(number)
        run.dropped.skipped += 1
        run.step_numbers["nonfinite/skipped"] = run.dropped.skipped
        run.trackers.say(f"warning: {what}. Its update is skipped (skipped so far: {run.dropped.skipped}).{told}")
        return
    assert run.last_state is not None
    state = str(run.last_state)
    done = _roll_back(run, state, number)
    run.step_numbers["nonfinite/rollbacks"] = run.dropped.rollbacks
    run.trackers.say(
        f"warning: {what}. Weights and optimizer are back at step {done}, from {state}; the run goes on with the "
        f"pictures after this step.{told}"
    )


def _description(run: Run, failed: ComputedStep) -> tuple[str, str]:
    """What happened, and what of the step was applied."""
    left = "Nothing of this step was applied or saved"
    value, parameter = _culprit(run, failed)
    if parameter is not None:
        left = "It was not applied; weights whose gradients came before it have stepped, and nothing is saved"
    what = f"gradient of {parameter}" if parameter else "gradient"
    if not math.isfinite(run.step_numbers["loss"]):
        what = "loss"
    samples = gather_object([key for batch in failed.batches for key in batch.keys])
    return f"step {failed.step + 1}: the {what} is {value}; samples: {', '.join(samples)}", left


def _culprit(run: Run, failed: ComputedStep) -> tuple[float, str | None]:
    if failed.refused is not None:
        return failed.refused.value, failed.refused.parameter
    loss, norm = run.step_numbers["loss"], run.step_numbers["gradient_norm"]
    return (norm if math.isfinite(loss) else loss), None


def _bundle(run: Run, failed: ComputedStep) -> str:
    """Write the replay bundle; returns what to tell people."""
    refused = failed.refused
    own = refused.parameter if refused is not None else _first_bad_parameter(run, failed)
    norm = None if refused is not None else run.step_numbers["gradient_norm"]
    numbers = StepNumbers(run.step_numbers["loss"], norm, tuple(gather_object([own])))
    before = refused is None or refused.parameter is None
    return write_bundle(run, "nonfinite", failed.step, failed.batches, numbers, weights_are_of_before=before)


def _first_bad_parameter(run: Run, failed: ComputedStep) -> str | None:
    """The first parameter whose gradient isn't finite in this process's share of the step, which is done once more.

    Clipping has spread the number over all gradients by now. A sharded model's passes take all processes, whose
    shares may be unequal: it isn't asked.
    """
    if run.sharded:
        return None
    run.optimizer.zero_grad(set_to_none=True)
    for batch in failed.batches:
        run.accelerator.backward(training_loss(run, batch, step_samples=failed.step_samples).loss)
    return next(bad_gradients(run.trainable.named_parameters()), None)


def bad_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[str]:
    """The names of those whose gradient isn't finite."""
    return (name for name, parameter in parameters if parameter.grad is not None and not is_finite(parameter.grad))


def _no_way_back(run: Run) -> str | None:
    """Why the run can't go back to a state, as far as any process can see; None: it can."""
    if run.last_state is None:
        return "no state has been saved yet"
    own = None
    try:
        done = int(read_progress(str(run.last_state))["step"])
    except ConfigError as error:
        own = str(error)
    else:
        if run.dropped.times_back_to(done) >= MOST_ROLLBACKS:
            own = f"the run went back {MOST_ROLLBACKS} times and came to no new state"
    return next((problem for problem in gather_object([own]) if problem is not None), None)


def _roll_back(run: Run, state: str, number: int) -> int:
    """Put back what a state holds, but for the schedule, the losses and the counts; returns the step of the state.

    Args:
        run: The run.
        state: The folder.
        number: The step that is dropped, counted from 1.
    """
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    scheduled = [{name: group[name] for name in _SCHEDULED if name in group} for group in inner.param_groups]
    schedule, history = copy.deepcopy(run.schedule.state_dict()), run.history.state()
    dropped = run.dropped.as_dict()
    progress = read_progress(state)
    restore_state(run, state, progress)
    set_training_mode(run.optimizer, True)
    for group, values in zip(inner.param_groups, scheduled):
        group.update(values)
    run.schedule.load_state_dict(schedule)
    run.history.restore(history)
    run.dropped.restore(dropped)
    done = int(progress["step"])
    run.dropped.note_rollback(number, done)
    return done


def _forget_scaling(run: Run) -> None:
    """Let the loss scaler begin the next step anew, at the scale that it has: this step has divided its gradients."""
    scaler = run.accelerator.scaler
    if scaler is not None:
        scaler.update(scaler.get_scale())
