"""The rules that span groups, and what follows from other options."""

import dataclasses
import json

import pytest

from library.config.command_line import read_command_line
from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.options import option_values
from library.config.run import make_run_config, training_groups
from library.families import family_options
from library.records import ModelDescription, Resolution

MODEL = ModelDescription(
    title="model",
    architecture="model",
    base_model_version="1",
    parameters=1,
    sizes={},
    native_resolution=Resolution(512, 512),
    blocks=4,
    trainable_text_encoders=("clip_l", "clip_g"),
    save_layouts={"safetensors": ("vae", "text_encoders"), "diffusers": ("vae", "text_encoders")},
)


def run_config(*argv, datasets=None, job="adapter"):
    groups = training_groups(family_options("sd3"), job=job)
    line = read_command_line(groups, argv)
    assert not line.problems
    datasets = (dataset(),) if datasets is None else datasets
    return make_run_config("sd3", "sd3_train_network.py", line.groups, line.provenance, datasets)


def dataset(role="train", **subset):
    return DatasetConfig(
        resolution=Resolution(512, 512),
        role=role,
        subsets=(SubsetConfig(image_dir="cats", **subset),),
    )


def test_nothing_contradicts_the_defaults():
    assert run_config().problems() == []


CACHED = ("--cache_text_encoder_outputs", "--network_train_unet_only")


@pytest.mark.parametrize(
    ("argv", "subset", "problem"),
    [
        (["--cache_text_encoder_outputs"], {}, "--network_train_unet_only"),
        (CACHED, {"shuffle_caption": True}, "shuffle_caption of datasets[0].subsets[0] (cats) shuffles tags"),
        (CACHED, {"caption_tag_dropout_rate": 0.1}, "caption_tag_dropout_rate"),
        (CACHED, {"enable_wildcard": True}, "enable_wildcard"),
        (CACHED, {"token_warmup_step": 0.5}, "token_warmup_step"),
        (["--network_train_unet_only", "--text_encoder_lr", "1e-5"], {}, "--text_encoder_lr"),
        (["--network_train_text_encoder_only", "--unet_lr", "1e-5"], {}, "--unet_lr"),
        (["--network_train_text_encoder_only", "--text_encoder_lr", "0"], {}, "leaves nothing to train"),
        (["--max_train_steps", "10", "--max_train_epochs", "1"], {}, "both say how long; keep one"),
        (["--validate_every_n_steps", "10"], {}, "--validate_every_n_steps needs held-out pictures"),
        (["--max_validation_steps", "10"], {}, "--max_validation_steps needs held-out pictures"),
        (["--validation_seed", "10"], {}, "--validation_seed does nothing without held-out pictures"),
        (["--prior_loss_weight", "0.5"], {}, "--prior_loss_weight does nothing without regularisation"),
        (["--vae_batch_size", "4"], {}, "--vae_batch_size does nothing without --cache_latents"),
        (["--text_encoder_batch_size", "4"], {}, "does nothing without --cache_text_encoder_outputs"),
        (["--network_weights", "no.safetensors"], {}, "--network_weights no.safetensors: no such file"),
        (["--base_weights", "a.safetensors"], {}, "--base_weights a.safetensors: no such file"),
        (["--metadata_thumbnail", "a.png"], {}, "--metadata_thumbnail a.png: no such file"),
        (["--resume", "nowhere-state"], {}, "--resume nowhere-state: no such folder"),
        (["--loss_type", "huber", "--huber_schedule", "snr"], {}, "--huber_schedule snr does nothing"),
        (["--caption_variants", "4"], {"shuffle_caption": True}, "--caption_variants does nothing without --cache_t"),
        ([*CACHED, "--caption_variants", "4"], {}, "--caption_variants does nothing without"),
        ([*CACHED, "--caption_variants", "4"], {"token_warmup_step": 9, "shuffle_caption": True}, "token_warmup_step"),
        (["--cache_latents"], {"random_crop": True}, "random_crop of datasets[0].subsets[0] (cats) makes others"),
        (["--cache_latents"], {"color_aug": True}, "color_aug of datasets[0]"),
        (["--cache_latents"], {"face_crop_aug_range": (1.0, 2.0)}, "face_crop_aug_range of datasets[0]"),
        (["--regularisation_weight", "0.5"], {}, "--regularisation_weight does nothing without is_regularisation"),
        (["--masked_loss"], {}, "--masked_loss does nothing without masks"),
        (["--masked_loss_normalize"], {}, "--masked_loss_normalize does nothing without masks"),
        (["--unmasked_weight", "0.1"], {}, "--unmasked_weight does nothing without masks"),
    ],
)
def test_contradictions_between_groups(argv, subset, problem):
    problems = run_config(*argv, datasets=(dataset(**subset),)).problems()
    assert len(problems) == 1
    assert problem in problems[0]


@pytest.mark.parametrize(
    ("argv", "subset"),
    [
        (CACHED, {"caption_dropout_rate": 0.1, "keep_tokens": 2}),
        (["--cache_text_encoder_outputs", "--text_encoder_lr", "0"], {}),
        ([], {"shuffle_caption": True, "enable_wildcard": True}),
        (["--prior_loss_weight", "0.5"], {"is_reg": True}),
        (["--cache_latents_to_disk", "--vae_batch_size", "4"], {}),
        (["--loss_type", "huber"], {}),
        ([*CACHED, "--caption_variants", "4"], {"enable_wildcard": True}),
        (["--masked_loss", "--masked_loss_normalize", "--unmasked_weight", "0.1"], {"alpha_mask": True}),
        (["--regularisation_weight", "0.5"], {"is_regularisation_data": True}),
        (["--vae_cache_disable"], {"random_crop": True, "color_aug": True}),
    ],
)
def test_what_fits_together(argv, subset):
    assert run_config(*argv, datasets=(dataset(**subset),)).problems() == []


def test_validation_with_held_out_pictures():
    argv = ("--validate_every_n_steps", "10", "--max_validation_steps", "3", "--validation_seed", "1")
    assert run_config(*argv, datasets=(dataset(), dataset(validation_split=0.1))).problems() == []
    assert run_config(*argv, datasets=(dataset(), dataset(role="validation"))).problems() == []


def test_a_full_fine_tune_has_no_teacher():
    argv = ("--learning_rate", "1e-5")
    problems = run_config(*argv, job="full", datasets=(dataset(is_regularisation_data=True),)).problems()
    assert problems == [
        "datasets[0].subsets[0] (cats): is_regularisation_data needs an adapter to switch off; a full fine-tune has "
        "none"
    ]


def test_typed_epochs_win_over_the_files_steps(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("max_train_steps = 10")
    assert run_config("--config_file", str(path), "--max_train_epochs", "2").problems() == []
    path.write_text("max_train_steps = 10\nmax_train_epochs = 2")
    assert len(run_config("--config_file", str(path)).problems()) == 1


def test_all_at_once():
    problems = run_config("--cache_text_encoder_outputs", "--vae_batch_size", "4", "--validation_seed", "1").problems()
    assert len(problems) == 3


def test_learning_rate_of_adapters_is_derived():
    config = run_config()
    assert config.optimizer.learning_rate == 1e-4
    assert config.provenance["learning_rate"].startswith("derived: ")
    assert run_config("--learning_rate", "1e-5").optimizer.learning_rate == 1e-5


def test_a_full_fine_tune_names_its_learning_rate():
    config = run_config(job="full")
    assert config.network is None and config.problems() == []
    assert [problem.split()[0] for problem in config.model_problems(MODEL)] == ["--learning_rate"]
    assert run_config("--learning_rate", "1e-5", job="full").model_problems(MODEL) == []
    sure = dataclasses.replace(MODEL, defaults={"learning_rate": 1e-5})
    config = config.with_model_defaults(sure)
    assert config.model_problems(sure) == [] and config.optimizer.learning_rate == 1e-5
    assert run_config().with_model_defaults(sure).optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--unet_lr", "1e-5"], "--unet_lr is for adapters"),
        (["--text_encoder_lr", "1e-5"], "--text_encoder_lr 1e-05 does nothing without --train_text_encoder"),
        (["--train_text_encoder", "--text_encoder_lr", "0", "0"], "--train_text_encoder trains nothing"),
        (["--train_text_encoder", "--cache_text_encoder_outputs"], "--cache_text_encoder_outputs keeps text"),
        (["--save_parts", "vae", "vae"], "--save_parts vae vae names a part twice"),
    ],
)
def test_contradictions_in_a_full_fine_tune(argv, problem):
    (found,) = run_config("--learning_rate", "1e-5", *argv, job="full").problems()
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("argv", "changes", "problem"),
    [
        (["--train_text_encoder"], {"trainable_text_encoders": ()}, "--train_text_encoder does nothing: this model's"),
        (["--train_text_encoder", "--text_encoder_lr", "1", "2", "3"], {}, "--text_encoder_lr takes one value, or one"),
        (["--save_model_as", "pth"], {}, "--save_model_as pth: this model is written as safetensors or diffusers"),
        (
            ["--save_parts", "vae"],
            {"save_layouts": {"safetensors": (), "diffusers": ("vae",)}},
            "--save_parts vae: such a file holds the denoiser alone; use --save_model_as diffusers",
        ),
    ],
)
def test_what_a_model_can_not_do_in_a_full_fine_tune(argv, changes, problem):
    config = run_config("--learning_rate", "1e-5", *argv, job="full")
    assert config.problems() == []
    (found,) = config.model_problems(dataclasses.replace(MODEL, **changes))
    assert found.startswith(problem)


def test_adapters_are_safetensors():
    (problem,) = run_config("--save_model_as", "diffusers").problems()
    assert problem.startswith("--save_model_as diffusers is for a full fine-tune")


def test_who_trains_text_encoders():
    assert run_config().trains_text_encoders
    assert not run_config("--network_train_unet_only").trains_text_encoders
    assert not run_config("--text_encoder_lr", "0").trains_text_encoders
    assert not run_config("--learning_rate", "1", job="full").trains_text_encoders


def test_all_values_as_json_without_secrets():
    config = run_config("--log_with", "wandb", "--wandb_api_key", "hunter2", "--text_encoder_lr", "1e-5", "2e-5")
    values = config.as_dict()
    assert "hunter2" not in json.dumps(values)
    assert values["text_encoder_lr"] == [1e-5, 2e-5]
    assert len(values) == len([1 for declared, _ in option_values(config)]) - 1


def test_groups_are_attributes_of_the_configuration():
    config = run_config()
    for attribute, group in training_groups(family_options("sd3"), job="adapter").items():
        assert isinstance(getattr(config, attribute), group)
    assert dataclasses.is_dataclass(config)
