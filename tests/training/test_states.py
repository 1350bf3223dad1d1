"""The states of a run: whole or not there, found again, never the last one deleted, and a disk that fills up."""

import contextlib
import json
import os
import random
import resource
import shutil

import pytest
import torch

from library.config.errors import ConfigError
from library.io.manifest import MANIFEST
from library.training import rotation, saved_weights, saving_hooks, states
from library.training.state_files import PROGRESS, find_states, newest_state, read_progress
from tests.training.ranks import in_processes

CACHED = {
    "cache_latents_to_disk": True,
    "cache_text_encoder_outputs_to_disk": True,
    "network_train_unet_only": True,
}
EVERY_STEP = {"save_every_n_steps": 1, "save_state": True}


@pytest.fixture(autouse=True)
def cache(trainer, monkeypatch):
    """All runs of a test share a cache."""
    monkeypatch.setitem(CACHED, "cache_dir", trainer.folder / "cache")


def names(folder, ending="-state"):
    return sorted(path.name.removesuffix(ending) for path in folder.iterdir() if path.name.endswith(ending))


def told(capsys, *words):
    """The lines on the error stream with all these words."""
    return [line for line in capsys.readouterr().err.splitlines() if all(word in line for word in words)]


def equal(trainer, *outputs):
    first, second = (trainer.weights(output) for output in outputs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def flip(path, at, change=1):
    content = bytearray(path.read_bytes())
    content[at] ^= change
    path.write_bytes(content)


def test_any_damaged_byte_of_any_file_is_refused_with_the_files_name(trainer):
    options = {**CACHED, "max_train_steps": 1, "save_state_on_train_end": True, "use_ema": True}
    assert trainer("out", **options) == 0
    state = trainer.folder / "out" / "run-state"
    files = {path.name: path.read_bytes() for path in state.iterdir()}
    assert set(files) == {"state.json", "manifest.json", "trainable.safetensors", "ema.safetensors", "optimizer.pt"}
    assert json.loads(files[MANIFEST])["files"].keys() == files.keys() - {MANIFEST}
    progress = read_progress(state)
    rng = random.Random(3)
    for name, content in files.items():
        for at in rng.sample(range(len(content)), 50):
            flip(state / name, at, rng.randrange(1, 256))
            with pytest.raises(ConfigError, match=f": {name} is missing or damaged; resume from an older state"):
                read_progress(state)
            (state / name).write_bytes(content)
        (state / name).unlink()
        with pytest.raises(ConfigError, match=f": {name} is missing or damaged"):
            read_progress(state)
        (state / name).write_bytes(content)
    assert read_progress(state) == progress


# --resume auto


def test_auto_takes_the_newest_whole_state_and_names_the_file_of_a_damaged_one(trainer, capsys):
    options = {**CACHED, "max_train_steps": 4}
    assert trainer("whole", **options) == 0
    capsys.readouterr()
    assert trainer("out", **options, **EVERY_STEP, resume="auto", max_train_seconds=600) == 0
    assert len(told(capsys, "--resume auto: no state of run in ", "a fresh run begins")) == 1
    folder = trainer.folder / "out"
    for name in ("run-state", "run-step00000004-state"):
        shutil.rmtree(folder / name, ignore_errors=True)
    flip(folder / "run-step00000003-state" / "trainable.safetensors", 999)
    shutil.copytree(folder / "run-step00000001-state", folder / "run-2-step00000009-state")  # of another run
    shutil.rmtree(folder / "run-000009-state", ignore_errors=True)
    assert trainer("out", **options, resume_from_checkpoint="latest") == 0
    printed = capsys.readouterr().err.splitlines()
    (warning,) = [line for line in printed if "WARNING" in line]
    assert f"{folder / 'run-step00000003-state'}: trainable.safetensors is missing or damaged" in warning
    assert any(f"--resume auto: {folder / 'run-step00000002-state'}, step 2" in line for line in printed)
    assert list(trainer.losses("out")) == [1, 2, 3, 4] and trainer.losses("out") == trainer.losses("whole")
    assert equal(trainer, "whole", "out")


def test_auto_of_a_complete_run_touches_nothing(trainer, capsys):
    options = {**CACHED, "max_train_steps": None, "max_train_epochs": 1}
    assert trainer("out", **options, save_state_on_train_end=True) == 0
    folder = trainer.folder / "out"
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    assert trainer("out", **options, save_state_on_train_end=True, resume="auto") == 0
    assert len(told(capsys, "the run is complete", "there is nothing to do")) == 1
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before
    # as many steps, said in another way: known once the pictures are
    assert trainer("out", **CACHED, max_train_steps=None, max_train_epochs=1, resume="auto", seed=None) == 0
    steps = {**CACHED, "max_train_steps": 2}
    assert trainer("out", **steps, resume="auto") == 0 and trainer("out", **steps, resume=folder / "run-state") == 2
    capsys.readouterr()
    assert trainer("out", **steps, resume="auto", dry_run=True) == 0
    assert "the run is complete, " in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == {
        path: before[path] for path in folder.iterdir()
    }
    assert trainer("out", **{**options, "max_train_epochs": 2}, resume="auto") == 0
    assert list(trainer.losses("out")) == [1, 2, 3, 4]


def test_auto_never_begins_anew_over_states_that_are_all_damaged(trainer, capsys):
    options = {**CACHED, "max_train_steps": 2, "save_state_on_train_end": True}
    assert trainer("out", **options) == 0
    (trainer.folder / "out" / "run-state" / "state.json").unlink()
    assert trainer("out", **{**options, "max_train_steps": 3}, resume="auto") == 2
    assert len(told(capsys, "error: --resume auto: every state of run in ", "is damaged")) == 1


def test_a_fresh_run_in_the_place_of_an_older_one_goes_on_with_its_own_states(trainer):
    options = {**CACHED, "max_train_steps": 3, "save_state_on_train_end": True}
    assert trainer("out", **options) == 0
    assert trainer("out", **options, save_every_n_steps=1, save_state=True) == 0
    folder = trainer.folder / "out"
    found = find_states(folder, "run")
    assert [(state.step, state.path.name) for state in found] == [
        (3, "run-state"),
        (2, "run-step00000002-state"),
        (1, "run-step00000001-state"),
    ]
    older = json.loads((folder / "run-step00000002-state" / PROGRESS).read_text())
    assert {state.run for state in found} == {older["run"]}
    # of another, older run of that name, with more steps
    shutil.copytree(folder / "run-state", folder / "run-000009-state")
    (folder / "run-000009-state" / PROGRESS).write_text(json.dumps({**older, "run": "x", "step": 99, "saved": 1.0}))
    assert [state.step for state in find_states(folder, "run")] == [3, 2, 1, 99]
    (folder / "run-000009-state" / PROGRESS).write_text("{")
    assert find_states(folder, "run")[0].path.name == "run-000009-state"  # to be named as damaged
    assert newest_state(folder, "run") == folder / "run-state"
    assert newest_state(folder, "other") is None and newest_state(folder / "nowhere", "run") is None


def test_what_a_killed_process_left_is_repaired_when_the_run_is_started_again(trainer, capsys):
    options = {**CACHED, "max_train_steps": 2, "save_state_on_train_end": True}
    assert trainer("out", **options) == 0
    folder, number = trainer.folder / "out", "0" * 32
    (folder / "sample").mkdir()
    os.rename(folder / "run-state", folder / f".run-state.{number}.old")
    mine = [f".run-state.{number}.partial", f".run-log.jsonl.{number}.partial", f".run_raw.pth.{number}.partial"]
    mine += [f".run-000001_diffusers.safetensors.{number}.partial", f"sample/.run_e000001_00_5.png.{number}.partial"]
    others = [
        f".run-2-state.{number}.old",
        f".runner.safetensors.{number}.partial",
        f".run-9.safetensors.{number}.partial",
    ]
    picture = f".run-2_000001_00_5.png.{number}.partial"
    for name in (*mine, *others, f"sample/{picture}"):
        (folder / name).write_text("x")
    capsys.readouterr()
    assert trainer("out", **{**options, "max_train_steps": 3}, resume="auto") == 0
    (line,) = told(capsys, "left by a process that was killed")
    assert "run-state put back" in line and "a half-written run_e000001_00_5.png removed" in line
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == sorted(others)
    assert [path.name for path in (folder / "sample").iterdir()] == [picture]
    assert list(trainer.losses("out")) == [1, 2, 3]


# rotation, and the order of things


def test_the_newest_state_survives_any_rotation(trainer):
    options = {**CACHED, "save_every_n_steps": 2, "save_state": True, "save_last_n_steps": 2}
    assert trainer("out", **options, max_train_steps=5) == 0
    folder = trainer.folder / "out"
    assert names(folder) == ["run", "run-step00000004"]
    # states of the process before are rotated too
    shutil.rmtree(folder / "run-state")
    assert trainer("out", **options, max_train_steps=7, resume="auto") == 0
    assert names(folder) == ["run", "run-step00000006"]
    # weights go on being rotated where no state is saved any more: the last one stays
    shutil.rmtree(folder / "run-state")
    assert trainer("out", **{**options, "save_state": None}, max_train_steps=9, resume="auto") == 0
    assert names(folder) == ["run-step00000006"]
    assert names(folder, ".safetensors") == ["run", "run-step00000008"]


def test_what_rotation_cannot_delete_stays_with_a_warning(trainer, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(rotation, "remove_folder", refuse)
    assert trainer("out", **CACHED, **EVERY_STEP, save_last_n_steps=1, max_train_steps=3) == 0
    assert len(told(capsys, "run-step00000001-state can't be deleted (Permission denied) and stays")) >= 1
    assert names(trainer.folder / "out") == ["run", "run-step00000001", "run-step00000002"]


def test_a_state_is_there_only_when_everything_else_of_its_step_is(trainer, monkeypatch):
    """Weights of the step and of the epoch, samples and the line of the validation come before it, on the disk."""
    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 5\n")
    folder, seen = trainer.folder / "out", []
    write, sync = states.write_manifest, os.fsync
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), sync(file)))

    def watched(state):
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.name.startswith(".")}
        log = folder / "run-log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        seen.append((there, any("loss/validation" in line for line in lines), log.stat().st_ino in synced))
        write(state)

    monkeypatch.setattr(states, "write_manifest", watched)
    options = {"save_every_n_steps": 2, "save_every_n_epochs": 1, "save_state": True, "max_train_steps": 3}
    options |= {"sample_prompts": prompts, "sample_every_n_steps": 2, "validate_every_n_steps": 2}
    assert trainer("out", **CACHED, **options, validation_split=0.25) == 0
    first = seen[0]
    expected = {"run-step00000002.safetensors", "run-000001.safetensors", "sample/run_000002_00_5.png"}
    assert expected <= first[0] and first[1:] == (True, True)
    assert not any(name.endswith("-state") for name in first[0])
    assert len(seen) == 3 and names(folder) == ["run", "run-000001", "run-step00000002"]


# a disk that fills up


@contextlib.contextmanager
def files_up_to(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_at(monkeypatch):
    """Lets no file grow beyond a size while something is saved, once after each of these steps."""

    def fill(name, size, *steps):
        save = getattr(saving_hooks, name)

        def limited(run, stem, done):
            with files_up_to(size) if done in left else contextlib.nullcontext():
                left.discard(done)
                return save(run, stem, done)

        left = set(steps)
        monkeypatch.setattr(saving_hooks, name, limited)

    return fill


def remains(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("what", "size", "file"),
    [
        ("save_state", 0, "run-step00000002-state/trainable.safetensors"),
        ("save_state", 80_000, "run-step00000002-state/optimizer.pt"),
        ("save_weights", 60_000, "run-step00000002.safetensors"),
    ],
)
def test_a_full_disk_ends_the_run_with_a_line_and_older_files_whole(
    trainer, full_at, capsys, monkeypatch, what, size, file
):
    options = {**CACHED, **EVERY_STEP, "max_train_steps": 3, "save_last_n_steps": 1}
    folder = trainer.folder / "out"
    kept = {}
    save = saving_hooks.save_weights
    monkeypatch.setattr(saving_hooks, "save_weights", lambda *args: (kept.update(remains(folder)), save(*args))[1])
    full_at(what, size, 2)
    assert trainer("out", **options) == 2
    (line,) = told(capsys, "error: ")
    assert line.startswith(f"error: {folder / file} can't be written: File too large, ")
    assert f"free, about {'201' if what == 'save_state' else '67'} KB needed" in line
    assert line.endswith(
        f"what was saved before is whole. Make room there, then go on with --resume {folder / 'run-step00000001-state'}"
    )
    now = remains(folder)
    new = {"run-step00000002.safetensors"} if what == "save_state" else set()
    assert now.keys() - kept.keys() == new and kept.keys() <= now.keys()
    assert all(now[name] == content for name, content in kept.items() if "log" not in name)
    if (what, size) != ("save_state", 80_000):
        return
    assert trainer("whole", **CACHED, max_train_steps=3) == 0
    assert trainer("out", **options, resume="auto") == 0
    assert equal(trainer, "whole", "out") and trainer.losses("whole") == trainer.losses("out")


def test_with_continue_training_goes_on_and_saves_again(trainer, full_at, capsys):
    options = {**CACHED, **EVERY_STEP, "max_train_steps": 5, "save_last_n_steps": 2, "on_save_error": "continue"}
    full_at("save_state", 80_000, 2, 3)
    full_at("save_weights", 100, 3)
    assert trainer("out", **options) == 0
    warnings = told(capsys, "WARNING", "can't be written", "Training goes on (--on_save_error continue)")
    assert [line.split("step ")[1][0] for line in warnings] == ["2", "3", "3"]
    folder = trainer.folder / "out"
    assert names(folder) == ["run", "run-step00000004"]
    assert trainer("whole", **CACHED, max_train_steps=5) == 0
    assert equal(trainer, "whole", "out")


def test_no_state_leaves_for_one_that_could_not_be_written(trainer, full_at):
    full_at("save_state", 80_000, 2, 3)
    options = {**CACHED, **EVERY_STEP, "save_last_n_steps": 1, "on_save_error": "continue"}
    assert trainer("out", **options, max_train_steps=3) == 2  # at the end it is an error in any case
    assert names(trainer.folder / "out") == ["run-step00000001"]
    assert names(trainer.folder / "out", ".safetensors") == [
        "run",
        "run-step00000001",
        "run-step00000002",
    ]


def test_a_full_disk_in_the_middle_of_the_pictures_of_samples_costs_a_picture(trainer, monkeypatch, capsys):
    from library.sampling import drawing

    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 5\na dog --w 64 --h 64 --s 1 --d 6\n")
    save = drawing.save_picture

    def limited(image, path, settings):
        with files_up_to(300) if "_00_" in path.name else contextlib.nullcontext():
            save(image, path, settings)

    monkeypatch.setattr(drawing, "save_picture", limited)
    assert trainer("out", **CACHED, max_train_steps=2, sample_prompts=prompts, sample_every_n_steps=2) == 0
    folder = trainer.folder / "out" / "sample"
    assert len(told(capsys, "WARNING", f"the sample {folder / 'run_000002_00_5.png'} can't be written")) == 1
    assert [path.name for path in folder.iterdir()] == ["run_000002_01_6.png"]


def test_lines_of_the_log_wait_for_room(trainer, monkeypatch, capsys):
    from library.training.log_file import LogFile

    add = LogFile.add

    def limited(log, entry):
        room = os.path.getsize(log._path) + 10  # a part of a line
        with files_up_to(room) if entry["step"] in (2, 3) else contextlib.nullcontext():
            add(log, entry)

    monkeypatch.setattr(LogFile, "add", limited)
    assert trainer("out", **CACHED, max_train_steps=4) == 0
    assert len(told(capsys, "WARNING", "run-log.jsonl can't be written (File too large)")) == 1
    assert list(trainer.losses("out")) == [1, 2, 3, 4]


def test_a_terminal_that_is_gone_ends_nothing(trainer):
    class Gone:
        disable = False

        def fail(self, *_, **__):
            raise BrokenPipeError(32, "Broken pipe")

        write = update = close = fail

        def set_postfix(self, **_):
            pass

    def act(run):
        run.trackers.bar = Gone()
        run.trackers.say("a line")
        run.trackers.log_step(1, 1, {"loss/average": 1.0}, samples=1)
        return True

    assert trainer.with_run("out", act, **CACHED)
    assert [line["step"] for line in trainer.log("out")] == [1]


def test_two_processes_agree_on_the_state_and_end_alike_on_a_full_disk(trainer, capfd):
    options = {**CACHED, **EVERY_STEP, "max_train_steps": 4}
    assert trainer("out", **options, gradient_accumulation_steps=2, max_train_seconds=600) == 0
    folder = trainer.folder / "out"
    for name in ("run-state", "run-step00000003-state"):
        shutil.rmtree(folder / name)
    flip(folder / "run-step00000002-state" / "optimizer.pt", 5000)

    def train(rank):
        save = saving_hooks.save_state

        def limited(run, stem, done):
            if done == 2 and run.accelerator.is_main_process:
                resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return save(run, stem, done)

        saving_hooks.save_state = limited
        return trainer("out", **options, resume="auto")

    capfd.readouterr()
    assert in_processes(2, train) == [2, 2]
    printed = capfd.readouterr().err
    assert "run-step00000002-state: optimizer.pt is missing or damaged" in printed
    assert "run-step00000001-state, step 1" in printed
    errors = [line for line in printed.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "run-step00000002-state/optimizer.pt can't be written" in errors[0]
    assert f"--resume {folder / 'run-step00000001-state'}" in errors[0]
    # the damaged one is as it was, and the one before it is whole
    assert read_progress(folder / "run-step00000001-state")["step"] == 1


def test_the_sizes_that_are_told_are_about_those_of_the_files(trainer):
    def sizes(run):
        for parameter in run.parameters:
            parameter.grad = torch.ones_like(parameter)
        run.optimizer.step()
        return states._size(run), saved_weights._size(run, None), states.save_state(run, "x", 1)

    state, weights, folder = trainer.with_run("out", sizes, **CACHED, use_ema=True)
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert 0.7 * written < state <= written
    assert weights == 4 * 16_768
