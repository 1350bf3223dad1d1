"""What is cached is what training and validation ask for, and nobody can tell by whom it is read."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from PIL import Image

from library.data.store import MemoryStore, PackedStore
from library.training import data
from library.training.data import captions_of, open_store

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
VARIED = 'shuffle_caption = true\ncaption_tag_dropout_rate = 0.1\ncaption_separator = " "\nenable_wildcard = true'


@pytest.fixture
def varied(trainer):
    """Captions that change at every visit, one of several lines."""
    (trainer.photos / "coffee.txt").write_text("a cup of {black|strong} coffee\nstill life with cup\n")
    return trainer.dataset(subset=f"{VARIED}\nflip_aug = true\ncaption_dropout_rate = 0.2", general="num_repeats = 4")


def test_cached_captions_are_the_versions_in_turn(trainer, varied):
    options = {**CACHED, "dataset_config": varied, "caption_variants": 3, "max_train_steps": 24}
    batches = trainer.with_run("out", lambda run: list(run.batches), **options)
    seen: dict[str, dict[int, set[str]]] = {}
    dropped = Counter()
    for batch in batches:
        assert batch.text is not None and batch.tokens is None
        for key, visit, caption, empty in zip(batch.keys, batch.visits, batch.captions, batch.dropped.tolist()):
            dropped[empty] += 1
            if not empty:
                seen.setdefault(key, {}).setdefault(visit % 3, set()).add(caption)
    assert len(seen) == 4 and all(len(versions) == 1 for own in seen.values() for versions in own.values())
    assert all(len({version for (version,) in own.values()}) > 1 for own in seen.values())
    assert min(dropped.values()) > 3


def test_every_caption_that_is_asked_for_is_listed(trainer, varied, monkeypatch):
    made = []

    def remembered(config, found, reader, seed):
        made.append((found.discovery, original(config, found, reader, seed)))
        return made[-1][1]

    original = data.make_validation
    monkeypatch.setattr(data, "make_validation", remembered)
    options = {**CACHED, "dataset_config": varied, "caption_variants": 3, "max_train_steps": 24}
    batches, config = trainer.with_run(
        "out", lambda run: (list(run.batches), run.config), **options, validation_split=0.3, validation_seed=1
    )
    ((discovery, validation),) = made
    assert discovery.samples and discovery.validation
    measured = [validation.reader(micro_batch) for micro_batch in validation.micro_batches]  # the cache has it all
    assert sorted(key for batch in measured for key in batch.keys) == sorted(s.key for s in discovery.validation)
    captions = captions_of(config, discovery)
    assert {caption for batch in [*batches, *measured] for caption in batch.captions} <= captions and "" in captions
    assert len(captions) <= 1 + 3 * len(discovery.samples) + len(discovery.validation)
    assert captions_of(config, dataclasses.replace(discovery, validation=())) < captions


@pytest.mark.parametrize("options", [CACHED, {"network_train_unet_only": True}], ids=["threads", "processes"])
def test_who_reads_changes_nothing(trainer, options):
    folder = trainer.folder / "masks"
    folder.mkdir()
    for path in trainer.photos.glob("*.png"):
        with Image.open(path) as picture:
            Image.linear_gradient("L").resize(picture.size).save(folder / path.name)
    subset = f"flip_aug = true\nunmasked_weight = 0.2\nconditioning_data_dir = {json.dumps(str(folder))}"
    options = {**options, "dataset_config": trainer.dataset(subset=subset, general="num_repeats = 2")}
    alone = trainer.with_run("alone", lambda run: list(run.batches), **options)
    assert all(batch.mask is not None for batch in alone)
    for workers in (1, 2):
        ahead = trainer.with_run("ahead", lambda run: list(run.batches), **options, max_data_loader_n_workers=workers)
        assert len(ahead) == len(alone) == 4
        for batch, other in zip(ahead, alone):
            assert (batch.keys, batch.visits, batch.captions) == (other.keys, other.visits, other.captions)
            pictures, others = (one.pixels if one.latents is None else one.latents for one in (batch, other))
            assert torch.equal(pictures, others) and torch.equal(batch.mask, other.mask)


def test_stores_lie_where_the_cache_is(trainer):
    folders = {"near": trainer.folder / "near", "far": "memory://data-test/cache"}
    for name, folder in folders.items():
        config = trainer.with_run("out", lambda run: run.config, **CACHED, cache_dir=folder)
        assert isinstance(open_store(config, "latents", on_disk=False), MemoryStore)
        with open_store(config, "latents", on_disk=True) as store:
            assert isinstance(store, PackedStore) and store.place == f"{folder}/latents"
            store.write({"ab": {"latents": torch.ones(2)}})
        again = open_store(config, "latents", on_disk=True)
        assert again.missing(["ab"]) == [] and open_store(config, "text", on_disk=True).missing(["ab"]) == ["ab"]
        index = trainer.folder / ("near" if name == "near" else "out/cache")
        assert (index / "files.sqlite").is_file()
