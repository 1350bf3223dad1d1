"""The loop."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from library.records import Batch
from library.training.bundle import StepNumbers, write_bundle
from library.training.gradients import gradient_norm, sum_gradients
from library.training.non_finite import NonFiniteLoss
from library.training.on_non_finite import meet
from library.training.optimizers import set_training_mode
from library.training.pending_step import ComputedStep
from library.training.run import Run
from library.training.saved_weights import step_name
from library.training.settling import call_hooks, is_wanted, note_numbers, send_numbers, settle
from library.training.sharding import to_propagate
from library.training.states import save_state
from library.training.step import MicroBatchLoss, training_loss


def train(run: Run) -> None:
    """Optimize ``run.trainable`` until ``run.max_steps`` optimizer steps are done, or any process is asked to stop."""
    run.trainable.train()
    set_training_mode(run.optimizer, True)
    run.trackers.show_progress(first_step=run.first_step, max_steps=run.max_steps)
    for step in range(run.first_step, run.max_steps):
        optimize(run, step)
        if run.pending is None:
            call_hooks(run, step + 1)
        elif is_wanted(run, step + 1):
            settle(run)
        if run.stop_code and step + 1 < run.max_steps:
            save_for_later(run, step + 1)
            return
    run.stop_code = 0  # there is nothing left to stop


def save_for_later(run: Run, done: int) -> None:
    """Write the state of a run that ends early, and say how to go on."""
    folder = save_state(run, step_name(run.config.saving, done), done)
    run.accelerator.wait_for_everyone()
    if folder is not None:
        run.trackers.say(f"stopped after step {done} of {run.max_steps}; go on with --resume {folder}")


def optimize(run: Run, step: int) -> None:
    """Do one optimizer step: every micro-batch forward and backward, then clip, update, and note the numbers.

    Where the device guards the update, the numbers stay ``run.pending``, and those of the step before, which have long
    arrived, are looked at instead. If its update was dropped, this step was computed ahead on weights that needn't be
    those that it is to see: it is computed again.
    """
    try:
        computed = compute(run, step, run.batches)
    finally:  # whatever becomes of this step, that one is done
        dropped = run.pending is not None and settle(run)
    if dropped:
        computed = compute(run, step, iter(computed.batches))
    pending = send_numbers(run, computed)
    if run.guard is not None and step + 1 != run.config.training.replay_bundle_at_step:
        run.guard.step(pending.failed)
        run.pending = pending
    elif note_numbers(run, pending):
        meet(run, computed)
    else:
        if step + 1 == run.config.training.replay_bundle_at_step:
            numbers = StepNumbers(run.step_numbers["loss"], run.step_numbers["gradient_norm"])
            run.trackers.say(write_bundle(run, "replay", step, computed.batches, numbers, weights_are_of_before=True))
        if run.fused_backward is None:
            update_weights(run, step)
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)


def compute(run: Run, step: int, source: Iterator[Batch]) -> ComputedStep:
    """Do every micro-batch of a step forward and backward, and finish the gradients.

    Args:
        run: The run.
        step: Counted from 0.
        source: Gives the micro-batches.
    """
    sums = torch.zeros(5, device=run.device)
    batches: list[Batch] = []
    mine, step_samples = own_share(run, step)
    refused = None
    try:
        for number in range(passes(run, step)):  # accumulation is data, not control flow
            batch = next(source)
            share = training_loss(run, batch, step_samples=step_samples)
            if counts := number < mine:
                batches.append(batch)
                sums += loss_sums(batch, share)
            if run.fused_backward is not None:
                run.fused_backward.start(step, share.loss, [key for batch in batches for key in batch.keys])
            propagated = share.loss
            if run.sharded:
                propagated = to_propagate(share.loss, run.accelerator.num_processes, counts=counts)
            run.accelerator.backward(propagated)
        norm = finish_gradients(run)
    except NonFiniteLoss as error:  # of fused backward, which looks at each gradient
        refused, norm = error, torch.tensor(math.nan)
    return ComputedStep(step, batches, step_samples, sums, norm, refused)


def finish_gradients(run: Run) -> Tensor:
    """Sum the step's gradients over processes and clip them, unless they are used up already; returns their norm."""
    if run.fused_backward is not None:
        return run.fused_backward.finish()
    parameters = run.parameters
    if not run.sharded:  # else they are summed where they arise
        sum_gradients(parameters, run.accelerator)
    return gradient_norm(run, parameters)


def update_weights(run: Run, step: int) -> None:
    """Let the optimizer step: all weights together, or one by one where they are rounded."""
    if run.one_by_one is None:
        run.optimizer.step()
        return
    for parameter in run.parameters:
        if parameter.grad is not None:
            run.one_by_one.step(parameter, parameter.grad, step)
    run.one_by_one.finish()


def loss_sums(batch: Batch, share: MicroBatchLoss) -> Tensor:
    """What a micro-batch adds to the step's numbers (5,), on the device.

    First its share of the loss; then, of the samples that the base model teaches and of regularisation pictures: the
    sum of their losses before they are weighted, and how many they are.
    """
    sums = torch.zeros(5, device=share.loss.device)
    sums[0] = share.loss.detach()
    for place, rows in ((1, batch.taught), (3, batch.prior)):
        if rows is not None:
            rows = rows.to(sums.device, non_blocking=True)
            sums[place], sums[place + 1] = share.per_sample.where(rows, 0).sum(), rows.sum()
    return sums


def passes(run: Run, step: int) -> int:
    """How many micro-batches of the step this process does; with a sharded model all do as many as the busiest."""
    busiest = min(run.config.training.gradient_accumulation_steps, len(run.plan.step(step)))
    return busiest if run.sharded else own_share(run, step)[0]


def own_share(run: Run, step: int) -> tuple[int, int]:
    """How many of the step's micro-batches are this process's, and how many samples the whole step has."""
    micro_batches = run.plan.step(step)
    accumulation = run.config.training.gradient_accumulation_steps
    first = run.accelerator.process_index * accumulation
    return len(micro_batches[first : first + accumulation]), micro_batches[0].step_samples
