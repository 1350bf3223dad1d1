"""Before the first step: pictures that can't be decoded, steps without pictures, and what epochs count."""

import json
import shutil

import pytest
import torch

from library.families.sd3.family import Sd3Family

ON_DISK = {
    "cache_latents_to_disk": True,
    "cache_text_encoder_outputs_to_disk": True,
    "network_train_unet_only": True,
}
IN_MEMORY = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}


def damage(path) -> None:
    """Leave a PNG whole as a container, with picture data that nothing can decode."""
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT") + 4
    data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """The parts that runs loaded."""
    parts: list[str] = []
    for name in ("load_vae", "load_text_encoders", "load_denoiser"):
        original = getattr(Sd3Family, name)

        def watched(self, *, name=name, original=original, **options):
            if torch.device(options["device"]).type != "meta":
                parts.append(name)
            return original(self, **options)

        monkeypatch.setattr(Sd3Family, name, watched)
    return parts


@pytest.mark.parametrize("caching", [ON_DISK, IN_MEMORY], ids=["disk", "memory"])
def test_pictures_that_cannot_be_decoded_stop_the_run_with_a_line_each(trainer, loaded, caching, capsys):
    for name in ("camera.png", "coffee.png"):
        damage(trainer.photos / name)
    options = {**caching, "cache_dir": trainer.folder / "cache"}
    assert trainer("out", **options) == 2
    lines = capsys.readouterr().err.splitlines()
    found = [line for line in lines if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in found if ".png" in line] == [
        str(trainer.photos / "camera.png"),
        str(trainer.photos / "coffee.png"),
    ]
    assert "2 pictures can't be read" in found[0] and "--skip_bad_images" in found[0]
    assert loaded == ["load_vae"]  # they showed while caching, before anything else was loaded

    loaded.clear()
    assert trainer("again", **options) == 2  # now it is known at once
    assert loaded == []
    for name in ("camera.png", "coffee.png"):
        (trainer.photos / name).unlink()
    assert trainer("repaired", **options) == 0
    assert ("load_vae" in loaded) == (caching is IN_MEMORY)  # what was encoded before the run stopped is there


def test_with_skip_bad_images_the_run_is_that_of_the_others(trainer, capsys):
    damage(trainer.photos / "coffee.png")
    options = {**IN_MEMORY, "cache_dir": trainer.folder / "cache"}
    assert trainer("skipping", **options, skip_bad_images=True) == 0
    told = capsys.readouterr().err
    assert f"{trainer.photos / 'coffee.png'}: " in told
    (trainer.photos / "coffee.png").unlink()
    assert trainer("without", **IN_MEMORY) == 0
    assert trainer.losses("skipping") == trainer.losses("without")
    configuration = (trainer.folder / "skipping" / "run-run.toml").read_text()
    assert "datasets[0]: 3 pictures" in configuration


def test_a_picture_that_moves_into_validation_is_cached_as_it_is_measured(trainer):
    """Leaving out a bad picture may change which one is held out, and with it its caption's versions."""
    damage(trainer.photos / "chelsea.png")
    damage(trainer.photos / "camera.png")
    shuffled = 'shuffle_caption = true\nflip_aug = true\ncaption_separator = " "'
    dataset = trainer.dataset(subset=shuffled, general="validation_split = 0.01")
    options = {**IN_MEMORY, "dataset_config": dataset, "skip_bad_images": True, "caption_variants": 2}
    for seed in range(3):
        assert trainer(f"out{seed}", **options, seed=seed, cache_dir=trainer.folder / f"cache{seed}") == 0


def test_a_mask_that_cannot_be_decoded_is_found_while_caching(trainer, capsys):
    masks = shutil.copytree(trainer.photos, trainer.folder / "masks")
    damage(masks / "camera.png")
    dataset = trainer.dataset(subset=f"conditioning_data_dir = {json.dumps(str(masks))}")
    options = {**IN_MEMORY, "dataset_config": dataset, "cache_dir": trainer.folder / "cache"}
    assert trainer("out", **options) == 2
    assert f"error: {masks / 'camera.png'}: " in capsys.readouterr().err
    assert trainer("out", **options, skip_bad_images=True) == 0
    assert "datasets[0]: 3 pictures" in (trainer.folder / "out" / "run-run.toml").read_text()


def test_without_cached_latents_every_picture_is_decoded_before_anything_is_loaded(trainer, loaded, capsys):
    damage(trainer.photos / "camera.png")
    assert trainer("out", network_train_unet_only=True) == 2
    assert f"error: {trainer.photos / 'camera.png'}: " in capsys.readouterr().err
    assert loaded == []


def test_steps_in_which_nothing_is_used_stop_the_run_before_anything_is_loaded(trainer, loaded, capsys):
    dataset = trainer.dataset(subset="start_step = 2\nend_step = 3")
    assert trainer("out", **IN_MEMORY, dataset_config=dataset) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {dataset}: no subset is used")
    assert loaded == []


def test_epochs_are_those_of_the_plan_where_they_differ_in_length(trainer):
    others = shutil.copytree(trainer.photos, trainer.folder / "others")
    dataset = trainer.dataset(
        subset=f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(others))}\nstart_epoch = 2\nnum_repeats = 2"
    )
    options = {**IN_MEMORY, "dataset_config": dataset, "max_train_epochs": 3, "max_train_steps": None}
    assert trainer("out", **options, save_every_n_epochs=1, save_last_n_epochs=2, save_state=True) == 0
    log = trainer.log("out")
    lengths = [sum(line["epoch"] == epoch for line in log) for epoch in (1, 2, 3)]
    assert lengths[0] < lengths[1] == lengths[2] and sum(lengths) == len(log)
    ends = [line["step"] for line in log if "loss/epoch_average" in line]
    assert ends == [lengths[0], lengths[0] + lengths[1], len(log)]
    names = {path.name for path in (trainer.folder / "out").iterdir()}
    assert "run-000002.safetensors" in names and "run-000001.safetensors" not in names
    state = trainer.folder / "out" / "run-000002-state"
    assert trainer("resumed", **options, resume=state) == 0
    whole, resumed = trainer.weights("out"), trainer.weights("resumed")
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())
    assert trainer.losses("resumed") == {k: v for k, v in trainer.losses("out").items() if k > ends[1]}


def test_a_metadata_file_without_a_folder_is_named_in_the_metadata(trainer):
    listed = trainer.folder / "list.jsonl"
    lines = [{"file_name": str(path), "caption": "a photograph, a cat"} for path in trainer.photos.glob("*.png")]
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = trainer.folder / "listed.toml"
    folder = f"image_dir = {json.dumps(str(trainer.photos))}"
    dataset.write_text(
        trainer.dataset().read_text().replace(folder, f"metadata_file = {json.dumps(str(listed))}\nkeep_tokens = 1")
    )
    assert trainer("out", **IN_MEMORY, dataset_config=dataset) == 0

    from safetensors import safe_open

    with safe_open(trainer.folder / "out" / "run.safetensors", "pt") as file:
        metadata = file.metadata()
    ((subset,),) = [entry["subsets"] for entry in json.loads(metadata["ss_datasets"])]
    assert subset["metadata_file"] == "list.jsonl" and subset["img_count"] == 4 and subset["keep_tokens"] == 1
    assert "image_dir" not in subset and "flip_aug" not in subset
    assert json.loads(metadata["ss_dataset_dirs"]) == {"list.jsonl": {"n_repeats": 1, "img_count": 4}}
    assert json.loads(metadata["ss_tag_frequency"]) == {"list.jsonl": {"a photograph": 4, "a cat": 4}}
    assert str(trainer.folder) not in json.dumps(metadata)
