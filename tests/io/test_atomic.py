import contextlib
import errno
import os
import resource
import shutil

import pytest
import torch

from library.io.atomic import atomic_folder, atomic_path, remove_folder, repair, write_text
from library.io.safetensors import save_tensors
from library.io.torch_files import save_torch


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


def mine(name):
    return name in ("model", "model.safetensors")


def kill_at_rename(number, act):
    """Do something in a process of its own that dies just before its rename of that number."""
    child = os.fork()
    if child == 0:
        count = 0

        def rename(*paths, rename=os.rename):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            rename(*paths)

        os.rename = rename
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be split in two")
@pytest.mark.parametrize(("number", "found"), [(1, "old"), (2, "old"), (3, "new")])
def test_a_kill_at_any_rename_leaves_a_whole_folder_after_repair(tmp_path, number, found):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "part").write_text("old")

    def replace():
        with atomic_folder(target) as folder:
            (folder / "part").write_text("new")

    assert kill_at_rename(number, replace) == (0 if number == 3 else 9)
    assert target.exists() == (number != 2)  # the one moment at which there is none
    done = repair(tmp_path, mine)
    assert len(done) == {1: 1, 2: 2, 3: 0}[number]
    assert (target / "part").read_text() == found
    assert list(tmp_path.iterdir()) == [target]


def test_repair_touches_only_what_belongs_to_it(tmp_path):
    ending = f"{'0' * 32}.partial"
    names = [f".model.safetensors.{ending}", f".model-2.safetensors.{ending}", ".model.partial", "model", ".hidden"]
    for name in names:
        (tmp_path / name).write_text("x")
    assert repair(tmp_path, mine) == ["a half-written model.safetensors removed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    assert repair(tmp_path / "nowhere", mine) == []


def test_a_folder_on_its_way_out_is_removed_once_its_successor_is_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / f".model.{'0' * 32}.old").mkdir()
    assert repair(tmp_path, mine) == ["a half-written model removed"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    rename = os.rename

    def failing(source, to):
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error", str(source), None, str(to))
        rename(source, to)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match=r"error: '[^']*/model' ->"), atomic_folder(target) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [target]


def test_a_folder_is_removed_whole(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "part").write_text("x")
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: seen.append((target.exists(), os.path.basename(path))))
    remove_folder(target)
    assert len(seen) == 1 and not seen[0][0]
    assert seen[0][1].startswith(".model.") and seen[0][1].endswith(".partial")  # what repair removes, never puts back


@contextlib.contextmanager
def files_up_to(size):
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 70, 1000, 4100, 8000])
def test_a_disk_that_is_full_names_the_file_and_leaves_the_old_one(tmp_path, size):
    target = tmp_path / "state"
    with atomic_folder(target) as folder:
        (folder / "a.pt").write_text("old")
    value = {"a": torch.arange(1000.0), "b": torch.arange(1000.0)}
    for write in (
        lambda path: save_torch(value, path),
        lambda path: save_tensors(value, path, {}),
        lambda path: write_text(path, "x" * 8500),
    ):
        with pytest.raises(OSError) as caught, files_up_to(size), atomic_folder(target) as folder:
            write(folder / "a.pt")
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(target / "a.pt")
        with pytest.raises(OSError) as caught, files_up_to(size):
            write(target / "a.pt")
        assert caught.value.filename == str(target / "a.pt")
        assert [path.name for path in target.iterdir()] == ["a.pt"] and (target / "a.pt").read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]


def test_what_torch_writes_it_reads(tmp_path):
    value = {"a": torch.randn(300_000), "b": [1, None, "c"], "empty": torch.empty(0)}
    save_torch(value, tmp_path / "x.pt")
    read = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(read["a"], value["a"]) and read["b"] == value["b"] and read["empty"].shape == (0,)
