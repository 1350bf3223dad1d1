"""Runs whose blocks are compiled: with torch's own kernels in the graphs, the numbers are those of plain runs."""

import re

import pytest
import torch

from tests.conftest import Trainer

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
COMPILED = {"torch_compile": True, "dynamo_backend": "eager"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "network", "options", "graphs"),
    [
        # first block, middle and last block, each with and without gradients; the first sees tokens without gradient
        pytest.param("sd3", True, {"network_train_unet_only": True}, 6, id="sd3 adapter with samples"),
        pytest.param(
            *("sana", False, {"gradient_checkpointing": True}, 2),
            id="sana full, checkpointed, with samples",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_trains_and_draws_the_same(
    family, network, options, graphs, tiny_file, tiny_sana_file, photos, tmp_path, capsys
):
    trainer = Trainer(
        tiny_file if family == "sd3" else tiny_sana_file, photos, tmp_path, family, "adapter" if network else "full"
    )
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
@pytest.mark.parametrize("network", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("family", ["sd3", "sana"])
def test_the_compilers_own_code_learns_nearly_the_same(family, network, tiny_file, tiny_sana_file, photos, tmp_path):
    """With pictures of several shapes, so that sizes are variables."""
    trainer = Trainer(
        tiny_file if family == "sd3" else tiny_sana_file, photos, tmp_path, family, "adapter" if network else "full"
    )
    options = {**CACHED, "max_train_steps": 4, "mixed_precision": "no", "gradient_checkpointing": not network}
    options = {name: value for name, value in options.items() if value is not False}
    if network:
        options["network_train_unet_only"] = True
    assert trainer("plain", **options) == 0
    assert trainer("compiled", **options, torch_compile=True) == 0
    assert trainer.losses("compiled") == pytest.approx(trainer.losses("plain"), rel=1e-4)
