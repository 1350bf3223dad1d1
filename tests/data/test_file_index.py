import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from library.config.errors import ConfigError
from library.data import faces, file_index, images, index_database, picture_facts
from library.data.file_index import FileFacts, FileIndex, TextProblem
from library.io import places
from library.io.places import list_files, write_bytes
from library.records import Resolution

HOUR = 3600
ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "examples" / "data" / "photos"


def picture(path, size=(4, 3), colour=0, *, age=HOUR, **options):
    Image.new("RGB", size, (colour, 0, 0)).save(path, **options)
    return aged(path, age)


def aged(path, age=HOUR):
    then = time.time() - age
    os.utime(path, (then, then))
    return str(path)


def listed(folder, ending=""):
    return [entry for entry in list_files(str(folder), recursive=True) if entry.name.endswith(ending)]


def by_name(index, folder, ending="", **options):
    entries = listed(folder, ending)
    return {entry.name: fact for entry, fact in zip(entries, index.facts(entries, **options))}


@pytest.fixture(params=["stored", "in memory"])
def reopened(request, tmp_path):
    """Gives the index again: from its file, or as it was."""
    path = tmp_path / "index" / "files.sqlite"
    path.parent.mkdir()
    if request.param == "stored":
        return lambda: FileIndex(path)
    index = FileIndex(None)
    return lambda: index


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that were read, in any order."""
    seen = []

    def read(path, **limits):
        seen.append(os.path.basename(path))
        return places.read_bytes(path, **limits)

    monkeypatch.setattr(picture_facts, "read_bytes", read)
    monkeypatch.setattr(file_index, "read_bytes", read)
    return seen


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cats").mkdir()
    return tmp_path / "cats"


def test_facts_are_content_and_upright_size(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(folder / "a.png", colour=1)
    picture(folder / "b.png", colour=2)
    picture(folder / "c.png", colour=1)
    picture(folder / "d.png", exif=exif)
    entries = listed(folder)
    a, b, copy, turned = facts = FileIndex(None).facts(entries)
    assert a.content == copy.content != b.content and len(a.content) == 40
    assert a.size == Resolution(4, 3) and turned.size == Resolution(3, 4)
    assert all(fact[2:] == (None, None, None) for fact in facts)
    assert FileIndex(None).facts([*entries[::-1], *entries]) == [*facts[::-1], *facts]
    assert FileIndex(None).facts([]) == []


def test_a_file_is_read_once_until_it_changes(folder, reads, reopened):
    picture(folder / "a.png")
    picture(folder / "b.png")
    (folder / "sub").mkdir()
    picture(folder / "sub" / "a.png", colour=3)
    first = by_name(reopened(), folder)
    assert sorted(reads) == ["a.png", "a.png", "b.png"]
    assert by_name(reopened(), folder) == first and len(reads) == 3
    picture(folder / "a.png", size=(8, 8), age=HOUR - 5)
    second = by_name(reopened(), folder)
    assert second["a.png"].size == Resolution(8, 8) and reads[3:] == ["a.png"]
    os.utime(folder / "b.png", (1, 1))
    assert by_name(reopened(), folder) == second and reads[4:] == ["b.png"]


def test_a_relative_folder_is_the_same_folder(folder, reads, tmp_path, monkeypatch):
    picture(folder / "a.png")
    index = FileIndex(None)
    index.facts(listed(folder))
    monkeypatch.chdir(tmp_path)
    index.facts(listed("cats"))
    monkeypatch.chdir(folder)
    index.facts(listed("."))
    index.facts(listed("../cats"))
    assert reads == ["a.png"]


def test_a_file_that_comes_twice_is_read_once(folder, reads):
    picture(folder / "a.png")
    entries = listed(folder) * 3
    facts = FileIndex(None).facts(entries)
    assert reads == ["a.png"] and len(facts) == 3 and len(set(facts)) == 1


def test_a_file_of_this_moment_is_read_again(folder, reopened):
    a = picture(folder / "a.bmp", age=0)
    first = by_name(reopened(), folder)
    status = os.stat(a)
    picture(folder / "a.bmp", colour=9)
    os.utime(a, ns=(status.st_atime_ns, status.st_mtime_ns))  # the clock of the file system did not move on
    assert os.stat(a).st_size == status.st_size
    assert first != by_name(reopened(), folder) == by_name(FileIndex(None), folder)


def broken_files(folder):
    picture(folder / "whole.png", size=(64, 64))
    data = (folder / "whole.png").read_bytes()
    for name, content in {"empty": b"", "text": b"hello", "cut": data[: len(data) // 2]}.items():
        (folder / f"{name}.png").write_bytes(content)
        aged(folder / f"{name}.png")


def test_what_cannot_be_used_has_a_problem_and_is_looked_at_again(folder, reads, reopened):
    broken_files(folder)
    picture(folder / "gone.png")
    entries = listed(folder)
    os.remove(folder / "gone.png")
    for _ in range(2):
        reads.clear()
        facts = {entry.name: fact for entry, fact in zip(entries, reopened().facts(entries))}
        assert facts["whole.png"].problem is None
        assert facts["empty.png"].problem == "the file is empty"
        assert facts["text.png"].problem == "not a picture, or of an unknown kind"
        assert facts["cut.png"].problem is not None and "\n" not in facts["cut.png"].problem
        assert facts["gone.png"] == FileFacts("", Resolution(0, 0), "No such file or directory")
        assert len(facts["text.png"].content) == 40
    assert sorted(reads) == ["cut.png", "empty.png", "gone.png", "text.png"]


def damaged_inside(folder):
    """A JPEG of proper size and proper end, with nonsense between."""
    photo = Image.open(PHOTOS / "coffee.png").convert("RGB")
    photo.save(folder / "broken.png", quality=90)
    data = bytearray((folder / "broken.png").read_bytes())
    begin = data.index(b"IDAT") + 100
    data[begin : begin + 50] = bytes(50)
    (folder / "broken.png").write_bytes(data)
    aged(folder / "broken.png")


def test_pictures_are_decoded_once_and_only_when_asked(folder, reads, reopened):
    damaged_inside(folder)
    picture(folder / "whole.png")
    assert by_name(reopened(), folder)["broken.png"].problem is None
    assert len(reads) == 2
    decoded = by_name(reopened(), folder, decode=True)
    assert decoded["broken.png"].problem and decoded["whole.png"].problem is None
    assert len(reads) == 4
    assert by_name(reopened(), folder, decode=True) == decoded
    assert reads[4:] == ["broken.png"]  # the whole one is known to be whole
    assert by_name(reopened(), folder)["whole.png"] == decoded["whole.png"] and len(reads) == 5


def test_a_change_that_could_not_be_noticed_is_when_the_file_is_read_for_more(folder, reopened, monkeypatch):
    monkeypatch.setattr(faces, "find_face", lambda data: None)
    a = picture(folder / "a.bmp")
    first = by_name(reopened(), folder, decode=True, near=True)["a.bmp"]
    status = os.stat(a)
    picture(folder / "a.bmp", colour=9)
    os.utime(a, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert by_name(reopened(), folder)["a.bmp"] == first._replace(near=None)
    second = by_name(reopened(), folder, decode=True, faces=True)["a.bmp"]
    assert second.content == by_name(FileIndex(None), folder)["a.bmp"].content != first.content
    with reopened()._database.open() as database:
        assert database.execute("SELECT decoded, near FROM pictures").fetchall() == [(1, None)]


def test_pictures_that_caching_found_bad_are_remembered_by_content(folder, reads, reopened, monkeypatch):
    picture(folder / "a.png", colour=1)
    picture(folder / "b.png", colour=2)
    facts = by_name(reopened(), folder)
    reopened().mark_bad({facts["a.png"].content: "broken data stream"})
    picture(folder / "c.png", colour=1)
    again = by_name(reopened(), folder)
    assert again["a.png"] == facts["a.png"]._replace(problem="broken data stream")
    assert again["b.png"] == facts["b.png"]
    assert again["c.png"].problem == "broken data stream"
    picture(folder / "a.png", colour=3)  # repaired
    assert by_name(reopened(), folder)["a.png"].problem is None
    reopened().mark_bad({})
    monkeypatch.setattr(file_index, "decoder", lambda: "pillow 99")
    assert by_name(reopened(), folder)["c.png"].problem is None


def test_hashes_of_look_alikes_are_computed_once(folder, reads, reopened):
    photo = Image.open(PHOTOS / "coffee.png").convert("RGB")
    for name, option in {"a.jpg": 95, "b.jpg": 60}.items():
        photo.save(folder / name, quality=option)
        aged(folder / name)
    Image.open(PHOTOS / "chelsea.png").convert("RGB").save(folder / "c.jpg")
    aged(folder / "c.jpg")
    assert by_name(reopened(), folder)["a.jpg"].near is None
    facts = by_name(reopened(), folder, near=True)
    a, b, c = (facts[name].near for name in ("a.jpg", "b.jpg", "c.jpg"))
    assert all(0 <= near < 1 << 64 for near in (a, b, c))
    assert (a ^ b).bit_count() < 8 < (a ^ c).bit_count()
    reads.clear()
    assert by_name(reopened(), folder, near=True) == facts and reads == []
    assert by_name(reopened(), folder)["a.jpg"].near is None


def test_a_hash_of_64_bits_is_kept_whole(folder, reopened, monkeypatch):
    picture(folder / "a.png")
    for near in (0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        monkeypatch.setattr(images, "near_hash", lambda data, near=near: near)
        aged(folder / "a.png", HOUR + near.bit_length() + near % 2)
        for _ in range(2):
            assert by_name(reopened(), folder, near=True)["a.png"].near == near


def test_faces_are_looked_for_once_unless_the_name_tells(folder, reads, reopened, monkeypatch):
    looked = []

    def find_face(data):
        looked.append(len(data))
        return (5, 6, 7, 8) if len(looked) == 1 else None

    monkeypatch.setattr(faces, "find_face", find_face)
    picture(folder / "a.png", colour=1)
    picture(folder / "named_10_20_30_40.png", colour=2)
    assert by_name(reopened(), folder)["a.png"].face is None and not looked
    facts = by_name(reopened(), folder, faces=True)
    assert [fact.face for fact in facts.values()] == [(5, 6, 7, 8), (10, 20, 30, 40)]
    picture(folder / "b.png", colour=3)
    picture(folder / "new_1_2_3_4.png", colour=4)
    for _ in range(2):
        facts = by_name(reopened(), folder, faces=True)
        assert [fact.face for fact in facts.values()] == [(5, 6, 7, 8), None, (10, 20, 30, 40), (1, 2, 3, 4)]
    assert len(looked) == 2 and len(reads) == 5
    assert by_name(reopened(), folder)["a.png"].face is None


def test_texts_are_whole_and_read_once(folder, reads, reopened):
    expected = {"a.txt": "one\r\ntwo\n", "b.txt": "", "c.txt": "ü \x01 😀", "d.txt": "with a mark"}
    for name, text in expected.items():
        (folder / name).write_bytes((b"\xef\xbb\xbf" if name == "d.txt" else b"") + text.encode())
        aged(folder / name)
    (folder / "e.txt").write_bytes(b"caf\xe9")
    aged(folder / "e.txt")
    picture(folder / "a.png")
    entries = [*listed(folder, ".txt"), *listed(folder, "a.txt")]
    for _ in range(2):
        reads.clear()
        texts = reopened().texts(entries)
        assert texts[:4] == list(expected.values()) and texts[5] == texts[0]
        assert isinstance(texts[4], TextProblem)
        assert str(texts[4]) == "byte 4 is not UTF-8; save the caption as UTF-8"
    assert reads == ["e.txt"]
    (folder / "a.txt").write_text("new")
    assert reopened().texts(entries)[0] != "new"  # this entry is of the old version
    aged(folder / "a.txt", 60)
    assert reopened().texts(listed(folder, ".txt"))[0] == "new"
    os.remove(folder / "e.txt")
    assert str(reopened().texts(entries)[4]) == "can't be read (No such file or directory)"
    assert reopened().facts(listed(folder, ".png"))[0].problem is None


def test_what_a_window_keeps_is_remembered_per_tokenizer(reopened):
    captions = ["a cat", "", "ein Hündchen 😀", "a cat"]
    assert reopened().kept("clip 77", captions) == [None] * 4
    reopened().remember_kept("clip 77", captions[:3], [5, 0, 4])
    assert reopened().kept("clip 77", captions) == [5, 0, 4, 5]
    assert reopened().kept("clip 77", ["a dog", "a cat"]) == [None, 5]
    assert reopened().kept("t5 256", captions) == [None] * 4
    reopened().remember_kept("clip 77", ["a cat"], [3])
    assert reopened().kept("clip 77", ["a cat"]) == [3]


def test_names_that_are_not_utf8_are_used_and_not_remembered(folder, reads):
    path = os.fsencode(str(folder)) + b"/caf\xe9.png"
    picture(folder / "a.png")
    os.rename(folder / "a.png", path)
    index = FileIndex(None)
    for _ in range(2):
        assert index.facts(listed(folder))[0].problem is None
    assert len(reads) == 2


def test_progress_is_told_in_batches_and_kept_when_killed(folder, tmp_path, reads, monkeypatch):
    monkeypatch.setattr(file_index, "_BATCH", 2)
    for number in range(5):
        picture(folder / f"{number}.png")
    told = []

    def interrupt(done, total):
        told.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    index = FileIndex(tmp_path / "index.sqlite")
    with pytest.raises(KeyboardInterrupt):
        index.facts(listed(folder), progress=interrupt)
    assert told == [(2, 5), (4, 5)]
    reads.clear()
    index.facts(listed(folder), progress=lambda done, total: told.append((done, total)))
    assert len(reads) == 1 and told[2:] == [(1, 1)]
    index.facts(listed(folder), progress=lambda done, total: told.append((done, total)))
    assert len(told) == 3


def test_files_are_read_by_as_many_threads_as_allowed(folder, monkeypatch):
    for number in range(32):
        picture(folder / f"{number}.png")
    at_once, most, lock = [0], [0], threading.Lock()

    def slow(path, **limits):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        with lock:
            at_once[0] -= 1
        return places.read_bytes(path, **limits)

    monkeypatch.setattr(picture_facts, "read_bytes", slow)
    FileIndex(None, threads=3).facts(listed(folder))
    assert most == [3]


SCRIPT = """
import sys
from library.data.file_index import FileIndex
from library.io.places import list_files
folder, count = sys.argv[1], int(sys.argv[2])
entries = list_files(folder, recursive=False)
pictures = [entry for entry in entries if entry.name.endswith(".png")]
texts = [entry for entry in entries if entry.name.endswith(".txt")]
index = FileIndex(f"{folder}/../index.sqlite")
facts = index.facts(pictures)
assert len({fact.content for fact in facts}) == count
assert all(fact.problem is None for fact in facts)
assert index.texts(texts) == [entry.name for entry in texts]
"""


def filled(folder, count):
    for number in range(count):
        picture(folder / f"{number}.png", colour=number)
        (folder / f"{number}.txt").write_text(f"{number}.txt")
        aged(folder / f"{number}.txt")


def test_processes_may_share_an_index(folder, tmp_path):
    filled(folder, 20)
    processes = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), "20"], cwd=ROOT) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        for table in ("pictures", "texts"):
            assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (20,)


def test_an_index_survives_being_killed(folder, tmp_path):
    filled(folder, 200)
    code = "from library.data import file_index; file_index._BATCH = 2\n" + SCRIPT
    for delay in (0.0, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code, str(folder), "200"], cwd=ROOT)
        while process.poll() is None and not (tmp_path / "index.sqlite").exists():
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    subprocess.run([sys.executable, "-c", SCRIPT, str(folder), "200"], cwd=ROOT, check=True)


def test_a_database_of_another_layout_is_made_anew(folder, tmp_path, reads):
    path = tmp_path / "index.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE files (path TEXT PRIMARY KEY, bytes INTEGER) WITHOUT ROWID")
        database.execute("CREATE TABLE pictures (something TEXT)")
        database.execute("INSERT INTO files VALUES ('a', 1)")
    database.close()
    picture(folder / "a.png")
    for _ in range(2):
        FileIndex(path).facts(listed(folder))
    assert reads == ["a.png"]
    with sqlite3.connect(path) as database:
        assert ("files",) not in database.execute("SELECT name FROM sqlite_master").fetchall()


def test_tables_that_another_process_just_made_are_kept(folder, tmp_path, reads, monkeypatch):
    picture(folder / "a.png")
    FileIndex(tmp_path / "index.sqlite").facts(listed(folder))
    layout, seen_before = index_database._layout, [0]
    monkeypatch.setattr(index_database, "_layout", lambda db: seen_before.pop() if seen_before else layout(db))
    FileIndex(tmp_path / "index.sqlite").facts(listed(folder))
    assert reads == ["a.png"] and not seen_before


def test_a_file_that_is_no_database_is_named(folder, tmp_path):
    picture(folder / "a.png")
    (tmp_path / "index.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match=r"index.sqlite: can't be used as the index of pictures .*delete it"):
        FileIndex(tmp_path / "index.sqlite").facts(listed(folder))
    with pytest.raises(ConfigError, match=r"can't be used .*unable to open.*; see to its disk"):
        FileIndex(tmp_path / "no folder" / "index.sqlite").facts(listed(folder))


def test_a_damaged_database_is_named(folder, tmp_path):
    filled(folder, 60)
    path = tmp_path / "index.sqlite"
    FileIndex(path).facts(listed(folder, ".png"))
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA journal_mode=DELETE")
    database.close()
    data = bytearray(path.read_bytes())
    for begin in range(4096, len(data), 4096):
        data[begin : begin + 64] = b"\xff" * 64
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        FileIndex(path).facts(listed(folder, ".png"))
    assert str(caught.value) == (
        f"{path}: can't be used as the index of pictures (database disk image is malformed); delete it, it will be "
        "made anew"
    )


def test_a_database_that_is_held_is_said_to_be(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_database, "_BUSY_SECONDS", 0.05)
    picture(folder / "a.png")
    path = tmp_path / "index.sqlite"
    FileIndex(path).facts([])
    with sqlite3.connect(path) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConfigError, match=r"database is locked\); another process holds it"):
            FileIndex(path).facts(listed(folder))
    holder.close()


def test_pictures_in_a_bucket(s3_bucket, tmp_path, folder, reads):
    path = tmp_path / "index.sqlite"
    picture(folder / "a.png")
    write_bytes(f"{s3_bucket}/cats/a.png", (folder / "a.png").read_bytes())
    write_bytes(f"{s3_bucket}/cats/a.txt", "ü".encode())
    write_bytes(f"{s3_bucket}/cats/b.png", b"no picture")
    url = f"{s3_bucket}/cats"
    for _ in range(2):
        a, b = FileIndex(path).facts(listed(url, ".png"))
        assert [a] == FileIndex(None).facts(listed(folder)) and b.problem
        assert FileIndex(path).texts(listed(url, ".txt")) == ["ü"]
    assert sorted(reads) == ["a.png", "a.png", "a.png", "a.txt", "b.png", "b.png"]
    write_bytes(f"{s3_bucket}/cats/a.txt", b"new")
    assert FileIndex(path).texts(listed(url, ".txt")) == ["new"]
