import dataclasses
import json
import os

import pytest

from library.config.dataset import SubsetConfig
from library.data import metadata_files, metadata_pictures
from library.data.discovery import discover
from library.data.findings import Skipped
from tests.data.scans import captions_of, dataset, fill, find, keys, problems_of


def written(tmp_path, entries, name="meta.json"):
    path = tmp_path / name
    path.write_text(json.dumps(entries))
    return str(path)


def listed(tmp_path, *names, **settings):
    """A subset of these pictures, each with its name as caption."""
    source = written(tmp_path, {name: {"caption": f"listed {name}"} for name in names})
    return SubsetConfig(**{"image_dir": str(tmp_path / "cats"), "metadata_file": source, **settings})


def test_exactly_the_listed_pictures_are_used(tmp_path):
    cats = fill(tmp_path / "cats", names=("a.png", "b.png", "sub/c.png", "d.png"))
    subset = listed(tmp_path, "sub/c.png", "b.png", "./a.png")
    found = find(subset)
    assert keys(found.samples) == ["0/0/a.png", "0/0/b.png", "0/0/sub/c.png"]
    assert captions_of(found) == [("listed ./a.png",), ("listed b.png",), ("listed sub/c.png",)]
    assert found.notes == (f"{cats}: 1 picture not used, not listed in {subset.metadata_file}",)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_other_kinds_of_lists(tmp_path, kind):
    fill(tmp_path / "cats", names=("a.png", "b.png"))
    source = tmp_path / f"meta.{kind}"
    if kind == "jsonl":
        source.write_text('{"image_path": "b.png", "caption": "x"}\n{"image_path": "a.png", "caption": "y"}\n')
    elif kind == "csv":
        source.write_text("file_name,caption\nb.png,x\na.png,y\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"file_name": ["b.png", "a.png"], "caption": ["x", "y"]}), source)
    found = find(SubsetConfig(image_dir=str(tmp_path / "cats"), metadata_file=str(source)))
    assert list(zip(keys(found.samples), captions_of(found))) == [("0/0/a.png", ("y",)), ("0/0/b.png", ("x",))]


def test_names_may_be_absolute_or_lack_their_ending(tmp_path):
    cats, far = (
        fill(tmp_path / "cats", names=("a.png", "b.v2.png", "sub/c.jpg")),
        fill(tmp_path / "far", names=("x.png", "y.jpg")),
    )
    names = ("a", "b.v2", os.path.join(cats, "sub", "c"), os.path.join(far, "x.png"), "../far/y")
    found = find(listed(tmp_path, *names))
    assert keys(found.samples) == ["0/0/../far/x.png", "0/0/../far/y.jpg", "0/0/a.png", "0/0/b.v2.png", "0/0/sub/c.jpg"]
    assert captions_of(found)[2:4] == [("listed a",), ("listed b.v2",)]
    found = find(listed(tmp_path, *names[2:4], image_dir=None))
    assert keys(found.samples) == ["0/0/cats/sub/c.jpg", "0/0/far/x.png"]
    assert found.samples[1].path == os.path.join(far, "x.png")


def test_names_written_on_windows(tmp_path):
    fill(tmp_path / "cats", names=("sub/c.png",))
    assert keys(find(listed(tmp_path, "sub\\c.png")).samples) == ["0/0/sub/c.png"]


def test_relative_names_need_a_folder(tmp_path):
    subset = listed(tmp_path, "a.png", "b.png", "/c.png", image_dir=None)
    assert problems_of(dataset(subset)) == [
        f"{subset.metadata_file}: 2 relative names of pictures without image_dir, the folder where they start: a.png, "
        "b.png"
    ]


def test_listed_pictures_that_are_missing_are_counted_and_named(tmp_path):
    cats = fill(tmp_path / "cats", 1)
    names = [f"{number}.png" for number in range(6)]
    subset = listed(tmp_path, "000.png", *names, str(tmp_path / "no folder" / "a.png"))
    line = f"{subset.metadata_file}: 7 of 8 pictures not found in {cats}: 0.png, 1.png, 2.png, 3.png, 4.png and 2 more"
    assert problems_of(dataset(subset)) == [f"{line}. Add or unlist them, or start with --skip_bad_images"]
    found = find(subset, skip_bad_images=True)
    assert keys(found.samples) == ["0/0/000.png"]
    assert found.notes == (f"{line}; left out (--skip_bad_images)",)
    assert found.skipped[0] == Skipped("0.png", 0, 0, "not found") and len(found.skipped) == 7
    assert problems_of(dataset(listed(tmp_path, *names)), skip_bad_images=True) == [
        f"{subset.metadata_file}: none of its pictures can be found in {cats}"
    ]


def test_a_name_of_several_pictures_is_refused(tmp_path):
    fill(tmp_path / "cats", names=("a.png", "a.jpg", "b.png"))
    subset = listed(tmp_path, "a", "b", "a.png")
    assert problems_of(dataset(subset)) == [
        f"{subset.metadata_file}: 1 name of several pictures; write the endings: a (a.jpg or a.png)"
    ]


def test_a_picture_that_is_listed_twice_is_used_once(tmp_path):
    cats = fill(tmp_path / "cats", 1)
    subset = listed(tmp_path, "000.png", "000", os.path.join(cats, "000.png"))
    found = find(subset)
    assert captions_of(found) == [("listed 000.png",)]
    assert found.notes == (
        f"{subset.metadata_file}: 2 pictures listed before under another name, used once: 000, {cats}/000.png",
    )


def test_entries_without_a_caption_fall_back_on_class_tokens(tmp_path):
    cats = fill(tmp_path / "cats", 2)
    source = written(tmp_path, {"000.png": {"caption": "one"}, "001.png": {}})
    subset = SubsetConfig(image_dir=cats, metadata_file=source)
    assert problems_of(dataset(subset)) == [
        f"{cats}: no caption in {source} and no class_tokens for 1 of 2 pictures: 001.png. Write captions, or set "
        "class_tokens"
    ]
    found = find(SubsetConfig(image_dir=cats, metadata_file=source, class_tokens="sks cat"))
    assert captions_of(found) == [("one",), ("sks cat",)]
    assert found.notes == (f"{cats}: 1 picture without a caption, using 'sks cat'",)


def test_several_lines_need_enable_wildcard(tmp_path):
    cats = fill(tmp_path / "cats", 1)
    source = written(tmp_path, {"000.png": {"caption": "one\ntwo"}})
    assert captions_of(find(SubsetConfig(image_dir=cats, metadata_file=source))) == [("one",)]
    assert captions_of(find(SubsetConfig(image_dir=cats, metadata_file=source, enable_wildcard=True))) == [
        ("one", "two")
    ]


def test_one_list_is_read_once_for_subsets_that_take_it_alike(tmp_path, monkeypatch):
    fill(tmp_path / "cats", 1)
    source = written(tmp_path, {"000.png": {"caption": "one\ntwo"}})
    subset = SubsetConfig(image_dir=str(tmp_path / "cats"), metadata_file=source)
    many = dataclasses.replace(subset, enable_wildcard=True)
    read = []
    monkeypatch.setattr(
        metadata_pictures, "read_metadata", lambda *asked: read.append(asked) or metadata_files.read_metadata(*asked)
    )
    found = discover([dataset(subset), dataset(subset), dataset(many)])
    assert captions_of(found) == [("one",), ("one",), ("one", "two")] and len(read) == 2


def test_captions_stay_with_their_pictures_when_others_are_left_out(tmp_path):
    for name, size in (("a.png", (8, 8)), ("b.png", (40, 40)), ("c.png", (50, 50))):
        fill(tmp_path / "cats", names=(name,), size=size)
    found = discover([dataset(listed(tmp_path, "c.png", "b.png", "a.png"), minimum_image_size=20)])
    assert captions_of(found) == [("listed b.png",), ("listed c.png",)]


def test_a_list_may_choose_pictures_and_leave_captions_to_files(tmp_path):
    fill(tmp_path / "cats", names=("a.png", "sub/b.png"))
    fill(tmp_path / "far", names=("c.png",))
    (tmp_path / "cats" / "c.txt").write_text("not this")
    subset = listed(tmp_path, "a.png", "sub/b.png", str(tmp_path / "far" / "c.png"), caption_strategy="textfile")
    assert captions_of(find(subset)) == [("caption of c.png",), ("caption of a.png",), ("caption of sub/b.png",)]


@pytest.mark.parametrize(("content", "expected"), [("{", "meta.json: "), ("{}", "meta.json: lists no pictures")])
def test_a_list_that_is_wrong_is_told_once(tmp_path, content, expected):
    cats = fill(tmp_path / "cats", 1)
    source = tmp_path / "meta.json"
    source.write_text(content)
    one = dataset(SubsetConfig(image_dir=cats, metadata_file=str(source)))
    (line,) = problems_of(one, one)
    assert expected in line


def test_a_listed_file_that_is_no_picture(tmp_path):
    cats = fill(tmp_path / "cats", 1)
    lines = problems_of(dataset(listed(tmp_path, "000.png", "000.txt")))
    assert lines[1:] == [f"{cats}/000.txt: not a picture, or of an unknown kind"]
