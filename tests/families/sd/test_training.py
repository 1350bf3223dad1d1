"""Training on Stable Diffusion end to end: the caption's options, what saved files say, and going on from a state."""

import dataclasses
import random

import pytest
import torch
from safetensors import safe_open

from tests.tiny import TINY_SD
from tools.miniature_sd import make_sd
from tools.miniature_tokenizers import WORDS

CAPTION_OPTIONS = {"clip_skip": 2, "max_token_length": "150", "weighted_captions": True}
NOISE_OPTIONS = {
    **{"noise_offset": 0.1, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.05},
    **{"multires_noise_iterations": 4, "ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True},
    **{"min_snr_gamma": 5, "loss_type": "huber"},
}


def long_caption(seed):
    """More words than one chunk holds, some of them weighted."""
    words = random.Random(seed).choices(WORDS, k=100)
    return " ".join([*words[:3], f"({words[3]}:1.5)", *words[4:90], f"[{words[90]}]", *words[91:]])


@pytest.fixture
def long_captions(sd_trainer):
    """Two pictures, whose captions don't fit into one chunk."""
    for number, path in enumerate(sorted(sd_trainer.photos.glob("*.txt"))):
        if number > 1:
            path.unlink()
            path.with_suffix(".png").unlink()
        else:
            path.write_text(long_caption(number))
    return sd_trainer


def metadata_of(trainer, output):
    with safe_open(trainer.folder / output / "run.safetensors", "pt") as file:
        return file.metadata()


def test_cached_text_features_are_those_of_the_options(long_captions):
    """And a cache that was made under other options is not used."""
    train, alone = long_captions, {"network_train_unet_only": True, "max_train_steps": 1}
    cached = {**alone, "cache_text_encoder_outputs_to_disk": True, "cache_dir": train.folder / "cache"}
    losses = {}
    for name, options in (
        ("plain", cached),
        ("cached", {**cached, **CAPTION_OPTIONS}),
        ("encoded", {**alone, **CAPTION_OPTIONS}),
    ):
        assert train(name, **options) == 0
        losses[name] = train.losses(name)[1]
    assert losses["cached"] == pytest.approx(losses["encoded"], rel=1e-5)
    assert losses["cached"] != pytest.approx(losses["plain"], rel=1e-4)


def test_the_text_encoder_learns_through_all_chunks_up_to_the_chosen_layer(long_captions):
    train = long_captions
    options = {**CAPTION_OPTIONS, "unet_lr": 1e-3, "text_encoder_lr": 1e-2, "max_train_steps": 1}
    assert train("out", **options) == 0
    changed = {name: tensor.abs().max().item() for name, tensor in train.weights("out").items() if "lora_up" in name}
    encoder = {name: value for name, value in changed.items() if name.startswith("lora_te")}
    assert encoder and all(value > 0 for value in encoder.values())
    assert {name.split("_layers_")[1][0] for name in encoder} == {"0"}, "clip_skip 2 leaves the last layer out"
    metadata = metadata_of(train, "out")
    assert metadata["ss_clip_skip"] == metadata["modelspec.encoder_layer"] == "2"
    assert metadata["ss_max_token_length"] == "150" and metadata["ss_weighted_captions"] == "True"


def test_a_run_with_noise_of_every_kind_is_foreseen(sd_trainer, capsys):
    assert sd_trainer("out", **NOISE_OPTIONS, network_train_unet_only=True, max_train_steps=1) == 0
    assert "forecast: at most " in capsys.readouterr().err


def test_a_resumed_run_draws_the_same_noise(sd_trainer):
    options = {**NOISE_OPTIONS, "network_train_unet_only": True}
    assert sd_trainer("whole", **options, max_train_steps=3) == 0
    assert sd_trainer("first", **options, max_train_steps=1, save_state_on_train_end=True) == 0
    state = sd_trainer.folder / "first" / "run-state"
    assert sd_trainer("second", **options, max_train_steps=3, resume=state) == 0
    whole, second = sd_trainer.losses("whole"), sd_trainer.losses("second")
    assert list(second) == [2, 3] and all(second[step] == whole[step] for step in second)
    expected = sd_trainer.weights("whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sd_trainer.weights("second").items())

    metadata = metadata_of(sd_trainer, "whole")
    written = {name: metadata.get(f"ss_{name}") for name in (*NOISE_OPTIONS, "multires_noise_discount", "huber_c")}
    said = {**NOISE_OPTIONS, "min_snr_gamma": 5.0, "multires_noise_discount": 0.3, "huber_c": 0.1}
    assert written == {name: str(value) for name, value in said.items()}
    assert metadata["ss_huber_schedule"] == "snr" and metadata["ss_base_model_version"] == "sd_v1"
    silent = ("v2", "v_parameterization", "zero_terminal_snr", "debiased_estimation", "clip_skip", "weighted_captions")
    assert not [name for name in silent if f"ss_{name}" in metadata]
    assert metadata["modelspec.prediction_type"] == "epsilon" and "modelspec.encoder_layer" not in metadata


def test_another_objective_is_another_run(sd_trainer, capsys):
    options = {"network_train_unet_only": True, "cache_latents": True}
    assert sd_trainer("first", **options, max_train_steps=1, save_state_on_train_end=True) == 0
    state = sd_trainer.folder / "first" / "run-state"
    changed = {"v_parameterization": True, "zero_terminal_snr": True, "clip_skip": 2, "max_token_length": "225"}
    assert sd_trainer("second", **options, max_train_steps=2, resume=state, **changed, noise_offset=0.1) == 2
    told = capsys.readouterr().err
    for change in (
        "--v_parameterization True (the state: False)",
        "--zero_terminal_snr True (the state: unset)",
        "--clip_skip 2 (the state: unset)",
        "--max_token_length 225 (the state: 75)",
        "--noise_offset 0.1 (the state: unset)",
    ):
        assert change in told, change


def test_velocities_are_trained_and_written_into_the_file(sd_trainer):
    options = {"network_train_unet_only": True, "max_train_steps": 1, "debiased_estimation_loss": True}
    assert sd_trainer("out", **options, v_parameterization=True, zero_terminal_snr=True) == 0
    metadata = metadata_of(sd_trainer, "out")
    assert [metadata[f"ss_{name}"] for name in ("v_parameterization", "zero_terminal_snr", "debiased_estimation")] == [
        "True"
    ] * 3
    assert metadata["ss_base_model_version"] == "sd_v1_v" and metadata["modelspec.prediction_type"] == "v"


def test_a_second_generation_model_says_so_and_is_asked_about(sd_trainer, tmp_path, capsys):
    sizes = dataclasses.replace(TINY_SD, is_v2=True, width=64)
    train = dataclasses.replace(sd_trainer, checkpoint=make_sd(tmp_path / "second", sizes=sizes))
    options = {"network_train_unet_only": True, "max_train_steps": 1, "no_metadata": True}
    assert train("out", **options) == 0
    assert "is Stable Diffusion 2.x and does not say what it predicts" in capsys.readouterr().err
    metadata = metadata_of(train, "out")
    assert metadata["ss_v2"] == "True" and metadata["ss_base_model_version"] == "sd_v2"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    run = train.with_run(
        "other", lambda run: (run.metadata, run.family.description), **options, v_parameterization=True
    )
    assert "does not say what it predicts" not in capsys.readouterr().err
    assert run[0]["ss_base_model_version"] == "sd_v2_v" and run[1].architecture == "stable-diffusion-v2-768-v"


def test_a_full_fine_tune_takes_the_same_options(sd_trainer):
    train = dataclasses.replace(sd_trainer, job="full")
    options = {**NOISE_OPTIONS, "max_train_steps": 1}
    plain = train.with_run("out", lambda run: run.family.objective, max_train_steps=1)
    noisy = train.with_run("out", lambda run: run.family.objective, **options)
    assert plain.ddpm.noise_offset is None and noisy.ddpm.noise_offset == 0.1
    assert noisy.loss_options.huber_schedule == "snr"
