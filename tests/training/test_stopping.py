import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from library.training import loop
from library.training.stopping import STOP_CODES, TIME_IS_UP, Stopper
from tests.training.interruptions import before_optimizing

ROOT = Path(__file__).resolve().parents[2]
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}


@pytest.fixture(params=["trainer", "sana_trainer"])
def job(request):
    trainer = request.getfixturevalue(request.param)

    def run(output, **options):
        only = {"network_train_unet_only": True} if trainer.network else {}
        return trainer(output, **{**CACHED, **only, **options})

    run.trainer = trainer
    return run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(job, capfd, number, code, monkeypatch):
    before = signal.getsignal(number)
    assert job("whole") == 0
    with monkeypatch.context():
        before_optimizing(monkeypatch, 2, lambda run: os.kill(os.getpid(), number))
        assert job("stopped") == code
    assert signal.getsignal(number) is before
    state = job.trainer.folder / "stopped" / "run-step00000002-state"
    printed = capfd.readouterr()
    assert "stopping after this step" in printed.err
    assert f"stopped after step 2 of 4; go on with --resume {state}" in (printed.out + printed.err)
    assert not (job.trainer.folder / "stopped" / "run.safetensors").exists()
    monkeypatch.undo()
    assert job("resumed", resume=state) == 0
    whole, resumed = job.trainer.weights("whole"), job.trainer.weights("resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_asked_in_the_last_step_it_is_simply_done(job, monkeypatch):
    before_optimizing(monkeypatch, 4, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert job("out") == 0
    assert (job.trainer.folder / "out" / "run.safetensors").exists()
    assert not list((job.trainer.folder / "out").glob("*-state"))


def test_time_is_up(job, monkeypatch):
    before_optimizing(monkeypatch, 2, lambda run: time.sleep(1.1))
    assert job("out", max_train_seconds=1) == TIME_IS_UP
    (state,) = (job.trainer.folder / "out").glob("*-state")
    assert job("more", resume=state, max_train_seconds=600) == 0


def test_the_clock():
    now = time.monotonic()
    assert Stopper(None, now).exit_code == 0
    assert Stopper(60, now).exit_code == 0
    assert Stopper(60, now - 61).exit_code == TIME_IS_UP


def test_one_process_that_is_asked_stops_them_all(trainer):
    def act(run):
        reduce = run.accelerator.reduce
        other = torch.zeros(6 + len(STOP_CODES))
        other[5 + STOP_CODES.index(143)] = other[5 + STOP_CODES.index(130)] = 1  # two more, asked in two ways
        run.accelerator.reduce = lambda sums, reduction: reduce(sums, reduction=reduction) + other
        loop.optimize(run, 0)
        code, run.stop_code = run.stop_code, 0  # this run goes no further
        return code, run.step_numbers["loss"]

    code, loss = trainer.with_run("out", act, **CACHED, network_train_unet_only=True)
    assert code == 143
    assert trainer("alone", **CACHED, network_train_unet_only=True, max_train_steps=1) == 0
    assert trainer.losses("alone")[1] == loss


@pytest.mark.skipif(os.name == "nt", reason="signals are another thing there")
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_at_once(second):
    program = (
        "import os, signal, time\n"
        "from library.training.stopping import Stopper\n"
        "with Stopper(None, 0.0).listening():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        f"    os.kill(os.getpid(), {int(second)})\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -second
    assert done.stderr.count("stopping after this step") == 1
