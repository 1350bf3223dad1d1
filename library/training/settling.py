"""How an optimizer step went: its numbers, what is done about a failed one, and what follows a step."""

import torch

from library.training.on_non_finite import is_failed, meet
from library.training.pending_step import ComputedStep, PendingStep, sent
from library.training.run import Run
from library.training.schedules import current_learning_rates
from library.training.stopping import STOP_CODES


def send_numbers(run: Run, computed: ComputedStep) -> PendingStep:
    """Sum a step's numbers over all processes, and send them to the host."""
    sums, norm = computed.sums, computed.norm.to(computed.sums, non_blocking=True).reshape(1)
    asked = torch.tensor([run.stopper.exit_code == code for code in STOP_CODES], dtype=sums.dtype)
    sums = torch.cat([sums, asked.to(run.device, non_blocking=True), ~norm.isfinite()])
    sums = run.accelerator.reduce(sums, reduction="sum")
    rates = current_learning_rates(getattr(run.optimizer, "optimizer", run.optimizer))
    return sent(computed, rates, torch.cat([sums, norm]))


def note_numbers(run: Run, pending: PendingStep) -> bool:
    """Take a step's numbers into the run, as soon as they have arrived; returns whether the step has failed.

    Of an update that isn't guarded this is the moment in which the host waits for the device: no weight may follow a
    number that is none.
    """
    loss, *others, infinite_norms, own_norm = pending.read()
    of_kinds, asking = others[:4], others[4:]
    run.stop_code = next((code for code, processes in zip(STOP_CODES, asking) if processes), 0)
    run.step_numbers = {"loss": loss, "gradient_norm": own_norm}
    for name, total, count in zip(("loss/regularisation", "loss/prior"), of_kinds[::2], of_kinds[1::2]):
        if count:
            run.step_numbers[name] = total / count
    run.step_numbers.update({f"lr/{name}": rate for name, rate in pending.rates.items()})
    return is_failed(run, infinite_norms=infinite_norms)


def settle(run: Run) -> bool:
    """Do what follows the pending step, as all that it waited for are its numbers; returns whether it has failed."""
    pending, run.pending = run.pending, None
    assert pending is not None and run.guard is not None
    failed = note_numbers(run, pending)
    if failed:
        run.guard.forget()
        meet(run, pending.computed)
    call_hooks(run, pending.computed.step + 1)
    return failed


def is_wanted(run: Run, done: int) -> bool:
    """Whether the pending step must be settled before the next one begins: something that follows it can't wait.

    A process that is asked to stop does so at once where it is the only one. Several learn of it together, from the
    step's numbers.

    Args:
        run: The run.
        done: Optimizer steps that are done, the pending one included.
    """
    asked = run.accelerator.num_processes == 1 and run.stopper.exit_code
    due = any(hook.due(run, done) for hook in run.hooks if not hook.can_wait)
    return bool(due or asked or run.stop_code or done == run.max_steps)


def call_hooks(run: Run, done: int) -> None:
    """Let every hook act that is due after so many optimizer steps."""
    for hook in run.hooks:
        if hook.due(run, done):
            hook.act(run, done)
