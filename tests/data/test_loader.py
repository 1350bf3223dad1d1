import dataclasses
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.errors import ConfigError
from library.data.buckets import place
from library.data.cache_keys import LATENTS, latent_key, text_key
from library.data.discovery import discover
from library.data.images import load_pixels
from library.data.loader import BatchReader, make_loader
from library.data.plan import BatchPlan
from library.data.store import MemoryStore, PackedStore
from library.randomness import Draws
from library.records import LatentFormat, Resolution, TensorRecord

FORMAT = LatentFormat(channels=4, stride=8, patch=2, scale=1.5, shift=0.1)
SIGNATURE = {"vae": "tiny"}


@dataclass(frozen=True)
class Tokens(TensorRecord):
    ids: Tensor


@dataclass(frozen=True)
class Features(TensorRecord):
    context: Tensor
    pooled: Tensor | None = None


class Lengths:
    """A text strategy whose token ids are the length of the caption."""

    def tokenize(self, captions):
        return Tokens(torch.tensor([[len(caption)] for caption in captions]))


class Broken:
    def tokenize(self, captions):
        raise ZeroDivisionError("tokenizer")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cats").mkdir()
    for number in range(7):
        picture = Image.effect_noise((80 + 8 * number, 64 + 16 * (number % 3)), 90).convert("RGB")
        picture.save(tmp_path / "cats" / f"{number}.png")
        (tmp_path / "cats" / f"{number}.txt").write_text(f"cat, number {number}, tag, other")
    (tmp_path / "reg").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "reg" / "r.png")
    return tmp_path


def make_reader(folder, *, per_step=1, seed=5, with_reg=False, batch_size=2, reader=None, **settings):
    subsets = [SubsetConfig(image_dir=str(folder / "cats"), num_repeats=2, **settings)]
    if with_reg:
        subsets.append(SubsetConfig(image_dir=str(folder / "reg"), is_reg=True, class_tokens="red"))
    datasets = (
        DatasetConfig(
            resolution=Resolution(64, 64),
            batch_size=batch_size,
            min_bucket_reso=32,
            max_bucket_reso=128,
            bucket_reso_steps=32,
            subsets=tuple(subsets),
        ),
    )
    found = discover(datasets)
    placements = tuple(place(sample.size, datasets[0], 16) for sample in found.samples)
    plan = BatchPlan(found.samples, placements, datasets, seed=seed, micro_batches_per_step=per_step)
    values = {"text_strategy": Lengths(), "max_steps": 100, **(reader or {})}
    made = BatchReader(
        samples=found.samples,
        placements=placements,
        contents=found.contents,
        datasets=datasets,
        seed=seed,
        latent_format=FORMAT,
        **values,
    )
    return made, plan


def epochs_of(plan, count=1):
    return [batch for step in range(count * plan.steps_per_epoch) for batch in plan.step(step)]


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        for field in dataclasses.fields(batch):
            value, expected = getattr(batch, field.name), getattr(other, field.name)
            if isinstance(value, TensorRecord):
                value, expected = value.tensors(), expected.tensors()
                assert value.keys() == expected.keys()
                assert all(torch.equal(value[name], expected[name]) for name in value)
            elif isinstance(value, Tensor):
                assert torch.equal(value, expected), field.name
            else:
                assert value == expected, field.name


RANDOM = {"shuffle_caption": True, "caption_dropout_rate": 0.3, "flip_aug": True, "caption_tag_dropout_rate": 0.2}


def test_a_batch_of_pictures(folder):
    reader, plan = make_reader(folder)
    micro_batch = next(batch for batch in epochs_of(plan) if len(batch.visits) == 2)
    batch = reader(micro_batch)
    width, height = micro_batch.bucket
    samples = [reader.samples[visit.sample] for visit in micro_batch.visits]
    assert len(batch) == 2 and batch.keys == tuple(sample.key for sample in samples)
    assert batch.pixels.shape == (2, 3, height, width) and batch.latents is None
    assert torch.equal(
        batch.pixels[0], load_pixels(samples[0].path, reader.placements[micro_batch.visits[0].sample], False)
    )
    assert batch.noise.shape == (2, 4, height // 8, width // 8) and batch.resolution == micro_batch.bucket
    expected = Draws(5, batch.keys, batch.visits).normal("noise", (4, height // 8, width // 8))
    assert torch.equal(batch.noise, expected)
    assert batch.captions == tuple(sample.captions[0] for sample in samples)
    assert batch.tokens.ids.tolist() == [[len(caption)] for caption in batch.captions] and batch.text is None
    assert batch.dropped.tolist() == [False, False] and batch.loss_weight.tolist() == [1.0, 1.0]
    assert batch.dropped.dtype == torch.bool and batch.loss_weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("workers", "start_method", "persistent"),
    [(1, "fork", True), (2, "fork", False), (2, "spawn", True)],
)
def test_workers_change_nothing(folder, workers, start_method, persistent):
    reader, plan = make_reader(folder, **RANDOM, caption_dropout_every_n_epochs=3)
    micro_batches = epochs_of(plan, 3)
    alone = [reader(micro_batch) for micro_batch in micro_batches]
    loader = make_loader(reader, micro_batches, workers=workers, start_method=start_method, persistent=persistent)
    assert_same(loader, alone)
    assert_same(make_loader(reader, iter(micro_batches), workers=0), alone)


def test_every_epoch_is_covered_and_draws_differ_between_visits(folder):
    reader, plan = make_reader(folder, **RANDOM)
    batches = list(make_loader(reader, epochs_of(plan, 4), workers=2))
    visits = Counter((key, visit) for batch in batches for key, visit in zip(batch.keys, batch.visits))
    assert visits == Counter((sample.key, visit) for sample in reader.samples for visit in range(8))
    captions = {(key, caption) for batch in batches for key, caption in zip(batch.keys, batch.captions)}
    assert len(captions) > 3 * len(reader.samples)  # not one sequence of draws repeated in every worker
    noises = torch.cat([batch.noise.flatten(1)[:, :8] for batch in batches])
    assert len(noises.unique(dim=0)) == len(noises)


def test_batch_split_does_not_change_what_a_visit_draws(folder):
    def rows(batch_size):
        reader, plan = make_reader(folder, batch_size=batch_size, **RANDOM)
        return {
            (key, visit): (batch.captions[row], batch.dropped[row].item(), batch.noise[row].sum().item())
            for batch in map(reader, epochs_of(plan))
            for row, (key, visit) in enumerate(zip(batch.keys, batch.visits))
        }

    assert rows(1) == rows(3)


def test_dropout_by_epoch_strikes_whole_epochs(folder):
    reader, plan = make_reader(folder, caption_dropout_every_n_epochs=2)
    micro_batches = epochs_of(plan, 4)
    for micro_batch, batch in zip(micro_batches, make_loader(reader, micro_batches, workers=2)):
        dropped = micro_batch.epoch in (1, 3)
        assert batch.dropped.tolist() == [dropped] * len(batch)
        assert all((caption == "") == dropped for caption in batch.captions)


def test_about_half_of_the_visits_are_flipped(folder):
    reader, plan = make_reader(folder, flip_aug=True)
    flipped = []
    for micro_batch in epochs_of(plan, 8):
        batch = reader(micro_batch)
        for row, visit in enumerate(micro_batch.visits):
            plain = load_pixels(reader.samples[visit.sample].path, reader.placements[visit.sample], False)
            flipped.append(not torch.equal(batch.pixels[row], plain))
            assert torch.equal(batch.pixels[row], plain.flip(-1) if flipped[-1] else plain)
    assert 30 < sum(flipped) < 80 and len(flipped) == 112


def test_regularisation_pictures_weigh_what_they_should(folder):
    reader, plan = make_reader(folder, with_reg=True, reader={"prior_loss_weight": 0.25})
    weights = Counter(
        (key.startswith("0/1/"), weight)
        for batch in map(reader, epochs_of(plan))
        for key, weight in zip(batch.keys, batch.loss_weight.tolist())
    )
    assert weights == {(False, 1.0): 14, (True, 0.25): 14}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_cached_latents_and_text_are_found_by_their_keys(folder, tmp_path, packed, workers):
    latents, texts = (
        (PackedStore(tmp_path / "latents"), PackedStore(tmp_path / "texts"))
        if packed
        else (MemoryStore(), MemoryStore())
    )
    reader, plan = make_reader(
        folder,
        flip_aug=True,
        caption_dropout_rate=0.3,
        reader={
            "latents": latents,
            "latents_signature": SIGNATURE,
            "texts": texts,
            "text_signature": {"encoder": "tiny"},
            "text_record": Features,
            "text_strategy": None,
        },
    )
    for number, (sample, placement) in enumerate(zip(reader.samples, reader.placements)):
        for flipped in (False, True):
            key = latent_key(reader.contents[sample.path], placement, flipped, SIGNATURE)
            height, width = FORMAT.latent_size(placement.bucket)
            latents.write({key: {LATENTS: torch.full((4, height, width), number + 0.5 * flipped)}})
        caption = sample.captions[0]
        texts.write({text_key(caption, reader.text_signature): {"context": torch.full((3, 2), len(caption) + 0.0)}})
    texts.write({text_key("", reader.text_signature): {"context": torch.zeros(3, 2)}})
    latents.flush()
    texts.flush()
    micro_batches = epochs_of(plan, 3)
    batches = list(make_loader(reader, micro_batches, workers=workers))
    halves = []
    for micro_batch, batch in zip(micro_batches, batches):
        assert batch.pixels is None and batch.tokens is None and batch.text.pooled is None
        for row, visit in enumerate(micro_batch.visits):
            value = batch.latents[row, 0, 0, 0].item()
            assert int(value) == visit.sample
            halves.append(value % 1)
            assert batch.text.context[row, 0, 0].item() == len(batch.captions[row])
    assert 0 < sum(halves) < 0.5 * len(halves)
    plain, _ = make_reader(folder, flip_aug=True, caption_dropout_rate=0.3)
    for micro_batch, batch in zip(micro_batches, batches):  # caching changes neither flips, captions nor noise
        other = plain(micro_batch)
        assert batch.captions == other.captions and torch.equal(batch.noise, other.noise)
        for row, visit in enumerate(micro_batch.visits):
            upright = load_pixels(plain.samples[visit.sample].path, plain.placements[visit.sample], False)
            assert torch.equal(other.pixels[row], upright) == (batch.latents[row, 0, 0, 0].item() % 1 == 0)


def test_latents_of_another_size_are_refused(folder):
    store = MemoryStore()
    reader, plan = make_reader(folder, reader={"latents": store, "latents_signature": SIGNATURE})
    for sample, placement in zip(reader.samples, reader.placements):
        store.write(
            {latent_key(reader.contents[sample.path], placement, False, SIGNATURE): {LATENTS: torch.zeros(4, 2, 2)}}
        )
    with pytest.raises(ValueError, match=r"cached latents of sample 0/0/.* expected"):
        reader(plan.step(0)[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_went_bad_is_named_in_one_line(folder, workers):
    reader, plan = make_reader(folder)
    (folder / "cats" / "3.png").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        list(make_loader(reader, epochs_of(plan), workers=workers))
    assert str(caught.value).startswith(f"{folder}/cats/3.png: the picture of sample 0/0/3.png can't be read: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_cache_lacks_is_named(folder, workers):
    reader, plan = make_reader(folder, reader={"latents": MemoryStore(), "latents_signature": SIGNATURE})
    with pytest.raises(ConfigError, match=r"^the cache has no latents of sample 0/0/\d.png .*start again"):
        list(make_loader(reader, epochs_of(plan), workers=workers))
    reader, plan = make_reader(
        folder, reader={"texts": MemoryStore(), "text_signature": SIGNATURE, "text_record": Features}
    )
    with pytest.raises(ConfigError, match=r"^the cache has no text of sample 0/0/\d.png \('cat, number"):
        list(make_loader(reader, epochs_of(plan), workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_any_other_error_names_the_samples_too(folder, workers):
    reader, plan = make_reader(folder, reader={"text_strategy": Broken()})
    with pytest.raises(RuntimeError, match=r"step 0: no batch of the samples 0/0/\d.png.*ZeroDivisionError: tokenizer"):
        list(make_loader(reader, epochs_of(plan), workers=workers))


def test_the_reader_pickles(folder):
    reader, plan = make_reader(folder, **RANDOM)
    again = pickle.loads(pickle.dumps(reader))
    assert_same([again(plan.step(0)[0])], [reader(plan.step(0)[0])])


def test_micro_batches_are_taken_lazily_and_loading_stops_when_nobody_listens(folder):
    reader, plan = make_reader(folder)
    taken = []

    def endless():
        step = 0
        while True:
            taken.append(step)
            yield from plan.step(step)
            step += 1

    before = set(torch.multiprocessing.active_children())
    loader = make_loader(reader, endless(), workers=2)
    next(loader)
    assert len(taken) < 12
    assert len(set(torch.multiprocessing.active_children()) - before) == 2
    loader.close()
    assert not set(torch.multiprocessing.active_children()) - before


def test_workers_are_out_of_reach_of_signals_to_the_group(folder):
    reader, plan = make_reader(folder)
    micro_batches = epochs_of(plan, 3)
    before = set(torch.multiprocessing.active_children())
    loader = make_loader(reader, micro_batches, workers=2, start_method="fork")
    batches = [next(loader), next(loader)]  # one of each worker
    for child in set(torch.multiprocessing.active_children()) - before:
        assert os.getpgid(child.pid) != os.getpgid(0)
        os.kill(child.pid, signal.SIGINT)
    batches += loader
    assert len(batches) == len(micro_batches)


FAILING = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: None)  # what a run does to finish its step; forked workers inherit it
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_loader import epochs_of, make_loader, make_reader
reader, plan = make_reader(Path({folder!r}))
loader = make_loader(reader, epochs_of(plan, 3), workers=2, start_method="fork")
next(loader)
raise ValueError("the training stopped")
"""


def test_a_run_that_fails_takes_its_workers_along(folder):
    code = FAILING.format(tests=str(Path(__file__).parent), folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1 and done.stderr.strip().endswith("ValueError: the training stopped")


def test_validation_reads_pictures_as_they_are(folder):
    reader, plan = make_reader(folder, **RANDOM)
    calm = dataclasses.replace(reader, datasets=tuple(dataset.without_augmentation() for dataset in reader.datasets))
    for micro_batch in epochs_of(plan):
        batch = calm(micro_batch)
        for row, visit in enumerate(micro_batch.visits):
            sample = calm.samples[visit.sample]
            assert batch.captions[row] == sample.captions[0]
            assert torch.equal(batch.pixels[row], load_pixels(sample.path, calm.placements[visit.sample], False))
