"""A step done again from its bundle has the bits that the run had."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch

from library.training import bundle as bundle_module
from library.training.bundle import StepNumbers, write_bundle
from tests.training.ranks import in_processes
from tools.replay import main

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}


@pytest.fixture(params=["trainer", "full_trainer", "sana_trainer"])
def job(request):
    trainer = request.getfixturevalue(request.param)

    def run(output, **options):
        only = {"network_train_unet_only": True} if trainer.network else {}
        return trainer(output, **{**CACHED, **only, **options})

    run.trainer = trainer
    return run


@pytest.fixture
def replay(capsys):
    def call(folder, *options):
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        capsys.readouterr()
        try:
            code = main([str(folder), *map(str, options)])
        finally:
            logging.getLogger().handlers.clear()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def facts(bundle):
    return json.loads((bundle / "bundle.json").read_text())


def test_any_step_is_done_again_to_the_bit(job, replay):
    assert job("plain", max_train_steps=3) == 0
    assert job("out", max_train_steps=3, replay_bundle_at_step=2) == 0
    plain, out = job.trainer.weights("plain"), job.trainer.weights("out")
    assert all(torch.equal(plain[name], out[name]) for name in plain)
    bundle = job.trainer.folder / "out" / "run-replay-step00000002"
    code, printed = replay(bundle)
    assert code == 0, printed
    (line,) = [line for line in job.trainer.log("out") if line["step"] == 2]
    recorded = f"loss {line['loss/current']!r}, gradient norm {line['gradient_norm']!r}"
    assert f"reproduced: {recorded}, as recorded" in printed
    assert "first layer whose output is not finite: none" in printed
    assert printed.count(".png") == 2


def test_weights_that_grew_beyond_all_numbers(job, replay):
    assert job("out", learning_rate=1e30, max_grad_norm=0) == 2
    bundle = job.trainer.folder / "out" / "run-nonfinite-step00000002"
    assert facts(bundle)["numbers"]["loss"] == "nan"
    code, printed = replay(bundle)
    assert code == 0, printed
    assert "reproduced: loss nan, gradient norm nan, as recorded" in printed
    assert "first layer whose output is not finite: denoiser." in printed
    assert "its input was finite" in printed
    assert facts(bundle)["numbers"]["parameters"][0] in printed.partition("gradients are not finite: ")[2]


@pytest.mark.parametrize(
    ("options", "dataset"),
    [
        pytest.param({"cache_latents": None, "cache_text_encoder_outputs": None}, {}, id="encoded in the step"),
        pytest.param(
            {"cache_text_encoder_outputs": None, "network_train_unet_only": None, "text_encoder_lr": [1e-3, 1e-3, 0]},
            {},
            id="trained text encoders",
        ),
        pytest.param(
            {
                "mixed_precision": "bf16",
                "gradient_checkpointing": True,
                "gradient_accumulation_steps": 2,
                "max_data_loader_n_workers": 2,
                "network_dropout": 0.5,
                "lr_scheduler": "cosine",
                "optimizer_type": "AdamWScheduleFree",
            },
            {"subset": "is_regularisation_data = true\ncaption_dropout_rate = 0.5"},
            id="bf16, accumulated, taught by the base model",
        ),
        pytest.param({"vae_cache_disable": True, "cache_latents": None}, {"subset": "flip_aug = true"}, id="ahead"),
    ],
)
def test_all_that_goes_into_a_step_is_in_the_bundle(trainer, replay, options, dataset):
    settings = {**CACHED, "network_train_unet_only": True, **options, "dataset_config": trainer.dataset(**dataset)}
    assert trainer("out", **settings, max_train_steps=2, replay_bundle_at_step=2) == 0
    shutil.rmtree(trainer.photos)  # nothing of the data is needed any more
    settings["dataset_config"].unlink()
    code, printed = replay(trainer.folder / "out" / "run-replay-step00000002")
    assert code == 0 and "reproduced: loss " in printed, printed


def test_a_poisoned_entry_of_the_cache_is_named(trainer, replay):
    on_disk = {
        "cache_text_encoder_outputs": True,
        "network_train_unet_only": True,
        "cache_latents_to_disk": True,
        "max_train_steps": 2,
    }
    assert trainer("first", **on_disk, cache_dir=trainer.folder / "cache") == 0
    (shard,) = (trainer.folder / "cache" / "latents").glob("*.safetensors")
    from library.io.header import read_header

    header = read_header(shard)
    place = next(info for name, info in header.tensors.items() if info.dtype == "F32" and info.elements > 100)
    with open(shard, "r+b") as file:
        file.seek(header.data_start + place.begin)
        file.write(torch.tensor(torch.nan).numpy().tobytes())
    assert trainer("out", **on_disk, cache_dir=trainer.folder / "cache") == 2
    (bundle,) = (trainer.folder / "out").glob("run-nonfinite-*")
    code, printed = replay(bundle)
    assert code == 0, printed
    assert "parts of the batches that are not finite: latents of 0/0/" in printed
    assert "its input was not finite either" in printed


def test_two_processes_are_done_again_by_one(trainer, replay):
    text = trainer.dataset().read_text().replace("batch_size = 2", "batch_size = 1")
    (trainer.photos / "camera.png").unlink()
    spoilt = trainer.folder / "spoilt"
    spoilt.mkdir()
    for ending in ("png", "txt"):
        shutil.move(trainer.photos / f"coffee.{ending}", spoilt)
    dataset = trainer.folder / "two.toml"
    dataset.write_text(
        f"{text}[[datasets.subsets]]\nimage_dir = {json.dumps(str(spoilt))}\nis_regularisation_data = true\n"
    )
    # the weight of that picture's loss is beyond fp32, so that a step is no number in the process that has it
    options = {**CACHED, "network_train_unet_only": True, "dataset_config": dataset, "regularisation_weight": 1e39}
    options |= {"on_nonfinite": "skip", "max_train_steps": 4, "replay_bundle_at_step": 4}
    assert in_processes(2, lambda rank: trainer("out", **options)) == [0, 0]
    log = {line["step"]: line for line in trainer.log("out")}
    assert [number for number, line in log.items() if "nonfinite/skipped" in line] == [2, 3]
    assert all({"loss/current", "gradient_norm"} <= log[number].keys() for number in (1, 4))
    bundle = trainer.folder / "out" / "run-nonfinite-step00000003"
    assert sorted(path.name for path in bundle.iterdir()) == [
        "bundle.json",
        "process0.safetensors",
        "process1.safetensors",
        "settings.toml",
        "trainable.safetensors",
    ]
    assert [len(part["batches"]) for part in facts(bundle)["processes"]] == [1, 1]
    assert facts(bundle)["numbers"]["parameters"].count(None) == 1
    code, printed = replay(bundle)
    assert code == 0, printed
    assert "(process 0)" in printed and "(process 1)" in printed and "loss_weight of 0/1/coffee.png" in printed
    # in the epoch's last step there is work for one process only
    finite = trainer.folder / "out" / "run-replay-step00000004"
    assert [len(part["batches"]) for part in facts(finite)["processes"]] == [1, 0]
    code, printed = replay(finite)
    assert code == 0, printed


@pytest.fixture
def bundle(trainer):
    options = {**CACHED, "network_train_unet_only": True, "max_train_steps": 1, "replay_bundle_at_step": 1}
    assert trainer("out", **options) == 0
    return trainer.folder / "out" / "run-replay-step00000001"


def test_other_numbers_are_told(bundle, replay):
    path = bundle / "bundle.json"
    changed = facts(bundle)
    changed["numbers"]["loss"] = repr(float(changed["numbers"]["loss"]) * (1 + 2**-23))
    changed["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(changed))
    code, printed = replay(bundle)
    assert code == 1
    assert f"differs: recorded loss {changed['numbers']['loss']}, " in printed and "the run had torch 1.0" in printed
    changed["same_sums"] = False  # as of several processes, whose sums have another order
    path.write_text(json.dumps(changed))
    assert replay(bundle)[0] == 0


def test_options_that_are_given_anew_win(trainer, bundle, replay):
    moved = trainer.folder / "moved"
    shutil.copytree(trainer.checkpoint.parent, moved)
    settings = bundle / "settings.toml"
    settings.write_text(settings.read_text().replace(str(trainer.checkpoint), "gone.safetensors"))
    code, printed = replay(bundle)
    assert code == 2 and "gone.safetensors" in printed
    code, printed = replay(
        bundle, "--pretrained_model_name_or_path", moved / trainer.checkpoint.name, "--network_dim", 3
    )
    assert code == 2 and "tensors are not those of this model and these options, first lora_unet_" in printed
    code, printed = replay(bundle, "--pretrained_modell", "x")
    assert code == 2 and "unknown option --pretrained_modell" in printed


def test_what_is_no_bundle_is_one_line(bundle, replay):
    changes = {
        "not a replay bundle, it has no bundle.json": lambda folder: (folder / "bundle.json").unlink(),
        "bundle.json is damaged": lambda folder: (folder / "bundle.json").write_text("{"),
        "bundle.json is damaged (KeyError": lambda folder: (folder / "bundle.json").write_text('{"format": 1}'),
        "written in format 9, this version": lambda folder: (folder / "bundle.json").write_text('{"format": 9}'),
        "settings.toml: no such file": lambda folder: (folder / "settings.toml").unlink(),
        "process0.safetensors": lambda folder: (folder / "process0.safetensors").write_bytes(b"x"),
    }
    for number, (problem, change) in enumerate(changes.items()):
        folder = bundle.with_name(f"changed-{number}")
        shutil.copytree(bundle, folder)
        change(folder)
        code, printed = replay(folder)
        assert code == 2 and problem in printed and "Traceback" not in printed


def test_secrets_stay_out(trainer):
    def write(run):
        logging_options = dataclasses.replace(run.config.logging, log_with="wandb", wandb_api_key="very secret")
        run.config = dataclasses.replace(run.config, logging=logging_options)
        return write_bundle(run, "replay", 0, [], StepNumbers(1.0, 1.0), weights_are_of_before=True)

    assert "tools/replay.py" in trainer.with_run("out", write, **CACHED, network_train_unet_only=True)
    files = list((trainer.folder / "out" / "run-replay-step00000001").iterdir())
    assert len(files) == 4 and not [file for file in files if b"very secret" in file.read_bytes()]


def test_a_disk_that_is_full_is_said(trainer, monkeypatch):
    def write(run):
        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(bundle_module, "save_as_it_is", full)
        return write_bundle(run, "replay", 0, [], StepNumbers(1.0, 1.0), weights_are_of_before=True)

    told = trainer.with_run("out", write, **CACHED, network_train_unet_only=True)
    assert told.endswith("run-replay-step00000001 can't be written (No space left on device)")
    assert not list((trainer.folder / "out").glob("*replay*"))


def test_fused_backward_has_stepped_some_weights_already(trainer, replay, capsys):
    options = {**CACHED, "network_train_unet_only": True, "fused_backward_pass": True, "max_grad_norm": 0}
    assert trainer("out", **options, learning_rate=1e30) == 2
    bundle = trainer.folder / "out" / "run-nonfinite-step00000002"
    assert facts(bundle)["numbers"]["gradient_norm"] is None and facts(bundle)["weights_are_of_before"]
    code, printed = replay(bundle)
    assert code == 0 and "reproduced: loss nan, gradient norm nan, as recorded" in printed
