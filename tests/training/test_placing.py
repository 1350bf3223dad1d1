"""Where a frozen denoiser's weights lie changes nothing of what is trained.

All batches here have two pictures or more: a CPU's product of a matrix and a single vector depends, in its last bits,
on where in memory the matrix begins.
"""

import pytest
import torch

from tests.training.late_moves import move_late
from tests.training.ranks import in_processes

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
NO_MODULATION = {"network_args": ["x_mod_dim=0", "context_mod_dim=0"]}


@pytest.fixture(params=["sd3", "sana"])
def job(request, tiny_file, tiny_sana_file, photos, tmp_path, monkeypatch):
    from tests.conftest import Trainer

    checkpoint = tiny_file if request.param == "sd3" else tiny_sana_file
    trainer = Trainer(checkpoint, photos, tmp_path, request.param)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --l 3 --d 5\n")

    def run(output, *, moved=False, **options):
        with monkeypatch.context() as patch:
            made = move_late(patch) if moved else []
            options = {"sample_prompts": prompts, "sample_every_n_steps": 2, **options}
            assert trainer(output, **CACHED, **options) == 0
        return made

    run.trainer = trainer
    return run


def same(trainer, one, other):
    assert trainer.losses(one) == trainer.losses(other)
    ours, theirs = trainer.weights(one), trainer.weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    pictures = [sorted((trainer.folder / output / "sample").iterdir()) for output in (one, other)]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]] != []


def test_swapped_blocks_train_with_the_same_bytes(job):
    assert job("plain") == []
    checkpointing = {"gradient_checkpointing": True}
    variants = {
        "swapped": {"blocks_to_swap": 1},
        "all": {"blocks_to_swap": 3, "gradient_accumulation_steps": 1},
        "checkpointed": {"blocks_to_swap": 3, **checkpointing},
        "offloaded": {"blocks_to_swap": 2, **checkpointing, "cpu_offload_checkpointing": True},
        "every second": {"blocks_to_swap": 3, **checkpointing, "gradient_checkpointing_interval": 2},
        "attention kept": {"blocks_to_swap": 2, **checkpointing, "gradient_checkpointing_keep_attention": True},
    }
    if job.trainer.family == "sd3":  # the same machinery
        variants = {name: variants[name] for name in ("swapped", "offloaded", "attention kept")}
    for name, options in variants.items():
        (transfers,) = job(name, moved=True, **options)
        assert transfers.fetched
        same(job.trainer, name, "plain")


def test_two_processes_swap_each_for_itself(job):
    options = {"max_train_steps": 2, "gradient_checkpointing": True}
    assert in_processes(2, lambda rank: len(job("plain", **options))) == [0, 0]
    assert in_processes(2, lambda rank: len(job("swapped", moved=True, blocks_to_swap=2, **options))) == [1, 1]
    same(job.trainer, "swapped", "plain")


def test_a_quantised_base_swaps_with_the_same_bytes_and_trains_near_the_plain_one(job):
    assert job("plain") == []
    precision, near = {"sd3": ("nf4-bnb", 0.1), "sana": ("int8", 0.01)}[job.trainer.family]
    job("quantised", base_model_precision=precision, quantize_via="cpu")
    assert job("moved", moved=True, base_model_precision=precision, blocks_to_swap=3)
    same(job.trainer, "moved", "quantised")
    losses, plain = job.trainer.losses("quantised"), job.trainer.losses("plain")
    assert losses != plain and losses == pytest.approx(plain, rel=near)


def test_modulation_streams_once_a_pass(job, capsys):
    options = {**NO_MODULATION, "stream_modulation": True}
    if job.trainer.family == "sana":
        assert job.trainer("refused", **CACHED, stream_modulation=True) == 2
        assert "--stream_modulation does nothing for Sana" in capsys.readouterr().err
        return
    assert job("plain", **NO_MODULATION) == []
    for name, more in {"streamed": {}, "both": {"blocks_to_swap": 2, "gradient_checkpointing": True}}.items():
        assert len(job(name, moved=True, **options, **more)) == 1 + bool(more)
        same(job.trainer, name, "plain")
    assert job.trainer("refused", **CACHED, stream_modulation=True) == 2
    assert "the adapter trains modulation layers" in capsys.readouterr().err


def test_what_can_not_be_is_said_before_anything_is_loaded(job, capsys, full_trainer):
    assert job.trainer("out", **CACHED, blocks_to_swap=4) == 2
    assert "--blocks_to_swap 4: the model has 3 blocks; lower it" in capsys.readouterr().err
    assert full_trainer("out", blocks_to_swap=1, base_model_precision="int8", stream_modulation=True) == 2
    error = capsys.readouterr().err
    for name in ("base_model_precision", "stream_modulation"):
        assert f"error: --{name} is for weights that stay as they are" in error
    assert "error: --blocks_to_swap 1 in a full fine-tune needs --fused_backward_pass" in error
    assert full_trainer("out", blocks_to_swap=4, fused_backward_pass=True, max_grad_norm=0) == 2
    assert "--blocks_to_swap 4: the model has 3 blocks; lower it" in capsys.readouterr().err
    assert job.trainer("out", **CACHED, cpu_offload_checkpointing=True, quantize_via="cpu") == 2
    error = capsys.readouterr().err
    assert "--cpu_offload_checkpointing does nothing without --gradient_checkpointing" in error
    assert "--quantize_via does nothing without --base_model_precision" in error


def test_on_the_host_nothing_moves_and_that_is_said(job, capsys, full_trainer):
    options = {"blocks_to_swap": 2, "gradient_checkpointing": True, "cpu_offload_checkpointing": True}
    assert job("out", **options) == []
    told = capsys.readouterr().err
    assert "nothing is swapped or streamed" in told and "none is moved" in told
    if job.trainer.family == "sana":
        return
    fused = {"fused_backward_pass": True, "max_grad_norm": 0}
    assert full_trainer("full", **fused, blocks_to_swap=1, cache_latents=True, max_train_steps=1) == 0
    assert "nothing is swapped" in capsys.readouterr().err
