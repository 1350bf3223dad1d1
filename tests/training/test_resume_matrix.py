"""A run that is stopped anywhere and goes on ends with the bytes of one that never stopped.

Each row of the matrix is one job with its options: an uninterrupted run, and for each of the row's interruptions the
same run, interrupted (some several times) and gone on with by ``--resume auto`` in its own folder. Then everything
that both wrote is compared bit for bit by ``compare_runs``: the saved weights and what they say about themselves, the
final state (trained weights, optimizer, schedule, moving average, losses), every logged number, samples, and that no
file is missing or left over.

The rows cover, rather than multiply, these axes. Each value of an axis meets each of three jobs (SD3 LoRA, SD3
full, Sana full) where it exists for that job, and Stable Diffusion 1.x has rows for what it alone draws:

- where it stops: before there is a state, at an epoch's end, in an epoch, inside an accumulation, after a save, between
  weights and state, after validation, after samples, inside a sample, by SIGTERM, while caching, and twice
- 0, 2 and persistent workers, and caches in memory, on disk and off: every pair
- one and two processes
- what is carried from step to step: moving averages, schedules, optimizers with numbers of their own (schedule-free,
  Prodigy, 8 bits, CAME, Adafactor), bf16 weights with stochastic rounding, fused backward
- what is drawn: captions, crops, dropout, masks, teachers, noise of every kind, and what the curriculum decides
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from PIL import Image

from library.training.comparing import compare_runs
from tests.training.interruptions import (
    Killed,
    Stop,
    after,
    after_save,
    before_step,
    between_weights_and_state,
    in_micro_batch,
    in_picture,
    sigterm,
    while_caching,
)
from tests.training.ranks import in_processes

LORA, FULL, SANA = "trainer", "full_trainer", "sana_trainer"
SD_LORA, SD_FULL = "sd_trainer", "sd_full_trainer"
MEMORY = {"cache_latents": True, "cache_text_encoder_outputs": True}
DISK = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
ONLINE: dict = {}
AHEAD = {"vae_cache_disable": True}
WORKERS = {"max_data_loader_n_workers": 2}
PERSISTENT = {**WORKERS, "persistent_data_loader_workers": True}
EVERY_STEP = {"save_every_n_steps": 1, "save_state": True}
BF16 = {"mixed_precision": "bf16", "full_bf16": True}
ROUNDED = {**BF16, "stochastic_rounding": True}
FUSED = {"fused_backward_pass": True, "max_grad_norm": 0}
VALIDATION = {"validation_split": 0.25, "validate_every_n_steps": 1}
SAMPLES = {"sample_prompts": True, "sample_every_n_steps": 1, "preview_every": 1}
COSINE = {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
UNET = {"network_train_unet_only": True}
NOISE = {
    "noise_offset": 0.1,
    "noise_offset_random_strength": True,
    "adaptive_noise_scale": 0.05,
    "multires_noise_iterations": 3,
    "ip_noise_gamma": 0.1,
    "ip_noise_gamma_random_strength": True,
}


@dataclass(frozen=True)
class Row:
    """A job with its options, and how it is interrupted.

    Attributes:
        name: For the test's id.
        job: The fixture.
        options: Of the run.
        stops: Interrupted runs: each is interrupted by these, one after the other.
        processes: How many.
        data: Makes the dataset, given the trainer.
    """

    name: str
    job: str
    options: dict
    stops: list[list[Stop]]
    processes: int = 1
    data: Callable | None = field(default=None)


def varied_captions(trainer):
    for number, path in enumerate(sorted(trainer.photos.glob("*.txt"))):
        path.write_text(f"one {{small|large}} thing, red, round, number {number}\nanother line, far, near\n")
    return trainer.dataset(
        subset="shuffle_caption = true\nkeep_tokens = 1\nenable_wildcard = true\ncaption_tag_dropout_rate = 0.3\n"
        "caption_dropout_rate = 0.2"
    )


def varied_pixels(trainer):
    return trainer.dataset(
        subset="random_crop = true\nflip_aug = true\ncolor_aug = true\nshuffle_caption = true\n"
        "caption_dropout_every_n_epochs = 2\ntoken_warmup_min = 1\ntoken_warmup_step = 4"
    )


def curriculum(trainer):
    others = shutil.copytree(trainer.photos, trainer.folder / "others")
    photos, others = json.dumps(str(trainer.photos)), json.dumps(str(others))
    return trainer.dataset(
        subset=f"num_repeats = 2\nprobability = 0.6\n[[datasets.subsets]]\nimage_dir = {others}\nstart_step = 3\n"
        f"end_step = 5\n[[datasets]]\nresolution = 32\nbatch_size = 3\nmin_bucket_reso = 32\nbucket_reso_steps = 32\n"
        f"[[datasets.subsets]]\nimage_dir = {photos}\nstart_epoch = 2"
    )


def masks_and_teachers(trainer):
    masks = trainer.folder / "masks"
    masks.mkdir()
    for path in trainer.photos.glob("*.png"):
        with Image.open(path) as picture:
            mask = Image.new("L", picture.size, 60)
            mask.paste(255, (0, 0, picture.width, picture.height // 2))
            mask.save(masks / path.name)
    folders = [shutil.copytree(trainer.photos, trainer.folder / name) for name in ("taught", "ordinary")]
    taught, ordinary = (json.dumps(str(folder)) for folder in folders)
    return trainer.dataset(
        subset=f"conditioning_data_dir = {json.dumps(str(masks))}\n"
        f"[[datasets.subsets]]\nimage_dir = {taught}\nis_regularisation_data = true\n"
        f"[[datasets.subsets]]\nimage_dir = {ordinary}\nis_reg = true"
    )


def masks_only(trainer):
    return trainer.dataset(subset="alpha_mask = true")


def single_pictures(trainer):
    """Micro-batches of one picture, so that every process has some in every step."""
    path = trainer.folder / "single.toml"
    path.write_text(trainer.dataset().read_text().replace("batch_size = 2", "batch_size = 1"))
    return path


ROWS = [
    Row(
        "epochs' ends",
        LORA,
        {**MEMORY, **UNET, "save_every_n_epochs": 1, "save_state": True, "use_ema": True},
        [[before_step(4)], [before_step(2)], [before_step(3)]],
    ),
    Row("in an epoch", FULL, {**DISK, **WORKERS, **EVERY_STEP, **COSINE}, [[before_step(4)], [before_step(2)] * 2]),
    Row(
        "epochs' ends, rate by epochs",
        SANA,
        {**MEMORY, **WORKERS, "save_n_epoch_ratio": 2, "save_state": True, "optimizer_type": "Adafactor"},
        [[before_step(4)]],
    ),
    Row(
        "validation, ahead",
        SANA,
        {**AHEAD, **WORKERS, **EVERY_STEP, **VALIDATION},
        [[after("validate", 3)], [after("log_numbers", 3), in_micro_batch(4, 1)]],
    ),
    Row(
        "accumulation",
        LORA,
        {**DISK, **UNET, **COSINE, **EVERY_STEP, "gradient_accumulation_steps": 2, "use_ema": True}
        | {"ema_update_interval": 2, "ema_save_raw": True, "lr_warmup_steps": 0.4},
        [[in_micro_batch(2, 2)], [in_micro_batch(3, 2), in_micro_batch(3, 1)]],
    ),
    Row(
        "accumulation, ahead",
        FULL,
        {**AHEAD, **EVERY_STEP, **VALIDATION, "gradient_accumulation_steps": 2, "use_ema": True}
        | {"ema_device": "accelerator", "ema_decay": 0.5, "ema_validation": "comparison"},
        [[in_micro_batch(3, 2)], [after("validate", 2)]],
    ),
    Row(
        "samples and a moving average",
        SANA,
        {**MEMORY, **EVERY_STEP, **SAMPLES, "gradient_accumulation_steps": 2, "use_ema": True}
        | {"ema_validation": "comparison", "sample_every_n_steps": 2, "preview_every": None},
        [[after("take_samples", 2), in_picture(4)], [in_micro_batch(3, 2)]],
    ),
    Row(
        "text encoders trained, with samples",
        LORA,
        {**EVERY_STEP, **SAMPLES, **VALIDATION, "network_dropout": 0.2, "clip_l_dropout_rate": 0.3}
        | {"pos_emb_random_crop_rate": 0.5, "max_train_steps": 3},
        [[after("take_samples", 2)], [after("validate", 2), in_picture(3)]],
    ),
    Row("samples", FULL, {**MEMORY, **EVERY_STEP, **SAMPLES}, [[after("take_samples", 3)], [after_save(2)]]),
    Row(
        "schedule-free",
        LORA,
        {**MEMORY, **UNET, **WORKERS, **EVERY_STEP, **VALIDATION, "optimizer_type": "AdamWScheduleFree"},
        [[sigterm(3)], [after_save(2), after_save(3)]],
    ),
    Row(
        "schedule-free with warm-up",
        SANA,
        {**DISK, **EVERY_STEP, "optimizer_type": "AdamWScheduleFree", "optimizer_args": ["warmup_steps=3"]},
        [[sigterm(3)]],
    ),
    Row(
        "rounded CAME, fused",
        SANA,
        {**DISK, **WORKERS, **ROUNDED, **FUSED, "optimizer_type": "CAME", "learning_rate": 1e-4, "use_ema": True}
        | COSINE,
        [[sigterm(2)], [sigterm(1), sigterm(3)]],
    ),
    Row(
        "rounded CAME8bit, fused",
        FULL,
        {**ONLINE, **WORKERS, **ROUNDED, **FUSED, **EVERY_STEP, "optimizer_type": "CAME8bit", "learning_rate": 1e-4},
        [[sigterm(2)], [before_step(4)]],
    ),
    Row(
        "rounded, whole step",
        LORA,
        {**ONLINE, **ROUNDED, **EVERY_STEP, **UNET, "optimizer_type": "CAME", "learning_rate": 1e-4},
        [[after_save(3)]],
    ),
    Row(
        "caption variants",
        LORA,
        {**DISK, **UNET, **PERSISTENT, **EVERY_STEP, "caption_variants": 3, "text_encoder_batch_size": 2},
        [[before_step(4)], [while_caching(), before_step(3)]],
        data=varied_captions,
    ),
    Row(
        "caption variants, ahead",
        SANA,
        {**EVERY_STEP, "caption_variants": 3, "vae_cache_disable": True, "cache_text_encoder_outputs": True},
        [[before_step(3)], [sigterm(2)]],
        data=varied_captions,
    ),
    Row("captions and pixels", FULL, {**PERSISTENT, **EVERY_STEP}, [[before_step(4)]], data=varied_pixels),
    Row(
        "curriculum",
        SANA,
        {**DISK, **WORKERS, **EVERY_STEP, "max_train_steps": 7},
        [[before_step(5), before_step(6)], [in_micro_batch(4, 1)]],
        data=curriculum,
    ),
    Row(
        "curriculum, by epochs",
        LORA,
        {**AHEAD, **UNET, **WORKERS, **EVERY_STEP, "max_train_epochs": 3, "max_train_steps": None},
        [[before_step(5)], [sigterm(3)]],
        data=curriculum,
    ),
    Row(
        "masks and teachers",
        LORA,
        {**MEMORY, **UNET, **PERSISTENT, **EVERY_STEP, "gradient_accumulation_steps": 2, "prior_loss_weight": 0.5}
        | {"network_args": ["rank_dropout=0.3", "module_dropout=0.3"], "max_train_steps": 5},
        [[in_micro_batch(3, 2)], [after("log_numbers", 4)]],
        data=masks_and_teachers,
    ),
    Row(
        "Prodigy, norms, LoKr",
        LORA,
        {**MEMORY, **EVERY_STEP, "optimizer_type": "Prodigy", "learning_rate": 1.0, "scale_weight_norms": 0.05}
        | {"network_module": "networks.lokr", "network_train_unet_only": True},
        [[before_step(3)], [between_weights_and_state(3)]],
    ),
    Row(
        "8 bits, checkpointing, rotation",
        FULL,
        {**MEMORY, **EVERY_STEP, "optimizer_type": "AdamW8bit", "gradient_checkpointing": True}
        | {"save_last_n_steps": 2, "lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 2, "max_train_steps": 5}
        | {"loss_type": "huber", "huber_schedule": "exponential", "lr_scheduler_timescale": 3},
        [[between_weights_and_state(4)], [before_step(5)]],
        data=masks_only,
    ),
    Row(
        "diffusers' folder, Prodigy",
        SANA,
        {**MEMORY, **PERSISTENT, **EVERY_STEP, "optimizer_type": "Prodigy", "learning_rate": 1.0}
        | {"save_model_as": "diffusers", "save_precision": "fp16"},
        [[between_weights_and_state(3)]],
    ),
    Row(
        "a schedule by its class",
        FULL,
        {**DISK, **PERSISTENT, "train_text_encoder": True, "cache_text_encoder_outputs_to_disk": None, **EVERY_STEP}
        | {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ["max_lr=0.01", "total_steps=5"]},
        [[before_step(3)]],
    ),
    Row(
        "noise of every kind",
        SD_LORA,
        {**MEMORY, **UNET, **EVERY_STEP, **VALIDATION, "gradient_accumulation_steps": 2, **NOISE},
        [[in_micro_batch(3, 2)], [after("validate", 2), sigterm(3)]],
    ),
    Row(
        "samples with noise on the way, chunks, the text encoder trained",
        SD_LORA,
        {**EVERY_STEP, **SAMPLES, "sample_sampler": "euler_a", "max_token_length": 150, "weighted_captions": True}
        | {"network_args": ["conv_dim=2", "conv_alpha=1"], "max_train_steps": 3},
        [[after("take_samples", 2)], [in_picture(3)]],
    ),
    Row(
        "velocities, a moving average",
        SD_FULL,
        {**DISK, **WORKERS, **EVERY_STEP, **FUSED, "v_parameterization": True, "zero_terminal_snr": True}
        | {"use_ema": True, "min_snr_gamma": 5},
        [[before_step(3)], [between_weights_and_state(2)]],
    ),
    Row(
        "two processes",
        LORA,
        {**DISK, **UNET, **WORKERS, **EVERY_STEP, **SAMPLES, **VALIDATION, **COSINE, "use_ema": True}
        | {"gradient_accumulation_steps": 2, "network_dropout": 0.2},
        [[in_micro_batch(2, 1), sigterm(3)], [after("take_samples", 2), after("validate", 3)]],
        processes=2,
        data=single_pictures,
    ),
    Row(
        "two processes, text encoders trained",
        FULL,
        {"cache_latents": True, "train_text_encoder": True, **EVERY_STEP, "optimizer_type": "AdamWScheduleFree"}
        | {"max_train_steps": 3},
        [[before_step(3)], [sigterm(2)]],
        processes=2,
        data=single_pictures,
    ),
    Row(
        "two processes, ahead",
        SANA,
        {**AHEAD, **WORKERS, **ROUNDED, **EVERY_STEP, "use_ema": True, "max_train_steps": 3},
        [[before_step(3)]],
        processes=2,
        data=single_pictures,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.job} {row.name}") for row in ROWS])
def test_interrupted_and_resumed_equals_uninterrupted(row, request):
    trainer = request.getfixturevalue(row.job)
    options = {**row.options}
    if row.data is not None:
        options["dataset_config"] = row.data(trainer)
    if "sample_prompts" in options:
        options["sample_prompts"], height = trainer.folder / "prompts.txt", 64 if row.job == SD_LORA else 32
        options["sample_prompts"].write_text(
            "a cat --w 64 --h 32 --s 2 --l 3 --d 5\n"
            if row.job == SANA
            else f"a cat --w 64 --h 64 --s 2 --l 3 --d 5\na cup --w 64 --h {height} --s 2 --l 1 --d 6\n"
        )
    outputs = [f"interrupted {number}" for number in range(len(row.stops))]

    def train(rank: int) -> None:
        assert trainer("whole", **options) == 0
        for output, stops in zip(outputs, row.stops):
            for stop in stops:
                interrupt(trainer, output, stop, options)
            assert trainer(output, **options, resume="auto") == 0

    options |= {"save_state_on_train_end": True}
    if row.processes == 1:
        train(0)
    else:
        in_processes(row.processes, train)
    for output, stops in zip(outputs, row.stops):
        comparison = compare_runs(trainer.folder / "whole", trainer.folder / output)
        found = "\n".join(map(str, comparison.differences[:12]))
        assert not comparison.differences, f"{stops}: {len(comparison.differences)} differ:\n{found}"
        assert {"trained weights", "optimizer", "progress", "saved weights", "logged numbers"} <= set(comparison.equal)
        assert ("moving average" in comparison.equal) == ("use_ema" in options)
        assert ("sample pictures" in comparison.equal) == ("sample_prompts" in options)


def interrupt(trainer, output: str, stop: Stop, options: dict) -> None:
    """Train in ``output``, from its newest state on if there is one, until the run is stopped."""
    with pytest.MonkeyPatch.context() as patch:
        stop(patch)
        with pytest.raises(Killed) if stop.code is None else contextlib.nullcontext():
            assert trainer(output, **options, resume="auto") == stop.code
    assert not os.path.exists(trainer.folder / output / "run.safetensors"), "it was not interrupted"


def test_a_run_that_ended_goes_on_as_if_it_had_been_longer_from_the_start(trainer):
    options = {**DISK, **UNET, **VALIDATION, "use_ema": True, "save_state_on_train_end": True}
    assert trainer("whole", **options, max_train_steps=5) == 0
    assert trainer("longer", **options, max_train_steps=3) == 0
    assert trainer("longer", **options, max_train_steps=5, resume=trainer.folder / "longer" / "run-state") == 0
    assert compare_runs(trainer.folder / "whole", trainer.folder / "longer").differences == []
