import math
import time

import pytest
import torch
from safetensors import safe_open
from torch import nn

from library.training import ema
from library.training.ema import WeightAverage

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
EMA = {**CACHED, "use_ema": True, "ema_decay": 0.5}


@pytest.fixture(params=["trainer", "sana_trainer"])
def job(request):
    trainer = request.getfixturevalue(request.param)

    only = {"network_train_unet_only": True} if trainer.network else {}

    def run(output, **options):
        return trainer(output, **{**only, **options})

    run.trainer, run.only = trainer, only
    return run


def move(*parameters):
    """A step."""
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn(parameter.shape)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def learned(tensors):
    """Without what no optimizer changes."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")}


@pytest.mark.parametrize("on_host", [False, True])
def test_it_is_what_diffusers_computes(on_host):
    from diffusers.training_utils import EMAModel

    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    ours = WeightAverage({"a": parameters[0], "b": parameters[1]}, 0.3, on_host=on_host)
    theirs = EMAModel(parameters, decay=0.3)
    # theirs keeps nothing at its first update, ours a tenth: the same while the parameters haven't moved
    ours.update()
    theirs.step(parameters)
    for _ in range(8):
        move(*parameters)
        assert ours.next_decay == pytest.approx(theirs.get_decay(theirs.optimization_step + 1))
        ours.update()
        theirs.step(parameters)
    assert ours.next_decay == 0.3  # the warm-up is over
    expected = dict(zip("ab", theirs.shadow_params))
    for name, average in ours.tensors().items():
        torch.testing.assert_close(average, expected[name], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(average, dict(zip("ab", parameters))[name])
    ours.close()


def test_once_settled_it_is_torchs_exponential_average():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = nn.Linear(3, 2)
    ours = WeightAverage(dict(model.named_parameters()), 0.7, on_host=True)
    ours.load(dict(model.named_parameters()), updates=100)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    theirs.update_parameters(model)  # the first one copies
    for _ in range(5):
        move(*model.parameters())
        ours.update()
        theirs.update_parameters(model)
    for name, average in ours.tensors().items():
        torch.testing.assert_close(average, theirs.module.get_parameter(name).detach())
    ours.close()


def test_it_is_the_recursion():
    parameter = nn.Parameter(torch.zeros(2))
    average = WeightAverage({"w": parameter}, 0.9, on_host=False)
    expected, values = torch.zeros(2), torch.arange(1.0, 21.0)
    for update, value in enumerate(values):
        with torch.no_grad():
            parameter.fill_(value)
        decay = min((1 + update) / (10 + update), 0.9)
        assert average.next_decay == decay
        expected = decay * expected + (1 - decay) * value
        average.update()
    torch.testing.assert_close(average.tensors()["w"], expected)
    assert average.updates == 20 and math.isclose(average.next_decay, 21 / 30)


@pytest.mark.parametrize("on_host", [False, True])
def test_it_is_kept_in_fp32_and_shown_in_the_parameters_type(on_host):
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    average = WeightAverage({"w": parameter}, 0.999, on_host=on_host)
    for _ in range(3):
        with torch.no_grad():
            parameter.mul_(1.5)
        average.update()
    own = parameter.detach().clone()
    assert average.tensors()["w"].dtype == torch.float32
    with average.shown():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, average.tensors()["w"].bfloat16())
    assert torch.equal(parameter, own)


def test_what_is_shown_is_forgotten_whatever_happens_inside():
    """The average, too, is as it was: nothing that is done to the parameters inside reaches it."""
    parameter = nn.Parameter(torch.ones(3))
    average = WeightAverage({"w": parameter}, 0.5, on_host=True)
    move(parameter)
    average.update()
    own, kept = parameter.detach().clone(), average.tensors()["w"].clone()
    with pytest.raises(KeyError), average.shown():
        move(parameter)
        raise KeyError
    assert torch.equal(parameter, own) and torch.equal(average.tensors()["w"], kept)
    average.close()


def test_an_update_on_its_way_is_waited_for(monkeypatch):
    blend = ema._blend
    monkeypatch.setattr(ema, "_blend", lambda *arguments: (time.sleep(0.2), blend(*arguments)))
    parameter = nn.Parameter(torch.zeros(3))
    average = WeightAverage({"w": parameter}, 0.5, on_host=True)
    for value in (10.0, 0.0):
        with torch.no_grad():
            parameter.fill_(value)
        average.update()
    with average.shown():
        torch.testing.assert_close(parameter.detach(), torch.full((3,), 9.0 * 2 / 11))
    assert not parameter.any()
    average.close()


def test_what_goes_wrong_in_the_thread_is_told():
    parameter = nn.Parameter(torch.ones(3))
    average = WeightAverage({"w": parameter}, 0.5, on_host=True)
    average._averages["w"] = torch.ones(4)
    average.update()
    with pytest.raises(RuntimeError, match="size"):
        average.tensors()
    average.close()


def test_training_is_the_same_with_it_and_the_file_holds_it(job):
    assert job("plain", **CACHED) == 0
    assert job("averaged", **EMA, ema_save_raw=True) == 0
    plain, average, raw = (
        learned(job.trainer.weights(*place)) for place in (("plain",), ("averaged",), ("averaged", "run_raw"))
    )
    assert equal(plain, raw) and not equal(plain, average)
    assert job.trainer.losses("plain") == job.trainer.losses("averaged")
    facts = []
    for name in ("run", "run_raw"):
        with safe_open(job.trainer.folder / "averaged" / f"{name}.safetensors", "pt") as file:
            facts.append(file.metadata())
    assert facts[0]["ss_ema_updates"] == "4" and "ss_ema_updates" not in facts[1]
    assert (facts[0]["ss_use_ema"], facts[0]["ss_ema_decay"]) == ("True", "0.5")
    assert not [name for name in facts[1] if "ema" in name.split("_")]  # what acted on another file


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_a_resumed_run_has_the_same_average(job, device):
    options = {**EMA, "ema_device": device, "ema_update_interval": 2, "max_train_steps": 5}
    assert job("whole", **options, save_every_n_steps=3, save_state=True) == 0
    state = job.trainer.folder / "whole" / "run-step00000003-state"
    assert job("resumed", **options, resume=state) == 0
    assert equal(job.trainer.weights("whole"), job.trainer.weights("resumed"))


def test_the_interval_acts(job):
    for interval in (1, 3):
        assert job(f"{interval}", **EMA, ema_update_interval=interval) == 0
    assert not equal(job.trainer.weights("1"), job.trainer.weights("3"))


def test_validation_and_samples_use_it_or_both(job):
    prompts = job.trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    options = {"validation_split": 0.3, "validate_every_n_steps": 4, "sample_prompts": prompts}
    options |= {"sample_every_n_steps": 4}
    losses, pictures = {}, {}
    for mode in ("ema_only", "comparison", "none"):
        assert job(mode, **EMA, **options, ema_validation=mode) == 0
        losses[mode] = [
            {name: value for name, value in line.items() if name in ("loss/validation", "loss/validation_raw")}
            for line in job.trainer.log(mode)
        ]
        losses[mode] = {name: value for line in losses[mode] for name, value in line.items()}
        folder = job.trainer.folder / mode / "sample"
        pictures[mode] = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    average, raw = losses["ema_only"]["loss/validation"], losses["none"]["loss/validation"]
    assert average != raw
    assert losses["comparison"] == {"loss/validation": average, "loss/validation_raw": raw}
    first, second = "run_000004_00_1.png", "run_000004_raw_00_1.png"
    assert pictures["ema_only"].keys() == pictures["none"].keys() == {first}
    assert pictures["comparison"] == {first: pictures["ema_only"][first], second: pictures["none"][first]}


def test_a_state_without_it_is_refused(job, capsys):
    assert job("plain", **CACHED, max_train_steps=1, save_state_on_train_end=True) == 0
    capsys.readouterr()
    assert job("more", **EMA, resume=job.trainer.folder / "plain" / "run-state") == 2
    assert "the state was saved without a moving average" in capsys.readouterr().err


def test_a_damaged_average_is_refused(job, capsys):
    assert job("out", **EMA, max_train_steps=1, save_state_on_train_end=True) == 0
    state = job.trainer.folder / "out" / "run-state"
    data = bytearray((state / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (state / "ema.safetensors").write_bytes(data)
    capsys.readouterr()
    assert job("more", **EMA, resume=state) == 2
    assert "ema.safetensors is missing or damaged" in capsys.readouterr().err


def test_old_raw_files_go(job):
    assert job("out", **EMA, ema_save_raw=True, save_every_n_steps=1, save_last_n_steps=2) == 0
    names = {path.name for path in (job.trainer.folder / "out").glob("*.safetensors")}
    assert names == {f"run{step}{raw}.safetensors" for step in ("", "-step00000003") for raw in ("", "_raw")}


def test_an_average_that_is_no_number_is_not_saved(job):
    from library.config.errors import ConfigError
    from library.training.saved_weights import save_weights
    from library.training.states import save_state

    def spoil(run):
        name, average = next(iter(run.average.tensors().items()))
        average.view(-1)[0] = float("nan")
        for save in (save_weights, save_state):
            with pytest.raises(ConfigError, match=f"the average of {name} has numbers that are not finite"):
                save(run, "run", 1)
        return True

    assert job.trainer.with_run("out", spoil, **{**job.only, **EMA})
    assert not list((job.trainer.folder / "out").glob("run.safetensors"))


def test_an_interval_beyond_the_run_is_refused(job, capsys):
    assert job("out", **EMA, ema_update_interval=5, max_train_steps=4) == 2
    assert "--ema_update_interval 5: the run has 4 optimizer steps" in capsys.readouterr().err
    assert job("out", **EMA, ema_update_interval=5, max_train_steps=None, max_train_epochs=2) == 2
    assert "--ema_update_interval 5: the run has 4 optimizer steps" in capsys.readouterr().err


def test_what_looks_at_it_may_change_and_what_makes_it_is_refused(job, capsys):
    assert job("out", **EMA, max_train_steps=1, save_state_on_train_end=True) == 0
    state = job.trainer.folder / "out" / "run-state"
    capsys.readouterr()
    assert job("free", **EMA, ema_device="accelerator", ema_save_raw=True, max_train_steps=2, resume=state) == 0
    assert "this is another run" not in capsys.readouterr().err
    other = {**EMA, "ema_decay": 0.9, "max_train_steps": 2, "resume": state}
    assert job("refused", **other) == 2
    assert "this is another run than the state's: --ema_decay 0.9 (the state: 0.5)" in capsys.readouterr().err
    assert job("told", **other, resume_anyway=True) == 0
    assert "--ema_decay 0.9 (the state: 0.5)" in capsys.readouterr().err
    assert job("ends", **CACHED, max_train_steps=2, resume=state, resume_anyway=True) == 0
    told = capsys.readouterr().err
    assert "--use_ema False (the state: True)" in told
