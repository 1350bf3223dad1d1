"""Steps whose loss or gradient is no number: the run stops, skips them, or goes back to its last state."""

import json
import math
import re

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from library.config.errors import ConfigError
from library.training import loop, step, validation
from library.training.non_finite import DroppedSteps
from library.training.optimizers import set_training_mode
from library.training.saved_weights import save_weights
from library.training.states import save_state

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
RAW_TOO = ("run", "run_raw")
EMA = {"use_ema": True, "ema_decay": 0.5, "ema_save_raw": True}


@pytest.fixture(params=["trainer", "full_trainer", "sana_trainer"])
def job(request):
    trainer = request.getfixturevalue(request.param)

    def run(output, **options):
        only = {"network_train_unet_only": True} if trainer.network else {}
        return trainer(output, **{**CACHED, **only, **options})

    run.trainer = trainer
    return run


@pytest.fixture
def lora(trainer):
    def run(output, **options):
        return trainer(output, **{**CACHED, "network_train_unet_only": True, **options})

    run.trainer = trainer
    return run


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of some steps (from 1) NaN, or their gradient alone; notes which samples each step uses."""
    used = {}

    def strike(*numbers, factor=math.nan, only_gradient=False):
        optimize, training_loss, per_sample = loop.optimize, step.training_loss, step._per_sample
        now = []

        def in_step(run, number):
            now[:] = [number + 1]
            optimize(run, number)

        def noted(run, batch, **rest):
            used.setdefault(now[0], []).extend(zip(batch.keys, batch.visits))
            return training_loss(run, batch, **rest)

        def struck(*arguments):
            loss = per_sample(*arguments)
            if now[0] not in numbers:
                return loss
            if only_gradient:
                loss.register_hook(lambda gradient: gradient * factor)
                return loss
            return loss * factor

        monkeypatch.setattr(loop, "optimize", in_step)
        monkeypatch.setattr(loop, "training_loss", noted)
        monkeypatch.setattr(step, "_per_sample", struck)
        return used

    return strike


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state(job, output, number):
    folder = job.trainer.folder / output / f"run-step{number:08d}-state"
    from safetensors.torch import load_file

    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    tensors = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    return tensors, optimizer


def moments(optimizer):
    return {
        f"{number}.{name}": value
        for number, values in optimizer["optimizer"]["state"].items()
        for name, value in values.items()
    }


def lines(job, output):
    """The lines of the log, read by a parser that takes JSON only."""

    def refuse(word):
        raise AssertionError(f"{word} in the log")

    text = (job.trainer.folder / output / "run-log.jsonl").read_text()
    return {entry["step"]: entry for entry in (json.loads(line, parse_constant=refuse) for line in text.splitlines())}


def bundles(job, output):
    return sorted(path.name for path in (job.trainer.folder / output).glob("run-nonfinite-*"))


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_stop_names_step_samples_and_bundle(job, poison, capsys):
    poison(3)
    assert job("out", save_every_n_steps=1, save_state=True) == 2
    (line,) = errors(capsys)
    folder = job.trainer.folder / "out"
    bundle = folder / "run-nonfinite-step00000003"
    assert "step 3: the loss is nan; samples: 0/0/" in line
    assert f"python tools/replay.py {bundle}` (" in line
    assert not (folder / "run.safetensors").exists() and not (folder / "run-step00000003.safetensors").exists()
    assert {path.name for path in bundle.iterdir()} == {
        "bundle.json",
        "settings.toml",
        "trainable.safetensors",
        "process0.safetensors",
    }
    facts = json.loads((bundle / "bundle.json").read_text())
    assert facts["step"] == 3 and facts["numbers"]["loss"] == "nan" and facts["seed"] == 7
    assert facts["numbers"]["parameters"] != [None]
    weights, _ = state(job, "out", 2)
    from safetensors.torch import load_file

    assert equal(load_file(bundle / "trainable.safetensors"), weights["trainable.safetensors"])


def resumes_alike(job, whole, number, **options):
    """Whether the run that goes on from a state of the whole one ends with its bytes and writes its log."""
    resumed = f"resumed {number}"
    folder = job.trainer.folder / whole / f"run-step{number:08d}-state"
    assert job(resumed, **options, resume=folder) == 0
    weights = all(equal(job.trainer.weights(whole, stem), job.trainer.weights(resumed, stem)) for stem in RAW_TOO)
    later = {step: entry for step, entry in lines(job, whole).items() if step > number}
    return weights and lines(job, resumed) == later


def test_skip_leaves_weights_optimizer_and_average_alone(job, poison):
    options = {**EMA, "save_every_n_steps": 1, "save_state": True, "max_train_steps": 5, "on_nonfinite": "skip"}
    poison(3)
    assert job("whole", **options) == 0
    before, after, later = (state(job, "whole", number) for number in (2, 3, 4))
    for name, tensors in before[0].items():
        assert equal(tensors, after[0][name]) and not equal(tensors, later[0][name])
    assert equal(moments(before[1]), moments(after[1])) and not equal(moments(before[1]), moments(later[1]))
    log = lines(job, "whole")
    assert log[3]["nonfinite/skipped"] == 1
    assert not [number for number in (1, 2, 4, 5) if "nonfinite/skipped" in log[number]]
    assert "loss/current" not in log[3] and "gradient_norm" not in log[3]
    assert all(math.isfinite(log[number]["loss/average"]) for number in log)
    assert bundles(job, "whole") == ["run-nonfinite-step00000003"]
    assert resumes_alike(job, "whole", 3, **options)


def test_a_gradient_beyond_all_numbers_is_skipped_too_and_the_schedule_goes_on(lora, poison, capsys):
    options = {**EMA, "lr_scheduler": "cosine", "scale_weight_norms": 1e-3, "max_train_steps": 4}
    options |= {"save_every_n_steps": 1, "save_state": True}
    assert lora("plain", **options) == 0
    poison(2, factor=math.inf, only_gradient=True)
    capsys.readouterr()
    assert lora("whole", **options, on_nonfinite="skip") == 0
    printed = capsys.readouterr()
    assert "warning: step 2: the gradient is " in printed.out + printed.err
    assert "Its update is skipped (skipped so far: 1)" in printed.out + printed.err
    one, two = state(lora, "whole", 1), state(lora, "whole", 2)
    assert all(equal(tensors, two[0][name]) for name, tensors in one[0].items())
    log, plain = lines(lora, "whole"), lines(lora, "plain")
    assert "loss/current" in log[2] and "gradient_norm" not in log[2] and log[2]["nonfinite/skipped"] == 1
    rates = [name for name in log[3] if name.startswith("lr/")]
    assert rates and all(log[number][name] == plain[number][name] for number in log for name in rates)
    assert resumes_alike(lora, "whole", 1, **options, on_nonfinite="skip")


def test_rollback_goes_back_and_on(job, poison):
    options = {**EMA, "save_state": True, "save_every_n_steps": 2, "max_train_steps": 6, "on_nonfinite": "rollback"}
    used = poison(4)
    assert job("whole", **options) == 0
    two, four = state(job, "whole", 2), state(job, "whole", 4)
    assert all(equal(tensors, four[0][name]) for name, tensors in two[0].items())
    assert equal(moments(two[1]), moments(four[1]))
    log = lines(job, "whole")
    assert log[4]["nonfinite/rollbacks"] == 1 and "loss/current" not in log[4]
    assert not [number for number in (1, 2, 3, 5, 6) if "nonfinite/rollbacks" in log[number]]
    visits = [visit for number in sorted(used) for visit in used[number]]
    assert sorted(used) == [1, 2, 3, 4, 5, 6] and len(set(visits)) == len(visits)  # nothing is seen twice
    assert bundles(job, "whole") == ["run-nonfinite-step00000004"]
    assert resumes_alike(job, "whole", 4, **options)


def test_going_back_keeps_the_schedule_where_it_stands(lora, poison):
    options = {**EMA, "save_state": True, "save_every_n_steps": 2, "lr_scheduler": "cosine", "max_train_steps": 5}
    assert lora("plain", **options) == 0
    poison(4)  # not right after the state
    assert lora("whole", **options, on_nonfinite="rollback") == 0
    log, plain = lines(lora, "whole"), lines(lora, "plain")
    rates = [name for name in log[5] if name.startswith("lr/")]
    assert rates and all(log[number][name] == plain[number][name] for number in log for name in rates)
    assert state(lora, "whole", 4)[1]["schedule"]["last_epoch"] == 4
    assert log[5]["loss/current"] != plain[5]["loss/current"]
    # inside the resumed run the way back leads to the state that it was resumed from
    assert resumes_alike(lora, "whole", 2, **options, on_nonfinite="rollback")


@pytest.mark.parametrize("optimizer", ["AdamWScheduleFree", "Prodigy", "CAME8bit"])
def test_every_optimizer_goes_back_in_the_middle_of_a_run(lora, poison, optimizer):
    options = {"optimizer_type": optimizer, "on_nonfinite": "rollback", "max_train_steps": 5}
    if optimizer == "CAME8bit":
        options |= {"mixed_precision": "bf16", "full_bf16": True, "stochastic_rounding": True, "learning_rate": 1e-4}
    options |= {"save_state": True, "save_every_n_steps": 2}
    poison(3)
    assert lora("whole", **options) == 0
    assert lora("resumed", **options, resume=lora.trainer.folder / "whole" / "run-step00000004-state") == 0
    assert equal(lora.trainer.weights("whole"), lora.trainer.weights("resumed"))


def test_too_many_in_a_row_stop(lora, poison, capsys):
    poison(*range(2, 20))
    assert lora("out", on_nonfinite="skip", max_train_steps=20) == 2
    (line,) = errors(capsys)
    assert line.startswith("error: step 12: the loss is nan; samples: 0/0/")
    assert "--on_nonfinite skip stops here: 10 steps before it were skipped too" in line
    expected = [f"run-nonfinite-step{number:08d}" for number in (2, 3, 4, 12)]
    assert bundles(lora, "out") == expected
    assert lines(lora, "out")[11]["nonfinite/skipped"] == 10


def test_a_row_goes_on_over_a_restart():
    dropped = DroppedSteps()
    for number in (3, 4, 6):
        dropped.note(number)
    dropped.note(7)
    assert (dropped.row_before(8), dropped.row_before(9), dropped.row_before(7)) == (2, 0, 0)
    resumed = DroppedSteps()
    resumed.restore(json.loads(json.dumps(dropped.as_dict())))
    resumed.note(8)
    assert resumed.row_before(9) == 3
    assert DroppedSteps().row_before(1) == 0


def test_going_back_needs_a_state(lora, poison, capsys):
    poison(2)
    assert lora("out", on_nonfinite="rollback", save_state=True, save_every_n_steps=2) == 2
    (line,) = errors(capsys)
    assert "step 2: the loss is nan" in line and "rollback stops here: no state has been saved yet" in line


def test_without_progress_going_back_ends(lora, poison, capsys):
    # states are saved between, but with the weights of the first
    poison(*range(4, 40, 2))
    assert lora("out", on_nonfinite="rollback", save_state=True, save_every_n_steps=2, max_train_steps=40) == 2
    (line,) = errors(capsys)
    assert "step 10: the loss is nan" in line
    assert "--on_nonfinite rollback stops here: the run went back 3 times and came to no new state" in line
    assert lines(lora, "out")[8]["nonfinite/rollbacks"] == 3
    state = lora.trainer.folder / "out" / "run-step00000006-state"
    options = {"on_nonfinite": "rollback", "save_state": True, "save_every_n_steps": 2, "max_train_steps": 40}
    assert lora("resumed", **options, resume=state) == 2
    assert errors(capsys)[0].startswith("error: step 10: the loss is nan")


def test_a_new_state_is_progress(lora, poison):
    poison(3, 6, 9, 12, 15)
    options = {"on_nonfinite": "rollback", "save_state": True, "save_every_n_steps": 2, "max_train_steps": 16}
    assert lora("out", **options) == 0
    assert lines(lora, "out")[15]["nonfinite/rollbacks"] == 5
    assert len(bundles(lora, "out")) == 3


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_state_that_is_gone_stops(lora, poison, capsys, damage, monkeypatch):
    poison(4)
    optimize = loop.optimize

    def spoil(run, number):
        if number == 3:
            file = run.last_state / "trainable.safetensors"
            file.unlink() if damage == "missing" else file.write_bytes(b"0" * file.stat().st_size)
        optimize(run, number)

    monkeypatch.setattr(loop, "optimize", spoil)
    assert lora("out", on_nonfinite="rollback", save_state=True, save_every_n_steps=2, max_train_steps=6) == 2
    (line,) = errors(capsys)
    assert "--on_nonfinite rollback stops here: " in line and "trainable.safetensors is missing or damaged" in line


FUSED = {"fused_backward_pass": True, "max_grad_norm": 0}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"on_nonfinite": "rollback"}, "--on_nonfinite rollback goes back to a saved state"),
        ({"on_nonfinite": "rollback", "save_state": True}, "--on_nonfinite rollback goes back to a saved state"),
        ({"on_nonfinite": "rollback", "save_every_n_steps": 2}, "--on_nonfinite rollback goes back to a saved state"),
        ({"on_nonfinite": "skip", **FUSED}, "--on_nonfinite skip drops a step as a whole"),
        ({"replay_bundle_at_step": 2, **FUSED}, "--replay_bundle_at_step 2 keeps the weights from before the step"),
        ({"replay_bundle_at_step": 5}, "--replay_bundle_at_step 5: the run has 4 optimizer steps, so it never comes"),
        ({"on_nonfinite": "skipp"}, "expected one of stop, skip, rollback, got 'skipp'; did you mean skip?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(lora, capsys, options, problem):
    assert lora("out", **options) == 2
    (line,) = errors(capsys)
    assert problem in line


@pytest.mark.parametrize("only_gradient", [False, True], ids=["loss", "gradient"])
def test_fused_backward_goes_back(lora, poison, only_gradient, capsys):
    poison(3, factor=math.inf, only_gradient=only_gradient)
    options = {**FUSED, "on_nonfinite": "rollback", "save_state": True, "save_every_n_steps": 2, "max_train_steps": 5}
    assert lora("whole", **options) == 0
    printed = capsys.readouterr()
    assert "warning: step 3: the " in printed.out + printed.err
    assert lora("resumed", **options, resume=lora.trainer.folder / "whole" / "run-step00000004-state") == 0
    assert equal(lora.trainer.weights("whole"), lora.trainer.weights("resumed"))


def with_scaler(run, scale):
    """What fp16 on a GPU has: a scaler for the loss."""
    scaler = run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run.optimizer = AcceleratedOptimizer(run.optimizer.optimizer, scaler=scaler)
    run.accelerator.unscale_gradients = lambda: scaler.unscale_(run.optimizer.optimizer)
    return scaler


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_gradient_that_the_scaler_drops_is_ordinary_until_its_scale_is_used_up(lora, poison, policy):
    poison(*range(2, 40), factor=math.inf, only_gradient=True)

    def act(run):
        scaler = with_scaler(run, 8.0)
        run.last_state = None
        scales = []
        for number in range(5):
            loop.optimize(run, number)
            scales.append(scaler.get_scale())
        assert scales == [8, 4, 2, 1, 0.5] and run.dropped.last == 0
        if policy != "skip":
            with pytest.raises(ConfigError, match="step 6: the gradient is "):
                loop.optimize(run, 5)
            return True
        loop.optimize(run, 5)
        assert run.dropped.last == 6 and scaler.get_scale() == 0.5
        return True

    options = {"max_train_steps": 10, "on_nonfinite": policy}
    if policy == "rollback":
        options |= {"save_state": True, "save_every_n_steps": 5}
    assert lora.trainer.with_run("out", act, **CACHED, network_train_unet_only=True, **options)


def test_a_loss_that_is_no_number_is_dropped_with_a_scaler_too(lora, poison):
    poison(2)

    def act(run):
        scaler = with_scaler(run, 8.0)
        loop.optimize(run, 0)
        before = {name: tensor.clone() for name, tensor in run.trainable.state_dict().items()}
        loop.optimize(run, 1)
        assert equal(before, run.trainable.state_dict()) and scaler.get_scale() == 8
        loop.optimize(run, 2)
        assert not equal(before, run.trainable.state_dict())
        return True

    options = {"max_train_steps": 10, "on_nonfinite": "skip"}
    assert lora.trainer.with_run("out", act, **CACHED, network_train_unet_only=True, **options)


@pytest.mark.parametrize(
    ("optimizer", "moment", "value"), [("AdamW", "exp_avg_sq", math.inf), ("AdamWScheduleFree", "z", math.nan)]
)
def test_a_moment_that_is_no_number_reaches_no_file(lora, optimizer, moment, value):
    def act(run):
        set_training_mode(run.optimizer, True)
        loop.optimize(run, 0)
        parameter = run.parameters[3]
        (name,) = [name for name, other in run.trainable.named_parameters() if other is parameter]
        run.optimizer.optimizer.state[parameter][moment].view(-1)[0] = value
        said = f"after step 1 {moment} of {name} in the optimizer's state has numbers that are not finite"
        with pytest.raises(ConfigError, match=re.escape(said)):
            save_state(run, "run", 1)
        if optimizer == "AdamW":
            assert save_weights(run, "run", 1)  # the weights are fine
        else:
            with pytest.raises(ConfigError, match=re.escape(said)):
                save_weights(run, "run", 1)  # what is saved is made of it
        return True

    assert lora.trainer.with_run("out", act, **CACHED, network_train_unet_only=True, optimizer_type=optimizer)
    assert not list((lora.trainer.folder / "out").glob("*-state"))


def test_numbers_that_the_saved_type_lacks_are_one_line(lora):
    def act(run):
        with torch.no_grad():
            run.parameters[0].view(-1)[0] = 1e6
        with pytest.raises(
            ConfigError, match=r"the adapter can't be saved: .* not finite.*; use another --save_precision"
        ):
            save_weights(run, "run", 1)
        return True

    assert lora.trainer.with_run("out", act, **CACHED, network_train_unet_only=True, save_precision="fp16")
    assert not list((lora.trainer.folder / "out").glob("*.safetensors"))


def test_a_validation_loss_that_is_no_number_is_left_out_of_the_log(lora, monkeypatch):
    validation_loss = step.validation_loss
    monkeypatch.setattr(validation, "validation_loss", lambda *given: validation_loss(*given) * math.nan)
    assert lora("out", validation_split=0.5, validate_every_n_steps=1, max_train_steps=2) == 0
    log = lines(lora, "out")
    assert sorted(log) == [1, 2] and not [name for name in log[2] if name.startswith("loss/validation")]
