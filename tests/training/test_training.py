"""Training end to end, on a tiny model: what is written, and that what must not change the result doesn't."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open

CACHED = {
    "cache_latents": True,
    "cache_text_encoder_outputs": True,
    "network_train_unet_only": True,
}
CACHED_ON_DISK = {
    "cache_latents_to_disk": True,
    "cache_text_encoder_outputs_to_disk": True,
    "network_train_unet_only": True,
}


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_writes_adapter_log_and_configuration(trainer):
    assert trainer("out", **CACHED, save_precision="fp16") == 0
    weights = trainer.weights("out")
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if name.endswith("lora_up.weight"))
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())
    assert list(trainer.losses("out")) == [1, 2, 3, 4]
    assert "# trained: unet (16,768 numbers at learning rate 0.01)" in (trainer.folder / "out/run-run.toml").read_text()
    with safe_open(trainer.folder / "out" / "run.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_steps"] == "4"
    assert metadata["ss_seed"] == "7"
    assert metadata["ss_num_train_images"] == "4"
    assert metadata["ss_base_model_version"] == "5-medium"
    assert metadata["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"
    assert metadata["modelspec.resolution"] == "64x64"
    assert "ss_logit_mean" not in metadata  # the density is uniform: it didn't act
    assert "modelspec.prediction_type" not in metadata
    assert str(trainer.photos.parent) not in json.dumps(metadata)


def test_the_written_configuration_gives_the_same_run_again(trainer):
    assert trainer("first", **CACHED, seed=None) == 0
    again = trainer.folder / "first" / "run-run.toml"
    text = again.read_text().replace(str(trainer.folder / "first"), str(trainer.folder / "second"))
    again.write_text(text)

    from accelerate.state import AcceleratorState

    from library.cli import main

    AcceleratorState._reset_state(reset_partial_state=True)
    assert main("sd3", job="adapter", argv=["--config_file", str(again)]) == 0
    assert equal(trainer.weights("first"), trainer.weights("second"))


def test_a_resumed_run_goes_on_with_its_log_and_its_seed(trainer):
    assert trainer("out", **CACHED, max_train_steps=3, save_state_on_train_end=True, seed=None) == 0
    before = (trainer.folder / "out" / "run-log.jsonl").read_text()
    assert trainer("out", **CACHED, max_train_steps=5, resume=trainer.folder / "out" / "run-state", seed=None) == 0
    after = (trainer.folder / "out" / "run-log.jsonl").read_text()
    assert after.startswith(before)
    assert list(trainer.losses("out")) == [1, 2, 3, 4, 5]


def test_the_log_has_the_learning_rate_of_its_step(trainer):
    assert trainer("out", **CACHED, lr_scheduler="linear", learning_rate=1.0, network_alpha=1e-9) == 0
    lines = [json.loads(line) for line in (trainer.folder / "out" / "run-log.jsonl").read_text().splitlines()]
    assert [line["lr/unet"] for line in lines] == [1.0, 0.75, 0.5, 0.25]


def test_a_warm_start_loads_no_encoder(trainer, capsys):
    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 5\n")
    sampling = {"sample_prompts": prompts, "sample_every_n_steps": 4, "cache_dir": trainer.folder / "cache"}
    assert trainer("cold", **CACHED_ON_DISK, **sampling) == 0
    assert "loading the text encoders" in capsys.readouterr().err
    assert trainer("warm", **CACHED_ON_DISK, **sampling) == 0
    told = capsys.readouterr().err
    assert "loading the text encoders" not in told and "loading the VAE" not in told
    assert equal(trainer.weights("cold"), trainer.weights("warm"))
    pictures = [(trainer.folder / name / "sample" / "run_000004_00_5.png").read_bytes() for name in ("cold", "warm")]
    assert pictures[0] == pictures[1]


def test_a_batch_split_over_an_accumulation_gives_the_same_steps(trainer):
    whole = trainer.dataset(dataset="enable_bucket = false")
    halves = trainer.folder / "halves.toml"
    halves.write_text(whole.read_text().replace("batch_size = 2", "batch_size = 1"))
    # a learning rate this small leaves the weights as they are, so that the two steps of the first run compare
    options = {**CACHED, "max_train_epochs": 1, "max_train_steps": None, "learning_rate": 1e-12}
    assert trainer("whole", **options, dataset_config=whole) == 0
    assert trainer("halves", **options, dataset_config=halves, gradient_accumulation_steps=4) == 0
    whole_losses, halves_losses = trainer.losses("whole"), trainer.losses("halves")
    assert (len(whole_losses), len(halves_losses)) == (2, 1)
    assert sum(whole_losses.values()) / 2 == pytest.approx(halves_losses[1], rel=1e-6)


def test_dropped_captions_train_with_cached_text(trainer):
    dropping = trainer.dataset(subset="caption_dropout_rate = 1.0")
    assert trainer("always", **CACHED, dataset_config=dropping) == 0
    for caption in trainer.photos.glob("*.txt"):
        caption.write_text("another caption altogether")
    assert trainer("other", **CACHED, dataset_config=dropping) == 0
    # the empty caption is encoded beside other captions, which moves its last bits
    assert trainer.losses("always") == pytest.approx(trainer.losses("other"), rel=1e-6)
    assert trainer("never", **CACHED) == 0
    assert trainer.losses("always") != pytest.approx(trainer.losses("never"), rel=1e-4)


def test_regularisation_pictures_weigh_what_was_asked(trainer):
    ordinary = shutil.copytree(trainer.photos, trainer.folder / "ordinary")
    dataset = trainer.dataset(subset=f'[[datasets.subsets]]\nimage_dir = "{ordinary}"\nis_reg = true')
    one = {**CACHED, "dataset_config": dataset, "max_train_epochs": 1, "max_train_steps": None, "learning_rate": 1e-12}
    sums = {}
    for weight in (1.0, 0.5, 0.25):
        assert trainer(f"w{weight}", **one, prior_loss_weight=weight) == 0
        sums[weight] = sum(trainer.losses(f"w{weight}").values())
    assert sums[0.5] < sums[1.0]
    assert sums[1.0] - sums[0.5] == pytest.approx(2 * (sums[0.5] - sums[0.25]), rel=1e-4)


def test_a_loss_that_is_no_number_stops_with_the_samples_and_saves_nothing(trainer, capsys):
    assert trainer("out", **CACHED, learning_rate=1e30, save_every_n_steps=1, max_train_steps=10) == 2
    error = capsys.readouterr().err
    assert "step 2: the" in error and "samples: 0/0/" in error
    for path in (trainer.folder / "out").glob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in trainer.weights("out", path.stem).values())


def test_checkpoints_are_named_and_rotated(trainer):
    options = {"save_every_n_steps": 1, "save_last_n_steps": 2, "save_every_n_epochs": 1, "save_last_n_epochs": 1}
    assert trainer("out", **CACHED, **options, save_state=True, max_train_steps=5) == 0
    names = sorted(path.name for path in (trainer.folder / "out").iterdir())
    assert names == [
        "cache",
        "run-000002-state",
        "run-000002.safetensors",
        "run-log.jsonl",
        "run-run.toml",
        "run-state",
        "run-step00000004-state",
        "run-step00000004.safetensors",
        "run.safetensors",
    ]


def test_validation_is_measured_on_held_out_pictures_and_changes_nothing(trainer):
    dataset = trainer.dataset(general="validation_split = 0.25")
    options = {**CACHED, "dataset_config": dataset}
    assert trainer("seldom", **options, validate_every_n_steps=4) == 0
    assert trainer("often", **options, validate_every_n_steps=1) == 0
    assert equal(trainer.weights("seldom"), trainer.weights("often"))
    lines = [json.loads(line) for line in (trainer.folder / "often" / "run-log.jsonl").read_text().splitlines()]
    measured = [line["loss/validation"] for line in lines if "loss/validation" in line]
    assert len(measured) == 4
    assert len(set(measured)) == 4
    with safe_open(trainer.folder / "often" / "run.safetensors", "pt") as file:
        assert file.metadata()["ss_num_train_images"] == "3"


@pytest.mark.parametrize("options", [CACHED, {}], ids=["cached text", "text encoders trained"])
def test_samples_are_made_and_change_nothing(trainer, options):
    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --l 3 --d 5\na cup --w 64 --h 32 --s 2 --l 1 --d 6\n")
    sampling = {"sample_prompts": prompts, "sample_at_first": True, "sample_every_n_steps": 2}
    assert trainer("with", **options, **sampling) == 0
    assert trainer("without", **options) == 0
    assert equal(trainer.weights("with"), trainer.weights("without"))
    names = sorted(path.name for path in (trainer.folder / "with" / "sample").iterdir())
    labels = ("e000000", "000002", "000004")
    assert names == sorted(
        f"run_{label}_{index:02d}_{seed}.png" for label in labels for index, seed in ((0, 5), (1, 6))
    )

    from PIL import Image

    first, last = (Image.open(trainer.folder / "with" / "sample" / f"run_{label}_00_5.png") for label in labels[::2])
    assert first.size == (64, 64)
    assert first.tobytes() != last.tobytes()
    assert first.text["parameters"].startswith("a cat")
