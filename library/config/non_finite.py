"""What contradicts ``--on_nonfinite`` and ``--replay_bundle_at_step``, and how often a run may go on."""

from collections.abc import Iterator

from library.config.memory import MemoryConfig
from library.config.saving import SavingConfig
from library.config.training import TrainingConfig


def non_finite_problems(training: TrainingConfig, memory: MemoryConfig, saving: SavingConfig) -> Iterator[str]:
    """Every contradiction, one line each."""
    if memory.fused_backward_pass and training.on_nonfinite == "skip":
        yield (
            "--on_nonfinite skip drops a step as a whole, but --fused_backward_pass has stepped the first weights when "
            "it finds out; use --on_nonfinite rollback or stop, or remove one"
        )
    if memory.fused_backward_pass and training.replay_bundle_at_step is not None:
        yield (
            f"--replay_bundle_at_step {training.replay_bundle_at_step} keeps the weights from before the step, but "
            "--fused_backward_pass has stepped them when the step's gradient is known; remove one"
        )
    interval = saving.save_every_n_steps or saving.save_every_n_epochs or saving.save_n_epoch_ratio
    if training.on_nonfinite == "rollback" and not (saving.save_state and interval) and not training.resume:
        yield (
            "--on_nonfinite rollback goes back to a saved state, and none would be written before the end; add "
            "--save_state and --save_every_n_steps 500"
        )
