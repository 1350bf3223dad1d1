"""Runs whose updates the device guards: all that they write is what a run writes that looks before each update."""

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import time

import pytest
import torch

from library.training import loop, settling, step, updates
from library.training.comparing import compare_runs
from library.training.stopping import TIME_IS_UP
from library.training.updates import prepare_updates
from tests.training.interruptions import Killed, before_optimizing, in_micro_batch
from tests.training.ranks import in_processes

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
DISK = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
GUARDED = {"optimizer_args": ["fused=True"], "lr_scheduler": "cosine"}
EMA = {"use_ema": True, "ema_decay": 0.5, "ema_save_raw": True}


@pytest.fixture
def poison(monkeypatch):
    """Multiplies the loss of some steps (from 1), or their gradient alone, however often they are computed."""

    def strike(*numbers, factor=math.nan, only_gradient=False):
        compute, per_sample = loop.compute, step._per_sample
        steps, now = {}, []

        def of_step(run, number, source):
            def noted():
                for batch in source:
                    steps.setdefault((batch.keys, batch.visits), number + 1)
                    yield batch

            return compute(run, number, noted())

        def struck(run, batch, *rest):
            loss = per_sample(run, batch, *rest)
            now.append(steps.get((batch.keys, batch.visits)))
            if now[-1] not in numbers:
                return loss
            if only_gradient:
                loss.register_hook(lambda gradient: gradient * factor)
                return loss
            return loss * factor

        monkeypatch.setattr(loop, "compute", of_step)
        monkeypatch.setattr(step, "_per_sample", struck)
        return now

    return strike


@contextlib.contextmanager
def looking_first():
    """Inside, no update is guarded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "takes_guard", lambda optimizer: False)
        yield


def run_both(trainer, code=0, **options):
    """Train into ``looked`` and, with guarded updates, into ``out``; returns the lines of the second one's log."""
    if trainer.network:
        options = {"network_train_unet_only": True, **options}
    options = {**CACHED, **GUARDED, **options}
    with looking_first():
        assert trainer("out", **options) == code
    shutil.move(trainer.folder / "out", trainer.folder / "looked")
    assert trainer("out", **options) == code
    assert compare_runs(trainer.folder / "looked", trainer.folder / "out").differences == []
    logs = [(trainer.folder / name / "run-log.jsonl").read_bytes() for name in ("looked", "out")]
    assert logs[0] == logs[1]
    return trainer.log("out")


@pytest.fixture
def settled(monkeypatch):
    """When steps (from 1) settle: the number of the step whose gradients are there, and that of the step."""
    computed, pairs = [0], []
    compute, settle = loop.compute, settling.settle

    def noted(run, number, source):
        answer = compute(run, number, source)
        computed[0] = number + 1
        return answer

    def watched(run):
        pairs.append((computed[0], run.pending.computed.step + 1))
        return settle(run)

    monkeypatch.setattr(loop, "compute", noted)
    monkeypatch.setattr(loop, "settle", watched)
    return pairs


@pytest.mark.parametrize("family", ["trainer", "full_trainer", "sana_trainer"])
def test_a_guarded_run_writes_what_one_writes_that_looks_first(request, family, settled):
    trainer = request.getfixturevalue(family)
    options = {"max_train_steps": 7, "save_every_n_steps": 4, "save_state": True, "gradient_accumulation_steps": 2}
    log = run_both(trainer, **options, replay_bundle_at_step=5)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6, 7]
    # a step is looked at when the next one is computed; before a save, a bundle, and at the end, at once
    assert settled == [(2, 1), (3, 2), (4, 3), (4, 4), (7, 6), (7, 7)]


def test_what_acts_on_weights_waits_for_no_next_step(trainer, settled):
    options = {**EMA, "ema_update_interval": 2, "validation_split": 0.25, "validate_every_n_steps": 3}
    assert trainer("out", **CACHED, **GUARDED, **options, network_train_unet_only=True, max_train_steps=5) == 0
    assert settled == [(2, 1), (2, 2), (3, 3), (4, 4), (5, 5)]


def test_skipped(trainer, poison, settled):
    computed = poison(3, 5, 6, factor=math.inf, only_gradient=True)
    options = {"max_train_steps": 8, "save_every_n_steps": 5, "save_state": True, "on_nonfinite": "skip"}
    log = run_both(trainer, **options)
    assert [entry["step"] for entry in log if "nonfinite/skipped" in entry] == [3, 5, 6]
    assert len(list((trainer.folder / "out").glob("run-nonfinite-*"))) == 3
    assert (4, 3) in settled and (5, 5) in settled and (7, 6) in settled
    once = computed.count(8)
    assert computed.count(4) == 3 * once / 2  # computed again in one of two runs


def test_skipped_first_of_all(full_trainer, poison):
    poison(1)
    options = {"max_train_steps": 3, "save_every_n_steps": 1, "save_state": True, "on_nonfinite": "skip"}
    run_both(full_trainer, **options)
    state = full_trainer.folder / "out" / "run-step00000001-state" / "optimizer.pt"
    assert torch.load(state, weights_only=True)["optimizer"]["state"] == {}


def test_rolled_back(trainer, poison, settled):
    poison(4, 5)
    options = {"max_train_steps": 7, "save_every_n_steps": 2, "save_state": True, "on_nonfinite": "rollback"}
    log = run_both(trainer, **EMA, ema_update_interval=3, **options)
    assert [entry["nonfinite/rollbacks"] for entry in log if "nonfinite/rollbacks" in entry] == [1, 2]
    assert (4, 4) in settled and (6, 5) in settled


def test_stopped(trainer, poison, capsys):
    poison(3)
    run_both(trainer, code=2, max_train_steps=6, save_every_n_steps=2, save_state=True)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and errors[0] == errors[1]
    assert "step 3: the loss is nan; samples: " in errors[0] and "Nothing of this step was applied" in errors[0]
    assert (trainer.folder / "out" / "run-nonfinite-step00000003").is_dir()


@pytest.mark.parametrize(
    ("act", "options", "code"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), {}, 143),
        (lambda: time.sleep(1.1), {"max_train_seconds": 1}, TIME_IS_UP),
    ],
    ids=["signal", "time"],
)
def test_asked_to_stop_a_run_ends_with_the_step(trainer, monkeypatch, act, options, code):
    before_optimizing(monkeypatch, 2, lambda run: act())
    assert trainer("out", **CACHED, **GUARDED, **options, network_train_unet_only=True) == code
    done = [entry["step"] for entry in trainer.log("out")]
    (state,) = (trainer.folder / "out").glob("*-state")
    assert state.name == f"run-step{len(done):08d}-state" and done[-1] == len(done)
    assert code == TIME_IS_UP or len(done) == 2  # loading may take as long as that


def test_a_run_that_is_killed_with_a_step_pending_goes_on_from_its_state(trainer, monkeypatch):
    options = {**DISK, **GUARDED, "network_train_unet_only": True, "max_train_steps": 6}
    options |= {"save_every_n_steps": 3, "save_state": True, "resume": "auto"}
    assert trainer("whole", **options) == 0
    with monkeypatch.context() as patch:
        in_micro_batch(5, 1)(patch)
        with pytest.raises(Killed):
            trainer("killed", **options)
    assert trainer("killed", **options) == 0
    assert compare_runs(trainer.folder / "whole", trainer.folder / "killed").differences == []


@pytest.mark.usefixtures("unforeseen")
def test_the_log_has_every_step_that_was_done_when_the_next_one_breaks(trainer, monkeypatch):
    training_loss, count = loop.training_loss, [0]

    def breaking(run, batch, **settings):
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("no memory")
        return training_loss(run, batch, **settings)

    monkeypatch.setattr(loop, "training_loss", breaking)
    with pytest.raises(RuntimeError, match="no memory"):
        trainer("out", **CACHED, **GUARDED, network_train_unet_only=True)
    assert [entry["step"] for entry in trainer.log("out")] == [1, 2]


def test_two_processes_settle_alike(trainer, poison, monkeypatch):
    """One of them is asked to stop, a step later is no number, and the run goes back."""
    poison(5)
    trainer.dataset().write_text(trainer.dataset().read_text().replace("batch_size = 2", "batch_size = 1"))
    options = {**DISK, **GUARDED, "network_train_unet_only": True, "on_nonfinite": "rollback"}
    options |= {"max_train_steps": 6, "save_every_n_steps": 3, "save_state": True, "resume": "auto"}

    def looks_first(rank):
        with looking_first():
            return trainer("out", **options)

    def asked(rank):
        if rank:
            before_optimizing(monkeypatch, 1, lambda run: os.kill(os.getpid(), signal.SIGTERM))
        return trainer("out", **options)

    assert in_processes(2, looks_first) == [0, 0]
    shutil.move(trainer.folder / "out", trainer.folder / "looked")
    assert in_processes(2, asked) == [143, 143]
    (state,) = (trainer.folder / "out").glob("*-state")
    assert state.name == "run-step00000002-state"  # they learn of it when the second is computed
    assert in_processes(2, lambda rank: trainer("out", **options)) == [0, 0]
    assert compare_runs(trainer.folder / "looked", trainer.folder / "out").differences == []
    assert [entry["step"] for entry in trainer.log("out") if "nonfinite/rollbacks" in entry] == [5]


def test_where_others_decide_on_updates_none_is_guarded(trainer, monkeypatch):
    def guarded(run):
        run.guard = None
        prepare_updates(run)
        return run.guard is not None

    def act(run):
        answers = [guarded(run)]
        run.sharded = True
        answers.append(guarded(run))
        run.sharded = False
        monkeypatch.setattr(run.accelerator, "scaler", torch.amp.GradScaler("cpu"))
        answers.append(guarded(run))
        monkeypatch.undo()
        config = run.config
        for option in ("cpu_offload_checkpointing", "fused_backward_pass"):
            memory = dataclasses.replace(config.memory, gradient_checkpointing=True, **{option: True})
            run.config = dataclasses.replace(config, memory=memory)
            answers.append(guarded(run))
        return answers

    options = {**CACHED, **GUARDED, "network_train_unet_only": True, "max_grad_norm": 0}
    assert trainer.with_run("out", act, **options) == [True, False, False, False, False]
