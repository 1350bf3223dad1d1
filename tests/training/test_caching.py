import hashlib
import threading
import time
from dataclasses import dataclass

import accelerate
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.config.caching import UNSUPPORTED, CachingConfig
from library.config.dataset import SubsetConfig
from library.config.errors import ConfigError
from library.data.buckets import Placement
from library.data.cache_keys import LATENTS, MASK, latent_key, mask_key, text_key
from library.data.images import PixelSettings, load_pixels
from library.data.masks import load_mask
from library.data.store import MemoryStore, PackedStore
from library.records import Box, Resolution, Sample, TensorRecord
from library.training import read_pictures, write_behind
from library.training.caching import CacheCounts, cache_latents, cache_texts
from library.training.read_pictures import LatentItem

SIGNATURE = {"vae": "abc", "dtype": "torch.float32"}
PLAIN, FROM_ALPHA, FROM_FILE = (
    SubsetConfig(image_dir="x", **settings)
    for settings in ({}, {"alpha_mask": True}, {"conditioning_data_dir": "masks"})
)


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


def content_of(path):
    return hashlib.blake2b(path.read_bytes(), digest_size=20).hexdigest()


def placed(width, height):
    size = Resolution(width, height)
    return Placement(size, size, Box(0, 0, width, height))


class Folder:
    """A folder of small pictures, each of one level of grey that is its number."""

    def __init__(self, path):
        self.path = path

    def item(self, number, width=4, height=4, *, flipped=False, subset=PLAIN, mask=None, signature=SIGNATURE):
        """The picture of this number, made where it isn't there, with its left half black."""
        path = self.path / f"{number}.png"
        if not path.exists():
            picture = Image.new("RGBA" if subset.alpha_mask else "L", (width, height))
            picture.paste(
                (number, number, number, 255) if subset.alpha_mask else number, (width // 2, 0, width, height)
            )
            picture.save(path)
        sample = Sample(
            f"0/0/{number}.png",
            str(path),
            content_of(path),
            ("",),
            Resolution(width, height),
            0,
            0,
            mask=None if mask is None else str(mask),
            mask_content="" if mask is None else content_of(mask),
        )
        size = placed(width, height)
        return LatentItem.of(sample, subset, size, flipped=flipped, stride=2, signature=signature)

    def items(self, *numbers, **settings):
        return [self.item(number, **settings) for number in numbers]

    def mask(self, name, size=(4, 4)):
        path = self.path / f"{name}-mask.png"
        Image.effect_noise(size, 200).save(path)
        return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    return Folder(tmp_path / "pictures")


class Encoder:
    """Shrinks by two into 4 channels of grey levels; remembers the batches."""

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        self.batches = []

    def __call__(self, pixels):
        assert not torch.is_grad_enabled()
        self.batches.append(tuple(pixels.shape))
        return ((pixels[:, :1, ::2, ::2] + 1) * 127.5).round().expand(-1, 4, -1, -1).to(self.dtype)


def run(store, items, encode=None, batch_size=4, processes=None, masks=None):
    return cache_latents(
        store,
        MemoryStore() if masks is None else masks,
        items,
        encode or Encoder(),
        batch_size=batch_size,
        accelerator=processes or Processes(),
    )


@pytest.fixture(params=["memory", "packed"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else PackedStore(tmp_path / "cache")


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are read."""
    names = []

    def read(path):
        names.append(path.rsplit("/", 1)[1])
        return original(path)

    original = read_pictures.read_bytes
    monkeypatch.setattr(read_pictures, "read_bytes", read)
    return names


def threads_left():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("read", "write"))]


# Latents


def test_each_picture_gets_its_own_latents(folder, store):
    sizes = [(4, 4), (8, 4), (4, 8), (4, 4), (8, 4)]
    items = [folder.item(number, *sizes[number % 5]) for number in range(20)]
    items += [folder.item(number, 4, 4, flipped=True) for number in range(0, 20, 5)]
    assert run(store, items, batch_size=3) == CacheCounts(0, 24)
    for wanted in items:
        latents = store.read(wanted.key)[LATENTS]
        width, height = wanted.placement.bucket
        number = int(wanted.path.rsplit("/", 1)[1][:-4])
        assert latents.shape == (4, height // 2, width // 2)
        columns = [0] * (width // 4) + [number] * (width // 4)
        assert latents[0, 0].tolist() == (columns[::-1] if wanted.flipped else columns)


def test_batches_hold_one_resolution_and_the_largest_come_first(folder):
    encode = Encoder()
    sizes = [(4, 4), (8, 8), (4, 4), (8, 4), (4, 4)]
    run(MemoryStore(), [folder.item(n, *size) for n, size in enumerate(sizes)], encode, 2)
    assert encode.batches == [(1, 3, 8, 8), (1, 3, 4, 8), (2, 3, 4, 4), (1, 3, 4, 4)]


def test_only_what_is_missing_is_read_and_encoded(folder, store, reads, capsys):
    run(store, folder.items(*range(5)))
    capsys.readouterr()
    reads.clear()
    encode = Encoder()
    assert run(store, folder.items(*range(5)), encode) == CacheCounts(5, 0)
    assert (reads, encode.batches) == ([], [])
    assert capsys.readouterr().err == ""
    assert run(store, folder.items(*range(7)), encode) == CacheCounts(5, 2)
    assert sorted(reads) == ["5.png", "6.png"]
    assert "latents: 5 cached, 2 to encode" in capsys.readouterr().err


def test_equal_content_is_encoded_once(folder, store):
    encode = Encoder()
    folder.item(1)
    (folder.path / "2.png").write_bytes((folder.path / "1.png").read_bytes())
    assert run(store, folder.items(1, 2, 3), encode, batch_size=1) == CacheCounts(0, 2)
    assert len(encode.batches) == 2


def test_a_picture_and_its_mirror_image_are_read_once(folder, store, reads):
    mask = folder.mask("own")
    items = [
        folder.item(number, flipped=flipped, subset=FROM_FILE, mask=mask)
        for flipped in (False, True)
        for number in range(3)
    ]
    run(store, items, batch_size=2, masks=MemoryStore())
    assert sorted(reads) == ["0.png", "1.png", "2.png", "own-mask.png"]


def test_a_later_run_finds_what_an_earlier_one_stored(folder, tmp_path):
    run(PackedStore(tmp_path / "cache"), folder.items(*range(3)))
    assert run(PackedStore(tmp_path / "cache"), folder.items(*range(4))) == CacheCounts(3, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_store_holds_what_the_encoder_returned(folder, store, dtype):
    one = folder.item(3)
    run(store, [one], Encoder(dtype))
    assert store.read(one.key)[LATENTS].dtype == dtype


def test_items_of_samples():
    placement = placed(4, 4)
    settings = {"flipped": True, "stride": 8, "signature": SIGNATURE}
    plain = Sample("0/0/a.png", "/p/a.png", "c0ffee", ("a cat",), Resolution(4, 4), 0, 0)
    item = LatentItem.of(plain, SubsetConfig(image_dir="x", resize_interpolation="box"), placement, **settings)
    own = PixelSettings(interpolation="box")
    assert item.key == latent_key("c0ffee", placement, True, own, SIGNATURE)
    assert (item.path, item.content, item.settings, item.mask) == ("/p/a.png", "c0ffee", own, None)
    assert item.title == "/p/a.png (mirrored)"
    item = LatentItem.of(plain, FROM_ALPHA, placement, **settings)
    assert item.mask == ("/p/a.png", "c0ffee", True)
    assert item.mask_key == mask_key("c0ffee", placement, True, alpha=True, stride=8)
    masked = plain._replace(mask="/m/a.png", mask_content="beef")
    for subset in (FROM_FILE, SubsetConfig(image_dir="x", alpha_mask=True)):  # a file of its own goes first
        item = LatentItem.of(masked, subset, placement, **settings)
        assert item.mask == ("/m/a.png", "beef", False)
        assert item.mask_key == mask_key("beef", placement, True, alpha=False, stride=8)


def test_pictures_are_placed_as_the_loader_places_them(tmp_path, store):
    path = tmp_path / "a.png"
    Image.effect_noise((60, 44), 100).convert("RGBA").save(path)
    placement = Placement(Resolution(32, 32), Resolution(44, 32), Box(5, 0, 37, 32))
    subset = SubsetConfig(image_dir="x", resize_interpolation="bicubic", alpha_color="#102030")
    sample = Sample("0/0/a.png", str(path), content_of(path), ("",), Resolution(60, 44), 0, 0)
    for flipped in (False, True):
        item = LatentItem.of(sample, subset, placement, flipped=flipped, stride=8, signature=SIGNATURE)
        run(store, [item], lambda pixels: pixels)
        expected = load_pixels(path, placement, flipped, PixelSettings.of(subset))
        assert torch.equal(store.read(item.key)[LATENTS], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_stop_with_the_pictures_name(folder, store, bad):
    def encode(pixels):
        latents = Encoder()(pixels).clone()
        latents[(latents[:, 0, 0, 0] == 5), 0, 1, 1] = bad  # the mirrored one begins with its grey half
        return latents

    items = [folder.item(n, flipped=n == 5) for n in range(8)]
    with pytest.raises(ConfigError, match=r"5\.png \(mirrored\) has numbers that are not finite"):
        run(store, items, encode, batch_size=2)
    # What was encoded before is kept.
    assert store.missing([wanted.key for wanted in items[:4]]) == []
    assert store.missing([items[5].key]) == [items[5].key]


# Pictures that are not as they were


def test_a_picture_that_went_away_is_named(folder, store):
    items = folder.items(*range(4))
    (folder.path / "2.png").unlink()
    with pytest.raises(ConfigError, match=r"2\.png can't be read any more: No such file or directory\. Put it back"):
        run(store, items, batch_size=1)
    assert store.missing(wanted.key for wanted in items[:2]) == []
    assert not threads_left()


@pytest.mark.parametrize("name", ["2.png", "some-mask.png"])
def test_a_file_that_changed_is_named(folder, store, name):
    masks = MemoryStore()
    items = folder.items(*range(3), subset=FROM_FILE, mask=folder.mask("some"))
    Image.new("L", (4, 4), 77).save(folder.path / name)
    with pytest.raises(ConfigError, match=rf"{name} changed while the run started; start again"):
        run(store, items, batch_size=1, masks=masks)
    assert not threads_left()


def broken(path):
    """The picture, cut off in the middle: its header is whole."""
    Image.effect_noise((64, 64), 200).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    return path


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pictures_that_cannot_be_decoded_are_listed_and_the_others_encoded(folder, store, batch_size):
    for number in (0, 4, 5):
        broken(folder.path / f"{number}.png")
    items = folder.items(*range(9)) + folder.items(4, 6, flipped=True)
    counts = run(store, items, batch_size=batch_size)
    contents = {content_of(folder.path / f"{number}.png") for number in (0, 4, 5)}
    assert counts.bad.keys() == contents and counts == CacheCounts(0, 7, counts.bad)
    assert all(problem and "\n" not in problem for problem in counts.bad.values())
    bad = [item.key for item in items if item.content in contents]
    assert store.missing([item.key for item in items]) == list(dict.fromkeys(bad))
    # Without them a run has nothing to do; with them it finds them again.
    assert run(store, [item for item in items if item.content not in contents]) == CacheCounts(7, 0)
    assert run(store, items) == CacheCounts(7, 0, counts.bad)


def test_only_bad_pictures_leave_an_empty_store(folder, store):
    broken(folder.path / "0.png")
    encode = Encoder()
    counts = run(store, folder.items(0), encode)
    assert list(counts.bad) == [content_of(folder.path / "0.png")] and encode.batches == []


def test_a_mask_that_cannot_be_decoded_is_listed_and_its_picture_encoded(folder, store):
    masks = MemoryStore()
    mask = broken(folder.path / "mask.png")
    items = folder.items(1, subset=FROM_FILE, mask=mask) + folder.items(2, subset=FROM_FILE, mask=folder.mask("good"))
    counts = run(store, items, masks=masks)
    assert list(counts.bad) == [content_of(mask)] and counts.encoded == 2
    assert masks.missing(item.mask_key for item in items) == [items[0].mask_key]
    assert store.missing(item.key for item in items) == []


# Masks


@pytest.mark.parametrize("flipped", [False, True])
def test_masks_are_those_that_the_loader_would_read(tmp_path, store, flipped):
    masks = MemoryStore()
    placement = Placement(Resolution(32, 32), Resolution(44, 32), Box(5, 0, 37, 32))
    picture, mask = tmp_path / "a.png", tmp_path / "a-mask.png"
    transparent = Image.effect_noise((60, 44), 100).convert("RGBA")
    transparent.putalpha(Image.effect_noise((60, 44), 200))
    transparent.save(picture)
    Image.effect_noise((120, 88), 200).save(mask)
    sample = Sample("0/0/a.png", str(picture), content_of(picture), ("",), Resolution(60, 44), 0, 0)
    own = sample._replace(mask=str(mask), mask_content=content_of(mask))
    for wanted, subset, path, alpha in ((sample, FROM_ALPHA, picture, True), (own, FROM_FILE, mask, False)):
        item = LatentItem.of(wanted, subset, placement, flipped=flipped, stride=8, signature=SIGNATURE)
        run(store, [item], masks=masks)
        stored = masks.read(item.mask_key)[MASK]
        assert stored.dtype == torch.uint8 and stored.shape == (1, 4, 4)
        assert torch.equal(stored, load_mask(path, placement, flipped, stride=8, alpha=alpha))
    upright = LatentItem.of(own, FROM_FILE, placement, flipped=not flipped, stride=8, signature=SIGNATURE)
    run(store, [upright], masks=masks)
    assert torch.equal(masks.read(upright.mask_key)[MASK].flip(-1), stored) and not torch.equal(stored.flip(-1), stored)


def test_one_read_gives_picture_and_transparency(folder, store, reads):
    masks = MemoryStore()
    items = folder.items(*range(3), subset=FROM_ALPHA)
    run(store, items, masks=masks)
    assert sorted(reads) == ["0.png", "1.png", "2.png"]
    assert [masks.read(item.mask_key)[MASK].flatten().tolist() for item in items] == [[0, 255, 0, 255]] * 3


def test_masks_that_come_later_need_no_encoder(folder, store, reads, capsys):
    masks, encode = MemoryStore(), Encoder()
    mask = folder.mask("all")
    run(store, folder.items(*range(3)))
    capsys.readouterr()
    reads.clear()
    items = folder.items(*range(3), subset=FROM_FILE, mask=mask) + folder.items(3, subset=FROM_FILE, mask=mask)
    assert run(store, items, encode, masks=masks) == CacheCounts(3, 1)
    assert sorted(reads) == ["3.png", "all-mask.png"] and len(encode.batches) == 1
    assert "latents: 3 cached, 1 to encode; masks: 1 more to make" in capsys.readouterr().err
    reads.clear()
    assert run(store, items, encode, masks=masks) == CacheCounts(4, 0)
    assert reads == [] and masks.missing(item.mask_key for item in items) == []


def test_the_same_picture_with_and_without_masks(folder, store):
    # Two datasets on one folder: the latents are the same, and each has its own masks.
    masks, encode = MemoryStore(), Encoder()
    kinds = [
        {},
        {"subset": FROM_ALPHA},
        {"subset": FROM_FILE, "mask": folder.mask("a")},
        {"subset": FROM_FILE, "mask": folder.mask("b")},
    ]
    items = [folder.item(1, **kind) for kind in kinds]
    assert len({item.key for item in items}) == 1
    assert run(store, items, encode, masks=masks) == CacheCounts(0, 1)
    assert masks.missing(item.mask_key for item in items[1:]) == [] and encode.batches == [(1, 3, 4, 4)]


# The device is kept busy


def test_too_little_memory_says_which_option_helps(folder):
    def encode(pixels):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match="encoding 2 pictures of 4x4 at once; lower --vae_batch_size 2") as caught:
        run(MemoryStore(), folder.items(*range(30)), encode, batch_size=2)
    assert not threads_left()
    assert caught.value.__cause__ is not None


def test_pictures_are_read_ahead_of_the_encoder_but_not_far(folder, monkeypatch, reads):
    monkeypatch.setattr(read_pictures.os, "cpu_count", lambda: 3)
    seen = []

    def encode(pixels):
        time.sleep(0.03)
        seen.append(len(reads))
        return Encoder()(pixels)

    run(MemoryStore(), folder.items(*range(60)), encode, batch_size=4)
    done = [4 * (number + 1) for number in range(len(seen))]
    ahead = [read - encoded for read, encoded in zip(seen, done)]
    assert max(ahead) >= 4
    assert max(ahead) <= 1 + 4 + 2 * 3


def test_writing_does_not_hold_up_encoding(folder):
    class Slow(MemoryStore):
        def write(self, entries):
            time.sleep(0.02)
            times.append(("written", len(entries)))
            super().write(entries)

    times = []

    def encode(pixels):
        times.append(("encoded", len(pixels)))
        return Encoder()(pixels)

    slow = Slow()
    items = folder.items(*range(12))
    run(slow, items, encode, batch_size=1)
    assert times[:2] == [("encoded", 1), ("encoded", 1)]
    assert slow.missing([item.key for item in items]) == []
    waiting = [sum(1 if what == "encoded" else -1 for what, _ in times[: end + 1]) for end in range(len(times))]
    assert max(waiting) <= write_behind.UNDER_WAY + 2  # results don't pile up on the device


# Several processes


def test_processes_share_the_work_of_a_store_on_disk(folder, tmp_path):
    items = folder.items(*range(40), flipped=False) + folder.items(*range(40), flipped=True)
    encoders, ranks = [Encoder() for _ in range(3)], [Processes(rank, 3) for rank in range(3)]
    counts = [
        run(PackedStore(tmp_path / "cache"), items, encode, processes=rank) for encode, rank in zip(encoders, ranks)
    ]  # one after another, so that each finds less missing than the one before
    assert sum(count.encoded for count in counts) == 80
    assert min(count.encoded for count in counts) > 10
    assert all(count.encoded % 2 == 0 for count in counts)  # a picture and its mirror image are one's work
    assert [rank.waited for rank in ranks] == [1, 1, 1]
    assert PackedStore(tmp_path / "cache").missing([wanted.key for wanted in items]) == []


def test_every_process_fills_a_store_in_memory(folder):
    items = folder.items(*range(10))
    for rank in range(2):
        assert run(MemoryStore(), items, processes=Processes(rank, 2)) == CacheCounts(0, 10)


def test_only_the_first_process_shows_a_bar(folder, capsys):
    run(MemoryStore(), [folder.item(1)], processes=Processes(1, 2))
    assert capsys.readouterr().err == ""


def find_bad_pictures(path):
    """In each of two processes: what both found."""
    process = accelerate.PartialState()
    folder = Folder(path)
    counts = run(PackedStore(path.parent / "cache"), folder.items(*range(6)), processes=process)
    expected = {content_of(path / f"{number}.png") for number in range(6)}
    shares = {int(content[:8], 16) % 2 for content in expected}
    assert counts.bad.keys() == expected and shares == {0, 1} and counts.encoded == 0


def test_all_processes_learn_of_all_bad_pictures(folder):
    for number in range(6):
        broken(folder.path / f"{number}.png")
    accelerate.debug_launcher(find_bad_pictures, args=(folder.path,), num_processes=2)


# Texts


def features(captions):
    assert not torch.is_grad_enabled()
    context = torch.stack([torch.full((5, 3), float(len(caption))) for caption in captions]).bfloat16()
    pooled = torch.tensor([[float(hash(caption) % 1000)] for caption in captions])
    return Text(context, pooled)


def rows(text, row):
    return {name: tensor[row] for name, tensor in text.tensors().items()}


def test_what_is_stored_is_what_pack_gives(store):
    def first_tokens(text, row):
        assert text.context.device.type == "cpu" and not text.context.requires_grad
        return {"context": text.context[row, : row + 1]}

    cache_texts(store, ["a", "b"], features, first_tokens, signature=SIGNATURE, batch_size=8, accelerator=Processes())
    lengths = [len(store.read(text_key(caption, SIGNATURE))["context"]) for caption in ("", "a", "b")]
    assert lengths == [1, 2, 3]


def test_captions_are_encoded_once_and_the_empty_one_always(store):
    batches = []

    def encode(captions):
        batches.append(list(captions))
        return features(captions)

    def fill(captions):
        return cache_texts(store, captions, encode, rows, signature=SIGNATURE, batch_size=2, accelerator=Processes())

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
        counts = cache_texts(store, ["x"], features, rows, signature=signature, batch_size=8, accelerator=Processes())
        assert counts == CacheCounts(0, 2)


def test_features_that_are_not_finite_stop_with_the_caption(store):
    def encode(captions):
        record = features(captions)
        record.pooled[[caption == "a bad one" for caption in captions]] = float("nan")
        return record

    with pytest.raises(ConfigError, match="caption 'a bad one' has numbers that are not finite"):
        cache_texts(store, ["fine", "a bad one"], encode, rows, signature={}, batch_size=1, accelerator=Processes())
    assert store.missing([text_key("fine", {})]) == []


def test_processes_share_captions(tmp_path):
    captions = [f"caption {n}" for n in range(30)]
    counts = [
        cache_texts(
            PackedStore(tmp_path), captions, features, rows, signature={}, batch_size=4, accelerator=Processes(rank, 2)
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
