"""Runs whose blocks are compiled: with torch's own kernels in the graphs, the numbers are those of plain runs."""

import re
from dataclasses import replace

import pytest
import torch

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
COMPILED = {"torch_compile": True, "dynamo_backend": "eager"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "options", "graphs"),
    [
        # first block, middle and last block, each with and without gradients; the first sees tokens without gradient
        pytest.param("trainer", {"network_train_unet_only": True}, 6, id="sd3"),
        # each stage is of its own kind
        pytest.param("sd_trainer", {"network_train_unet_only": True}, 32, id="sd", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_trains_and_is_drawn_the_same(name, options, graphs, request, tmp_path, capsys):
    trainer = request.getfixturevalue(name)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --l 3 --d 5\n")
    options = {**CACHED, **options, "sample_prompts": prompts, "sample_every_n_steps": 2, "max_train_steps": 2}
    assert trainer("plain", **options) == 0
    assert "compiled" not in capsys.readouterr().err
    assert trainer("compiled", **options, **COMPILED) == 0
    told = re.search(r"compiled (\d+) graphs with eager in \d+ s", capsys.readouterr().err)
    assert told and int(told[1]) <= 2 * graphs  # twice: a batch of one has graphs of its own
    assert trainer.losses("compiled") == trainer.losses("plain")
    ours, plain = trainer.weights("compiled"), trainer.weights("plain")
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    pictures = [sorted((tmp_path / output / "sample").iterdir()) for output in ("compiled", "plain")]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]] != []


@pytest.mark.slow
def test_a_recomputed_model_learns_nearly_the_same(sana_trainer, capsys):
    """Pictures lie otherwise in Sana's graphs, for inductor's sake, and convolutions sum in another order."""
    options = {**CACHED, "gradient_checkpointing": True, "max_train_steps": 3}
    assert sana_trainer("plain", **options) == 0
    assert sana_trainer("compiled", **options, **COMPILED) == 0
    told = re.search(r"compiled (\d+) graphs with eager in \d+ s", capsys.readouterr().err)
    assert told and int(told[1]) <= 2
    assert sana_trainer.losses("compiled") == pytest.approx(sana_trainer.losses("plain"), rel=1e-6)
    ours, plain = sana_trainer.weights("compiled"), sana_trainer.weights("plain")
    assert all(torch.allclose(ours[name], plain[name], rtol=1e-2, atol=1e-5) for name in plain)


def test_what_can_not_be_is_said_before_anything_is_loaded(full_trainer, capsys, monkeypatch):
    assert full_trainer("out", dynamo_backend="eager") == 2
    assert "--dynamo_backend does nothing without --torch_compile" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert full_trainer("out", torch_compile=True) == 2
    assert "error: --torch_compile needs a C++ compiler" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert full_trainer("out", **COMPILED) == 2
    assert "error: --torch_compile doesn't go with weights that are spread" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("job", ["adapter", "full"])
@pytest.mark.parametrize("name", ["trainer", "sana_trainer", "sd_trainer"])
def test_the_compilers_own_code_learns_nearly_the_same(name, job, request):
    """With pictures of several shapes, so that sizes are variables."""
    trainer = replace(request.getfixturevalue(name), job=job)
    options = {**CACHED, "max_train_steps": 4, "mixed_precision": "no"}
    options |= {"network_train_unet_only": True} if job == "adapter" else {"gradient_checkpointing": True}
    if trainer.family == "sd":  # at 64 px its lowest level has one position, of which a norm keeps little but the sign
        options["dataset_config"] = trainer.folder / "larger.toml"
        larger = trainer.dataset().read_text().replace("resolution = 64", "resolution = 128")
        options["dataset_config"].write_text(larger)
    assert trainer("plain", **options) == 0
    assert trainer("compiled", **options, torch_compile=True) == 0
    assert trainer.losses("compiled") == pytest.approx(trainer.losses("plain"), rel=1e-4)
