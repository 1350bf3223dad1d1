"""What every kind of training keeps to: an adapter on SD3, all of SD3, all of Sana."""

import math

import pytest
import torch

from library.training import step

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}


@pytest.fixture(params=["trainer", "full_trainer", "sana_trainer"])
def job(request):
    trainer = request.getfixturevalue(request.param)

    def run(output, **options):
        only = {"network_train_unet_only": True} if trainer.network else {}
        return trainer(output, **{**only, **options})

    run.trainer = trainer
    return run


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_accumulation_is_a_larger_batch(job):
    one = job.trainer.dataset()
    text = one.read_text()
    for batch, accumulation in ((4, 1), (2, 2)):
        dataset = job.trainer.folder / f"batches-of-{batch}.toml"
        dataset.write_text(text.replace("batch_size = 2", f"batch_size = {batch}\nenable_bucket = false"))
        options = {**CACHED, "dataset_config": dataset, "optimizer_type": "SGDNesterov", "max_train_steps": 2}
        assert job(f"{batch}", **options, gradient_accumulation_steps=accumulation) == 0
    four, two = job.trainer.weights("4"), job.trainer.weights("2")
    assert all(torch.allclose(four[name], two[name], rtol=1e-4, atol=1e-6) for name in four)
    assert job.trainer.losses("4") == pytest.approx(job.trainer.losses("2"), rel=1e-5)


@pytest.mark.usefixtures("unforeseen")
def test_a_loss_that_is_no_number_stops_before_anything_is_saved(job, capsys, monkeypatch):
    calls = []
    per_sample = step._per_sample

    def poisoned(*arguments):
        calls.append(1)
        loss = per_sample(*arguments)
        return loss * math.nan if len(calls) == 3 else loss

    monkeypatch.setattr(step, "_per_sample", poisoned)
    assert job("out", **CACHED, save_every_n_steps=2, save_state=True) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "step 3: the loss is nan; samples: 0/0/" in line
    folder = job.trainer.folder / "out"
    assert not (folder / "run.safetensors").exists()
    assert all(tensor.isfinite().all() for tensor in job.trainer.weights("out", "run-step00000002").values())


def test_a_run_is_a_function_of_its_seed(job):
    for output, seed in (("one", 1), ("same", 1), ("other", 2)):
        assert job(output, **CACHED, seed=seed, max_train_steps=2) == 0
    weights = {output: job.trainer.weights(output) for output in ("one", "same", "other")}
    assert equal(weights["one"], weights["same"]) and not equal(weights["one"], weights["other"])


def test_half_way_and_on_ends_with_the_same_bytes(job):
    options = {**CACHED, "max_train_steps": 4, "lr_scheduler": "cosine"}
    assert job("whole", **options, save_every_n_steps=3, save_state=True) == 0
    state = job.trainer.folder / "whole" / "run-step00000003-state"
    assert job("resumed", **options, resume=state) == 0
    assert equal(job.trainer.weights("whole"), job.trainer.weights("resumed"))


def test_the_gradient_is_logged_as_it_was_before_clipping(job):
    for output, limit in (("clipped", 1e-3), ("free", 0)):
        assert job(output, **CACHED, max_grad_norm=limit, max_train_steps=1) == 0
    norms = [job.trainer.log(output)[0]["gradient_norm"] for output in ("clipped", "free")]
    assert norms[0] == norms[1] > 1e-3
