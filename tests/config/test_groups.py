"""The rules inside each option group."""

import dataclasses

import pytest

from library.config.caching import CachingConfig
from library.config.errors import ConfigError
from library.config.logging import LoggingConfig
from library.config.memory import MemoryConfig
from library.config.optimizer import (
    OPTIMIZER_NAMES,
    OptimizerConfig,
    parse_key_values,
    parse_optimizer_type,
    parse_steps,
)
from library.config.saving import SavingConfig, parse_output_name, parse_save_model_as
from library.config.training import TrainingConfig
from library.config.validation import ValidationConfig


@pytest.mark.parametrize(
    ("group", "problem"),
    [
        (lambda: OptimizerConfig(lr_warmup_steps=10), "--lr_scheduler constant has no warm-up"),
        (lambda: OptimizerConfig(lr_warmup_steps=0.1, lr_scheduler="adafactor"), "no warm-up"),
        (lambda: OptimizerConfig(lr_scheduler="adafactor"), "relative_step=True"),
        (lambda: OptimizerConfig(lr_scheduler="adafactor", optimizer_type="Adafactor"), "relative_step=True"),
        (lambda: OptimizerConfig(lr_scheduler="piecewise_constant"), "step_rules="),
        (
            lambda: OptimizerConfig(lr_scheduler_power=2.0),
            "--lr_scheduler_power does nothing with --lr_scheduler constant",
        ),
        (lambda: OptimizerConfig(lr_decay_steps=5, lr_scheduler="cosine"), "--lr_decay_steps does nothing"),
        (
            lambda: OptimizerConfig(lr_scheduler_args=("a=1",), lr_scheduler="cosine"),
            "--lr_scheduler_args does nothing",
        ),
        (lambda: OptimizerConfig(lr_scheduler_type="StepLR", lr_scheduler="cosine"), "replaces --lr_scheduler cosine"),
        (lambda: OptimizerConfig(lr_scheduler_type="StepLR", lr_warmup_steps=3), "--lr_warmup_steps does nothing"),
        (lambda: OptimizerConfig(optimizer_args=("weight_decay",)), "--optimizer_args: expected key=value"),
        (lambda: OptimizerConfig(use_8bit_adam=True, use_lion_optimizer=True), "choose two optimizers"),
        (lambda: OptimizerConfig(use_8bit_adam=True, optimizer_type="Lion"), "choose two optimizers"),
        (lambda: OptimizerConfig(text_encoder_lr=(1.0, 1.0, 1.0, 1.0)), "takes 1 to 3 values, got 4"),
        (lambda: OptimizerConfig(text_encoder_lr=()), "takes 1 to 3 values, got 0"),
        (lambda: TrainingConfig(full_fp16=True), "--full_fp16 needs --mixed_precision fp16, but it is bf16"),
        (lambda: TrainingConfig(full_bf16=True, mixed_precision="no"), "--full_bf16 needs --mixed_precision bf16"),
        (lambda: TrainingConfig(full_bf16=True, full_fp16=True), "exclude each other"),
        (lambda: TrainingConfig(stochastic_rounding=True), "--stochastic_rounding does nothing without --full_bf16"),
        (lambda: TrainingConfig(kahan_summation=True), "--kahan_summation does nothing without --full_bf16"),
        (
            lambda: TrainingConfig(full_bf16=True, kahan_summation=True, stochastic_rounding=True),
            "--kahan_summation and --stochastic_rounding exclude each other",
        ),
        (lambda: MemoryConfig(sdpa=True, xformers=True), "--sdpa and --xformers exclude each other"),
        (lambda: MemoryConfig(gradient_checkpointing_interval=2), "does nothing without --gradient_checkpointing"),
        (lambda: ValidationConfig(validate_every_n_steps=1, validate_every_n_epochs=1), "exclude each other"),
        (lambda: LoggingConfig(log_with="all"), "--log_with all needs --logging_dir"),
        (lambda: LoggingConfig(log_config=True), "--log_config does nothing without a tracker"),
        (lambda: LoggingConfig(logging_dir="logs", wandb_run_name="x"), "--wandb_run_name does nothing without wandb"),
        (lambda: LoggingConfig(log_prefix="x"), "--log_prefix does nothing without --logging_dir"),
        (lambda: SavingConfig(save_last_n_steps=100), "--save_last_n_steps does nothing without --save_every_n_steps"),
        (lambda: SavingConfig(save_last_n_epochs=1), "does nothing without --save_every_n_epochs"),
        (lambda: SavingConfig(save_every_n_steps=1, save_last_n_steps_state=2), "and --save_state"),
        (lambda: SavingConfig(save_every_n_epochs=1, save_n_epoch_ratio=2), "exclude each other"),
    ],
)
def test_contradictions(group, problem):
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        group()


@pytest.mark.parametrize(
    "group",
    [
        lambda: OptimizerConfig(lr_warmup_steps=0.1, lr_scheduler="cosine"),
        lambda: OptimizerConfig(
            lr_scheduler="adafactor", optimizer_type="Adafactor", optimizer_args=("relative_step=True",)
        ),
        lambda: OptimizerConfig(lr_scheduler="piecewise_constant", lr_scheduler_args=("step_rules=1:10,0.1",)),
        lambda: OptimizerConfig(lr_scheduler="polynomial", lr_scheduler_power=2.0, lr_scheduler_args=("lr_end=1e-7",)),
        lambda: OptimizerConfig(lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=10",)),
        lambda: SavingConfig(save_state=True),
        lambda: SavingConfig(save_every_n_steps=1, save_state=True, save_last_n_steps_state=2, save_last_n_steps=1),
        lambda: SavingConfig(save_n_epoch_ratio=3, save_last_n_epochs=1),
        lambda: LoggingConfig(log_with="wandb", wandb_run_name="x", log_config=True),
        lambda: TrainingConfig(full_fp16=True, mixed_precision="fp16"),
    ],
)
def test_what_fits_together(group):
    group()


def test_contradictions_of_a_group_come_together():
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig(lr_warmup_steps=10, lr_scheduler_power=2.0, optimizer_args=("x",))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("value", "steps"),
    [("100", 100), ("0.1", 0.1), ("10%", 0.1), ("1e-1", 0.1), (100, 100), (0.25, 0.25), ("0", 0), ("0%", 0.0)],
)
def test_steps(value, steps):
    parsed = parse_steps(value)
    assert parsed == pytest.approx(steps)
    assert type(parsed) is type(steps)


@pytest.mark.parametrize("value", ["1.5", "100%", "-3", -1, "ten", "1e3", "nan", True, None, [1]])
def test_what_steps_are_not(value):
    with pytest.raises(ValueError, match="expected steps"):
        parse_steps(value)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_optimizer_names_in_any_case(name):
    assert parse_optimizer_type(name.upper()) == name


def test_other_optimizers():
    assert parse_optimizer_type("pytorch_optimizer.Lamb") == "pytorch_optimizer.Lamb"
    with pytest.raises(ValueError, match="did you mean AdamW8bit"):
        parse_optimizer_type("adamw8bits")
    with pytest.raises(ValueError, match="known are AdamW,"):
        parse_optimizer_type("zzz")


def test_optimizer_names_are_those_that_training_makes():
    from library.training.optimizers import OPTIMIZERS

    assert {name.lower() for name in OPTIMIZER_NAMES} == set(OPTIMIZERS)


def test_older_spellings_of_optimizers():
    assert OptimizerConfig().name == "AdamW"
    assert OptimizerConfig(use_8bit_adam=True).name == "AdamW8bit"
    assert OptimizerConfig(use_lion_optimizer=True).name == "Lion"
    assert OptimizerConfig(optimizer_type="CAME").name == "CAME"


def test_key_values():
    texts = ("betas=0.9,0.99", "weight_decay = 1e-2", "mode=fast", "on=True", "rule=a=b")
    assert parse_key_values(texts, "x") == {
        "betas": (0.9, 0.99),
        "weight_decay": 0.01,
        "mode": "fast",
        "on": True,
        "rule": "a=b",
    }
    with pytest.raises(ConfigError, match="--x: a is given twice"):
        parse_key_values(["a=1", "a=2"], "x")


@pytest.mark.parametrize(
    ("value", "reason"), [("ckpt", "pickles"), ("pt", "pickles"), ("gguf", "expected safetensors")]
)
def test_formats_that_are_refused(value, reason):
    with pytest.raises(ValueError, match=reason):
        parse_save_model_as(value)


def test_output_name_is_a_stem():
    assert parse_output_name("cat.safetensors") == "cat"
    with pytest.raises(ValueError, match="--output_dir"):
        parse_output_name("models/cat")


@pytest.mark.parametrize(("ratio", "epochs", "interval"), [(4, 20, 5), (4, 3, 1), (3, 10, 3)])
def test_epoch_interval(ratio, epochs, interval):
    assert SavingConfig(save_n_epoch_ratio=ratio).epoch_interval(epochs) == interval


def test_attention_backend():
    assert MemoryConfig().attention_backend == MemoryConfig(sdpa=True).attention_backend == "sdpa"
    assert MemoryConfig(xformers=True).attention_backend == "xformers"


def test_trackers():
    assert LoggingConfig().trackers == ()
    assert LoggingConfig(logging_dir="x").trackers == ("tensorboard",)
    assert LoggingConfig(logging_dir="x", log_with="all").trackers == ("tensorboard", "wandb")


def test_groups_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().seed = 3


def test_online_encoding_and_cached_latents_exclude_each_other():
    with pytest.raises(ConfigError, match="--vae_cache_disable and --cache_latents exclude each other"):
        CachingConfig(vae_cache_disable=True, cache_latents_to_disk=True)
