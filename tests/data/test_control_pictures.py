"""Control pictures: found beside their pictures, and taken where these go."""

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.errors import ConfigError
from library.data.buckets import place
from library.data.control_pictures import load_control
from library.data.discovery import discover
from library.data.images import PixelSettings
from library.data.loader import BatchReader
from library.data.plan import BatchPlan
from library.records import Resolution
from tests.data.scans import dataset, fill, problems_of
from tests.data.test_loader import FORMAT, Lengths


@pytest.fixture
def steered(tmp_path):
    """Four pictures whose control pictures are the same in the other colours, two of them at twice the size."""
    (tmp_path / "cats").mkdir()
    (tmp_path / "control").mkdir()
    for number in range(4):
        picture = Image.effect_noise((80, 64), 90).convert("RGB").resize((160, 128), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "cats" / f"{number}.png")
        (tmp_path / "cats" / f"{number}.txt").write_text("a cat")
        control = Image.fromarray(255 - np.array(picture))
        if number % 2:
            control = control.resize((320, 256), Image.Resampling.NEAREST)
        control.save(tmp_path / "control" / f"{number}.png")
    return tmp_path


def batches(folder, **settings):
    subset = SubsetConfig(
        image_dir=str(folder / "cats"), conditioning_data_dir=str(folder / "control"), num_repeats=3, **settings
    )
    datasets = (
        DatasetConfig(
            resolution=Resolution(64, 64),
            batch_size=2,
            min_bucket_reso=32,
            max_bucket_reso=128,
            bucket_reso_steps=32,
            subsets=(subset,),
        ),
    )
    found = discover(datasets, steered=True)
    placements = tuple(place(sample.size, datasets[0], 16) for sample in found.samples)
    plan = BatchPlan(found.samples, placements, datasets, seed=5, micro_batches_per_step=1)
    reader = BatchReader(
        samples=found.samples,
        placements=placements,
        datasets=datasets,
        seed=5,
        latent_format=FORMAT,
        text_strategy=Lengths(),
        max_steps=100,
    )
    return [reader(batch) for step in range(plan.steps_per_epoch) for batch in plan.step(step)]


@pytest.mark.parametrize("settings", [{}, {"flip_aug": True}, {"random_crop": True, "flip_aug": True}])
def test_they_go_where_their_pictures_go(steered, settings):
    """The negative of a picture stays its negative through resizing, cropping and mirroring."""
    for batch in batches(steered, **settings):
        assert batch.control.shape == batch.pixels.shape and batch.mask is None
        assert batch.control.min() >= 0 and batch.control.max() <= 1
        negative = 1 - (batch.pixels + 1) / 2
        for key, control, expected in zip(batch.keys, batch.control, negative):
            near = 0.08 if int(key[-5]) % 2 else 0.01  # scaled from another size
            assert (control - expected).abs().mean() < near
            assert (control.flip(-1) - expected).abs().mean() > 2 * near  # it could be told


def test_their_colours_are_as_they_are(tmp_path):
    for level, expected in ((0, 0.0), (51, 0.2), (255, 1.0)):
        path = tmp_path / f"{level}.png"
        Image.new("RGB", (64, 64), (level, 0, 255)).save(path)
        placement = place(Resolution(64, 64), dataset(SubsetConfig(image_dir=str(tmp_path))), 16)
        made = load_control(path, placement, False, PixelSettings())
        assert torch.allclose(made[:, 3, 5], torch.tensor([expected, 0.0, 1.0]), atol=1e-6)


def test_a_picture_without_one_is_named(tmp_path):
    cats = fill(tmp_path / "cats", names=("a.png", "b.png"), size=(40, 30))
    control = fill(tmp_path / "control", names=("a.png", "c.png"), size=(40, 30), captions=False)
    config = dataset(SubsetConfig(image_dir=cats, conditioning_data_dir=control))
    assert problems_of(config, steered=True) == [
        f"{control}: no control picture for 1 of 2 pictures: b.png. A control picture is named like its picture"
    ]


def test_a_broken_one_is_found_before_training_though_latents_are_cached(tmp_path):
    """Pictures and masks are decoded when they are cached; these never are."""
    cats = fill(tmp_path / "cats", names=("a.png",), size=(64, 64))
    control = tmp_path / "control"
    control.mkdir()
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save(control / "a.png")
    whole = (control / "a.png").read_bytes()
    middle = len(whole) // 2
    (control / "a.png").write_bytes(whole[:middle] + bytes(8) + whole[middle + 8 :])  # the header and the end are whole
    config = dataset(SubsetConfig(image_dir=cats, conditioning_data_dir=str(control)))
    with pytest.raises(ConfigError, match="1 control picture can't be read"):
        discover([config], decode=False, steered=True)


def test_one_that_goes_away_is_named(steered):
    found = batches(steered)
    assert found
    with pytest.raises(ConfigError, match=r"control/1\.png: the control picture of sample 0/0/1\.png can't be read"):
        _read_without(steered, "1.png")


def _read_without(folder, name):
    subset = SubsetConfig(image_dir=str(folder / "cats"), conditioning_data_dir=str(folder / "control"))
    config = DatasetConfig(resolution=Resolution(64, 64), batch_size=4, enable_bucket=False, subsets=(subset,))
    found = discover([config], steered=True)
    placements = tuple(place(sample.size, config, 16) for sample in found.samples)
    plan = BatchPlan(found.samples, placements, (config,), seed=5, micro_batches_per_step=1)
    reader = BatchReader(
        samples=found.samples,
        placements=placements,
        datasets=(config,),
        seed=5,
        latent_format=FORMAT,
        text_strategy=Lengths(),
    )
    (folder / "control" / name).unlink()
    return reader(plan.step(0)[0])
