"""Samples of a training run on Stable Diffusion, and what generate.py makes of the same prompts."""

import dataclasses
import json

import pytest
from PIL import Image

from library.config.command_line import read_command_line
from library.config.ddpm import DdpmConfig
from library.config.loss import LossConfig
from library.config.model import ModelConfig
from library.families import family_options
from library.families.sd.files import describe, locate
from library.sampling.generate_command import main, objective_groups
from tests.tiny import TINY_SD2
from tools.miniature_sd import make_sd

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
PROMPTS = "a cat --d 5 --ss euler_a --n a dog\na dog --d 6 --ss k_euler --l 1\na bird --d 7\n"


def pictures(folder) -> dict[str, Image.Image]:
    return {path.name: Image.open(path) for path in sorted(folder.iterdir())}


def settings_of(image: Image.Image) -> dict:
    return json.loads(image.text["atelier"])


def words(checkpoint, folder, *more) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(checkpoint), "--mixed_precision", "no"),
        *("--device", "cpu", "--width", "64", "--height", "64", "--seed", "5", "--steps", "4", "--output_name", "x"),
        *("--output_dir", str(folder), *map(str, more)),
    ]


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    return max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True))


@pytest.mark.parametrize("average", [False, True], ids=["adapter", "average"])
def test_a_sample_in_training_is_the_picture_that_generate_makes(sd_trainer, tmp_path, average):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)
    sampling = {
        "sample_prompts": prompts,
        "sample_every_n_steps": 2,
        "validation_resolution": "64x64",
        "validation_num_inference_steps": 4,
        "sample_sampler": "unipc",
        "preview_every": 3,
        "max_train_steps": 2,
    }
    ema = {"use_ema": True, "ema_decay": 0.5, "ema_validation": "comparison"} if average else {}
    assert sd_trainer("out", **sampling, **CACHED, **ema) == 0
    samples = pictures(tmp_path / "out" / "sample")
    names = [f"run_000002_0{number}_{seed}.png" for number, seed in enumerate((5, 6, 7))]
    raw = [name.replace("000002_", "000002_raw_") for name in names] if average else []
    assert sorted(samples) == sorted([*names, *raw])
    found = [settings_of(samples[name]) for name in names]
    assert [entry["sampler"] for entry in found] == ["euler_a", "euler", "unipc"]
    assert [entry["scale"] for entry in found] == [7.5, 1.0, 7.5]
    for name, other in zip(names, raw):
        assert samples[name].tobytes() != samples[other].tobytes()

    more = ["--sample_prompts", prompts, "--sampler", "unipc", "--preview_every", 2]
    adapter = ["--network_weights", tmp_path / "out" / "run.safetensors"]
    assert main(words(sd_trainer.checkpoint, tmp_path / "made", *more, *adapter)) == 0
    made = pictures(tmp_path / "made")
    assert list(made) == ["x_000_5.png", "x_001_6.png", "x_002_7.png"]
    for one, other in zip(made.values(), names):
        assert largest_difference(one, samples[other]) <= 1  # captions were encoded in batches
    if not average:
        assert main(words(sd_trainer.checkpoint, tmp_path / "base", *more)) == 0
        base = pictures(tmp_path / "base")
        assert all(base[name].tobytes() != image.tobytes() for name, image in made.items())


def test_generate_has_the_models_defaults(tiny_sd_file, tmp_path, capsys):
    start = ["--pretrained_model_name_or_path", str(tiny_sd_file), "--prompt", "a cat", "--dry_run"]
    assert main(start) == 0
    said = capsys.readouterr().out
    for part in ("model: Stable Diffusion 1.x", "'width': 512", "'steps': 30", "'scale': 7.5", "'sampler': 'ddim'"):
        assert part in said
    assert main([*start, "--sampler", "k_euler_a"]) == 0
    assert "'sampler': 'euler_a'" in capsys.readouterr().out


DDPM_NAMES = "expected one of ddim, euler, euler_a, dpmpp_2m, unipc, got"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "heun"], f"--sampler: {DDPM_NAMES} 'heun'"),
        (["--sampler", "dpm_2"], f"--sampler: {DDPM_NAMES} 'dpm_2'"),
        (["--width", "72"], "--width 72 isn't a multiple of 64; the nearest are 64 and 128"),
        (
            ["--validation_guidance_skip_layers", "1"],
            "--validation_guidance_skip_layers does nothing for Stable Diffusion 1.x: its stages change the size",
        ),
        (["--use_resolution_binning"], "--use_resolution_binning does nothing for Stable Diffusion 1.x: it has no"),
        (["--zero_terminal_snr"], "--zero_terminal_snr makes the last timestep pure noise"),
        (["--min_snr_gamma", "5"], "unknown option --min_snr_gamma"),
        (["--text_encoder_2_precision", "int8"], "--text_encoder_2_precision does nothing: this model's text encoders"),
    ],
)
def test_mistakes(tiny_sd_file, tmp_path, capsys, arguments, message):
    start = ["--pretrained_model_name_or_path", str(tiny_sd_file), "--prompt", "a cat"]
    assert main([*start, "--output_dir", str(tmp_path / "made"), *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("options", "line", "message"),
    [
        ({"sample_sampler": "heun"}, "a cat", f"--sample_sampler: {DDPM_NAMES} 'heun'"),
        ({}, "a cat --ss heun", f"prompts.txt, line 1: --ss: {DDPM_NAMES} 'heun'"),
        ({"validation_guidance_skip_layers": 1}, "a cat", "--validation_guidance_skip_layers does nothing for Stable"),
    ],
)
def test_mistakes_in_training(sd_trainer, tmp_path, capsys, options, line, message):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(line)
    assert sd_trainer("out", sample_prompts=prompts, sample_at_first=True, dry_run=True, **options) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_the_options_of_the_schedule_act(tiny_sd_file, tmp_path):
    made = []
    for number, more in enumerate(([], ["--v_parameterization"], ["--v_parameterization", "--zero_terminal_snr"])):
        assert main(words(tiny_sd_file, tmp_path / str(number), "--prompt", "a cat", *more)) == 0
        made.append(Image.open(tmp_path / str(number) / "x_000_5.png").tobytes())
    assert len(set(made)) == 3


@pytest.mark.parametrize(
    ("stored", "argv", "velocity"),
    [(None, [], False), (True, [], True), (False, [], False), (None, ["--v_parameterization"], True)],
)
def test_what_is_predicted_is_said_by_the_files_or_the_option(tiny_sd_file, stored, argv, velocity):
    options = family_options("sd")
    files = dataclasses.replace(
        locate(ModelConfig(pretrained_model_name_or_path=str(tiny_sd_file)), options.OPTIONS()), v_prediction=stored
    )
    command_line = read_command_line(options.GENERATE_GROUPS, argv)
    groups = objective_groups(options, command_line, describe(files, options.OPTIONS()))
    assert groups["ddpm"] == DdpmConfig(v_parameterization=velocity)
    assert type(groups["loss"]) is LossConfig


def test_files_that_say_what_they_predict_are_not_contradicted(tiny_sd_file, monkeypatch, capsys):
    def said(*arguments):
        return dataclasses.replace(locate(*arguments), v_prediction=True)

    monkeypatch.setattr("library.families.sd.files.locate", said)
    start = ["--pretrained_model_name_or_path", str(tiny_sd_file), "--prompt", "a cat", "--dry_run"]
    assert main(start) == 0 and main([*start, "--v_parameterization", "--zero_terminal_snr"]) == 0
    assert "'width': 768" in capsys.readouterr().out
    assert main([*start, "--no-v_parameterization"]) == 2
    assert "error: --no-v_parameterization: the files of" in capsys.readouterr().err


def test_a_guess_is_said(tmp_path, capsys):
    file = make_sd(tmp_path / "sd2", sizes=TINY_SD2)
    start = ["--pretrained_model_name_or_path", str(file), "--prompt", "a cat", "--dry_run"]
    assert main(start) == 0
    assert "does not say what it predicts" in capsys.readouterr().out
    assert main([*start, "--v_parameterization"]) == 0
    assert "does not say" not in capsys.readouterr().out


def test_a_prompt_file_names_a_sampler_that_the_model_has(tiny_sd_file, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --ss heun")
    start = ["--pretrained_model_name_or_path", str(tiny_sd_file), "--sample_prompts", str(prompts)]
    assert main([*start, "--output_dir", str(tmp_path / "made"), "--dry_run"]) == 2
    assert f"error: prompts.txt, line 1: --ss: {DDPM_NAMES} 'heun'" in capsys.readouterr().err
