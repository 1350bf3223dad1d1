import os
import sqlite3
import subprocess
import sys
import time

import pytest
from PIL import Image

from library.config.errors import ConfigError
from library.data import file_index
from library.data.file_index import FileIndex
from library.records import Resolution

HOUR = 3600


def picture(path, size=(4, 3), colour=0, *, age=HOUR, **options):
    Image.new("RGB", size, (colour, 0, 0)).save(path, **options)
    then = time.time() - age
    os.utime(path, (then, then))
    return str(path)


@pytest.fixture
def reads(monkeypatch):
    """The files that were read, in order."""
    seen = []
    original = file_index.read_facts
    monkeypatch.setattr(file_index, "read_facts", lambda path: (seen.append(path), original(path))[1])
    return seen


def test_facts_are_content_and_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    a, b = picture(tmp_path / "a.png", colour=1), picture(tmp_path / "b.png", colour=2)
    copy, turned = picture(tmp_path / "c.png", colour=1), picture(tmp_path / "d.png", exif=exif)
    facts = FileIndex(None).facts([a, b, copy, turned])
    assert set(facts) == {a, b, copy, turned}
    assert facts[a].content == facts[copy].content != facts[b].content
    assert facts[a].size == Resolution(4, 3) and facts[turned].size == Resolution(3, 4)
    assert all(fact.problem is None for fact in facts.values())


@pytest.mark.parametrize("stored", [True, False])
def test_a_file_is_read_once_until_it_changes(tmp_path, reads, stored):
    database = tmp_path / "index.sqlite" if stored else None
    index = FileIndex(database)
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    first = index.facts([a, b, a])
    assert sorted(reads) == [a, b]
    if stored:
        index = FileIndex(database)
    assert index.facts([a, b]) == first and len(reads) == 2
    picture(tmp_path / "a.png", size=(8, 8), age=HOUR - 5)
    assert index.facts([a, b])[a].size == Resolution(8, 8)
    assert reads[2:] == [a]


def test_a_file_of_this_moment_is_read_again(tmp_path, reads):
    index = FileIndex(tmp_path / "index.sqlite")
    a = picture(tmp_path / "a.bmp", age=0)
    index.facts([a])
    status = os.stat(a)
    picture(tmp_path / "a.bmp", colour=9)
    os.utime(a, ns=(status.st_atime_ns, status.st_mtime_ns))  # the clock of the file system did not move on
    assert os.stat(a).st_size == status.st_size
    assert index.facts([a])[a] == FileIndex(None).facts([a])[a]


def test_what_cannot_be_used_has_a_problem_and_is_looked_at_again(tmp_path, reads):
    whole = picture(tmp_path / "whole.png", size=(64, 64))
    data = (tmp_path / "whole.png").read_bytes()
    paths = {}
    for name, content in {"empty": b"", "text": b"hello", "cut": data[: len(data) // 2]}.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        os.utime(path, (1, 1))
        paths[name] = str(path)
    paths["gone"] = str(tmp_path / "gone.png")
    index = FileIndex(tmp_path / "index.sqlite")
    facts = index.facts([whole, *paths.values()])
    problems = {name: facts[path].problem for name, path in paths.items()}
    assert problems["empty"] == "the file is empty"
    assert problems["text"] == "not a picture, or of an unknown kind"
    assert "truncated" in problems["cut"]
    assert problems["gone"] == "No such file or directory"
    reads.clear()
    index.facts([whole, *paths.values()])
    assert sorted(reads) == sorted(path for name, path in paths.items() if name != "gone")


def test_progress_is_told_in_batches_and_kept_when_killed(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(file_index, "_BATCH", 2)
    paths = [picture(tmp_path / f"{number}.png") for number in range(5)]
    told = []

    def interrupt(done, total):
        told.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    index = FileIndex(tmp_path / "index.sqlite")
    with pytest.raises(KeyboardInterrupt):
        index.facts(paths, interrupt)
    assert told == [(2, 5), (4, 5)]
    reads.clear()
    index.facts(paths, lambda done, total: told.append((done, total)))
    assert len(reads) == 1 and told[2:] == [(1, 1)]


SCRIPT = """
import sys
from library.data.file_index import FileIndex
folder, count = sys.argv[1], int(sys.argv[2])
paths = [f"{folder}/{number}.png" for number in range(count)]
facts = FileIndex(f"{folder}/index.sqlite").facts(paths)
assert len({fact.content for fact in facts.values()}) == count
assert all(fact.problem is None for fact in facts.values())
"""


def test_processes_may_share_an_index(tmp_path):
    for number in range(20):
        picture(tmp_path / f"{number}.png", colour=number)
    processes = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "20"]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        assert database.execute("SELECT count(*) FROM files").fetchone() == (20,)


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "index.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match=r"index.sqlite: can't be used as the index of pictures .*delete it"):
        FileIndex(tmp_path / "index.sqlite").facts([picture(tmp_path / "a.png")])
