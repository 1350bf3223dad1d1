"""tools/verify_resume.py on tiny models: equal, not equal, and what it refuses."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.training import loop, states, verifying
from library.training.comparing import compare_runs
from library.training.step import MicroBatchLoss
from library.training.verifying import NAME, PARTS, WHOLE, Check, verdict, verify_resume
from tools import verify_resume as tool

ROOT = Path(__file__).resolve().parents[2]
DISK = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "network_train_unet_only": True}
NOT_OURS = {"output_dir": None, "output_name": None, "max_train_steps": None}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    for name, value in {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        monkeypatch.setenv(name, value)


class Ended:
    """A process that has ended already."""

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code

    wait = poll


@pytest.fixture
def here(monkeypatch):
    """Lets the check's runs happen in this process: starting Python three times takes longer than all of them."""
    from accelerate.state import AcceleratorState, PartialState

    from library.cli import main

    def start(command, log):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        try:
            return Ended(main("sd3", job="adapter", argv=command[2:]))
        finally:
            logging.getLogger().handlers.clear()

    monkeypatch.setattr(verifying, "_start", start)


def check_of(trainer, folder, before_resuming=None):
    options = trainer.arguments("", **DISK, **NOT_OURS, use_ema=True)
    return Check(["python", "script"], options, steps=2, folder=folder, before_resuming=before_resuming)


def test_the_tool_says_equal(trainer, tmp_path, capsys):
    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 5\n")
    options = {**DISK, **NOT_OURS, "seed": None, "use_ema": True, "lr_scheduler": "cosine"}
    options |= {"sample_prompts": prompts, "sample_every_n_steps": 1}
    scratch = tmp_path / "scratch"
    command = [sys.executable, "tools/verify_resume.py", "sd3_train_network.py", "--steps", "2", "--folder", scratch]
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(f'echo "$1" >> {tmp_path}/launched\nexec {sys.executable} "$@"\n')
    command += ["--launch", f"sh {launcher}"]
    command += ["--keep", "--", *trainer.arguments("", **options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    launched = (tmp_path / "launched").read_text().splitlines()
    assert len(launched) == 3 and all(script.endswith("sd3_train_network.py") for script in launched)
    said = done.stdout.splitlines()
    assert [line[:7] for line in said[:3]] == ["1 of 3:", "2 of 3:", "3 of 3:"] and said[3] == "equal"
    for kind in ("trained weights", "optimizer", "schedule", "moving average", "logged numbers", "saved weights"):
        assert kind in said[4]
    assert "4 of sample pictures" in said[4]
    (folder,) = scratch.iterdir()
    assert (folder / "cache").is_dir() and not (folder / WHOLE / "cache").exists()
    lines = (folder / PARTS / f"{NAME}-log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_what_a_broken_resume_changes_is_named(trainer, tmp_path, monkeypatch, here):
    load = states.load_optimizer_state

    def broken(optimizer, state, **options):
        state["state"][0]["exp_avg"].mul_(1.5)
        load(optimizer, state, **options)

    def tamper(state):
        assert state == tmp_path / PARTS / f"{NAME}-step00000002-state"
        monkeypatch.setattr(states, "load_optimizer_state", broken)

    said = []
    check = check_of(trainer, tmp_path, tamper)
    comparison = verify_resume(check, said.append)
    first = comparison.differences[0]
    assert first.kind == "trained weights" and "trainable.safetensors" in first.place
    assert "numbers differ, by up to" in first.amount
    kinds = {one.kind for one in comparison.differences}
    assert kinds == {"trained weights", "optimizer", "moving average", "progress", "saved weights", "logged numbers"}
    lines = verdict(comparison, check)
    assert lines[0] == f"not equal: {first}" and lines[1].startswith("differ: ")
    assert "of schedule" in lines[2] and len(lines) == 3
    assert [line[:6] for line in said] == ["1 of 3", "2 of 3", "3 of 3"]


def test_a_training_that_does_not_repeat_is_told_apart(trainer, tmp_path, monkeypatch, here):
    training_loss, calls = loop.training_loss, []

    def unsteady(run, batch, **settings):
        share = training_loss(run, batch, **settings)
        calls.append(1)
        return MicroBatchLoss(share.loss * (1 + 1e-6 * len(calls)), share.per_sample)

    monkeypatch.setattr(loop, "training_loss", unsteady)
    check = check_of(trainer, tmp_path)
    assert "doesn't repeat exactly" in verdict(verify_resume(check, lambda line: None), check)[-1]


def test_a_failing_run_is_shown(trainer, monkeypatch, capsys):
    monkeypatch.setattr(tool, "ROOT", trainer.folder)
    (trainer.folder / "sd3_train_network.py").write_text("import sys; print('error: it is broken'); sys.exit(2)")
    words = trainer.arguments("", **{**DISK, **NOT_OURS})
    assert tool.main(["sd3_train_network", "--", *words]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: a run of the check ended with exit code 2",
        "  error: it is broken",
    ]


def test_a_run_is_stopped_with_all_that_it_started(tmp_path):
    """The launcher passes no signal on; and nothing is left running."""
    state = tmp_path / "state"
    inner = (
        f"import os, pathlib, time; p = pathlib.Path({str(state)!r}); p.mkdir(); "
        "(p / 'pid').write_text(str(os.getpid())); (p / 'state.json').write_text('{}'); time.sleep(100)"
    )
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    verifying._stop_at(state, [sys.executable, "-c", program], tmp_path / "log")
    pid = int((state / "pid").read_text())
    stat, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 10  # a signal takes a moment to arrive
    while (running := stat.exists() and stat.read_text().split()[2] != "Z") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_train_epochs": 2}, "--max_train_epochs 2: the check decides how many steps there are"),
        ({"save_every_n_epochs": 1}, "--save_every_n_epochs 1: the check decides when something is saved"),
        ({"save_every_n_steps": 1}, "--save_every_n_steps 1: the check decides when"),
        ({"log_with": "tensorboard", "logging_dir": "logs"}, "--log_with tensorboard: the runs of a check would stand"),
        ({"network_dimm": 2}, "unknown option --network_dimm"),
    ],
)
def test_options_that_leave_nothing_to_check_are_refused(trainer, capsys, options, problem):
    words = trainer.arguments("", **{**DISK, **NOT_OURS, **options})
    assert tool.main(["sd3_train_network", "--", *words]) == 2
    assert problem in capsys.readouterr().err


def test_a_state_is_no_start_of_a_check_not_even_in_a_file(trainer, capsys):
    path = trainer.folder / "run.toml"
    path.write_text('resume = "somewhere-state"\n')
    words = trainer.arguments("", **{**DISK, **NOT_OURS})
    assert tool.main(["sd3_train_network.py", "--", "--config_file", str(path), *words]) == 2
    assert "--resume somewhere-state: the check makes a state of its own" in capsys.readouterr().err


def test_the_users_seed_and_cache_are_left_alone(trainer):
    words = trainer.arguments("", **{**DISK, **NOT_OURS})
    assert tool.options_of_the_check("sd3_train_network.py", words) == ["--cache_dir", "{folder}/cache"]
    assert tool.options_of_the_check("sd3_train_network.py", [*words, "--cache_dir", "mine"]) == []
    without = trainer.arguments("", **NOT_OURS, seed=None)
    assert tool.options_of_the_check("sd3_train_network.py", without) == ["--seed", "0"]


def test_a_folder_that_is_not_kept_goes(tmp_path):
    with tool._folder(tmp_path / "a", keep=False) as folder:
        assert folder.is_dir()
    assert not folder.exists()
    with tool._folder(tmp_path / "a", keep=True) as folder:
        pass
    assert folder.is_dir() and os.listdir(tmp_path / "a") == [folder.name]


def test_compare_runs_finds_every_kind(trainer, tmp_path):
    options = {**DISK, "use_ema": True, "max_train_steps": 1, "save_state_on_train_end": True}
    assert trainer("one", **options, seed=7) == 0
    one = trainer.folder / "one"

    def changed(change):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        other = shutil.copytree(one, tmp_path / "other")
        change(other)
        return [tuple(found)[:2] for found in compare_runs(one, other).differences]

    def one_bit(path):
        def change(folder):
            tensors = load_file(folder / path)
            with safe_open(folder / path, "pt") as file:
                metadata = file.metadata()
            name = sorted(tensors)[-1]
            tensors[name].view(-1).view(torch.int32)[-1] ^= 1
            save_file(tensors, folder / path, metadata)

        return change

    def edit(path, before, after):
        def change(folder):
            text = (folder / path).read_text()
            assert before in text
            (folder / path).write_text(text.replace(before, after, 1))

        return change

    assert changed(lambda folder: None) == []
    for path, kind in {
        "run.safetensors": "saved weights",
        "run-state/trainable.safetensors": "trained weights",
        "run-state/ema.safetensors": "moving average",
    }.items():
        ((found, place),) = changed(one_bit(path))
        assert found == kind and place.startswith(path)
    assert changed(edit("run-log.jsonl", '"epoch": 1', '"epoch": 2')) == [
        ("logged numbers", "run-log.jsonl: step 1 epoch (line 1)")
    ]
    twice = changed(lambda folder: (folder / "run-log.jsonl").write_text(2 * (one / "run-log.jsonl").read_text()))
    assert {kind for kind, _ in twice} == {"logged numbers"}
    assert changed(edit("run-state/state.json", '"step": 1', '"step": 2')) == [
        ("progress", "run-state/state.json: step")
    ]
    assert changed(lambda folder: (folder / "left.tmp").touch()) == [("files", "left.tmp")]
    assert changed(lambda folder: (folder / "run-log.jsonl").unlink()) == [("files", "run-log.jsonl")]

    def schedule(folder):
        stored = torch.load(folder / "run-state" / "optimizer.pt", weights_only=True)
        stored["schedule"]["last_epoch"] += 1
        stored["optimizer"]["param_groups"][0]["lr"] *= 2
        torch.save(stored, folder / "run-state" / "optimizer.pt")

    assert changed(schedule) == [
        ("optimizer", "run-state/optimizer.pt: optimizer/param_groups/0/lr"),
        ("schedule", "run-state/optimizer.pt: schedule/last_epoch"),
    ]
