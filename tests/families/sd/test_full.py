"""train.py on Stable Diffusion: what is saved in either layout."""

import dataclasses
import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.config.model import ModelConfig
from library.families.sd.checkpoint import load_text_encoder, load_unet, load_vae
from library.families.sd.files import locate
from library.families.sd.options import SdOptions
from library.nn.attention import sdpa
from tests.tiny import TINY_SD2
from tools.miniature_sd import make_sd

CPU = {"device": "cpu", "dtype": torch.float32}
WHOLE = {"cache_latents": True, "max_train_steps": 1, "save_parts": ["vae", "text_encoders"]}


def weights(path):
    """Of every part, as the trainer loads them."""
    files = locate(ModelConfig(pretrained_model_name_or_path=str(path)), SdOptions())
    return {
        "denoiser": load_unet(files, attention=sdpa, **CPU).state_dict(),
        "vae": load_vae(files, **CPU).state_dict(),
        "clip": load_text_encoder(files.clip, is_v2=files.is_v2, **CPU).state_dict(),
    }


def changed(one, other):
    return {name for name, part in one.items() if any(not torch.equal(part[key], other[name][key]) for key in part)}


def test_a_trained_text_encoder_is_written_in_both_layouts(sd_full_trainer):
    options = {**WHOLE, "train_text_encoder": True}
    assert sd_full_trainer("single", **options) == 0
    assert sd_full_trainer("folder", **options, save_model_as="diffusers") == 0
    single = weights(sd_full_trainer.folder / "single" / "run.safetensors")
    assert changed(single, weights(sd_full_trainer.folder / "folder" / "run")) == set()
    assert changed(single, weights(sd_full_trainer.checkpoint)) == {"denoiser", "clip"}
    assert sd_full_trainer.weights("single").keys() == load_file(sd_full_trainer.checkpoint).keys()
    with safe_open(sd_full_trainer.folder / "single" / "run.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"


def test_the_second_generation_says_that_it_predicts_velocities(sd_full_trainer, tmp_path):
    base = make_sd(tmp_path / "sd2", sizes=TINY_SD2, variant="sd2-v")
    trainer = dataclasses.replace(sd_full_trainer, checkpoint=base)
    of_v1 = sd_full_trainer.checkpoint.parent / "tokenizer"  # the same words, other padding
    assert trainer("out", **WHOLE, zero_terminal_snr=True, save_model_as="diffusers", tokenizer_dir=of_v1) == 0
    folder = tmp_path / "out" / "run"
    assert changed(weights(folder), weights(base)) == {"denoiser"}
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (schedule["prediction_type"], schedule["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["pad_token"] == "!"


def test_all_weights_may_be_taught_otherwise_than_the_files_say(sd_full_trainer, tmp_path, capsys):
    """Velocities from a folder whose schedule says noise; the next run takes them from the files."""
    assert sd_full_trainer("noise", **WHOLE, save_model_as="diffusers") == 0
    trainer = dataclasses.replace(sd_full_trainer, checkpoint=tmp_path / "noise" / "run")
    otherwise = {"v_parameterization": True, "zero_terminal_snr": True}
    capsys.readouterr()
    assert dataclasses.replace(trainer, job="adapter")("adapter", max_train_steps=1, v_parameterization=True) == 2
    assert "(epsilon); remove it" in capsys.readouterr().err
    assert trainer("velocities", **WHOLE, **otherwise, save_model_as="diffusers") == 0
    told = capsys.readouterr().err
    assert "--v_parameterization: the files of" in told and "(epsilon); this run teaches it otherwise" in told
    schedule = json.loads((tmp_path / "velocities" / "run" / "scheduler" / "scheduler_config.json").read_text())
    assert (schedule["prediction_type"], schedule["rescale_betas_zero_snr"]) == ("v_prediction", True)
    taught = dataclasses.replace(trainer, checkpoint=tmp_path / "velocities" / "run")
    ddpm = taught.with_run("next", lambda run: run.family.objective.ddpm, **WHOLE)
    assert ddpm.v_parameterization is ddpm.zero_terminal_snr is True
    assert "teaches it otherwise" not in capsys.readouterr().err


def test_a_checkpoint_with_code_in_it_is_refused_in_one_line(sd_trainer, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    path = sd_trainer.checkpoint
    checkpoint = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(path), "callbacks": Evil()}, checkpoint)
    tokenizer = path.parent / "tokenizer"
    assert sd_trainer("out", pretrained_model_name_or_path=checkpoint, tokenizer_dir=tokenizer, max_train_steps=1) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(checkpoint) in told and "more than tensors" in told
    assert not (tmp_path / "written").exists()
