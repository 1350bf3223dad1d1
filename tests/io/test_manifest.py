import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.io.manifest import MANIFEST, find_damage, looks_whole, read_manifest, write_manifest

FILES = {"state.json": b'{"step": 3}', "a b.bin": bytes(range(256)), "sharded/0.distcp": b"shard", "empty": b""}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path)
    return tmp_path


def test_every_file_is_listed_with_its_size(folder):
    assert read_manifest(folder) == {name: len(content) for name, content in FILES.items()}
    assert find_damage(folder) is None and looks_whole(folder)
    write_manifest(folder)  # an old list isn't a file of its own
    assert MANIFEST not in read_manifest(folder)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), change=st.integers(1, 255))
def test_any_other_byte_is_found_and_its_file_named(folder, data, change):
    name = data.draw(st.sampled_from([MANIFEST, *(name for name in FILES if FILES[name])]))
    path = folder / name
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
    try:
        assert find_damage(folder) == name
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_a_file_that_is_missing_or_of_another_length_is_named(folder, name):
    content = (folder / name).read_bytes()
    for other in (None, content[:-1] if content else b"x", content + b"\n"):
        (folder / name).unlink(missing_ok=True)
        if other is not None:
            (folder / name).write_bytes(other)
        assert find_damage(folder) == name
        assert not looks_whole(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}, "checksum": ""}', "[" * 100_000])
def test_a_list_that_is_none_is_damaged(folder, text):
    (folder / MANIFEST).write_text(text)
    assert find_damage(folder) == MANIFEST and read_manifest(folder) is None


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b", "..\\b", "c:x"])
def test_a_list_never_leads_out_of_its_folder(folder, name):
    from library.io import manifest

    listed = json.loads((folder / MANIFEST).read_text())["files"] | {name: {"size": 1, "blake2b": "0"}}
    (folder / MANIFEST).write_text(manifest._spelled(listed))
    assert find_damage(folder) == MANIFEST


def test_a_list_of_any_length_takes_bounded_memory(folder):
    with open(folder / MANIFEST, "r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no room
    assert find_damage(folder) == MANIFEST


def test_files_are_read_in_blocks_and_once(folder, monkeypatch):
    from library.io import manifest

    monkeypatch.setattr(manifest, "_BLOCK", 100)
    opened, before = [], open
    monkeypatch.setattr(manifest, "open", lambda path, mode: opened.append(path) or before(path, mode), raising=False)
    assert find_damage(folder) is None
    assert sorted(os.path.relpath(path, folder) for path in opened) == sorted(FILES)
