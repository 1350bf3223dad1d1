"""Where the frozen U-Net's weights lie, and how they are stored, under an adapter with convolutions.

A U-Net's stages hand what they made to stages far behind them, unlike blocks that follow each other.
"""

import pytest
import torch

from tests.training.late_moves import move_late

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
C3LIER = {"network_args": ["conv_dim=2"], "max_train_steps": 2}
STAGES = 16


@pytest.fixture
def job(sd_trainer, monkeypatch):
    def run(output, *, moved=False, **options):
        with monkeypatch.context() as patch:
            made = move_late(patch) if moved else []
            assert sd_trainer(output, **{**CACHED, **C3LIER, **options}) == 0
        return made

    run.trainer = sd_trainer
    return run


def same(trainer, one, other):
    assert trainer.losses(one) == trainer.losses(other)
    ours, theirs = trainer.weights(one), trainer.weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_swapped_and_checkpointed_stages_train_with_the_same_bytes(job):
    assert job("plain") == []
    checkpointing = {"gradient_checkpointing": True}
    variants = {
        "swapped": {"blocks_to_swap": 1},
        "checkpointed": {"blocks_to_swap": STAGES, **checkpointing, "cpu_offload_checkpointing": True},
        "attention kept": {"blocks_to_swap": 5, **checkpointing, "gradient_checkpointing_keep_attention": True},
    }
    for name, options in variants.items():
        (transfers,) = job(name, moved=True, **options)
        assert transfers.fetched
        same(job.trainer, name, "plain")


def test_a_quantised_base_trains_near_the_plain_one_and_keeps_its_wide_convolutions(job):
    from library.memory.quantization import quantized_layers

    job("plain")
    plain = job.trainer.losses("plain")
    job("int8", base_model_precision="int8", quantize_via="cpu")
    losses = job.trainer.losses("int8")
    assert losses != plain and losses == pytest.approx(plain, rel=0.01)
    job("moved", moved=True, base_model_precision="int8", quantize_via="cpu", blocks_to_swap=5)
    same(job.trainer, "moved", "int8")

    def stored(run):
        return quantized_layers(run.denoiser)

    layers = job.trainer.with_run("stored", stored, **CACHED, **C3LIER, base_model_precision="int8", quantize_via="cpu")
    assert any(name.endswith(".proj_in") for name in layers) and any(name.endswith(".to_q") for name in layers)
    wide = (".in_layers.2", ".out_layers.3", ".op", ".conv")
    assert not any(name.endswith(wide) for name in layers)


def test_streamed_modulation_is_refused_with_the_reason(job, capsys):
    assert job.trainer("out", **CACHED, stream_modulation=True) == 2
    assert "--stream_modulation does nothing for" in capsys.readouterr().err
