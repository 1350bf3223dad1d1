import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

from library.training.ema import WeightAverage

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
EMA = {**CACHED, "use_ema": True, "ema_decay": 0.5}
CPU = torch.device("cpu")


@pytest.fixture(params=["trainer", "sana_trainer"])
def job(request):
    trainer = request.getfixturevalue(request.param)

    def run(output, **options):
        only = {"network_train_unet_only": True} if trainer.network else {}
        return trainer(output, **{**only, **options})

    run.trainer = trainer
    return run


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def learned(tensors):
    """Without what no optimizer changes."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")}


def test_it_is_what_diffusers_computes():
    from diffusers.training_utils import EMAModel

    parameters = {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(5))}
    ours, theirs = WeightAverage(parameters, 0.5, CPU), EMAModel(parameters.values(), decay=0.5)
    theirs.step(parameters.values())  # theirs forgets the first values wholly at the first update, ours by nine tenths
    ours.load(parameters, updates=1)
    for _ in range(12):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter += torch.randn(parameter.shape)
        ours.update()
        theirs.step(parameters.values())
        for average, expected in zip(ours.tensors().values(), theirs.shadow_params):
            torch.testing.assert_close(average, expected)


def test_it_is_the_recursion():
    parameter = nn.Parameter(torch.zeros(2))
    average = WeightAverage({"w": parameter}, 0.9, CPU)
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


def test_it_is_kept_in_fp32_and_shown_in_the_parameters_type():
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    average = WeightAverage({"w": parameter}, 0.999, CPU)
    for _ in range(3):
        with torch.no_grad():
            parameter.mul_(1.01)
        average.update()
    own = parameter.detach().clone()
    assert average.tensors()["w"].dtype == torch.float32
    with average.shown():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, average.tensors()["w"].bfloat16())
    assert torch.equal(parameter, own)


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
    assert facts[0]["ss_ema_decay"] == "0.5"


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
