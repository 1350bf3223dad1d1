import os
import uuid

import pytest
import torch

from library.config.errors import ConfigError
from library.data import shard_files
from library.data.shard_index import INDEX_NAME
from library.data.store import PackedStore
from library.data.store_care import StoreCare
from tests.data.store_fixtures import entry, key, present, put, same, shards


@pytest.fixture
def folder(tmp_path):
    """A store of ten entries in two shards."""
    with PackedStore(tmp_path / "store") as packed:
        put(packed, range(6))
        packed.flush()
        put(packed, range(6, 10))
    return tmp_path / "store"


@pytest.fixture
def care(folder):
    return StoreCare(str(folder))


class Counted:
    """A progress that adds up."""

    def __init__(self):
        self.bytes = 0

    def __call__(self, done):
        self.bytes += done


def holding(folder, number):
    """The shard with this entry."""
    return next(path for path in shards(folder) if key(number).encode() in path.read_bytes())


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(bytes(data))


def position_of(path, tensor):
    return path.read_bytes().index(tensor.flatten().view(torch.uint8).numpy().tobytes())


def test_contents(folder, care):
    size, progress = sum(path.stat().st_size for path in shards(folder)), Counted()
    assert care.contents(progress) == (10, size, 2)
    assert progress.bytes == size
    with PackedStore(folder) as packed:
        packed.write({key(0): entry(0), key(10): entry(10)})
    assert care.contents(Counted())[:1] == (11,), "a second copy of an entry is no second entry"


def test_nothing_is_in_a_folder_that_is_not_there(tmp_path):
    care = StoreCare(str(tmp_path / "nowhere"))
    assert care.contents(Counted()) == (0, 0, 0)
    assert list(care.damages(Counted())) == []
    assert not (tmp_path / "nowhere").exists()


def test_an_intact_store_has_no_damage(folder, care):
    before, progress = {path: path.read_bytes() for path in folder.iterdir()}, Counted()
    assert list(care.damages(progress)) == []
    assert progress.bytes == sum(path.stat().st_size for path in shards(folder))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["context", "ids", "mask"])
@pytest.mark.parametrize("block", [1 << 23, 8])
def test_one_changed_bit_is_found(folder, care, name, block, monkeypatch):
    monkeypatch.setattr(shard_files, "_BLOCK_BYTES", block)
    path = holding(folder, 7)
    flip(path, position_of(path, entry(7)["context"]) if name == "context" else within(path, 7, name))
    (damage,) = care.damages(Counted())
    assert damage == (path.name, key(7), "its bytes are not those that were written")


def within(path, number, name):
    """A byte of a tensor that is too short to be found by its bytes."""
    entries = shard_files.entries_of(shard_files.shard_files(path.parent), path.name, path.stat().st_size)
    (tensor,) = (tensor for tensor in entries[key(number)].tensors if tensor.name == name)
    return tensor.begin


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "is truncated: 1 bytes are missing at its end"),
        (lambda path: os.truncate(path, 0), "is not a safetensors file"),
        (lambda path: flip(path, 8), "is not a safetensors file"),
        (lambda path: flip(path, path.read_bytes().index(b"shape")), "has a damaged safetensors header"),
        (lambda path: flip(path, path.read_bytes().index(b'crc32/') + 45), "has a damaged safetensors header"),
    ],
    ids=["truncated", "empty", "start", "header", "key"],
)  # fmt: skip
def test_shards_that_can_not_be_read(folder, care, damage, problem):
    path = holding(folder, 7)
    damage(path)
    (found,) = care.damages(Counted())
    assert (found.shard, found.key) == (path.name, None)
    assert found.problem.startswith(f"{path.name} {problem}") and "\n" not in found.problem
    care.remove_damage([found], Counted())
    assert list(care.damages(Counted())) == []
    assert present(PackedStore(folder), range(10)) == list(range(6))


def test_a_changed_checksum_is_damage(folder, care):
    path = holding(folder, 7)
    text = path.read_bytes()
    at = text.index(f"crc32/{key(7)}".encode()) + 6 + 40 + 3
    path.write_bytes(text[:at] + (b"0" if text[at : at + 1] != b"0" else b"1") + text[at + 1 :])
    assert [damage.key for damage in care.damages(Counted())] == [key(7)]


def test_a_disk_that_can_not_read_is_damage(folder, care, monkeypatch):
    start = within(holding(folder, 7), 7, "ids")
    read = shard_files._LocalShard.read_into

    def broken(self, begin, buffers):
        if begin == start:
            raise OSError(5, "Input/output error")
        read(self, begin, buffers)

    monkeypatch.setattr(shard_files._LocalShard, "read_into", broken)
    assert [(d.key, d.problem) for d in care.damages(Counted())] == [(key(7), "it can't be read: Input/output error")]


def test_only_what_is_damaged_is_removed(folder, care):
    path, other = holding(folder, 7), holding(folder, 1)
    flip(path, within(path, 7, "ids"))
    flip(path, within(path, 8, "ids"))
    damages = list(care.damages(Counted()))
    assert {damage.key for damage in damages} == {key(7), key(8)}
    care.remove_damage(damages, Counted())
    assert not path.exists() and other.exists() and len(shards(folder)) == 2
    assert list(care.damages(Counted())) == []
    packed = PackedStore(folder)
    assert packed.missing(map(key, range(10))) == [key(7), key(8)]
    put(packed, range(10))
    assert present(packed, range(11)) == list(range(10))


def test_other_peoples_files_are_no_damage(folder, care):
    with PackedStore(folder.parent / "other") as packed:
        put(packed, [1])
    (path,) = shards(folder.parent / "other")
    foreign = folder / f"{uuid.uuid4().hex}.safetensors"
    foreign.write_bytes(path.read_bytes().replace(b"atelier.tensor_store", b"somebody.else_s_thing"[:20]))
    assert list(care.damages(Counted())) == []
    care.remove_spares(care.spares(set(), Counted()), Counted())
    assert shards(folder) == [foreign]


def test_a_store_that_is_merged_meanwhile_is_checked_whole(folder, care):
    path = holding(folder, 1)
    flip(path, within(path, 1, "ids"))
    damages = list(care.damages(merging(folder)))
    assert {damage.key for damage in damages} == {key(1)}
    assert not path.exists() and (folder / damages[-1].shard).exists()
    care.remove_damage(damages, Counted())
    assert present(PackedStore(folder), range(10)) == [0, *range(2, 10)]


def merging(folder):
    """A progress that lets another process merge all shards once the first is done."""

    def progress(done):
        if len(shards(folder)) < 16:
            packed = PackedStore(folder, pending_bytes=1)
            put(packed, range(100, 120))

    return progress


# Making room


def test_what_is_not_wanted(folder, care):
    first, second = holding(folder, 0), holding(folder, 6)
    one = sum(tensor.nbytes for tensor in entry(0).values())
    spares = {spare.shard: spare for spare in care.spares({key(n) for n in range(5)}, Counted())}
    assert spares[first.name][2:] == ({key(n) for n in range(5)}, 1, one)
    assert spares[second.name][2:] == (frozenset(), 4, second.stat().st_size)
    assert care.spares({key(n) for n in range(20)}, Counted()) == []


def test_room_is_made(folder, care):
    packed = PackedStore(folder)
    assert present(packed, range(10)) == list(range(10))  # open while it happens
    keys = {key(n) for n in range(5)}
    spares = care.spares(keys, Counted())
    before = sum(path.stat().st_size for path in shards(folder))
    care.remove_spares(spares, Counted())
    assert before - sum(path.stat().st_size for path in shards(folder)) >= sum(spare.bytes for spare in spares)
    assert care.spares(keys, Counted()) == [] and list(care.damages(Counted())) == []
    for target in (packed, PackedStore(folder)):
        assert present(target, range(10)) == list(range(5))
        same(target.read(key(2)), entry(2))
    assert len(shards(folder)) == 1
    (folder / INDEX_NAME).unlink()
    assert present(PackedStore(folder), range(10)) == list(range(5))


def test_second_copies_are_not_wanted(folder, care):
    with PackedStore(folder) as packed:
        packed.write({key(0): entry(0), key(10): entry(10)})
    keys = {key(n) for n in range(11)}
    (spare,) = care.spares(keys, Counted())
    assert spare.entries == 1
    care.remove_spares([spare], Counted())
    assert care.spares(keys, Counted()) == []
    assert present(PackedStore(folder), range(12)) == list(range(11))


def test_what_others_write_meanwhile_stays(folder, care):
    spares = care.spares(set(), Counted())
    unfinished = folder / f".{uuid.uuid4().hex}.safetensors.{uuid.uuid4().hex}.partial"
    unfinished.write_bytes(b"half")
    with PackedStore(folder) as packed:
        put(packed, [10])
    care.remove_spares(spares, Counted())
    assert unfinished.exists()
    assert present(PackedStore(folder), range(12)) == [10]


def test_a_shard_that_stays_is_said(folder, care, monkeypatch):
    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    with pytest.raises(ConfigError, match=r"2 shards in .* can't be removed") as caught:
        care.remove_spares(care.spares(set(), Counted()), Counted())
    assert "\n" not in str(caught.value)


def refuse(*arguments, **options):
    raise PermissionError(13, "Permission denied")
