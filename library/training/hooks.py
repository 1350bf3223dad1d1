"""What happens after optimizer steps, saving apart: weight norms, the average, logging, validation, samples."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from library.config.sampling import SkipLayerGuidance
from library.records import TensorRecord
from library.sampling.drawing import draw
from library.sampling.pictures import encode_prompts, generate
from library.sampling.previews import Previews, fit_latent_colours
from library.sampling.prompts import PromptRequest, PromptText
from library.training.due import always, every, unless_dropped
from library.training.ema import WeightAverage
from library.training.run import Run, StepHook
from library.training.save_errors import could_not_write
from library.training.saved_weights import RAW, averaged_weights
from library.training.sharding import looking
from library.training.validation import Validation

log = logging.getLogger(__name__)


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
    shown: list[tuple[str, AbstractContextManager[None]]] = []
    if mode != "none":
        shown.append(("", averaged_weights(run)))
    if mode != "ema_only":
        shown.append((RAW if mode == "comparison" else "", nullcontext()))
    for suffix, weights in shown:
        yield suffix, looking(run.trainable, weights) if run.sharded else weights


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

    return StepHook(always, act, can_wait=True)


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
        """Draw this process's share of the prompts; returns the pictures' files.

        A picture that can't be written is left out with a warning: nothing that follows needs it.
        """
        started = time.monotonic()
        folder = Path(run.config.saving.output_dir) / "sample"
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
            if run.sharded and not run.accelerator.is_main_process:
                self._draw_along(run, texts, request)
                continue
            if not run.sharded and index % run.accelerator.num_processes != run.accelerator.process_index:
                continue
            path = folder / f"{stem}_{index:02d}_{request.file_stem}.png"
            try:
                self._draw_one(run, texts, request, path)
            except OSError as error:
                log.warning("the sample %s; training goes on", could_not_write(error, path))
                continue
            written.append(path)
        return written

    def _draw_one(self, run: Run, texts: Mapping[PromptText, TensorRecord], request: PromptRequest, path: Path) -> None:
        assert run.vae is not None
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

    def _draw_along(self, run: Run, texts: Mapping[PromptText, TensorRecord], request: PromptRequest) -> None:
        """Do what the main process does to draw a picture, which takes this process's part of the weights."""
        assert run.vae is not None
        device, dtype = run.device, run.weight_dtype
        with run.accelerator.autocast():
            generate(run.family, run.denoiser, run.vae, texts, request, device=device, dtype=dtype, skip=self.skip)


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
