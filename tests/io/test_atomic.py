import os

import pytest

from library.io.atomic import atomic_folder, atomic_path, write_text


def test_the_file_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "model.safetensors"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        assert temporary.parent == target.parent
        assert not target.exists()
        temporary.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        pass


def test_the_file_is_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    write_text(tmp_path / "x", "text")
    assert events == ["sync", "rename", "sync"]


def test_text_is_utf8_with_plain_line_feeds(tmp_path):
    write_text(tmp_path / "x", "ü\n")
    assert (tmp_path / "x").read_bytes() == b"\xc3\xbc\n"


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "model"
    for content in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / "part").mkdir()
            (folder / "part" / content).write_text(content)
    assert [path.name for path in (target / "part").iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(error), atomic_folder(target) as folder:
        (folder / "new").write_text("new")
        raise error
    assert [path.name for path in target.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [target]
