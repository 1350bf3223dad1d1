"""A model that is spread over two processes trains as a whole one, and its states go both ways."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.errors import ConfigError
from library.training.sharded_states import SHARDED, saved_shapes
from library.training.sharding_settings import asked_sharding
from tests.training.ranks import in_processes
from tests.training.sharded_process import train_and_tell

ROOT = Path(__file__).parents[2]
CACHED = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
PROMPTS = ROOT / "examples" / "sd3" / "quickstart_prompts.txt"
ZERO_2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
}
# a large eps: AdamW's first step is the gradient's sign, which rounding turns over where the gradient is almost zero
ADAMW = {"optimizer_type": "AdamW", "optimizer_args": ["eps=0.01"], "learning_rate": 1e-2}


def in_batches_of_one(trainer):
    """The trainer's dataset, each picture in a batch of its own."""
    dataset = trainer.dataset(general='caption_extension = ".txt"')
    dataset.write_text(dataset.read_text().replace("batch_size = 2", "batch_size = 1"))
    return dataset


def close(one, two):
    return one.keys() == two.keys() and all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def logged(trainer, output, name):
    return {line["step"]: line[name] for line in trainer.log(output) if name in line}


def pictures(trainer, output):
    folder = trainer.folder / output / "sample"
    return {path.name: np.asarray(Image.open(path)).astype(float) for path in sorted(folder.glob("*.png"))}


def test_two_processes_with_halves_equal_one_with_the_whole(full_trainer, capfd):
    trainer = full_trainer
    # 3 pictures are left for training: the epoch's last step leaves the second process without work
    dataset = in_batches_of_one(trainer)
    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\na clock --w 64 --h 64 --s 2 --d 2\n")
    options = {**CACHED, **ADAMW, "dataset_config": dataset, "max_train_steps": 4, "gradient_checkpointing": True}
    options |= {"save_every_n_steps": 2, "save_state": True, "use_ema": True, "ema_decay": 0.5}
    options |= {"validation_split": 0.25, "validate_every_n_steps": 2, "ema_validation": "comparison"}
    options |= {"sample_prompts": prompts, "sample_every_n_steps": 4, "ema_device": "accelerator"}
    assert trainer("one", **options, gradient_accumulation_steps=2) == 0
    found = trainer.folder / "held"
    assert in_processes(2, lambda rank: train_and_tell(trainer, "two", found, FSDP, **options)) == [0, 0]

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
    # one process has no room for its parts of a state: all know it, and go on
    saving = {"full_disk": "run-step00000003-state", "save_every_n_steps": 1, "on_save_error": "continue"}
    capfd.readouterr()
    assert in_processes(2, lambda rank: train_and_tell(trainer, "again", found, FSDP, **{**again, **saving})) == [0, 0]
    assert "can't be written: File too large" in capfd.readouterr().err
    names = {path.name for path in (trainer.folder / "again").iterdir()}
    assert {"run-step00000003.safetensors", "run-state"} <= names
    assert "run-step00000003-state" not in names and not any(name.startswith(".") for name in names)
    assert equal(trainer.weights("again"), trainer.weights("two"))
    for name in ("loss/current", "loss/validation", "loss/validation_raw"):
        whole = logged(trainer, "two", name)
        assert logged(trainer, "again", name) == {step: loss for step, loss in whole.items() if step > 2}
    assert trainer("alone", **again, gradient_accumulation_steps=2) == 0
    later = {step: loss for step, loss in trainer.losses("two").items() if step > 2}
    assert trainer.losses("alone") == pytest.approx(later, rel=1e-5)
    assert close(trainer.weights("alone"), trainer.weights("two"))


def test_zero_2_with_text_encoders_goes_on_from_a_whole_state(full_trainer, capfd):
    trainer = full_trainer
    options = {**ADAMW, "cache_latents": True, "train_text_encoder": True, "max_train_steps": 4, "use_ema": True}
    options |= {"save_parts": ["text_encoders"], "ema_device": "cpu", "ema_validation": "comparison"}
    # 3 pictures for training and 3 for validation: one process has fewer of both
    for picture in sorted((ROOT / "examples/data/photos").glob("[ab]*.png"))[:2]:
        shutil.copy(picture, trainer.photos)
        shutil.copy(picture.with_suffix(".txt"), trainer.photos)
    options |= {"dataset_config": in_batches_of_one(trainer), "validation_split": 0.5, "validate_every_n_steps": 1}
    once = {"save_every_n_steps": 2, "save_state": True}
    assert trainer("one", **options, **once, gradient_accumulation_steps=2) == 0
    state = trainer.folder / "one" / "run-step00000002-state"

    def train(rank):
        os.environ |= ZERO_2
        return trainer("two", **options, resume=state)

    assert in_processes(2, train) == [0, 0]
    assert "DeepSpeed ZeRO-2: torch's fully_shard does this work" in capfd.readouterr().err
    later = {step: loss for step, loss in trainer.losses("one").items() if step > 2}
    assert trainer.losses("two") == pytest.approx(later, rel=1e-5)
    for name in ("loss/validation", "loss/validation_raw"):
        later = {step: loss for step, loss in logged(trainer, "one", name).items() if step > 2}
        assert len(later) == 2 and logged(trainer, "two", name) == pytest.approx(later, rel=1e-5)
    assert close(trainer.weights("one"), trainer.weights("two"))


def test_bf16_computes_as_in_one_process(sana_trainer):
    trainer = sana_trainer
    # three batches of 1 in every step: two for the first process, one and one done along for the second
    dataset = in_batches_of_one(trainer)
    (trainer.photos / "camera.png").unlink()
    options = {**CACHED, **ADAMW, "learning_rate": 1e-3, "mixed_precision": "bf16", "max_train_steps": 2}
    options["dataset_config"] = dataset
    configuration = trainer.folder / "fsdp.yaml"
    configuration.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_machines: 1\nnum_processes: 2\n"
        "main_process_port: 0\nfsdp_config:\n  fsdp_version: 2\n  fsdp_reshard_after_forward: true\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration), trainer.script]
    command += trainer.arguments("two", **options, gradient_accumulation_steps=2)
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert trainer("one", **options, gradient_accumulation_steps=4) == 0
    one, two = trainer.losses("one"), trainer.losses("two")
    assert two[1] == one[1]  # before any sum over processes has been used
    assert two[2] == pytest.approx(one[2], rel=1e-4)
    assert close(trainer.weights("one"), trainer.weights("two"))


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        (FSDP, {"optimizer_type": "AdamW8bit"}, "--optimizer_type AdamW8bit: with FSDP each process has a part"),
        (FSDP, {"optimizer_type": "CAME"}, "--optimizer_type CAME: with FSDP"),
        (FSDP, {"optimizer_type": "torch.optim.Adafactor"}, "--optimizer_type torch.optim.Adafactor: with FSDP"),
        (FSDP, {"fused_backward_pass": True, "max_grad_norm": 0}, "--fused_backward_pass works in one process"),
        (FSDP, {"mixed_precision": "fp16"}, "--mixed_precision fp16 scales the loss"),
        (FSDP, {"sample_prompts": PROMPTS, "sample_at_first": True, "preview_every": 1}, "--preview_every writes"),
        (
            FSDP,
            {"mixed_precision": "bf16", "full_bf16": True, "stochastic_rounding": True},
            "--stochastic_rounding draws for whole weights",
        ),
        (
            FSDP,
            {"mixed_precision": "bf16", "full_bf16": True, "kahan_summation": True},
            "--kahan_summation keeps the rests of whole weights",
        ),
        (FSDP, {"offload_optimizer_device": "cpu"}, "--offload_optimizer_device cpu moves whole states, and with FSDP"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "this program's --gradient_checkpointing"),
        ({**FSDP, "FSDP_IGNORED_MODULES": "x_embedder"}, {}, "ignored modules (x_embedder)"),
        ({**FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {}, "HYBRID_SHARD is not supported"),
        ({**FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "3"}, {}, "NO_SHARD is plain data parallelism"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "asks for Megatron-LM, which is not supported"),
        ({**ZERO_2, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {}, "ZeRO stage 0 spreads nothing"),
        (ZERO_2, {"max_grad_norm": 0.5}, "gradient_clipping is 1.0 and --max_grad_norm is 0.5"),
        (
            ZERO_2,
            {"gradient_accumulation_steps": 3},
            "gradient_accumulation_steps is 1 and --gradient_accumulation_steps is 3",
        ),
        (
            {**ZERO_2, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"},
            {},
            "offload_optimizer to nvme is not supported",
        ),
        ({**ZERO_2, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/no/such.json"}, {}, "/no/such.json can't be read"),
    ],
)
def test_what_a_sharded_model_cannot_do_is_refused_before_loading(
    full_trainer, monkeypatch, capsys, environment, options, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert full_trainer("out", **CACHED, **options, dry_run=True) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line


def test_an_adapter_is_not_sharded(trainer, monkeypatch, capsys):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    assert trainer("out", **CACHED, network_train_unet_only=True) == 2
    assert "asks for FSDP, but an adapter is small" in capsys.readouterr().err
    assert not (trainer.folder / "out" / "cache").exists()


def test_deepspeeds_file_is_read(full_trainer, monkeypatch, capsys):
    path = full_trainer.folder / "zero.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    written = {"zero_optimization": zero, "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": 8}
    path.write_text(json.dumps({**written, "optimizer": {"type": "Adam"}}))
    environment = {**ZERO_2, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert full_trainer("out", **CACHED, max_grad_norm=0.5, dry_run=True) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 2
    assert "train_micro_batch_size_per_gpu is 8, the datasets' batch_size 2" in lines[0]
    assert "remove the section optimizer" in lines[1]

    path.write_text(json.dumps({**written, "train_micro_batch_size_per_gpu": 2}))
    made = full_trainer.with_run("out", lambda run: asked_sharding(run.config, environment), **CACHED)
    assert made.reshard_after_forward and made.offload and "ZeRO-3" in made.notes[0]


def test_fsdp_version_1_is_done_as_version_2(full_trainer):
    def asked(run):
        version_1 = {**FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}
        return asked_sharding(run.config, version_1), asked_sharding(run.config, {**FSDP, "FSDP_OFFLOAD_PARAMS": "1"})

    version_1, version_2 = full_trainer.with_run("out", asked, **CACHED)
    assert not version_1.reshard_after_forward and "version 2 is used" in version_1.notes[0]
    assert version_2.reshard_after_forward and version_2.offload and not version_2.notes


def test_one_process_trains_the_whole_model(full_trainer, monkeypatch, capsys):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    assert not full_trainer.with_run("out", lambda run: run.sharded, **CACHED)
    assert "asks for FSDP, but one process" in capsys.readouterr().err


class Calls:
    """Calls a function when it is unpickled."""

    def __reduce__(self):
        return print, ("called",)


def test_a_list_of_parts_that_would_call_something_is_refused(tmp_path, capsys):
    (tmp_path / SHARDED).mkdir()
    (tmp_path / SHARDED / ".metadata").write_bytes(pickle.dumps(Calls()))
    with pytest.raises(ConfigError, match=r"metadata can't be read \(it names builtins.print\)"):
        saved_shapes(tmp_path)
    (tmp_path / SHARDED / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(ConfigError, match="metadata can't be read"):
        saved_shapes(tmp_path)
    assert "called" not in capsys.readouterr().out
