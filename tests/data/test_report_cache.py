import shutil
from collections import namedtuple

import pytest

from library.records import Resolution
from tests.data.report_setting import SQUARE, WIDE, dataset, kinds, report, run, samples, subset


def needs(config, found, **more):
    cache = report(config, found, **more).cache
    assert cache is not None
    return cache


def test_nothing_cached_needs_nothing():
    assert report(run(dataset()), samples(SQUARE)).cache is None


def test_latents_and_masks_take_what_the_latent_grid_says():
    config = run(dataset(subset(flip_aug=True), subset(alpha_mask=True)), cache_latents_to_disk=True)
    found = (*samples(SQUARE, WIDE), *samples(SQUARE, position=1, content="other"))
    cache = needs(config, found)
    assert cache.latents == 2 * 4 * (2 * (8 * 8 + 16 * 4) + 8 * 8)  # bf16, 4 channels, mirrored
    assert cache.masks == 8 * 8 and cache.texts == 0
    assert cache.on_disk == cache.latents + cache.masks and cache.in_memory == 0


def test_equal_pictures_are_stored_once():
    config = run(dataset(), dataset(resolution=Resolution(32, 32)), cache_latents=True)
    one = samples(SQUARE, SQUARE, content="same")
    assert needs(config, one).latents == 2 * 4 * 64
    assert needs(config, (*one, *samples(SQUARE, number=1, content="same"))).latents == 2 * 4 * (64 + 16)
    assert needs(config, one, validation=samples(SQUARE, start=7)).latents == 2 * 2 * 4 * 64


@pytest.mark.parametrize(
    ("options", "latents", "texts"),
    [({"mixed_precision": "bf16"}, 2, 2), ({"mixed_precision": "no"}, 4, 4), ({"no_half_vae": True}, 4, 2)],
)
def test_the_precision_counts(options, latents, texts):
    config = run(dataset(), cache_latents=True, cache_text_encoder_outputs=True, **options)
    cache = needs(config, samples(SQUARE))
    assert (cache.latents, cache.texts) == (latents * 4 * 64, texts * 2 * 1000)
    assert cache.in_memory == cache.latents + cache.texts and cache.on_disk == 0 and cache.free is None


def test_texts_count_once_with_all_their_versions_and_the_empty_one():
    options = {"cache_text_encoder_outputs_to_disk": True}
    wild = dataset(subset(enable_wildcard=True))
    found = samples(SQUARE, SQUARE, captions=("a", "b")) + samples(SQUARE, start=2, captions=("c",))
    assert needs(run(wild, **options), found).texts == (1 + 2 + 1) * 2000
    assert needs(run(wild, caption_variants=5, **options), found).texts == (1 + 5 + 5) * 2000


def test_a_cache_that_does_not_fit_is_told_first(monkeypatch, tmp_path):
    config = run(dataset(), cache_latents_to_disk=True, cache_dir=str(tmp_path / "not" / "there"))
    usage = namedtuple("usage", "free")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(path), usage(511))[1])
    made = report(config, (*samples(SQUARE), *samples(SQUARE, start=1, captions=("",))))
    assert kinds(made) == ["disk", "no caption"] and asked == [str(tmp_path)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1024))
    assert kinds(report(config, samples(SQUARE, SQUARE))) == []


def test_what_is_cached_already_needs_no_room(monkeypatch, tmp_path):
    config = run(dataset(), cache_latents_to_disk=True, cache_dir=str(tmp_path))
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "shard").write_bytes(bytes(300))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(212))
    assert kinds(report(config, samples(SQUARE))) == []
    (tmp_path / "latents" / "shard").write_bytes(bytes(299))
    assert kinds(report(config, samples(SQUARE))) == ["disk"]


def test_the_room_of_a_remote_cache_is_not_known():
    config = run(dataset(), cache_latents_to_disk=True, cache_dir="s3://bucket/cache")
    cache = needs(config, samples(SQUARE))
    assert cache.free is None and cache.fits and cache.on_disk == 512
