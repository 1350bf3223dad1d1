import dataclasses
import types

import pytest
import torch

from library.config.errors import ConfigError
from library.config.memory import MemoryConfig
from library.training import attention
from library.training.attention import settle_attention
from library.training.state_files import read_progress

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}


def saved_mode(trainer, output):
    state = trainer.folder / output / "run-step00000002-state"
    return read_progress(state)["settings"]["attn_mode"]


def test_a_measured_choice_is_written_down_and_a_resumed_run_keeps_it(trainer, monkeypatch, capsys):
    monkeypatch.setattr(attention, "_measured", lambda *_: "torch-flash")
    options = {**CACHED, "attn_mode": "auto", "max_train_steps": 4}
    assert trainer("whole", **options, save_every_n_steps=2, save_state=True) == 0
    assert saved_mode(trainer, "whole") == "torch-flash"
    monkeypatch.setattr(attention, "_measured", lambda *_: pytest.fail("measured again"))
    capsys.readouterr()
    assert trainer("resumed", **options, resume=trainer.folder / "whole" / "run-step00000002-state") == 0
    assert "--attn_mode auto: torch-flash, as the state has it" in capsys.readouterr().err
    whole, resumed = trainer.weights("whole"), trainer.weights("resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_fastest_kernel_is_taken_for_the_largest_pictures(monkeypatch, caplog, trainer):
    asked = []

    def measure(shape, **of):
        asked.append((shape, of))
        return {"torch-efficient": 0.2, "torch-cudnn": 0.1}

    monkeypatch.setattr(attention, "measure_kernels", measure)
    gpu = types.SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16", num_processes=1)
    with caplog.at_level("INFO"):
        settled = trainer.with_run(
            "out", lambda run: settle_attention(auto(run.config), run.family, None, gpu), **CACHED
        )
    assert settled.memory == MemoryConfig(attn_mode="torch-cudnn")
    ((shape, of),) = asked
    assert shape.queries == shape.keys == 16 + 77 + 256 and not shape.masked
    assert of == {"batch_size": 2, "device": gpu.device, "dtype": torch.bfloat16}


def auto(config):
    return dataclasses.replace(config, memory=MemoryConfig(attn_mode="auto"))


def test_what_can_not_be_is_said_before_anything_is_loaded(trainer, sana_trainer, capsys):
    assert trainer("out", **CACHED, attn_mode="flash", mixed_precision="bf16") == 2
    assert "error: --attn_mode flash: " in (error := capsys.readouterr().err) and "pip install flash-attn" in error
    assert trainer("out", **CACHED, attn_mode="sage") == 2
    assert "error: --attn_mode: expected one of torch, auto" in capsys.readouterr().err
    assert trainer("out", **CACHED, attn_mode="torch-cudnn", xformers=True) == 2
    assert "--xformers is the same as --attn_mode xformers, not torch-cudnn" in capsys.readouterr().err
    assert sana_trainer("out", attn_mode="torch-flash") == 2
    assert "error: --attn_mode torch-flash does nothing for Sana" in capsys.readouterr().err


def test_flash_attn_wants_a_gpu_and_half_precision(trainer, monkeypatch, capsys):
    monkeypatch.setattr(attention, "attention_function", lambda name: None)
    assert trainer("out", **CACHED, attn_mode="flash") == 2
    assert "flash-attn runs on GPUs only" in capsys.readouterr().err
    config = trainer.with_run("made", lambda run: run.config, **CACHED)
    config = dataclasses.replace(config, memory=MemoryConfig(attn_mode="flash"))
    with pytest.raises(ConfigError, match="add --mixed_precision bf16"):
        attention.check_attention(config, accelerator_available=True)


def test_without_an_accelerator_nothing_is_measured_and_that_is_said(trainer, capsys):
    assert trainer("out", **CACHED, attn_mode="auto", max_train_steps=1) == 0
    assert "--attn_mode auto: no accelerator" in capsys.readouterr().err
