"""What happens after optimizer steps: weight norms, logging, validation, samples, saving."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from library.config.sampling import SkipLayerGuidance
from library.records import TensorRecord
from library.sampling.drawing import draw
from library.sampling.pictures import encode_prompts
from library.sampling.previews import Previews, fit_latent_colours
from library.sampling.prompts import PromptRequest, PromptText
from library.training.ema import WeightAverage
from library.training.rotation import remove_old
from library.training.run import Run, StepHook
from library.training.saved_weights import RAW, averaged_weights, epoch_name, save_weights, step_name
from library.training.states import save_state
from library.training.validation import Validation

Due = Callable[[Run, int], bool]


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


def scale_weight_norms(limit: float) -> StepHook:
    """Clamp the norm of every adapter module's update to ``limit``."""

    def act(run: Run, done: int) -> None:
        norms = run.trainable.scale_weight_norms(limit)
        run.step_numbers.update(
            {
                "max_norm/keys_scaled": norms.scaled.item(),
                "norm/avg_key_norm": norms.mean.item(),
                "max_norm/max_key_norm": norms.largest.item(),
            }
        )

    return StepHook(unless_dropped(always), act)


def average(average: WeightAverage, interval: int) -> StepHook:
    """Take the weights into their moving average every ``interval`` optimizer steps."""
    return StepHook(unless_dropped(every(interval, None)), lambda run, done: average.update())


def looks(run: Run) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """The ways to look at the weights: what goes after names, and a context in which the weights are those."""
    mode = run.config.ema.ema_validation if run.average is not None else "ema_only"
    if mode != "none":
        yield "", averaged_weights(run)
    if mode != "ema_only":
        yield RAW if mode == "comparison" else "", nullcontext()


def log_numbers() -> StepHook:
    """Log the step's loss, its averages, the gradient norm and the learning rates."""

    def act(run: Run, done: int) -> None:
        numbers = dict(run.step_numbers)
        loss = numbers.pop("loss")
        if math.isfinite(loss):
            run.history.add(loss)
        logged = {"loss/current": loss, "loss/average": run.history.smoothed, **numbers}
        if run.epoch_ended(done):
            logged["loss/epoch_average"] = run.history.epoch_average
            run.history.end_epoch()
        samples = run.plan.step(done - 1)[0].step_samples
        run.trackers.log_step(done, run.epoch_number(done), logged, samples=samples)

    return StepHook(always, act)


def save(due: Due, *, name: Callable[[Run, int], str], weights: bool, state: bool) -> StepHook:
    """Write weights, the run state, or both, then drop what the rotation no longer keeps."""

    def act(run: Run, done: int) -> None:
        started = time.monotonic()
        stem = name(run, done)
        if weights:
            for path in save_weights(run, stem, done):
                run.trackers.say(f"saved {path}")
        if state and (folder := save_state(run, stem, done)):
            run.trackers.say(f"saved {folder}; resume with --resume {folder}")
        remove_old(run, done)
        run.accelerator.wait_for_everyone()
        run.trackers.pause_clock(time.monotonic() - started)

    return StepHook(due, act)


def saving_hooks(run: Run) -> list[StepHook]:
    """The hooks that ``--save_*`` ask for; the final weights are always written."""
    saving, hooks = run.config.saving, []
    every_epochs = saving.save_every_n_epochs
    if saving.save_n_epoch_ratio and not every_epochs:
        every_epochs = max(1, run.epoch_number(run.max_steps) // saving.save_n_epoch_ratio)
    if saving.save_every_n_steps:
        hooks.append(
            save(
                before_end(every(saving.save_every_n_steps, None)),
                name=lambda run, done: step_name(saving, done),
                weights=True,
                state=saving.save_state,
            )
        )
    if every_epochs:
        hooks.append(
            save(
                before_end(every(None, every_epochs)),
                name=lambda run, done: epoch_name(saving, run.epoch_number(done)),
                weights=True,
                state=saving.save_state,
            )
        )
    final_state = saving.save_state or saving.save_state_on_train_end
    hooks.append(save(at_end, name=lambda run, done: saving.output_name, weights=True, state=final_state))
    return hooks


class SampleTaker:
    """Draws the sample prompts with the model as it is now."""

    def __init__(
        self,
        requests: Sequence[PromptRequest],
        texts: Mapping[PromptText, TensorRecord] | None,
        skip: SkipLayerGuidance | None,
        preview_every: int | None = None,
    ):
        self.requests, self.texts, self.skip, self.preview_every = requests, texts, skip, preview_every
        self._previews: Previews | None = None

    def take(self, run: Run, done: int, label: str) -> list[Path]:
        """Draw this process's share of the prompts; returns the pictures' files."""
        started = time.monotonic()
        folder = Path(run.config.saving.output_dir) / "sample"
        folder.mkdir(parents=True, exist_ok=True)
        assert run.vae is not None
        vae_device = next(run.vae.parameters()).device
        run.trainable.eval()
        run.vae.to(run.device)
        written = []
        if self.preview_every is not None and self._previews is None:
            self._previews = Previews(fit_latent_colours(run.family.latents, run.vae), self.preview_every)
        for suffix, weights in looks(run):
            with weights:
                written += self._draw(run, f"{run.config.saving.output_name}_{label}{suffix}", folder)
        run.vae.to(vae_device)
        run.trainable.train()
        run.accelerator.wait_for_everyone()
        run.trackers.pause_clock(time.monotonic() - started)
        return written

    def _draw(self, run: Run, stem: str, folder: Path) -> list[Path]:
        assert run.vae is not None
        texts = self.texts or encode_prompts(run.text, run.text_encoders, self.requests)
        written = []
        for index, request in enumerate(self.requests):
            if index % run.accelerator.num_processes != run.accelerator.process_index:
                continue
            path = folder / f"{stem}_{index:02d}_{request.file_stem}.png"
            with run.accelerator.autocast():
                draw(
                    run.family,
                    run.denoiser,
                    run.vae,
                    texts,
                    request,
                    path,
                    device=run.device,
                    dtype=run.weight_dtype,
                    skip=self.skip,
                    previews=self._previews,
                    facts={},
                )
            written.append(path)
        return written


def take_samples(taker: SampleTaker, *, steps: int | None, epochs: int | None) -> StepHook:
    """Draw samples every so many steps or epochs."""

    def act(run: Run, done: int) -> None:
        at_epoch = epochs and run.epoch_ended(done) and run.epoch_number(done) % epochs == 0
        taker.take(run, done, f"e{run.epoch_number(done):06d}" if at_epoch else f"{done:06d}")

    return StepHook(every(steps, epochs), act)


def validate(validation: Validation, *, steps: int | None, epochs: int | None) -> StepHook:
    """Measure the validation loss every so many steps or epochs."""

    def act(run: Run, done: int) -> None:
        started = time.monotonic()
        run.trainable.eval()
        for suffix, weights in looks(run):
            with weights:
                result = validation.measure(run)
            name = f"loss/validation{suffix}"
            numbers = {name: result.mean, f"{name}_standard_error": result.standard_error}
            numbers |= {f"{name}/level_{number}": loss for number, loss in enumerate(result.levels, start=1)}
            run.trackers.log(done, numbers)
            of = " of the weights as they are trained" if suffix else ""
            run.trackers.say(f"step {done}: validation loss{of} {result.mean:.5f} ± {result.standard_error:.5f}")
        run.trainable.train()
        run.trackers.pause_clock(time.monotonic() - started)

    return StepHook(every(steps, epochs), act)
