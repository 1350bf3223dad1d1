"""A run whose optimizer state waits on the host is the run whose state doesn't, byte for byte."""

import pytest
import torch

from library.memory import state_offload
from library.training import states, updates
from library.training.comparing import compare_runs
from tests.memory.late_state import LateStateTransfers
from tests.training.ranks import in_processes

CACHED = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
ADAPTER = {**CACHED, "network_train_unet_only": True, "network_dim": 8}
AWAY = {"offload_optimizer_device": "cpu"}
BF16 = {"mixed_precision": "bf16", "full_bf16": True}
FUSED = {"fused_backward_pass": True, "max_grad_norm": 0}
EVERY_SECOND = {"save_every_n_steps": 2, "save_state": True, "max_train_steps": 3}


@pytest.fixture
def made(monkeypatch):
    """The transfers of the runs with state on the host; tiny models' state moves, too."""
    transfers = []

    def make():
        transfers.append(LateStateTransfers())
        return transfers[-1]

    monkeypatch.setattr(updates, "state_transfers_to", lambda device: make)
    for module in (state_offload, states):
        monkeypatch.setattr(module, "SMALLEST", 256)
    return transfers


def assert_same(trainer, one, other):
    compared = compare_runs(trainer.folder / one, trainer.folder / other)
    assert not compared.differences
    assert compared.equal["optimizer"] > 10


@pytest.mark.parametrize(
    ("job", "options"),
    [
        pytest.param("trainer", {**ADAPTER, "use_ema": True}, id="adapter, averaged"),
        pytest.param(
            "full_trainer",
            {**CACHED, **BF16, **FUSED, "kahan_summation": True, "optimizer_type": "Adafactor"},
            id="full, fused, kahan",
        ),
        pytest.param(
            "sana_trainer",
            {**CACHED, **BF16, "stochastic_rounding": True, "optimizer_type": "AdamW8bit"},
            id="sana, rounding, 8bit",
        ),
    ],
)
def test_the_run_and_its_continuation_have_the_same_bytes(request, made, job, options):
    trainer = request.getfixturevalue(job)
    options = {**options, **EVERY_SECOND}
    assert trainer("plain", **options) == 0 and not made
    assert trainer("away", **options, **AWAY) == 0
    assert [what for what, _ in made[0].happened].count("used") > 20
    assert_same(trainer, "plain", "away")
    state = trainer.folder / "away" / "run-step00000002-state"
    assert trainer("resumed", **options, **AWAY, resume=state) == 0
    plain, resumed = trainer.weights("plain"), trainer.weights("resumed")
    assert all(torch.equal(plain[name], resumed[name]) for name in plain)


def test_each_of_two_processes_has_its_own(trainer, made):
    options = {**ADAPTER, **EVERY_SECOND, "max_train_steps": 2}
    assert in_processes(2, lambda rank: trainer("plain", **options)) == [0, 0]

    def moves(rank):
        assert trainer("away", **options, **AWAY) == 0
        return [what for what, _ in made[0].happened].count("used")

    assert min(in_processes(2, moves)) > 10
    assert_same(trainer, "plain", "away")


def test_on_the_host_nothing_moves_and_that_is_said(trainer, capsys):
    assert trainer("out", **ADAPTER, **AWAY, max_train_steps=1) == 0
    assert "the optimizer's state is in host memory already, nothing moves" in capsys.readouterr().err
