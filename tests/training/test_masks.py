"""Loss masks: what they weigh, against the sums written out."""

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image

from library.diffusion.loss import masked_mean
from library.families.sd3.family import Sd3Family
from library.training.step import training_loss, validation_loss

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}


def test_masked_mean_is_the_sum_written_out():
    generator = torch.Generator().manual_seed(0)
    per_element = torch.rand(3, 4, 2, 5, generator=generator)
    mask = torch.rand(3, 1, 2, 5, generator=generator)
    for normalize in (False, True):
        found = masked_mean(per_element, mask, normalize=normalize)
        for b in range(3):
            total = area = 0.0
            for y in range(2):
                for x in range(5):
                    weight = mask[b, 0, y, x].item()
                    area += weight / 10
                    total += weight * sum(per_element[b, c, y, x].item() for c in range(4)) / 40
            assert found[b].item() == pytest.approx(total / area if normalize else total, rel=1e-5)
    assert torch.equal(masked_mean(per_element, None, normalize=True), per_element.mean(dim=(1, 2, 3)))
    full = torch.ones_like(mask)
    assert torch.allclose(masked_mean(per_element, full, normalize=True), per_element.mean(dim=(1, 2, 3)))


def test_a_mask_of_zeros_gives_no_loss_and_no_gradient():
    per_element = torch.rand(2, 4, 2, 5).requires_grad_()
    mask = torch.stack([torch.zeros(1, 2, 5), torch.ones(1, 2, 5)])
    found = masked_mean(per_element, mask, normalize=True)
    found.sum().backward()
    assert found[0] == 0 and found[1] > 0
    assert torch.equal(per_element.grad[0], torch.zeros(4, 2, 5))
    assert torch.isfinite(per_element.grad).all()


@pytest.fixture
def masks(photos, tmp_path):
    """White above and black below for three pictures, black for the fourth."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in photos.glob("*.png"):
        with Image.open(path) as picture:
            width, height = picture.size
        mask = Image.new("L", (width, height), 0)
        if path.stem != "coffee":
            mask.paste(255, (0, 0, width, height // 2))
        mask.save(folder / path.name)
    return folder


def masked(trainer, masks, **options) -> dict:
    """Options of a run over all four pictures at once, with masks; the loss is the velocity's."""
    subset = f"conditioning_data_dir = {json.dumps(str(masks))}\nunmasked_weight = {options.pop('unmasked_weight', 0)}"
    dataset = trainer.dataset(dataset="enable_bucket = false", subset=subset)
    dataset.write_text(dataset.read_text().replace("batch_size = 2", "batch_size = 4"))
    return {**CACHED, "dataset_config": dataset, "weighting_scheme": "sigma_sqrt", **options}


def written_out(prediction, noised, keys, *, unmasked: float, normalize: bool) -> list[float]:
    """The loss of each sample, where the upper four of eight rows are masked in; of coffee none is."""
    error = (prediction - (noised.noise - noised.x_0)) ** 2
    losses = []
    for row, key in enumerate(keys):
        top, bottom = error[row, :, :4].sum().item(), error[row, :, 4:].sum().item()
        weight = unmasked if "coffee" in key else 1.0
        loss = (weight * top + unmasked * bottom) / error[row].numel()
        area = (weight + unmasked) / 2
        losses.append(loss if not normalize else loss / area if area else 0.0)
    return losses


@pytest.mark.parametrize("normalize", [False, True], ids=["by its size", "normalized"])
@pytest.mark.parametrize("unmasked", [0.0, 0.25])
@pytest.mark.usefixtures("unforeseen")
def test_training_and_validation_weigh_the_loss_as_written_out(trainer, masks, monkeypatch, unmasked, normalize):
    predict, asked = Sd3Family.predict, []

    def watched(self, denoiser, noised, text):
        asked.append((predict(self, denoiser, noised, text), noised))
        return asked[-1][0]

    monkeypatch.setattr(Sd3Family, "predict", watched)

    def measured(run):
        batch = dataclasses.replace(next(run.batches), loss_weight=torch.full((4,), 0.5))
        share = training_loss(run, batch, step_samples=4)
        share.loss.backward()
        norms = [parameter.grad.norm() for parameter in run.parameters if parameter.grad is not None]
        return batch.keys, share, validation_loss(run, batch, torch.full((2, 4), 0.3, dtype=torch.float64)), norms

    options = masked(trainer, masks, unmasked_weight=unmasked, masked_loss_normalize=normalize or None)
    keys, share, validation, norms = trainer.with_run("out", measured, **options)
    training, *levels = [written_out(*one, keys, unmasked=unmasked, normalize=normalize) for one in asked]
    assert share.per_sample.tolist() == pytest.approx(training, rel=1e-4)
    assert share.loss.item() == pytest.approx(sum(training) / 8, rel=1e-4)
    assert [found.tolist() for found in validation] == [pytest.approx(level, rel=1e-4) for level in levels]
    assert norms and all(torch.isfinite(norm) for norm in norms)
    assert min(training) == 0 if unmasked == 0 else min(training) > 0


def test_masks_act_the_same_cached_or_not_and_mirrored_with_the_picture(trainer, masks):
    mirrored = trainer.dataset(subset=f"conditioning_data_dir = {json.dumps(str(masks))}\nflip_aug = true")
    # white on the left, so that mirroring moves it
    for path in masks.glob("*.png"):
        with Image.open(path) as mask:
            mask = Image.new("L", mask.size, 0)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(path)
    options = {"network_train_unet_only": True, "dataset_config": mirrored, "max_train_steps": 6}
    assert trainer("online", **options) == 0
    assert trainer("cached", **options, cache_latents=True) == 0
    assert trainer("disk", **options, cache_latents_to_disk=True) == 0
    assert trainer("workers", **options, cache_latents=True, max_data_loader_n_workers=2) == 0
    assert trainer("ahead", **options, vae_cache_disable=True) == 0
    assert trainer.losses("cached") == pytest.approx(trainer.losses("online"), rel=1e-4)
    assert trainer.losses("disk") == trainer.losses("cached") == trainer.losses("workers")
    assert trainer.losses("ahead") == trainer.losses("online")
    shutil.rmtree(masks)
    options["dataset_config"] = trainer.dataset(subset="flip_aug = true")
    assert trainer("plain", **options, cache_latents=True) == 0
    assert trainer.losses("plain") != pytest.approx(trainer.losses("cached"), rel=1e-2)


def test_transparency_is_a_mask(trainer):
    for path in trainer.photos.glob("*.png"):
        with Image.open(path) as picture:
            picture = picture.convert("RGBA")
        picture.putalpha(255)
        picture.paste((0, 0, 0, 0), (0, picture.height // 2, picture.width, picture.height))
        picture.save(path)
    dataset = trainer.dataset(dataset="enable_bucket = false", subset="alpha_mask = true")

    def mask(run):
        return next(run.batches).mask

    found = trainer.with_run("out", mask, **CACHED, dataset_config=dataset)
    assert torch.equal(found[:, 0, :4], torch.ones(2, 4, 8)) and torch.equal(found[:, 0, 4:], torch.zeros(2, 4, 8))
