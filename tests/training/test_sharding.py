"""A model that is spread over two processes trains as a whole one, and its states go both ways."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.errors import ConfigError
from library.training.sharded_states import SHARDED, saved_shapes

ROOT = Path(__file__).parents[2]
CACHED = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
ZERO_2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
}
# a large eps: AdamW's first step is the gradient's sign, which rounding turns over where the gradient is almost zero
ADAMW = {"optimizer_type": "AdamW", "optimizer_args": ["eps=0.01"], "learning_rate": 1e-2}


def launch(trainer, output, environment, script=None, **options):
    """Train in two processes on gloo with accelerate's settings in the environment; returns what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [*(script or [trainer.script]), *trainer.arguments(output, **options)]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


def close(one, two):
    return one.keys() == two.keys() and all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def logged(trainer, output, name):
    return {line["step"]: line[name] for line in trainer.log(output) if name in line}


def pictures(trainer, output):
    folder = trainer.folder / output / "sample"
    return {path.name: np.asarray(Image.open(path)).astype(float) for path in sorted(folder.glob("*.png"))}


def test_two_processes_with_halves_equal_one_with_the_whole(full_trainer):
    trainer = full_trainer
    # batches of 1, and 3 pictures are left for training: the epoch's last step leaves the second process without work
    dataset = trainer.dataset(general='caption_extension = ".txt"')
    dataset.write_text(dataset.read_text().replace("batch_size = 2", "batch_size = 1"))
    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\na clock --w 64 --h 64 --s 2 --d 2\n")
    options = {**CACHED, **ADAMW, "dataset_config": dataset, "max_train_steps": 4, "gradient_checkpointing": True}
    options |= {"save_every_n_steps": 2, "save_state": True, "use_ema": True, "ema_decay": 0.5}
    options |= {"validation_split": 0.25, "validate_every_n_steps": 2, "ema_validation": "comparison"}
    options |= {"sample_prompts": prompts, "sample_every_n_steps": 4}
    assert trainer("one", **options, gradient_accumulation_steps=2) == 0
    found = trainer.folder / "held"
    launch(trainer, "two", FSDP, [str(ROOT / "tests/training/sharded_process.py"), "sd3", str(found)], **options)

    assert trainer.losses("two") == pytest.approx(trainer.losses("one"), rel=1e-5)
    assert len(trainer.losses("two")) == 4
    for name in ("gradient_norm", "loss/validation", "loss/validation_raw"):
        one, two = logged(trainer, "one", name), logged(trainer, "two", name)
        assert len(one) >= 2 and two == pytest.approx(one, rel=1e-5)
    for stem in ("run", "run-step00000002"):  # the averages
        assert close(trainer.weights("one", stem), trainer.weights("two", stem))
    one, two = pictures(trainer, "one"), pictures(trainer, "two")
    assert len(one) == 4 and one.keys() == two.keys()  # of two prompts, with the average and without
    assert all(np.abs(one[name] - two[name]).max() <= 1 for name in one)

    for process in range(2):
        holds = json.loads(Path(f"{found}{process}").read_text())
        assert holds["kinds"] == ["DTensor"] and holds["sharded"]
        assert 0.45 < holds["weights"] / holds["all_weights"] < 0.55
        assert holds["all_optimizer"] == 2 * holds["all_weights"]
        assert 0.45 < holds["optimizer"] / holds["all_optimizer"] < 0.55
        assert holds["environment"] == ["ACCELERATE_USE_CPU"]
        assert holds["first_non_finite"] == 1 and holds["all_finite"] is None
        assert holds["norm"] == pytest.approx(32**0.5)
        assert holds["clipped"] == pytest.approx(2 / 32**0.5)
        assert holds["optimizers"].keys() >= {"AdamW", "SGD"}
        assert all(difference < 1e-6 for difference in holds["optimizers"].values())

    state = trainer.folder / "two" / "run-step00000002-state"
    assert not list(state.parent.glob(".*")) and len(list((state / SHARDED).glob("*.distcp"))) == 2
    again = {**options, "sample_prompts": None, "sample_every_n_steps": None, "resume": state}
    launch(trainer, "again", FSDP, **again)
    assert equal(trainer.weights("again"), trainer.weights("two"))
    for name in ("loss/current", "loss/validation", "loss/validation_raw"):
        whole = logged(trainer, "two", name)
        assert logged(trainer, "again", name) == {step: loss for step, loss in whole.items() if step > 2}
    assert trainer("alone", **again, gradient_accumulation_steps=2) == 0
    later = {step: loss for step, loss in trainer.losses("two").items() if step > 2}
    assert trainer.losses("alone") == pytest.approx(later, rel=1e-5)
    assert close(trainer.weights("alone"), trainer.weights("two"))


def test_zero_2_with_text_encoders_goes_on_from_a_whole_state(full_trainer):
    trainer = full_trainer
    options = {**ADAMW, "cache_latents": True, "train_text_encoder": True, "max_train_steps": 4, "use_ema": True}
    options |= {"save_parts": ["text_encoders"], "ema_device": "cpu"}
    once = {"save_every_n_steps": 2, "save_state": True}
    assert trainer("one", **options, **once, gradient_accumulation_steps=2) == 0
    state = trainer.folder / "one" / "run-step00000002-state"
    said = launch(trainer, "two", ZERO_2, **options, resume=state)
    assert "DeepSpeed ZeRO-2: torch's fully_shard does this work" in said
    later = {step: loss for step, loss in trainer.losses("one").items() if step > 2}
    assert trainer.losses("two") == pytest.approx(later, rel=1e-5)
    assert close(trainer.weights("one"), trainer.weights("two"))


def test_bf16_computes_as_in_one_process(sana_trainer):
    trainer = sana_trainer
    options = {**CACHED, **ADAMW, "learning_rate": 1e-3, "mixed_precision": "bf16", "max_train_steps": 2}
    launch(trainer, "two", {**FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, **options)
    assert trainer("one", **options, gradient_accumulation_steps=2) == 0
    one, two = trainer.losses("one"), trainer.losses("two")
    assert two[1] == one[1]  # before any sum over processes has been used
    assert two[2] == pytest.approx(one[2], rel=1e-4)
    assert close(trainer.weights("one"), trainer.weights("two"))
