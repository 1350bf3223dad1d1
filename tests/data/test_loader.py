import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.errors import ConfigError
from library.data.buckets import place, vary
from library.data.cache_keys import LATENTS, MASK, latent_key, mask_key, text_key
from library.data.captions import caption_versions
from library.data.discovery import discover
from library.data.images import PixelSettings, colour_shift, load_pixels
from library.data.loader import BatchReader, make_loader
from library.data.mask_files import MaskFile
from library.data.masks import load_mask
from library.data.plan import BatchPlan
from library.data.store import MemoryStore, PackedStore
from library.io.places import write_bytes
from library.randomness import Draws, python_random
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

    def unpack(self, rows):
        return Features.stack(rows)


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
    (tmp_path / "base").mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (number, 9, 9)).save(tmp_path / "base" / f"b{number}.png")
    return tmp_path


def make_reader(folder, *, with_reg=False, **settings):
    own = {name: settings.pop(name) for name in ("per_step", "seed", "batch_size", "reader") if name in settings}
    subsets = [SubsetConfig(image_dir=str(folder / "cats"), num_repeats=2, **settings)]
    if with_reg:
        subsets.append(SubsetConfig(image_dir=str(folder / "reg"), is_reg=True, class_tokens="red"))
    return reader_of(*subsets, **own)


def reader_of(*subsets, per_step=1, seed=5, batch_size=2, reader=None):
    datasets = (
        DatasetConfig(
            resolution=Resolution(64, 64),
            batch_size=batch_size,
            min_bucket_reso=32,
            max_bucket_reso=128,
            bucket_reso_steps=32,
            subsets=subsets,
        ),
    )
    found = discover(datasets)
    placements = tuple(place(sample.size, datasets[0], 16) for sample in found.samples)
    plan = BatchPlan(found.samples, placements, datasets, seed=seed, micro_batches_per_step=per_step)
    values = {"text_strategy": Lengths(), "max_steps": 100, **(reader or {})}
    made = BatchReader(
        samples=found.samples,
        placements=placements,
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
            assert flipped[-1] == (python_random(5, "flip", batch.keys[row], visit.visit).random() < 0.5)
            assert torch.equal(batch.pixels[row], plain.flip(-1) if flipped[-1] else plain)
    assert 30 < sum(flipped) < 80 and len(flipped) == 112


def test_regularisation_pictures_weigh_what_they_should(folder):
    reader, plan = reader_of(
        SubsetConfig(image_dir=str(folder / "cats"), num_repeats=2),
        SubsetConfig(image_dir=str(folder / "reg"), is_reg=True, class_tokens="red"),
        SubsetConfig(
            image_dir=str(folder / "base"),
            class_tokens="base",
            is_regularisation_data=True,
            regularisation_weight=0.5,
        ),
        reader={"prior_loss_weight": 0.25},
    )
    rows = Counter()
    for batch in map(reader, epochs_of(plan)):
        marks = [
            [False] * len(batch) if rows_of is None else rows_of.tolist() for rows_of in (batch.prior, batch.taught)
        ]
        assert all(rows_of is None or rows_of.any() for rows_of in (batch.prior, batch.taught))
        rows.update(zip((int(key[2]) for key in batch.keys), batch.loss_weight.tolist(), *marks))
    assert rows == {(0, 1.0, False, False): 14, (1, 0.25, True, False): 16, (2, 0.5, False, True): 2}


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
        },
    )
    for number, (sample, placement) in enumerate(zip(reader.samples, reader.placements)):
        for flipped in (False, True):
            key = latent_key(sample.content, placement, flipped, PixelSettings(), SIGNATURE)
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


def fill_caches(reader, folder=None):
    """The reader with caches: latents that say which sample they are of, and masks."""
    latents, masks = (
        (MemoryStore(), MemoryStore()) if folder is None else map(PackedStore, (folder / "l", folder / "m"))
    )
    for number, (sample, placement) in enumerate(zip(reader.samples, reader.placements)):
        subset = reader.datasets[sample.dataset].subsets[sample.subset]
        height, width = FORMAT.latent_size(placement.bucket)
        source = MaskFile.of(sample, subset)
        for flipped in (False, True):
            key = latent_key(sample.content, placement, flipped, PixelSettings.of(subset), SIGNATURE)
            latents.write({key: {LATENTS: torch.full((4, height, width), number + 0.5 * flipped).bfloat16()}})
            if source is not None:
                key = mask_key(source.content, placement, flipped, alpha=source.alpha, stride=FORMAT.stride)
                mask = load_mask(source.path, placement, flipped, stride=FORMAT.stride, alpha=source.alpha)
                masks.write({key: {MASK: mask}})
    latents.flush()
    masks.flush()
    return dataclasses.replace(reader, latents=latents, latents_signature=SIGNATURE, masks=masks)


def test_latents_of_another_size_are_refused(folder):
    store = MemoryStore()
    reader, plan = make_reader(folder, reader={"latents": store, "latents_signature": SIGNATURE})
    for sample, placement in zip(reader.samples, reader.placements):
        key = latent_key(sample.content, placement, False, PixelSettings(), SIGNATURE)
        store.write({key: {LATENTS: torch.zeros(4, 2, 2)}})
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
    reader, plan = make_reader(folder, reader={"texts": MemoryStore(), "text_signature": SIGNATURE})
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


def test_cached_latents_are_read_by_threads(folder, tmp_path):
    reader, plan = make_reader(folder, flip_aug=True)
    reader = fill_caches(reader, tmp_path)
    micro_batches, taken = epochs_of(plan, 3), []

    def listed():
        for micro_batch in micro_batches:
            taken.append((micro_batch, threading.current_thread()))
            yield micro_batch

    before = set(torch.multiprocessing.active_children())
    loader = make_loader(reader, listed(), workers=3)
    first = next(loader)
    assert {thread for _, thread in taken} == {threading.current_thread()} and len(taken) == 7
    assert threads_of_the_loader() and set(torch.multiprocessing.active_children()) == before
    assert_same([first, *loader], map(reader, micro_batches))
    assert not threads_of_the_loader()
    loader = make_loader(reader, listed(), workers=2)
    next(loader)
    loader.close()
    assert not threads_of_the_loader()


def threads_of_the_loader():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


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


# Masks


@pytest.fixture
def masked(folder):
    """The cats with masks of their own, and three transparent pictures."""
    (folder / "masks").mkdir()
    for path in sorted((folder / "cats").glob("*.png")):
        with Image.open(path) as picture:
            mask = Image.effect_noise(picture.size, 120)
            mask.paste(255, (0, 0, picture.width // 2, picture.height // 3))
            mask.paste(0, (0, picture.height // 2, picture.width // 2, picture.height))
            mask.save(folder / "masks" / path.name)
    (folder / "alpha").mkdir()
    for number in range(3):
        picture = Image.effect_noise((100, 70), 90).convert("RGBA")
        picture.putalpha(Image.linear_gradient("L").resize((100, 70)).rotate(60 * number))
        picture.save(folder / "alpha" / f"{number}.png")
    return folder


def subsets_of(masked, **settings):
    settings = {"num_repeats": 2, "class_tokens": "x", **settings}
    return (
        SubsetConfig(image_dir=str(masked / "cats"), conditioning_data_dir=str(masked / "masks"), **settings),
        SubsetConfig(image_dir=str(masked / "alpha"), alpha_mask=True, **settings),
        SubsetConfig(image_dir=str(masked / "base"), **settings),
    )


def test_masks_weigh_the_loss(masked):
    reader, plan = reader_of(*subsets_of(masked, flip_aug=True), batch_size=3)
    kinds = Counter()
    for micro_batch in epochs_of(plan, 3):
        batch = reader(micro_batch)
        size = FORMAT.latent_size(batch.resolution)
        if batch.mask is None:
            assert all(key.startswith("0/2/") for key in batch.keys)
            continue
        assert batch.mask.shape == (len(batch), 1, *size) and batch.mask.dtype == torch.float32
        for row, visit in enumerate(micro_batch.visits):
            sample, placement = reader.samples[visit.sample], reader.placements[visit.sample]
            kinds[sample.subset] += 1
            if sample.subset == 2:
                assert torch.equal(batch.mask[row], torch.ones(1, *size))
                continue
            alpha = sample.subset == 1
            upright = load_pixels(sample.path, placement, False)
            flipped = not torch.equal(batch.pixels[row], upright)
            kinds[sample.subset, flipped] += 1
            expected = load_mask(sample.path if alpha else sample.mask, placement, False, stride=8, alpha=alpha) / 255
            assert torch.equal(batch.mask[row], expected.flip(-1) if flipped else expected)
            assert len(expected.unique()) > 5
    assert kinds.keys() == {0, 1, 2, (0, False), (0, True), (1, False), (1, True)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_cached_masks_are_those_of_the_files_bit_for_bit(masked, tmp_path, packed, workers):
    reader, plan = reader_of(*subsets_of(masked, flip_aug=True, unmasked_weight=0.3), batch_size=3)
    cached = fill_caches(reader, tmp_path if packed else None)
    micro_batches = epochs_of(plan, 3)
    flips = Counter()
    for micro_batch, batch in zip(micro_batches, make_loader(cached, micro_batches, workers=workers)):
        other = reader(micro_batch)
        assert batch.pixels is None and (batch.mask is None) == (other.mask is None)
        assert batch.mask is None or torch.equal(batch.mask, other.mask)
        for row, visit in enumerate(micro_batch.visits):
            number, half = divmod(batch.latents[row, 0, 0, 0].item(), 1)
            assert number == visit.sample
            flips[half] += 1
    assert set(flips) == {0.0, 0.5}


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.3, 1.0])
def test_black_has_the_weight_of_the_unmasked(masked, weight):
    def rows(weight):
        reader, plan = reader_of(*subsets_of(masked, unmasked_weight=weight)[:1], batch_size=1)
        return {batch.keys: batch.mask for batch in map(reader, epochs_of(plan))}

    for key, plain in rows(0.0).items():
        mask = rows(weight)[key]
        assert torch.equal(mask[plain == 1], torch.ones((plain == 1).sum()))
        assert torch.equal(mask[plain == 0], torch.full(((plain == 0).sum(),), weight))
        assert torch.allclose(mask, weight + (1 - weight) * plain, atol=1e-6)
        assert (plain == 1).any() and (plain == 0).any()


def test_a_mask_that_went_bad_is_named(masked):
    reader, plan = reader_of(*subsets_of(masked)[:1])
    (masked / "masks" / "4.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"masks/4\.png: the mask of sample 0/0/4\.png can't be read: "):
        list(make_loader(reader, epochs_of(plan)))
    cached = dataclasses.replace(fill_caches(reader_of(*subsets_of(masked)[1:2])[0]), masks=MemoryStore())
    _, plan = reader_of(*subsets_of(masked)[1:2])
    with pytest.raises(ConfigError, match=r"^the cache has no mask of sample 0/0/\d\.png \(.*alpha/\d\.png\); start"):
        cached(plan.step(0)[0])


# Pixels that change


def test_random_crops_and_colours_follow_the_visit(folder):
    settings = {"random_crop": True, "color_aug": True}
    reader, plan = make_reader(folder, **settings)
    micro_batches = epochs_of(plan, 4)
    alone = [reader(micro_batch) for micro_batch in micro_batches]
    assert_same(make_loader(reader, micro_batches, workers=2), alone)
    seen = Counter()
    for micro_batch, batch in zip(micro_batches, alone):
        for row, visit in enumerate(micro_batch.visits):
            sample, placement = reader.samples[visit.sample], reader.placements[visit.sample]
            draws = (5, sample.key, visit.visit)
            moved = vary(
                placement,
                sample.size,
                reader.datasets[0],
                reader.datasets[0].subsets[0],
                None,
                python_random(5, "crop", *draws[1:]),
            )
            colour = colour_shift(python_random(5, "colour", *draws[1:]))
            expected = load_pixels(sample.path, moved, False, colour=colour)
            assert torch.equal(batch.pixels[row], expected)
            seen[moved != placement, colour is not None] += 1
    assert min(seen[True, True], seen[True, False]) > 5
    # one of the two doesn't disturb the other
    only_crop, _ = make_reader(folder, random_crop=True)
    differences = [
        torch.equal(only_crop(micro_batch).pixels, batch.pixels) for micro_batch, batch in zip(micro_batches, alone)
    ]
    assert 0 < sum(differences) < len(differences)


def test_pixel_settings_act(masked):
    reader, plan = reader_of(*subsets_of(masked)[1:2], batch_size=1)
    for settings in ({"resize_interpolation": "nearest"}, {"alpha_color": "#000000"}):
        other, _ = reader_of(*subsets_of(masked, **settings)[1:2], batch_size=1)
        batch, changed = reader(plan.step(0)[0]), other(plan.step(0)[0])
        sample = int(batch.keys[0][4])
        expected = load_pixels(
            reader.samples[sample].path,
            reader.placements[sample],
            False,
            PixelSettings.of(other.datasets[0].subsets[0]),
        )
        assert torch.equal(changed.pixels[0], expected) and not torch.equal(changed.pixels, batch.pixels)
        assert torch.equal(changed.mask, batch.mask)


# Captions that are cached in several versions


def test_caption_variants_are_what_the_cache_holds(folder):
    settings = {"shuffle_caption": True, "caption_dropout_rate": 0.3}
    texts = MemoryStore()
    reader, plan = make_reader(folder, **settings)
    versions = {}
    for sample in reader.samples:
        versions[sample.key] = caption_versions(sample.captions, reader.datasets[0].subsets[0], 3)
        for caption in versions[sample.key]:
            texts.write({text_key(caption, SIGNATURE): {"context": torch.full((1, 1), float(len(caption)))}})
    texts.write({text_key("", SIGNATURE): {"context": torch.zeros(1, 1)}})
    cached = dataclasses.replace(reader, texts=texts, text_signature=SIGNATURE, caption_variants=3)
    seen = Counter()
    for micro_batch in epochs_of(plan, 6):
        batch, online = cached(micro_batch), reader(micro_batch)
        assert torch.equal(batch.dropped, online.dropped)
        assert batch.text.context.flatten().tolist() == [len(caption) for caption in batch.captions]
        for key, visit, caption, dropped in zip(batch.keys, batch.visits, batch.captions, batch.dropped.tolist()):
            seen[caption] += 1
            possible = versions[key]
            assert caption == ("" if dropped else possible[visit % 3] if len(possible) == 3 else caption)
            assert dropped or caption in possible
    assert len(seen) > 15


# Where pictures lie


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_in_a_bucket_are_read(masked, s3_bucket, workers):
    for path in sorted(masked.rglob("*")):
        if path.is_file():
            write_bytes(f"{s3_bucket}/{path.relative_to(masked)}", path.read_bytes())
    near, plan = reader_of(*subsets_of(masked)[:2])
    far, _ = reader_of(
        SubsetConfig(
            image_dir=f"{s3_bucket}/cats", conditioning_data_dir=f"{s3_bucket}/masks", class_tokens="x", num_repeats=2
        ),
        SubsetConfig(image_dir=f"{s3_bucket}/alpha", alpha_mask=True, class_tokens="x", num_repeats=2),
    )
    assert [sample.key for sample in far.samples] == [sample.key for sample in near.samples]
    micro_batches = epochs_of(plan)[:4]
    assert_same(make_loader(far, micro_batches, workers=workers), map(near, micro_batches))


def test_file_names_need_not_be_text(folder):
    name = os.fsdecode(b"caf\xe9.png")
    os.rename(folder / "cats" / "0.png", folder / "cats" / name)
    reader, plan = make_reader(folder, class_tokens="a cat, a hat", **RANDOM)
    assert sum(key.endswith(name) for batch in map(reader, epochs_of(plan)) for key in batch.keys) == 2
