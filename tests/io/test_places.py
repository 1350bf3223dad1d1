import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from library.io import places
from library.io.places import exists, join, list_files, open_range, read_bytes, remove, start_method, write_bytes
from library.io.remote import s3_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["local", "memory", "file", "s3"])
def folder(request, tmp_path):
    """An empty folder of each kind of place."""
    if request.param == "s3":
        return request.getfixturevalue("s3_bucket") + "/some/folder"
    return {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}/some"}[
        request.param
    ]


NAMES = ("b.txt", "a.jpg", "sub/c.jpg", "sub/deeper/ü d.jpg", ".hidden", "sub/._c.jpg", ".thumbs/a.jpg")


def fill(folder):
    for name in NAMES:
        write_bytes(join(folder, name), name.encode())


def names(entries):
    return [entry.name for entry in entries]


def test_files_are_listed_by_name_without_hidden_ones(folder):
    fill(folder)
    assert names(list_files(folder, recursive=False)) == ["a.jpg", "b.txt"]
    for same in (folder, f"{folder}/"):
        entries = list_files(same, recursive=True)
        assert names(entries) == ["a.jpg", "b.txt", "sub/c.jpg", "sub/deeper/ü d.jpg"]
        assert [entry.path for entry in entries] == [join(folder, entry.name) for entry in entries]
        assert [entry.bytes for entry in entries] == [len(entry.name.encode()) for entry in entries]


def test_what_is_written_can_be_read_in_parts_and_removed(folder):
    path = join(folder, "new/file.bin")
    assert not exists(path) and not exists(join(folder, "new"))
    write_bytes(path, b"first")
    write_bytes(path, b"0123456789")
    assert exists(path) and exists(join(folder, "new"))
    assert read_bytes(path) == b"0123456789"
    assert open_range(path, 3, 4) == b"3456"
    assert open_range(path, 10, 0) == b""
    for begin in (8, 20):
        with pytest.raises(OSError) as caught:
            open_range(path, begin, 4)
        assert caught.value.strerror in (
            f"the file ends before byte {begin + 4}",
            "The requested range is not satisfiable (InvalidRange)",
        )
    remove(path)
    remove(path)
    assert not exists(path)
    with pytest.raises(FileNotFoundError) as missing:
        read_bytes(path)
    assert missing.value.strerror in ("no such file", "No such file or directory")


def test_the_version_changes_with_the_file(folder):
    path = join(folder, "a.jpg")
    write_bytes(path, b"one")
    (first,) = list_files(folder, recursive=False)
    assert list_files(folder, recursive=False) == [first]
    time.sleep(0.02)
    write_bytes(path, b"two")
    (second,) = list_files(folder, recursive=False)
    assert first.version != second.version and first.version and second.version


def test_a_local_version_is_the_time_of_the_last_change(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    os.utime(tmp_path / "a", ns=(1, 1234567890123456789))
    assert list_files(str(tmp_path), recursive=False) == [
        places.FileEntry(str(tmp_path / "a"), "a", 1, 1234567890123456789)
    ]


def test_a_relative_folder_gives_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill("cats")
    entries = list_files("cats", recursive=True)
    assert [entry.path for entry in entries][-2:] == [os.path.join("cats", "sub", "c.jpg"), join("cats", NAMES[3])]


def test_links_are_followed_and_loops_end(tmp_path):
    fill(str(tmp_path / "cats"))
    os.symlink(tmp_path / "cats", tmp_path / "cats" / "sub" / "again")
    os.symlink(tmp_path / "cats" / "a.jpg", tmp_path / "cats" / "link.jpg")
    os.symlink(tmp_path / "nowhere", tmp_path / "cats" / "z.jpg")
    entries = {entry.name: entry for entry in list_files(str(tmp_path / "cats"), recursive=True)}
    assert sorted(entries) == ["a.jpg", "b.txt", "link.jpg", "sub/c.jpg", "sub/deeper/ü d.jpg", "z.jpg"]
    assert entries["link.jpg"].bytes == len("a.jpg")
    assert entries["z.jpg"][2:] == (0, "")
    with pytest.raises(FileNotFoundError):
        read_bytes(entries["z.jpg"].path)


def test_what_is_wrong_is_said_in_one_line(tmp_path, s3_bucket):
    expected = {
        str(tmp_path / "gone"): "No such file or directory",
        "s3://no-such-bucket/folder": "no such bucket",
        "gs://bucket/folder": "gs:// needs another package: Please install gcsfs to access Google Storage",
        "xyz://bucket/folder": "nothing is known about addresses with xyz://",
    }
    if find_spec("gcsfs") is not None:
        del expected["gs://bucket/folder"]
    for path, reason in expected.items():
        for recursive in (True, False):
            with pytest.raises(OSError) as caught:
                list_files(path, recursive=recursive)
            assert caught.value.strerror == reason, path
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        list_files(str(tmp_path / "file"), recursive=False)
    assert not exists("s3://no-such-bucket/file")
    with pytest.raises(FileNotFoundError):
        write_bytes("s3://no-such-bucket/file", b"x")


def test_a_storage_that_refuses_or_is_away_is_named(s3_bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(OSError, match="Missing") as caught:
        list_files("s3://only-a-secret-key", recursive=False)
    assert "\n" not in str(caught.value) and "AccessKeyId" in caught.value.strerror
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError) as away:
        list_files("s3://far-away", recursive=False)
    assert away.value.strerror == "no answer from http://127.0.0.1:9"


def test_a_missing_package_is_named(s3_bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(OSError) as caught:
        list_files("s3://another", recursive=False)
    assert caught.value.strerror == "s3:// needs the package obstore: pip install obstore"


def test_a_plain_http_endpoint_needs_no_switch(s3_bucket, monkeypatch):
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    write_bytes(f"{s3_bucket}/a", b"x")
    assert s3_settings({"AWS_ENDPOINT_URL": "http://here:1"})["client_options"]["allow_http"] is True
    assert "allow_http" not in s3_settings({"AWS_ENDPOINT_URL": "https://here:1"})["client_options"]


def test_the_profile_of_the_aws_tools_is_used_without_keys_in_the_environment(tmp_path):
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = d\naws_secret_access_key = ds\n[mine]\naws_access_key_id = m\n"
    )
    (tmp_path / "config").write_text(
        "[profile mine]\nregion = eu-west-1\nendpoint_url = http://here:1\noutput = json\n"
    )
    files = {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }
    settings = s3_settings(files)
    assert settings["aws_access_key_id"] == "d" and settings["aws_secret_access_key"] == "ds"
    settings = s3_settings({**files, "AWS_PROFILE": "mine"})
    assert (settings["aws_access_key_id"], settings["aws_region"]) == ("m", "eu-west-1")
    assert settings["aws_endpoint"] == "http://here:1" and settings["client_options"]["allow_http"] is True
    assert "aws_region" not in s3_settings({**files, "AWS_PROFILE": "mine", "AWS_REGION": "us-east-2"})
    assert "aws_access_key_id" not in s3_settings({**files, "AWS_ACCESS_KEY_ID": "e"})
    (tmp_path / "config").write_text("no section")
    with pytest.raises(OSError, match="config, line 1: not of the form"):
        s3_settings(files)


def test_threads_share_a_bucket(s3_bucket):
    for number in range(4):
        write_bytes(f"{s3_bucket}/{number}", b"%d" % number)
    with ThreadPoolExecutor(16) as pool:
        read = list(pool.map(lambda number: read_bytes(f"{s3_bucket}/{number % 4}"), range(200)))
    assert read == [b"%d" % (number % 4) for number in range(200)]


def test_spawned_processes_read_buckets_and_forked_ones_say_that_they_cannot(s3_bucket):
    assert start_method() is None
    write_bytes(f"{s3_bucket}/a", b"x")
    assert start_method() == "spawn"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(read_bytes, (f"{s3_bucket}/a",)).get(timeout=60) == b"x"
    if "fork" not in multiprocessing.get_all_start_methods():
        return
    with multiprocessing.get_context("fork").Pool(1) as pool:
        with pytest.raises(OSError, match="forked") as caught:
            pool.apply_async(read_bytes, (f"{s3_bucket}/a",)).get(timeout=60)
        assert caught.value.strerror.endswith("start it by spawn instead")
        assert pool.apply_async(exists, (str(ROOT),)).get(timeout=60) is True


def test_a_process_without_buckets_may_fork():
    code = (
        "from library.io import places\n"
        "places.write_bytes('memory://m/a', b'x')\n"
        "assert places.read_bytes('memory://m/a') == b'x' and places.start_method() is None\n"
        "import sys; assert 'obstore' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
