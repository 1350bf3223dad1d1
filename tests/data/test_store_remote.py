"""The store in a bucket of an S3 server that runs here."""

import multiprocessing
import threading
import uuid

import pytest
import torch

from library.config.errors import ConfigError
from library.data import shard_files, store
from library.data.shard_files import shard_files as files_at
from library.data.shard_index import INDEX_NAME, index_folder
from library.data.store import PackedStore
from library.data.store_care import StoreCare
from library.io import places
from tests.data.store_fixtures import entry, key, present, put, same

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def url(s3_bucket):
    return f"{s3_bucket}/cache/latents"


@pytest.fixture
def here(url, tmp_path):
    """The store as this machine has it."""
    return PackedStore(url, tmp_path / "here", pending_bytes=1)


@pytest.fixture
def there(url, tmp_path):
    """The same store on another machine, whose index is its own."""
    return PackedStore(url, tmp_path / "there", pending_bytes=1)


def objects(url):
    return files_at(url).sizes()


def test_entries_come_back(here, url, tmp_path):
    put(here, range(3))
    assert len(objects(url)) == 3
    assert present(here, range(5)) == [0, 1, 2]
    here.close()
    assert present(PackedStore(url, tmp_path / "here"), range(5)) == [0, 1, 2]
    assert {path.name for path in tmp_path.rglob("*.*")} == {INDEX_NAME}, "shards are in the bucket alone"


def test_another_machine_finds_the_entries(here, there):
    put(here, range(3))
    assert present(there, range(5)) == [0, 1, 2]
    put(here, [3])
    same(there.read(key(3)), entry(3))  # also without asking what is missing
    with pytest.raises(KeyError, match="has no entry"):
        there.read(key(4))


def test_an_entry_is_one_request(here, url, monkeypatch):
    here.write({key(n): {"clip": torch.ones(7, 3), "pooled": torch.ones(3), "t5": torch.ones(5, 3)} for n in range(9)})
    requests = []
    monkeypatch.setattr(places, "open_range", lambda *range: requests.append(range) or open_range(*range))
    assert here.read(key(5))["t5"].tolist() == [[1, 1, 1]] * 5
    assert [length for _, _, length in requests] == [4 * (21 + 3 + 15)]
    (name,) = objects(url)
    assert requests[0][0] == f"{url}/{name}"


open_range = places.open_range


def test_the_index_of_every_place_is_apart(tmp_path):
    folders = {
        index_folder(url, tmp_path) for url in ("s3://one/a", "s3://one/b", "s3://one-a", "s3://one.a", "gs://one/a")
    }
    assert len(folders) == 5 and all(folder.parent == tmp_path for folder in folders)
    assert index_folder("s3://one/a", tmp_path).name.startswith("s3-one-a-")
    with pytest.raises(ValueError, match="the store at s3://one/a needs a folder on this machine for its index"):
        PackedStore("s3://one/a")


def test_objects_are_never_merged_nor_removed(here, there, url):
    put(here, range(40))
    before = objects(url)
    assert len(before) == 40
    put(there, range(40))  # nothing was missing: a run would not do it
    assert present(here, range(41)) == present(there, range(41)) == list(range(40))
    assert before.items() <= objects(url).items() and len(objects(url)) == 80


def test_more_is_gathered_before_an_object_is_made(url, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_REMOTE_PENDING_BYTES", 5000)
    packed = PackedStore(url, tmp_path)
    put(packed, range(8))
    assert objects(url) == {}
    put(packed, range(8, 12))
    assert len(objects(url)) == 1
    packed.flush()
    assert len(objects(url)) == 2
    assert present(PackedStore(url, tmp_path / "there"), range(20)) == list(range(12))


@pytest.mark.parametrize("first", [64, 1 << 18])
def test_headers_of_every_length_are_read(here, there, url, monkeypatch, first):
    monkeypatch.setattr(shard_files, "_FIRST_READ", first)
    here.write({key(n): entry(n) for n in range(300)})
    put(here, [300])
    assert len(objects(url)) == 2
    assert present(there, range(302)) == list(range(301))


def test_a_vanished_object_is_missing_and_written_again(here, there, url):
    put(here, range(3))
    assert present(there, range(3)) == [0, 1, 2]
    for name in objects(url):
        places.remove(f"{url}/{name}")
    with pytest.raises(KeyError, match=f"lost the entry {key(1)}"):
        there.read(key(1))
    assert here.missing(map(key, range(3))) == [key(0), key(1), key(2)]
    put(here, range(3))
    assert present(there, range(3)) == present(here, range(3)) == [0, 1, 2]


def test_what_two_machines_wrote_survives_the_loss_of_one_copy(here, there, url):
    put(here, range(3))
    first = objects(url)
    put(there, range(3))
    assert present(here, range(3)) == present(there, range(3)) == [0, 1, 2]
    for name in first:
        places.remove(f"{url}/{name}")
    assert present(here, range(3)) == present(there, range(3)) == [0, 1, 2]
    same(here.read(key(0)), entry(0))


def test_an_object_that_is_not_complete_is_not_there_yet(here, there, url, caplog):
    put(here, [0])
    (name,) = objects(url)
    whole = places.read_bytes(f"{url}/{name}")
    arriving = f"{url}/{uuid.uuid4().hex}.safetensors"
    places.remove(f"{url}/{name}")
    places.write_bytes(arriving, whole[:-1])  # as a storage shows it that isn't S3
    for _ in range(3):
        assert there.missing([key(0)]) == [key(0)]
    assert [record.message for record in caplog.records if "truncated" in record.message] != []
    assert len([record for record in caplog.records if "truncated" in record.message]) == 1
    places.write_bytes(arriving, whole)
    assert present(there, [0]) == [0]


def test_other_peoples_objects_are_left_alone(here, url):
    places.write_bytes(f"{url}/model.safetensors", b"mine")
    put(here, range(3))
    assert present(here, range(4)) == [0, 1, 2]
    assert places.read_bytes(f"{url}/model.safetensors") == b"mine"


def write_from_another_machine(url, folder, numbers):
    with PackedStore(url, folder, pending_bytes=3000) as packed:
        put(packed, numbers)
        assert present(packed, numbers) == list(numbers)


def test_two_writers_on_two_machines(url, tmp_path, s3_environment):
    writers = [
        SPAWN.Process(target=write_from_another_machine, args=(url, tmp_path / str(number), numbers))
        for number, numbers in enumerate((range(0, 60), range(40, 100)))
    ]
    for process in writers:
        process.start()
    for process in writers:
        process.join(120)
        assert process.exitcode == 0
    assert present(PackedStore(url, tmp_path / "third"), range(110)) == list(range(100))


def write_and_die(url, folder):
    packed = PackedStore(url, folder, pending_bytes=1)
    put(packed, range(3))
    store.write_entries = die_afterwards(store.write_entries)
    put(packed, [3])


def die_afterwards(function):
    def dying(*arguments):
        import os

        function(*arguments)
        os._exit(7)

    return dying


def test_a_killed_writer_leaves_a_readable_store(url, tmp_path, s3_environment):
    writer = SPAWN.Process(target=write_and_die, args=(url, tmp_path / "died"))
    writer.start()
    writer.join(120)
    assert writer.exitcode == 7
    assert present(PackedStore(url, tmp_path / "died"), range(5)) == [0, 1, 2, 3]
    assert present(PackedStore(url, tmp_path / "there"), range(5)) == [0, 1, 2, 3]


def test_threads_may_share_a_store(here):
    put(here, range(20))
    problems = []

    def read_all():
        try:
            assert present(here, range(20)) == list(range(20))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_a_bucket_that_is_not_there_is_one_line(s3_environment, tmp_path):
    packed = PackedStore("s3://no-such-bucket/cache", tmp_path)
    with pytest.raises(
        ConfigError, match=r"the cache in s3://no-such-bucket/cache can't be used: no such bucket\."
    ) as e:
        packed.missing([key(0)])
    assert "--cache_dir" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(
        ConfigError, match="the cache can't be written in s3://no-such-bucket/cache: no such bucket"
    ) as e:
        put(packed, [0])
        packed.flush()
    assert "\n" not in str(e.value)
    packed.close()


def test_damage_is_found_and_removed(here, there, url, tmp_path):
    put(here, range(6), size=500)
    care = StoreCare(url)
    assert list(care.damages(lambda done: None)) == []
    hurt = next(name for name in objects(url) if key(2) in places.read_bytes(f"{url}/{name}").decode("latin-1"))
    data = bytearray(places.read_bytes(f"{url}/{hurt}"))
    data[-1] ^= 1
    places.write_bytes(f"{url}/{hurt}", bytes(data))
    damages = list(care.damages(lambda done: None))
    assert [(damage.shard, damage.key) for damage in damages] == [(hurt, key(2))]
    care.remove_damage(damages, lambda done: None)
    assert list(care.damages(lambda done: None)) == []
    assert there.missing(map(key, range(6))) == here.missing(map(key, range(6))) == [key(2)]


def test_what_is_not_wanted_goes_and_the_rest_stays_readable_elsewhere(here, there, url, tmp_path):
    here.write({key(n): entry(n) for n in range(10)})
    put(here, [10])
    assert present(there, range(12)) == list(range(11))
    care = StoreCare(url)
    wanted = {key(n) for n in range(0, 10, 2)}
    spares = care.spares(wanted, lambda done: None)
    assert sum(spare.entries for spare in spares) == 6
    care.remove_spares(spares, lambda done: None, str(tmp_path / "here"))
    assert len(objects(url)) == 1
    same(there.read(key(4)), entry(4))  # its index still names the object that is gone
    for machine in (here, there):
        assert present(machine, range(12)) == [0, 2, 4, 6, 8]
    assert care.contents(lambda done: None)[0] == 5


@pytest.mark.parametrize("scheme", ["memory", "local"])
def test_other_storages(scheme, tmp_path):
    url = f"memory://{uuid.uuid4().hex}/cache" if scheme == "memory" else f"local://{tmp_path}/far/cache"
    packed = PackedStore(url, tmp_path / "here", pending_bytes=1)
    assert packed.missing([key(0)]) == [key(0)]
    put(packed, range(3))
    assert present(PackedStore(url, tmp_path / "there"), range(4)) == [0, 1, 2]
