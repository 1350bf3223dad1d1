"""What a resumed run may change, and that what it changes acts."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.cli import SCRIPTS
from library.config.errors import ConfigError
from library.config.options import option_values
from library.training.resume_from import Resumed
from library.training.resuming import _is_compared, changes_since
from library.training.schedules import learning_rate_multiplier
from library.training.state_files import read_progress

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CACHED = {
    "cache_latents_to_disk": True,
    "cache_text_encoder_outputs_to_disk": True,
    "network_train_unet_only": True,
}


@pytest.fixture(autouse=True)
def cache(trainer, monkeypatch):
    """All runs of a test share a cache."""
    monkeypatch.setitem(CACHED, "cache_dir", trainer.folder / "cache")


@pytest.fixture
def stopped(trainer):
    """Trains two steps; gives the state."""

    def stop(output="out", **options):
        settings = {**CACHED, "max_train_steps": 2, "save_state_on_train_end": True, **options}
        assert trainer(output, **settings) == 0
        return trainer.folder / output / "run-state"

    return stop


def error_of(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_everything_that_makes_it_another_run_is_refused_at_once_with_both_values(trainer, stopped, capsys):
    state = stopped()
    (trainer.photos / "camera.png").unlink()
    dataset = trainer.dataset(dataset="flip_aug = true", subset="num_repeats = 2")
    changed = {"network_alpha": 1, "training_shift": 2.0, "seed": 8, "dataset_config": dataset}
    changed |= {"caption_dropout_rate": 0.5, "optimizer_args": ["weight_decay=0.5"]}
    changed |= {"max_grad_norm": 0.5, "gradient_accumulation_steps": 3}
    assert trainer("more", **CACHED, max_train_steps=3, resume=state, **changed) == 2
    error = error_of(capsys)
    for change in (
        "--network_alpha 1.0 (the state: 2.0)",
        "--training_shift 2.0 (the state: 1.0)",
        "--seed 8 (the state: 7)",
        "--optimizer_args weight_decay=0.5 (the state: )",
        "--max_grad_norm 0.5 (the state: 1.0)",
        "pictures 3 (the state: 4)",
        "micro-batches per step (processes times accumulation) 3 (the state: 1)",
        "datasets[0].subsets[0].num_repeats 2 (the state: 1)",
        "datasets[0].subsets[0].flip_aug True (the state: False)",
        "datasets[0].subsets[0].caption_dropout_rate 0.5 (the state: 0.0)",
    ):
        assert change in error, change
    assert not (trainer.folder / "more" / "run-log.jsonl").exists()

    assert trainer("more", **CACHED, max_train_steps=3, resume=state, resume_anyway=True, **changed) == 0
    told = capsys.readouterr().err
    assert f"--resume_anyway: going on with another run than that of {state}: --network_alpha 1.0" in told
    assert "pictures 3 (the state: 4)" in told
    assert list(trainer.losses("more")) == [3]


def test_what_cannot_be_gone_on_with_stays_an_error(trainer, stopped, capsys):
    state = stopped()
    anyway = {**CACHED, "max_train_steps": 3, "resume": state, "resume_anyway": True}
    assert trainer("more", **anyway, optimizer_type="Lion") == 2
    assert "--optimizer_type Lion (the state: AdamW)" in error_of(capsys)
    assert trainer("more", **{**anyway, "network_dim": 3}) == 2
    assert "what it trains is something else than in this configuration" in error_of(capsys)
    assert trainer("more", **{**anyway, "use_ema": True}) == 2
    assert "--use_ema, but the state was saved without" in error_of(capsys)
    assert trainer("more", **{**anyway, "resume": None}) == 2
    assert "--resume_anyway does nothing without --resume" in error_of(capsys)
    # another spelling of the same optimizer is the same
    assert trainer("more", **{**anyway, "resume_anyway": None}, optimizer_type="adamw") == 0


def test_a_finished_run_and_a_damaged_state_are_refused(trainer, stopped, capsys):
    state = stopped()
    assert trainer("more", **CACHED, max_train_steps=2, resume=state) == 2
    assert "2 steps are done and the run has 2" in error_of(capsys)
    with open(state / "optimizer.pt", "r+b") as file:
        file.truncate(100)
    assert trainer("more", **CACHED, max_train_steps=3, resume=state) == 2
    assert f"--resume {state}: optimizer.pt is missing or damaged" in error_of(capsys)


def test_the_same_pictures_with_other_contents_or_captions_are_another_run(trainer, stopped, capsys):
    state = stopped()
    shutil.copy(trainer.photos / "coffee.png", trainer.photos / "clock_motion.png")
    (trainer.photos / "chelsea.txt").write_text("something else")
    assert trainer("more", **CACHED, max_train_steps=3, resume=state) == 2
    error = error_of(capsys)
    assert "contents of pictures, with the hash " in error and "captions, with the hash " in error


def test_another_base_model_is_refused_and_the_same_one_elsewhere_is_not(trainer, stopped, capsys):
    state, moved = stopped(), trainer.folder / "moved"
    shutil.copytree(trainer.checkpoint.parent, moved)
    file = moved / trainer.checkpoint.name
    same = dataclasses.replace(trainer, checkpoint=file)
    options = {**CACHED, "max_train_steps": 3, "resume": state}
    assert same("same", **options) == 0
    tensors = load_file(file)
    name = next(name for name in tensors if "joint_blocks.1" in name and name.endswith("weight"))
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file)
    assert same("other", **options) == 2
    error = error_of(capsys)
    assert "weights of denoiser, with the hash " in error and "weights of vae" not in error
    assert same("dry", **options, dry_run=True) == 2
    assert error_of(capsys) == error
    assert same("dry", **options, resume_anyway=True, dry_run=True) == 0
    printed = capsys.readouterr().out
    assert (
        f"resumed: {state}, after step 2" in printed and "--resume_anyway: other than in that state: weights" in printed
    )
    assert same("other", **options, resume_anyway=True) == 0


def test_what_may_change_and_what_may_not(trainer, stopped):
    state = stopped(use_ema=True)
    resumed = Resumed(str(state), read_progress(state))

    def act(run):
        return run.config

    config = trainer.with_run("more", act, **CACHED, use_ema=True, max_train_steps=3, resume=state)
    assert changes_since(config, resumed) == []

    def changed(group, **options):
        return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **options)})

    for group, options in (
        ("optimizer", {"learning_rate": 1e-5}),
        ("optimizer", {"unet_lr": 1e-5}),
        ("training", {"max_train_steps": 9, "max_train_epochs": 3}),
        ("training", {"max_train_seconds": 9, "gradient_accumulation_steps": 2}),
        ("ema", {"ema_device": "accelerator", "ema_save_raw": True, "ema_validation": "none"}),
        ("caching", {"cache_latents_to_disk": False, "cache_text_encoder_outputs_to_disk": False}),
        ("caching", {"cache_dir": "elsewhere", "vae_batch_size": 3}),
        ("data", {"max_data_loader_n_workers": 3, "persistent_data_loader_workers": False, "dataset_config": "moved"}),
        ("memory", {"gradient_checkpointing": True, "sdpa": True}),
        ("network", {"save_format": "diffusers"}),
        ("saving", {"output_name": "other", "save_every_n_steps": 1, "save_precision": "fp16"}),
        ("sampling", {"sample_prompts": "prompts.txt", "sample_every_n_steps": 2}),
        ("validation", {"validate_every_n_steps": 2}),
        ("logging", {"console_log_level": "DEBUG"}),
    ):
        assert changes_since(changed(group, **options), resumed) == [], options
    for group, name, value in (
        ("training", "seed", 3),
        ("training", "mixed_precision", "bf16"),
        ("ema", "use_ema", False),
        ("ema", "ema_decay", 0.5),
        ("ema", "ema_update_interval", 2),
        ("caching", "no_half_vae", True),
        ("data", "prior_loss_weight", 0.5),
        ("network", "network_dim", 4),
        ("network", "network_dropout", 0.5),
        ("network", "scale_weight_norms", 1.0),
        ("optimizer", "optimizer_type", "Lion"),
        ("optimizer", "lr_scheduler", "cosine"),
        ("loss", "loss_type", "huber"),
        ("flow", "timestep_sampling", "logit_normal"),
        ("family", "t5xxl_max_token_length", 99),
    ):
        with pytest.raises(ConfigError, match=rf"--{name} {value} \(the state: "):
            changes_since(changed(group, **{name: value}), resumed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_has_been_decided_on(script):
    """The options that a resumed run must not change are listed: a new option asks for a decision."""
    groups = SCRIPTS[script].groups
    config = dataclasses.make_dataclass(
        "Config", [(name, kind, kind()) for name, kind in groups.items()], frozen=True
    )()
    compared = sorted(declared.name for declared, _ in option_values(config) if _is_compared(declared, True))
    path = GOLDEN / f"resume_fixed_options_{script}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text("\n".join(compared) + "\n")
    assert path.read_text().splitlines() == compared, "accept it by UPDATE_GOLDEN=1"


SCHEDULES = {"constant": {}, "cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 0.2}}


def rates(run):
    return [(group["lr"], group["initial_lr"]) for group in run.optimizer.param_groups], run.schedule.get_last_lr()


def rates_and_options(run):
    return *rates(run), run.config.optimizer


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_new_learning_rate_acts_as_if_it_had_always_been_there(trainer, schedule):
    options = {**CACHED, **schedule, "max_train_steps": 5}
    assert trainer("old", **options, save_every_n_steps=2, save_state=True) == 0
    state = trainer.folder / "old" / "run-step00000002-state"
    assert trainer("resumed", **options, learning_rate=3e-3, resume=state) == 0
    # an unchanged rate keeps every bit
    saved = torch.load(state / "optimizer.pt", weights_only=True)["optimizer"]["param_groups"][0]
    groups, last, config = trainer.with_run("same", rates_and_options, **options, resume=state)
    assert groups == [(saved["lr"], saved["initial_lr"])] and last == [saved["lr"]]
    at = learning_rate_multiplier(config, max_steps=5)
    assert [line["lr/unet"] for line in trainer.log("resumed")] == [3e-3 * at(step) for step in (2, 3, 4)]
    old, resumed = trainer.weights("old"), trainer.weights("resumed")
    assert not all(torch.equal(old[name], resumed[name]) for name in old)
    # another length is that of the whole run
    groups, _, config = trainer.with_run("longer", rates_and_options, **{**options, "max_train_steps": 9}, resume=state)
    assert groups[0][0] == learning_rate_multiplier(config, max_steps=9)(2) * 0.01


def test_a_schedule_with_a_memory_of_its_own_goes_on_in_proportion(trainer, stopped):
    options = {"lr_scheduler_type": "ExponentialLR", "lr_scheduler_args": ["gamma=0.5"]}
    state = stopped(**options)
    more = {**CACHED, **options, "max_train_steps": 4, "resume": state}
    assert trainer.with_run("same", rates, **more)[0] == [(0.0025, 0.01)]
    assert trainer("resumed", **more, learning_rate=0.4) == 0
    assert [line["lr/unet"] for line in trainer.log("resumed")] == [0.1, 0.05]


def test_a_new_learning_rate_acts_beside_what_prodigy_has_found(trainer, stopped):
    options = {"optimizer_type": "Prodigy", "learning_rate": 1.0}
    state = stopped(**options)
    more = {**CACHED, **options, "max_train_steps": 3, "resume": state}

    def found(run):
        (group,) = run.optimizer.param_groups
        return group["lr"], group["d"], group["k"], group["d_numerator"]

    same, half = (
        trainer.with_run("same", found, **more),
        trainer.with_run("half", found, **{**more, "learning_rate": 0.5}),
    )
    assert (same[0], half[0]) == (1.0, 0.5)
    assert same[1:] == half[1:] and same[2] == 2


def test_arguments_of_the_optimizer_act_where_they_may_change(trainer, stopped):
    state = stopped(optimizer_args=["betas=0.5,0.6"])
    more = {**CACHED, "max_train_steps": 3, "resume": state, "resume_anyway": True}

    def arguments(run):
        (group,) = run.optimizer.param_groups
        return group["betas"], group["weight_decay"], group["lr"]

    kept = trainer.with_run("kept", arguments, **more, optimizer_args=["betas=0.5,0.6", "weight_decay=0.25"])
    assert kept == ((0.5, 0.6), 0.25, 0.01)
    assert trainer.with_run("default", arguments, **more) == ((0.9, 0.999), 0.01, 0.01)


def test_learning_rates_of_text_encoders_may_change(trainer):
    options = {"max_train_steps": 2, "learning_rate": 1e-3, "cache_latents": True}
    assert trainer("out", **options, text_encoder_lr=[1e-4], save_state_on_train_end=True) == 0
    state = trainer.folder / "out" / "run-state"
    more = {**options, "max_train_steps": 3, "resume": state, "text_encoder_lr": [2e-4, 3e-4]}
    groups, _ = trainer.with_run("more", rates, **more, unet_lr=5e-3)
    assert [lr for lr, _ in groups] == [5e-3, 2e-4, 3e-4, *[3e-4] * (len(groups) - 3)]


def test_states_of_the_format_without_a_manifest_are_read(trainer, stopped, capsys):
    state = stopped()
    path = state / "state.json"
    old = json.loads(path.read_text())
    listed = json.loads((state / "manifest.json").read_text())["files"]
    for name in ("run", "saved", "data", "weights", "average", "max_steps"):
        old.pop(name)
    old |= {"format": 1, "checksums": {n: listed[n]["blake2b"] for n in ("trainable.safetensors", "optimizer.pt")}}
    path.write_text(json.dumps(old))
    (state / "manifest.json").unlink()
    more = {**CACHED, "max_train_steps": 3, "resume": state}
    assert trainer("more", **more) == 0
    assert trainer("whole", **CACHED, max_train_steps=3) == 0
    assert trainer.losses("more")[3] == trainer.losses("whole")[3]
    assert trainer("other", **{**more, "resume": "auto", "output_dir": state.parent}) == 0
    assert list(trainer.losses("out")) == [1, 2, 3]
    with open(state / "optimizer.pt", "ab") as file:
        file.write(b"x")
    assert trainer("damaged", **more) == 2
    assert "optimizer.pt is missing or damaged" in error_of(capsys)
