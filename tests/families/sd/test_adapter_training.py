"""Adapters on Stable Diffusion trained end to end: resuming, starting points, metadata."""

import json

import pytest
import torch

from library.io.header import read_header

LOKR = {"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=4"], "network_alpha": 1}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_lycoris_trains_both_parts_and_resuming_is_bit_equal(sd_trainer):
    options = {**LOKR, "max_train_steps": 2}
    assert sd_trainer("whole", **options, save_every_n_steps=1, save_state=True) == 0
    assert sd_trainer("resumed", **options, resume=sd_trainer.folder / "whole" / "run-step00000001-state") == 0
    whole = sd_trainer.weights("whole")
    assert equal(whole, sd_trainer.weights("resumed"))
    zeros_at_first = [name for name in whole if name.endswith((".lokr_w2", ".lokr_w2_b"))]
    # At 64 px the middle has one position: what it asks itself for changes nothing.
    alone = tuple(f"_mid_block_attentions_0_transformer_blocks_0_attn1_to_{part}" for part in "qk")
    learned = [name for name in zeros_at_first if not name.split(".")[0].endswith(alone)]
    assert learned and all(whole[name].any() for name in learned)
    names = {name.split(".")[0] for name in whole}
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1" in names
    assert "lora_unet_mid_block_resnets_0_conv1" in names
    metadata = read_header(sd_trainer.folder / "whole" / "run.safetensors").metadata
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"]) == {"algo": "lokr", "factor": "4"}


def test_training_goes_on_from_a_file_in_either_spelling_and_merges_it(sd_trainer):
    settings = {"network_args": ["conv_dim=2", "conv_alpha=2", "mid_lr_weight=0.5"], "max_train_steps": 1}
    assert sd_trainer("first", **settings, save_format="both") == 0
    folder = sd_trainer.folder / "first"
    metadata = read_header(folder / "run.safetensors").metadata
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2", "mid_lr_weight": "0.5"}
    assert (metadata["ss_network_dim"], metadata["ss_network_module"]) == ("2", "networks.lora")
    from_file = {"dim_from_weights": True, "network_dim": None, "network_alpha": None}
    runs = {
        "on": {**settings, "network_weights": folder / "run.safetensors"},
        "again": {"max_train_steps": 1, **from_file, "network_weights": folder / "run_diffusers.safetensors"},
        "merged": {**settings, "base_weights": [folder / "run.safetensors"]},
    }
    for name, options in runs.items():
        assert sd_trainer(name, **options) == 0
    losses = {name: sd_trainer.losses(name)[1] for name in runs}
    assert losses["on"] == pytest.approx(losses["again"], rel=1e-5) == pytest.approx(losses["merged"], rel=1e-5)
    assert losses["on"] != pytest.approx(sd_trainer.losses("first")[1], rel=1e-4)
    assert sd_trainer.weights("on").keys() == sd_trainer.weights("again").keys()
