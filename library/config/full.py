"""Options of a full fine-tune, in which the model's own weights are trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.config.options import option
from library.records import ModelDescription

if TYPE_CHECKING:
    from library.config.run import RunConfig

PARTS = ("vae", "text_encoders")


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Full fine-tuning."""

    train_text_encoder: bool = option(
        False,
        "Also train the text encoders that can be: SD3's two CLIPs and Stable Diffusion 1.x's and 2.x's one; T5 and "
        "Gemma never are. By default only the denoiser is trained.",
        metadata_key="ss_train_text_encoder",
    )
    save_parts: tuple[str, ...] = option(
        (),
        "What is written beside the trained weights, so that the result works by itself: vae, text_encoders. By "
        "default nothing: other programs take them from the base model. Those for Stable Diffusion 1.x and 2.x expect "
        "both in the file.",
        choices=PARTS,
        metavar="PART",
    )


def full_problems(config: "RunConfig") -> Iterator[str]:
    """What contradicts the options of a full fine-tune in other groups, one sentence each."""
    full, optimizer = config.full, config.optimizer
    assert full is not None
    if optimizer.unet_lr is not None:
        yield "--unet_lr is for adapters; in a full fine-tune --learning_rate is the denoiser's"
    if optimizer.text_encoder_lr is not None and not full.train_text_encoder:
        rates = " ".join(f"{rate:g}" for rate in optimizer.text_encoder_lr)
        yield f"--text_encoder_lr {rates} does nothing without --train_text_encoder; add it, or remove the rates"
    if full.train_text_encoder:
        if not any(optimizer.text_encoder_lr or (1.0,)):
            yield "--train_text_encoder trains nothing where every --text_encoder_lr is 0; remove both"
        if config.caching.cache_text_encoder_outputs:
            yield (
                "--cache_text_encoder_outputs keeps text features fixed, but --train_text_encoder changes them; remove "
                "one of the two"
            )
    if len(set(full.save_parts)) < len(full.save_parts):
        yield f"--save_parts {' '.join(full.save_parts)} names a part twice"


def full_model_problems(config: "RunConfig", description: ModelDescription) -> Iterator[str]:
    """What a full fine-tune asks of a model that can't do it, or lacks; one sentence each."""
    full, rates = config.full, config.optimizer.text_encoder_lr or ()
    assert full is not None
    if config.optimizer.learning_rate is None:
        yield "--learning_rate is missing: a full fine-tune of this model has no safe default; 1e-5 is a common start"
    trainable = description.trainable_text_encoders
    if full.train_text_encoder and not trainable:
        yield "--train_text_encoder does nothing: this model's text encoder is a language model, which is never trained"
    elif len(rates) > max(1, len(trainable)):
        yield f"--text_encoder_lr takes one value, or one each for {', '.join(trainable)}; got {len(rates)}"
    layout, layouts = config.saving.save_model_as, description.save_layouts
    if layout not in layouts:
        yield f"--save_model_as {layout}: this model is written as {' or '.join(layouts)}"
    elif other := [part for part in full.save_parts if part not in layouts[layout]]:
        fits = next((name for name, parts in layouts.items() if set(other) <= set(parts)), None)
        yield f"--save_parts {' '.join(other)}: such a file holds the denoiser alone; use --save_model_as {fits}"
