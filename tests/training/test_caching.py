import threading
import time
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from torch import Tensor

from library.config.caching import UNSUPPORTED, CachingConfig
from library.config.errors import ConfigError
from library.data.buckets import Placement
from library.data.cache_keys import latent_key, text_key
from library.data.store import MemoryStore, PackedStore
from library.records import Box, Resolution, Sample, TensorRecord
from library.training import caching
from library.training.caching import CacheCounts, LatentItem, cache_latents, cache_texts

SIGNATURE = {"vae": "abc", "dtype": "torch.float32"}


@dataclass
class Processes:
    """One of the processes of a run."""

    process_index: int = 0
    num_processes: int = 1
    waited: int = 0

    def wait_for_everyone(self):
        self.waited += 1


@dataclass(frozen=True)
class Text(TensorRecord):
    context: Tensor
    pooled: Tensor
    mask: Tensor | None = None


def item(name, width=4, height=4, flipped=False, content=None):
    size = Resolution(width, height)
    placement = Placement(size, size, Box(0, 0, width, height))
    return LatentItem(latent_key(content or name, placement, flipped, SIGNATURE), f"{name}.png", placement, flipped)


class Pictures:
    """Pictures whose pixels all hold a number made of their name; remembers what was read."""

    def __init__(self):
        self.read = []

    def value(self, path, flipped):
        return float(path[:-4]) + (0.5 if flipped else 0)

    def __call__(self, path, placement, flipped):
        self.read.append((path, flipped))
        return torch.full((3, placement.bucket.height, placement.bucket.width), self.value(path, flipped))


class Encoder:
    """Shrinks by two into 4 channels; remembers the batches."""

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        self.batches = []

    def __call__(self, pixels):
        assert not torch.is_grad_enabled()
        self.batches.append(tuple(pixels.shape))
        return pixels[:, :1, ::2, ::2].expand(-1, 4, -1, -1).to(self.dtype)


def run(store, items, encode=None, batch_size=4, processes=None, load=None):
    return cache_latents(
        store,
        items,
        encode or Encoder(),
        batch_size=batch_size,
        accelerator=processes or Processes(),
        load=load or Pictures(),
    )


@pytest.fixture(params=["memory", "packed"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else PackedStore(tmp_path / "cache")


def threads_left():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("read", "write"))]


# Latents


def test_each_picture_gets_its_own_latents(store):
    items = [item(str(number), *size) for number, size in enumerate([(4, 4), (8, 4), (4, 8), (4, 4), (8, 4)] * 5)]
    items += [item(str(number), 4, 4, flipped=True) for number in range(0, 25, 5)]
    assert run(store, items, batch_size=3) == CacheCounts(0, 30)
    for wanted in items:
        latents = store.read(wanted.key)["latents"]
        assert latents.shape == (4, wanted.placement.bucket.height // 2, wanted.placement.bucket.width // 2)
        assert latents.unique().tolist() == [Pictures().value(wanted.path, wanted.flipped)]


def test_batches_hold_one_resolution_and_the_largest_come_first():
    encode = Encoder()
    run(
        MemoryStore(),
        [item(str(n), *size) for n, size in enumerate([(4, 4), (8, 8), (4, 4), (8, 4), (4, 4)])],
        encode,
        2,
    )
    assert encode.batches == [(1, 3, 8, 8), (1, 3, 4, 8), (2, 3, 4, 4), (1, 3, 4, 4)]


def test_only_what_is_missing_is_read_and_encoded(store, capsys):
    run(store, [item(str(n)) for n in range(5)])
    capsys.readouterr()
    pictures, encode = Pictures(), Encoder()
    assert run(store, [item(str(n)) for n in range(5)], encode, load=pictures) == CacheCounts(5, 0)
    assert (pictures.read, encode.batches) == ([], [])
    assert capsys.readouterr().err == ""
    assert run(store, [item(str(n)) for n in range(7)], encode, load=pictures) == CacheCounts(5, 2)
    assert sorted(pictures.read) == [("5.png", False), ("6.png", False)]
    assert "latents: 5 cached, 2 to encode" in capsys.readouterr().err


def test_equal_content_is_encoded_once(store):
    encode = Encoder()
    copies = [item("1", content="same"), item("2", content="same"), item("3")]
    assert run(store, copies, encode, batch_size=1) == CacheCounts(0, 2)
    assert len(encode.batches) == 2


def test_a_later_run_finds_what_an_earlier_one_stored(tmp_path):
    run(PackedStore(tmp_path), [item(str(n)) for n in range(3)])
    assert run(PackedStore(tmp_path), [item(str(n)) for n in range(4)]) == CacheCounts(3, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_store_holds_what_the_encoder_returned(store, dtype):
    one = item("3")
    run(store, [one], Encoder(dtype))
    assert store.read(one.key)["latents"].dtype == dtype


def test_items_of_samples():
    sample = Sample("0/0/a.png", "/pictures/a.png", ("a cat",), Resolution(4, 4), 0, 0)
    placement = item("1").placement
    made = LatentItem.of(sample, "c0ffee", placement, flipped=True, signature=SIGNATURE)
    assert made == LatentItem(latent_key("c0ffee", placement, True, SIGNATURE), "/pictures/a.png", placement, True)


def test_picture_files_are_read(tmp_path, store):
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "a.png")
    size = Resolution(4, 4)
    placement = Placement(size, Resolution(6, 4), Box(1, 0, 5, 4))
    wanted = LatentItem("0" * 40, str(tmp_path / "a.png"), placement)
    cache_latents(store, [wanted], lambda pixels: pixels, batch_size=1, accelerator=Processes())
    assert store.read("0" * 40)["latents"][:, 0, 0].tolist() == [1.0, -1.0, -1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_stop_with_the_pictures_name(store, bad):
    def encode(pixels):
        latents = pixels.clone()
        latents[pixels[:, 0, 0, 0] == 5.5, 0, 1, 1] = bad
        return latents

    items = [item(str(n), flipped=n == 5) for n in range(8)]
    with pytest.raises(ConfigError, match=r"5\.png \(mirrored\) has numbers that are not finite"):
        run(store, items, encode, batch_size=2)
    # What was encoded before is kept.
    assert store.missing([wanted.key for wanted in items[:4]]) == []
    assert store.missing([items[5].key]) == [items[5].key]


def test_a_picture_that_went_away_is_named(store):
    def load(path, placement, flipped):
        if path == "2.png":
            raise FileNotFoundError(2, "No such file or directory", path)
        return Pictures()(path, placement, flipped)

    with pytest.raises(ConfigError, match=r"2\.png can't be read any more"):
        run(store, [item(str(n)) for n in range(4)], load=load)
    assert not threads_left()


def test_too_little_memory_says_which_option_helps():
    def encode(pixels):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match="encoding 2 pictures of 4x4 at once; lower --vae_batch_size 2") as caught:
        run(MemoryStore(), [item(str(n)) for n in range(100)], encode, batch_size=2)
    assert not threads_left()
    assert caught.value.__cause__ is not None


def test_pictures_are_read_ahead_of_the_encoder_but_not_far(monkeypatch):
    monkeypatch.setattr(caching.os, "cpu_count", lambda: 3)
    pictures, seen = Pictures(), []

    def encode(pixels):
        time.sleep(0.02)
        seen.append(len(pictures.read))
        return pixels

    run(MemoryStore(), [item(str(n)) for n in range(60)], encode, batch_size=4, load=pictures)
    done = [4 * (number + 1) for number in range(len(seen))]
    ahead = [read - encoded for read, encoded in zip(seen, done)]
    assert max(ahead) >= 4
    assert max(ahead) <= 4 + 2 * 3


def test_writing_does_not_hold_up_encoding():
    class Slow(MemoryStore):
        def write(self, entries):
            time.sleep(0.02)
            times.append(("written", len(entries)))
            super().write(entries)

    times = []

    def encode(pixels):
        times.append(("encoded", len(pixels)))
        return pixels

    slow = Slow()
    run(slow, [item(str(n)) for n in range(12)], encode, batch_size=1)
    assert times[:2] == [("encoded", 1), ("encoded", 1)]
    assert slow.missing([item(str(n)).key for n in range(12)]) == []
    waiting = [sum(1 if what == "encoded" else -1 for what, _ in times[: end + 1]) for end in range(len(times))]
    assert max(waiting) <= caching._WRITES_UNDER_WAY + 2  # results don't pile up on the device


def test_processes_share_the_work_of_a_store_on_disk(tmp_path):
    items = [item(str(n)) for n in range(40)]
    encoders, ranks = [Encoder() for _ in range(3)], [Processes(rank, 3) for rank in range(3)]
    counts = [
        run(PackedStore(tmp_path), items, encode, processes=rank) for encode, rank in zip(encoders, ranks)
    ]  # one after another, so that each finds less missing than the one before
    assert sum(count.encoded for count in counts) == 40
    assert min(count.encoded for count in counts) > 5
    assert [rank.waited for rank in ranks] == [1, 1, 1]
    assert PackedStore(tmp_path).missing([wanted.key for wanted in items]) == []


def test_every_process_fills_a_store_in_memory():
    items = [item(str(n)) for n in range(10)]
    for rank in range(2):
        memory = MemoryStore()
        assert run(memory, items, processes=Processes(rank, 2)) == CacheCounts(0, 10)


def test_only_the_first_process_shows_a_bar(capsys):
    run(MemoryStore(), [item("1")], processes=Processes(1, 2))
    assert capsys.readouterr().err == ""


# Texts


def features(captions):
    assert not torch.is_grad_enabled()
    context = torch.stack([torch.full((5, 3), float(len(caption))) for caption in captions]).bfloat16()
    pooled = torch.tensor([[float(hash(caption) % 1000)] for caption in captions])
    return Text(context, pooled)


def test_captions_are_encoded_once_and_the_empty_one_always(store):
    batches = []

    def encode(captions):
        batches.append(list(captions))
        return features(captions)

    def fill(captions):
        return cache_texts(store, captions, encode, signature=SIGNATURE, batch_size=2, accelerator=Processes())

    assert fill(["a cat", "a dog", "a cat", "a bird"]) == CacheCounts(0, 4)
    assert batches == [["", "a cat"], ["a dog", "a bird"]]
    assert fill(["a cat", "a cow"]) == CacheCounts(2, 1)
    assert batches[2:] == [["a cow"]]
    for caption in ("", "a cat", "a dog", "a bird", "a cow"):
        entry = store.read(text_key(caption, SIGNATURE))
        expected = features_without_grad([caption]).tensors()
        assert set(entry) == {"context", "pooled"}
        assert all(torch.equal(entry[name], expected[name][0]) for name in entry)
        assert entry["context"].dtype == torch.bfloat16
    stacked = Text.stack([store.read(text_key(caption, SIGNATURE)) for caption in ("a cat", "")])
    assert torch.equal(stacked.context, features_without_grad(["a cat", ""]).context)


def features_without_grad(captions):
    with torch.no_grad():
        return features(captions)


def test_other_encoders_make_other_features(store):
    for signature in (SIGNATURE, {**SIGNATURE, "t5": "other"}):
        counts = cache_texts(store, ["x"], features, signature=signature, batch_size=8, accelerator=Processes())
        assert counts == CacheCounts(0, 2)


def test_features_that_are_not_finite_stop_with_the_caption(store):
    def encode(captions):
        record = features(captions)
        record.pooled[[caption == "a bad one" for caption in captions]] = float("nan")
        return record

    with pytest.raises(ConfigError, match="caption 'a bad one' has numbers that are not finite"):
        cache_texts(store, ["fine", "a bad one"], encode, signature={}, batch_size=1, accelerator=Processes())
    assert store.missing([text_key("fine", {})]) == []


def test_processes_share_captions(tmp_path):
    captions = [f"caption {n}" for n in range(30)]
    counts = [
        cache_texts(
            PackedStore(tmp_path), captions, features, signature={}, batch_size=4, accelerator=Processes(rank, 2)
        )
        for rank in range(2)
    ]
    assert sum(count.encoded for count in counts) == 31
    assert PackedStore(tmp_path).missing([text_key(caption, {}) for caption in captions]) == []


# Options


def test_to_disk_implies_caching():
    config = CachingConfig(cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True)
    assert config.cache_latents
    assert config.cache_text_encoder_outputs
    assert not CachingConfig().cache_latents
    assert not CachingConfig(cache_latents_to_disk=True).cache_text_encoder_outputs


def test_options_are_understood_by_the_command_line():
    from library.config.options import build

    built = build({"caching": CachingConfig}, {"vae_batch_size": ["0"]})
    assert built.problems == ("--vae_batch_size: expected a whole number of at least 1, got 0",)
    built = build({"caching": CachingConfig}, {"cache_latents_to_disk": True, "cache_dir": ["x"]})
    assert built.groups["caching"].cache_latents
    assert built.groups["caching"].cache_dir == "x"
    assert set(UNSUPPORTED) == {"skip_cache_check"}
