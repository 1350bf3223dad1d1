import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sqlite3
import threading
import time
import uuid
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from safetensors import safe_open

from library.config.errors import ConfigError
from library.data import shard_files, shard_index, store
from library.data.shard_index import INDEX_NAME
from library.data.store import MemoryStore, NonFiniteEntry, PackedStore
from tests.data.store_fixtures import entry, key, present, put, same, shards

FORK = multiprocessing.get_context("fork")


def in_child(function, *arguments):
    """Runs in a forked process and returns its exit code (negative: the signal)."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.fixture(params=["memory", "packed"])
def any_store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else PackedStore(tmp_path / "cache")


# What every store does


def test_every_type_and_shape_comes_back(any_store):
    plain = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64]
    tensors = {str(dtype): torch.arange(-3, 3).to(dtype).view(2, 3) for dtype in plain}
    tensors |= {
        "bool": torch.tensor([True, False, True]),
        "fp8": torch.tensor([1.5, -2.0, 448.0]).to(torch.float8_e4m3fn),
        "complex": torch.tensor([1 + 2j]),
        "uint16": torch.tensor([65535], dtype=torch.uint16),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 4),
        "a.b/c": torch.ones(1),
        "transposed": torch.arange(6.0).view(2, 3).t(),
    }
    any_store.write({"k1": tensors, "k2": {"x": torch.ones(1, dtype=torch.bool)}})
    any_store.flush()
    same(any_store.read("k1"), tensors)
    same(any_store.read("k2"), {"x": torch.ones(1, dtype=torch.bool)})


def test_missing_keeps_order_and_names_each_once(any_store):
    put(any_store, [1, 2])
    assert any_store.missing([key(5), key(1), key(3), key(5), key(2)]) == [key(5), key(3)]
    any_store.flush()
    assert any_store.missing(iter([key(5), key(1), key(3), key(5), key(2)])) == [key(5), key(3)]
    assert any_store.missing([]) == []


def test_reading_what_is_not_there(any_store):
    with pytest.raises(KeyError, match="has no entry abc"):
        any_store.read("abc")


@pytest.mark.parametrize("flush", [False, True])
def test_tensors_are_copied_in_and_out(any_store, flush):
    tensor = torch.zeros(4)
    any_store.write({"k": {"x": tensor}})
    tensor.fill_(1)
    if flush:
        any_store.flush()
    any_store.read("k")["x"].fill_(2)
    assert any_store.read("k")["x"].tolist() == [0, 0, 0, 0]


def test_the_first_one_stays(any_store):
    any_store.write({"k": {"x": torch.zeros(1)}})
    any_store.flush()
    any_store.write({"k": {"x": torch.ones(1)}})
    any_store.flush()
    assert any_store.read("k")["x"].item() == 0


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([1.0, float("nan")]),
        torch.tensor([float("inf")]).bfloat16(),
        torch.tensor([float("-inf"), 0.0]).half(),
        torch.tensor([float("nan")]).to(torch.float8_e4m3fn),
        torch.tensor([complex(0, float("nan"))]),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_numbers_that_are_not_finite_are_refused(any_store, bad):
    with pytest.raises(NonFiniteEntry, match="pooled of the cache entry k2 has numbers that are not finite") as caught:
        any_store.write({"k1": {"x": torch.zeros(1)}, "k2": {"context": torch.zeros(1), "pooled": bad}})
    assert isinstance(caught.value, ValueError)
    assert (caught.value.key, caught.value.name) == ("k2", "pooled")
    assert any_store.missing(["k1", "k2"]) == ["k1", "k2"]


@pytest.mark.parametrize("name", ["", "a/b"])
def test_keys_that_can_not_be_stored(any_store, name):
    with pytest.raises(ValueError, match="cache key"):
        any_store.write({name: {"x": torch.zeros(1)}})


def test_entries_that_can_not_be_stored(any_store):
    with pytest.raises(ValueError, match="no tensors"):
        any_store.write({"k": {}})
    with pytest.raises(ValueError, match="complex128"):
        any_store.write({"k": {"x": torch.zeros(1, dtype=torch.complex128)}})


@pytest.mark.parametrize("flush", [False, True])
def test_rows_of_one_kind_lie_one_after_the_other(any_store, flush):
    put(any_store, range(5))
    if flush:
        any_store.flush()
    rows = any_store.read_rows([key(3), key(0), key(3), key(4)])
    for number, row in zip((3, 0, 3, 4), rows):
        same(row, entry(number))
    if flush:
        for name in ("context", "ids", "mask"):
            starts = [row[name].data_ptr() for row in rows]
            assert starts == [starts[0] + number * rows[0][name].nbytes for number in range(4)], name
    rows[0]["ids"].fill_(-1)
    same(rows[2], entry(3))
    same(any_store.read(key(3)), entry(3))


def test_rows_of_several_kinds(any_store):
    put(any_store, [0])
    put(any_store, [1], size=30)
    any_store.write({"k": {"x": torch.zeros(3), "empty": torch.zeros(0, 4), "scalar": torch.tensor(7)}})
    any_store.flush()
    first, second, third = any_store.read_rows([key(0), key(1), "k"])
    same(first, entry(0))
    same(second, entry(1, 30))
    assert third["scalar"].item() == 7
    (alone, again) = any_store.read_rows(["k", "k"])
    same(alone, again)
    assert alone["empty"].shape == (0, 4) and alone["scalar"].shape == ()
    assert any_store.read_rows([]) == []
    with pytest.raises(KeyError, match="has no entry nothing"):
        any_store.read_rows(["k", "nothing"])


def test_memory_is_taken_in_blocks_that_grow():
    memory = MemoryStore(block_bytes=1 << 20)
    for number in range(300):
        memory.write({key(number): {"x": torch.full((2000 + number,), number, dtype=torch.float32)}})
    memory.write({"large": {"x": torch.ones(1 << 19)}})
    assert len(memory._blocks) < 10
    assert all(memory.read(key(n))["x"].tolist() == [n] * (2000 + n) for n in range(300))
    assert memory.read("large")["x"].sum() == 1 << 19


def test_memory_is_pickled_once():
    memory = MemoryStore()
    for number in range(500):
        memory.write({key(number): {"x": torch.full((256,), float(number))}})
    pickled = pickle.dumps(memory)
    assert len(pickled) < 3 * 500 * 1024
    assert pickle.loads(pickled).read(key(77))["x"].tolist() == [77.0] * 256


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts file handles as Linux lists them")
def test_memory_takes_few_file_handles_to_reach_workers():
    memory = MemoryStore()
    for number in range(500):
        memory.write({key(number): {"x": torch.zeros(256)}})
    before = len(os.listdir("/proc/self/fd"))
    ForkingPickler.dumps(memory)
    assert len(os.listdir("/proc/self/fd")) < before + 20


# The files


def test_shards_open_with_the_formats_own_loader(tmp_path):
    with PackedStore(tmp_path, pending_bytes=2000, shard_bytes=20_000) as packed:
        put(packed, range(60))
    assert 2 < len(shards(tmp_path)) < 16  # some were merged
    found = {}
    for path in shards(tmp_path):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = file.get_tensor(name)
    assert len(found) == 180
    for number in range(60):
        same({name: found[f"{key(number)}/{name}"] for name in ("context", "ids", "mask")}, entry(number))


def checksums(directory):
    found = {}
    for path in shards(directory):
        with safe_open(path, "pt") as file:
            found |= {k: v for k, v in file.metadata().items() if k.startswith("crc32/")}
    return found


def test_every_entry_has_a_checksum_that_stays_with_it(tmp_path):
    packed = PackedStore(tmp_path, pending_bytes=1)
    put(packed, range(15))
    before = checksums(tmp_path)
    assert before.keys() == {f"crc32/{key(n)}" for n in range(15)}
    assert len(set(before.values())) == 15
    put(packed, [15])
    assert len(shards(tmp_path)) == 1
    after = checksums(tmp_path)
    assert before.items() <= after.items() and len(after) == 16


def test_the_checksum_is_of_the_entry_and_not_of_the_shard_around_it(tmp_path):
    for name, company in (("alone", []), ("crowd", range(1, 9))):
        with PackedStore(tmp_path / name) as packed:
            put(packed, company)
            tensors = entry(0)
            packed.write({key(0): tensors if company else dict(reversed(tensors.items()))})
    of = f"crc32/{key(0)}"
    assert checksums(tmp_path / "alone")[of] == checksums(tmp_path / "crowd")[of]
    others = {
        "key": {"other": entry(0)},
        "name": {key(0): {"renamed" if n == "ids" else n: t for n, t in entry(0).items()}},
        "shape": {key(0): {**entry(0), "ids": entry(0)["ids"].view(7, 1)}},
        "type": {key(0): {**entry(0), "context": entry(0)["context"].view(torch.float16)}},
        "bytes": {key(0): {**entry(0), "ids": entry(0)["ids"] + 1}},
    }
    for name, entries in others.items():
        with PackedStore(tmp_path / name) as packed:
            packed.write(entries)
        assert list(checksums(tmp_path / name).values()) != [checksums(tmp_path / "alone")[of]], name


def test_systems_without_vectored_reads(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    packed = PackedStore(tmp_path, pending_bytes=1)
    put(packed, range(3))
    assert present(packed, range(4)) == [0, 1, 2]


def test_a_read_that_stops_short_is_gone_on_with(tmp_path, monkeypatch):
    packed = PackedStore(tmp_path)
    put(packed, range(3))
    packed.flush()
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, begin: read(file, [buffers[0][:1]], begin))
    assert present(packed, range(4)) == [0, 1, 2]


def test_shards_appear_only_when_there_is_enough(tmp_path):
    packed = PackedStore(tmp_path / "cache", pending_bytes=10_000)
    assert not (tmp_path / "cache").exists()
    put(packed, range(10))
    assert shards(tmp_path / "cache") == []
    assert present(packed, range(11)) == list(range(10))
    assert present(PackedStore(tmp_path / "cache"), range(11)) == []
    put(packed, range(10, 24))
    assert len(shards(tmp_path / "cache")) == 1
    packed.flush()
    packed.flush()
    assert len(shards(tmp_path / "cache")) == 2
    assert present(PackedStore(tmp_path / "cache"), range(30)) == list(range(24))


def test_a_slow_writer_does_not_wait_for_a_full_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_MOST_PENDING_SECONDS", 0.05)
    packed = PackedStore(tmp_path)
    put(packed, [0])
    assert shards(tmp_path) == []
    time.sleep(0.06)
    put(packed, [1])
    assert present(PackedStore(tmp_path), range(3)) == [0, 1]


def test_small_shards_are_merged(tmp_path):
    reader = PackedStore(tmp_path)
    packed = PackedStore(tmp_path, pending_bytes=1, shard_bytes=6_000)
    put(packed, range(10))
    assert present(reader, range(20)) == list(range(10))  # the reader now has the small shards open
    put(packed, range(10, 80))
    sizes = [path.stat().st_size for path in shards(tmp_path)]
    assert len(sizes) < 40
    assert max(sizes) < 8_000
    assert present(reader, range(90)) == list(range(80))
    assert present(PackedStore(tmp_path), range(90)) == list(range(80))


def test_a_merged_shard_replaces_its_sources(tmp_path):
    packed = PackedStore(tmp_path, pending_bytes=1)
    put(packed, range(15))
    before = shards(tmp_path)
    assert len(before) == 15
    put(packed, [15])
    assert len(shards(tmp_path)) == 1
    assert shards(tmp_path)[0] not in before


def test_merging_keeps_one_copy_of_an_entry(tmp_path):
    large = PackedStore(tmp_path, shard_bytes=100_000)
    put(large, range(80))
    large.flush()
    others = [PackedStore(tmp_path, shard_bytes=100_000) for _ in range(16)]
    for number, other in enumerate(others):
        put(other, [number, 100 + number])  # as writers do that looked before the large one was there
    for other in others:
        other.flush()
    assert len(shards(tmp_path)) == 2
    held = [name for path in shards(tmp_path) for name in safe_open(path, "pt").keys()]  # noqa: SIM118
    assert len(held) == len(set(held)) == 3 * 96
    assert present(PackedStore(tmp_path), range(120)) == [*range(80), *range(100, 116)]


def test_nothing_is_made_for_what_nobody_asks_for(tmp_path):
    with PackedStore(tmp_path / "masks") as packed:
        assert packed.missing([]) == []
        packed.flush()
    assert not (tmp_path / "masks").exists()


def test_only_a_few_shards_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "_MOST_OPEN", 3)
    packed = PackedStore(tmp_path, pending_bytes=1)
    put(packed, range(12))
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(2):
        assert present(packed, range(12)) == list(range(12))
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_many_keys_are_looked_up_at_once(tmp_path):
    packed = PackedStore(tmp_path)
    put(packed, range(50))
    packed.flush()
    start = time.process_time()
    assert len(packed.missing(key(number) for number in range(100_000))) == 99_950
    assert time.process_time() - start < 30


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    foreign = tmp_path / f"{uuid.uuid4().hex}.safetensors"
    header = json.dumps({f"{key(1)}/x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    foreign.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    packed = PackedStore(tmp_path, pending_bytes=1)
    put(packed, range(2, 40))
    assert present(packed, range(50)) == list(range(2, 40))
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    assert foreign.exists()


# Damage


@pytest.mark.parametrize("damage", ["removed", "truncated", "emptied", "longer"])
def test_a_damaged_shard_is_missing_and_written_again(tmp_path, damage):
    packed = PackedStore(tmp_path, pending_bytes=1)
    put(packed, range(3))
    path = next(p for p in shards(tmp_path) if key(1) in p.read_bytes().decode("latin-1"))
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "emptied":
        os.truncate(path, 0)
    else:
        path.write_bytes(path.read_bytes() + b"\0")
    fresh = PackedStore(tmp_path, pending_bytes=1)
    with pytest.raises(KeyError, match=f"lost the entry {key(1)}: its shard {path.name} is gone or damaged"):
        fresh.read(key(1))
    assert fresh.missing(map(key, range(3))) == [key(1)]
    with pytest.raises(KeyError, match=f"has no entry {key(1)}"):
        fresh.read(key(1))
    put(fresh, range(3))
    assert present(fresh, range(3)) == [0, 1, 2]
    assert present(PackedStore(tmp_path), range(3)) == [0, 1, 2]


def test_a_second_copy_is_used_when_the_first_is_lost(tmp_path):
    first, second = PackedStore(tmp_path), PackedStore(tmp_path)
    put(first, range(3))
    put(second, range(1, 4))
    first.flush()
    (path,) = shards(tmp_path)
    second.flush()
    path.unlink()
    assert present(PackedStore(tmp_path), range(5)) == [1, 2, 3]


def test_shards_of_another_format_are_left_out_with_one_line(tmp_path, caplog):
    with PackedStore(tmp_path) as packed:
        put(packed, range(3))
    (path,) = shards(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"atelier.tensor_store":"2"', b'"atelier.tensor_store":"1"'))
    (tmp_path / INDEX_NAME).unlink()
    packed = PackedStore(tmp_path)
    for _ in range(2):
        assert present(packed, range(3)) == []
    assert [record.message for record in caplog.records] == [
        f"cache: in {tmp_path}, {path.name} is a shard of format 1, not 2; it is left out and can be deleted"
    ]


def test_a_header_without_its_checksums_is_damage(tmp_path, caplog):
    with PackedStore(tmp_path) as packed:
        put(packed, range(3))
    (path,) = shards(tmp_path)
    path.write_bytes(path.read_bytes().replace(f"crc32/{key(1)}".encode(), f"crc32/{key(9)}".encode()))
    (tmp_path / INDEX_NAME).unlink()
    assert present(PackedStore(tmp_path), range(10)) == []
    assert "damaged safetensors header" in caplog.text


def test_a_missing_index_is_rebuilt(tmp_path):
    with PackedStore(tmp_path, pending_bytes=3000) as packed:
        put(packed, range(30))
    (tmp_path / INDEX_NAME).unlink()
    assert present(PackedStore(tmp_path), range(31)) == list(range(30))


def test_rebuild_index(tmp_path):
    packed = PackedStore(tmp_path, pending_bytes=3000)
    put(packed, range(30))
    packed.flush()
    database = sqlite3.connect(tmp_path / INDEX_NAME)
    database.execute("DELETE FROM entries WHERE key < ?", (key(10),))
    database.commit()
    database.close()
    assert present(packed, range(30)) == list(range(10, 30))
    packed.rebuild_index()
    assert present(packed, range(30)) == list(range(30))


def test_an_index_that_is_deleted_while_a_store_is_closed(tmp_path):
    packed = PackedStore(tmp_path, pending_bytes=1)
    packed.write({"a": {"x": torch.zeros(3), "y": torch.ones(2)}})
    packed.write({"b": {"z": torch.full((4,), 2)}})
    assert packed.read("a")["y"].tolist() == [1, 1] and packed.read("b")["z"].tolist() == [2] * 4
    packed.close()
    (tmp_path / INDEX_NAME).unlink()
    with PackedStore(tmp_path, pending_bytes=1) as other:
        other.write({"c": {"w": torch.zeros(9, 9)}})  # kinds of entries get other numbers in the new index
        assert sorted(other.missing("abcd")) == ["d"]
    assert packed.read("a")["y"].tolist() == [1, 1] and packed.read("b")["z"].tolist() == [2] * 4


def test_a_damaged_index_says_what_to_do(tmp_path):
    with PackedStore(tmp_path) as packed:
        put(packed, range(3))
    (tmp_path / INDEX_NAME).write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(ConfigError, match=r"index\.sqlite is damaged .* Delete this one file"):
        PackedStore(tmp_path).missing([key(1)])
    (tmp_path / INDEX_NAME).unlink()
    assert present(PackedStore(tmp_path), range(4)) == [0, 1, 2]


def test_an_index_of_another_version_is_refused(tmp_path):
    with PackedStore(tmp_path) as packed:
        put(packed, range(3))
    database = sqlite3.connect(tmp_path / INDEX_NAME)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConfigError, match=r"another version \(99; this one reads 2\)"):
        PackedStore(tmp_path).read(key(1))


def test_unfinished_files_of_killed_writers_go_after_an_hour(tmp_path):
    old, new = (tmp_path / f".{uuid.uuid4().hex}.safetensors.{uuid.uuid4().hex}.partial" for _ in range(2))
    other = tmp_path / ".model.safetensors.abc.partial"
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    PackedStore(tmp_path).missing([key(0)])
    assert [path.exists() for path in (old, new, other)] == [False, True, True]


def write_on_a_full_disk(directory):
    torch.set_num_threads(1)  # threads of the parent do not live here
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    packed = PackedStore(directory)
    try:
        with packed:
            packed.write({"large": {"x": torch.zeros(200_000)}})
    except ConfigError as error:
        assert "can't be written" in str(error)
        assert "--cache_dir" in str(error)
        assert "\n" not in str(error)
        put(packed, [3])
        packed.close()
        os._exit(0)
    os._exit(1)


def test_a_full_disk_is_one_clear_line_and_the_store_stays(tmp_path):
    with PackedStore(tmp_path) as packed:
        put(packed, range(3))
    assert in_child(write_on_a_full_disk, tmp_path) == 0
    assert present(packed, range(5)) == [0, 1, 2, 3]
    assert packed.missing(["large"]) == ["large"]
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("where", ["writing", "syncing", "renaming"])
def test_no_space_left_is_one_clear_line_and_nothing_is_lost(tmp_path, monkeypatch, where):
    packed = PackedStore(tmp_path, pending_bytes=1)
    put(packed, range(3))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        if where == "writing":
            broken.setattr(shard_files, "open", lambda path, mode: FullFile(path), raising=False)
        else:
            broken.setattr(os, "fsync" if where == "syncing" else "replace", full)
        with pytest.raises(ConfigError) as caught:
            put(packed, [3])
        message = f"the cache can't be written in {tmp_path}: No space left on device. Free some space, or name another"
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
        assert str(caught.value).endswith("with --cache_dir; what was encoded so far is kept")
        packed.close()  # as the run ends: nothing is left to write, so this doesn't hide the reason
    assert present(packed, range(5)) == [0, 1, 2]
    assert [path.name for path in tmp_path.glob(".*")] == []
    put(packed, [3])
    assert present(PackedStore(tmp_path), range(5)) == [0, 1, 2, 3]


class FullFile(contextlib.nullcontext):
    """A file on a disk that is full after a few bytes."""

    def __enter__(self):
        return self

    def write(self, data):
        self.enter_result.write_bytes(bytes(data)[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_merging_is_a_warning(tmp_path, monkeypatch, caplog):
    packed = PackedStore(tmp_path, pending_bytes=1)
    put(packed, range(15))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_index, "copy_entries", full)
    put(packed, [15])
    assert "small shards were not merged" in caplog.text and "No space left on device" in caplog.text
    assert present(PackedStore(tmp_path), range(17)) == list(range(16))
    monkeypatch.undo()
    put(packed, [16])
    assert len(shards(tmp_path)) == 1
    assert present(PackedStore(tmp_path), range(18)) == list(range(17))


# Death


def write_until_killed(directory, begin, started):
    started.set()
    packed = PackedStore(directory, pending_bytes=1500, shard_bytes=12_000)
    for number in range(begin, begin + 100_000):
        packed.write({key(number): entry(number)})


def test_a_writer_killed_at_any_moment_leaves_a_readable_store(tmp_path):
    moment = random.Random(0)
    done = 0
    for _ in range(25):
        started = FORK.Event()
        process = FORK.Process(target=write_until_killed, args=(tmp_path, done, started))
        process.start()
        started.wait()
        time.sleep(moment.uniform(0.0, 0.1))
        process.kill()
        process.join()
        found = present(PackedStore(tmp_path), range(done + 400))
        assert found == list(range(len(found)))  # in order and without holes
        assert len(found) >= done  # nothing is lost again
        done = len(found)
    assert done > 20
    (tmp_path / INDEX_NAME).unlink()
    assert present(PackedStore(tmp_path), range(done + 1)) == list(range(done))


def die_at(point, directory, begin):
    """Writes entries and dies at the named moment of the 16th shard, when the small ones are merged."""
    packed = PackedStore(directory, pending_bytes=1)
    put(packed, range(begin, begin + 15))

    def then_die(function):
        def dying(*arguments):
            function(*arguments)
            os._exit(7)

        return dying

    if point == "shard written, not in the index":
        store.write_entries = then_die(store.write_entries)
    elif point == "in the index, not committed":
        shard_index.ShardIndex._register = then_die(shard_index.ShardIndex._register)
    elif point == "merged, not in the index":
        shard_index.copy_entries = then_die(shard_index.copy_entries)
    else:
        shard_files.LocalShards.remove = lambda self, name: os._exit(7)
    put(packed, [begin + 15])
    os._exit(0)


@pytest.mark.parametrize(
    "point",
    [
        "shard written, not in the index",
        "in the index, not committed",
        "merged, not in the index",
        "merged, sources not removed",
    ],
)
def test_dying_between_the_steps(tmp_path, point):
    assert in_child(die_at, point, tmp_path, 0) == 7
    packed = PackedStore(tmp_path, pending_bytes=1)
    assert present(packed, range(40)) == list(range(16))  # a complete shard is found again
    put(packed, range(16, 40))
    assert present(packed, range(40)) == list(range(40))
    assert len(shards(tmp_path)) < 16
    held = sum(path.stat().st_size for path in shards(tmp_path))
    assert held < 40 * 1100  # nothing is kept twice


# Several processes


def check_reading(target, numbers, times=3):
    assert [number for number in numbers if key(number) not in target.missing(map(key, numbers))] == list(numbers)
    for _ in range(times):
        for number in numbers:
            same(target.read(key(number)), entry(number))


def check_all(stores):
    for target in stores:
        check_reading(target, range(20), 30)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_in_other_processes(tmp_path, method):
    stores = [MemoryStore(), PackedStore(tmp_path)]
    for target in stores:
        put(target, range(20))
        target.flush()
        present(target, range(20))  # so that files are open when the process forks
    context = multiprocessing.get_context(method)
    readers = [context.Process(target=check_all, args=(stores,)) for _ in range(2 if method == "fork" else 1)]
    for process in readers:
        process.start()
    check_all(stores)  # at the same time: an inherited file would share its position
    for process in readers:
        process.join(60)
        assert process.exitcode == 0


def test_pickling_flushes(tmp_path):
    packed = PackedStore(tmp_path)
    put(packed, range(3))
    copy = pickle.loads(pickle.dumps(packed))
    assert present(copy, range(4)) == [0, 1, 2]


def child_that_exits_at_once(packed):
    packed.close()


def test_a_forked_child_leaves_its_parents_entries_alone(tmp_path):
    packed = PackedStore(tmp_path)
    put(packed, range(3))
    assert in_child(child_that_exits_at_once, packed) == 0
    assert shards(tmp_path) == []
    packed.flush()
    assert present(PackedStore(tmp_path), range(4)) == [0, 1, 2]


def write_range(directory, numbers, seed):
    numbers = list(numbers)
    random.Random(seed).shuffle(numbers)
    with PackedStore(directory, pending_bytes=3000, shard_bytes=30_000) as packed:
        put(packed, numbers)


def test_two_writers_and_a_reader_at_once(tmp_path):
    writers = [
        FORK.Process(target=write_range, args=(tmp_path, range(0, 200), 1)),
        FORK.Process(target=write_range, args=(tmp_path, range(100, 300), 2)),
    ]
    reader = PackedStore(tmp_path)
    for process in writers:
        process.start()
    rounds, last = 0, 0
    while any(process.is_alive() for process in writers):
        found = present(reader, range(300))
        assert len(found) >= last
        rounds, last = rounds + 1, len(found)
    for process in writers:
        process.join()
        assert process.exitcode == 0
    assert rounds > 0
    assert present(reader, range(310)) == list(range(300))


def test_threads_may_share_a_store(tmp_path):
    packed = PackedStore(tmp_path, pending_bytes=1500, shard_bytes=12_000)
    put(packed, range(50))
    problems = []

    def read_all(seed):
        numbers = list(range(50))
        random.Random(seed).shuffle(numbers)
        try:
            check_reading(packed, numbers)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    put(packed, range(50, 100))
    for thread in threads:
        thread.join()
    assert problems == []
    assert present(packed, range(110)) == list(range(100))
