"""A step done again from its bundle has the bits that the run had."""

import json
import logging

import pytest
import torch

from tools.replay import main

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}


@pytest.fixture(params=["trainer", "full_trainer", "sana_trainer"])
def job(request):
    trainer = request.getfixturevalue(request.param)

    def run(output, **options):
        only = {"network_train_unet_only": True} if trainer.network else {}
        return trainer(output, **{**CACHED, **only, **options})

    run.trainer = trainer
    return run


@pytest.fixture
def replay(capsys):
    def call(folder, *options):
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        capsys.readouterr()
        try:
            code = main([str(folder), *map(str, options)])
        finally:
            logging.getLogger().handlers.clear()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def facts(bundle):
    return json.loads((bundle / "bundle.json").read_text())


def test_any_step_is_done_again_to_the_bit(job, replay):
    assert job("plain", max_train_steps=3) == 0
    assert job("out", max_train_steps=3, replay_bundle_at_step=2) == 0
    plain, out = job.trainer.weights("plain"), job.trainer.weights("out")
    assert all(torch.equal(plain[name], out[name]) for name in plain)
    bundle = job.trainer.folder / "out" / "run-replay-step00000002"
    code, printed = replay(bundle)
    assert code == 0, printed
    (line,) = [line for line in job.trainer.log("out") if line["step"] == 2]
    recorded = f"loss {line['loss/current']!r}, gradient norm {line['gradient_norm']!r}"
    assert f"reproduced: {recorded}, as recorded" in printed
    assert "first layer whose output is not finite: none" in printed
    assert printed.count(".png") == 2


def test_weights_that_grew_beyond_all_numbers(job, replay):
    assert job("out", learning_rate=1e30, max_grad_norm=0) == 2
    bundle = job.trainer.folder / "out" / "run-nonfinite-step00000002"
    assert facts(bundle)["numbers"]["loss"] == "nan"
    code, printed = replay(bundle)
    assert code == 0, printed
    assert "reproduced: loss nan, gradient norm nan, as recorded" in printed
    assert "first layer whose output is not finite: denoiser." in printed
    assert "its input was finite" in printed
    assert facts(bundle)["numbers"]["parameters"][0] in printed.partition("gradients are not finite: ")[2]
