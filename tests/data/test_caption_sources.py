import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config.dataset import SubsetConfig
from library.data.caption_sources import lines_of
from tests.data.scans import captions_of, dataset, fill, find, problems_of


@given(st.text(alphabet="ab \t\r\n\x0b\u2028", max_size=20))
def test_lines_of_a_text_are_those_that_say_something(text):
    assert lines_of(text) == tuple(line.strip() for line in text.splitlines() if line.strip())


def test_lines_and_marks_of_caption_files(tmp_path):
    cats = fill(tmp_path / "cats", names=("a.png", "b.png", "c.png", "d.png"), captions=False)
    texts = {"a.txt": b"\xef\xbb\xbfbom\r\nsecond\r\n", "b.txt": b"\n  first  \n\nsecond\n", "c.txt": b" \n"}
    for name, text in {**texts, "d.caption": "käse".encode()}.items():
        (tmp_path / "cats" / name).write_bytes(text)
    found = find(SubsetConfig(image_dir=cats))
    assert captions_of(found) == [("bom",), ("first",), ("",), ("käse",)]
    assert found.notes == (
        f"{cats}: 1 caption read from .caption instead of .txt",
        f"{cats}: 1 caption file without text, used as an empty caption",
        f"{cats}: 2 caption files with several lines, of which the first is used (enable_wildcard uses all)",
    )
    found = find(SubsetConfig(image_dir=cats, enable_wildcard=True))
    assert captions_of(found) == [("bom", "second"), ("first", "second"), ("",), ("käse",)]
    assert len(found.notes) == 2 and "several lines" not in "".join(found.notes)


def test_another_caption_extension_has_no_second_guess(tmp_path):
    cats = fill(tmp_path / "cats", 1)
    (tmp_path / "cats" / "000.caption").write_text("not this")
    (line,) = problems_of(dataset(SubsetConfig(image_dir=cats, caption_extension=".tags")))
    assert "no caption (.tags)" in line


@pytest.mark.parametrize("extension", [".Txt", ".tags.txt"])
def test_any_ending_of_caption_files_is_found_however_it_is_written(tmp_path, extension):
    cats = fill(tmp_path / "cats", names=("a.b.png",), captions=False)
    (tmp_path / "cats" / "a.b.TXT").write_text("one")
    (tmp_path / "cats" / "a.b.tags.txt").write_text("two")
    found = find(SubsetConfig(image_dir=cats, caption_extension=extension))
    assert captions_of(found) == [("one",) if extension == ".Txt" else ("two",)]


def test_the_exact_ending_goes_first(tmp_path):
    cats = fill(tmp_path / "cats", names=("a.png",))
    for name in ("a.TXT", "a.caption"):
        (tmp_path / "cats" / name).write_text("not this")
    found = find(SubsetConfig(image_dir=cats))
    assert captions_of(found) == [("caption of a.png",)] and found.notes == ()
    assert captions_of(find(SubsetConfig(image_dir=cats, caption_extension=".TXT"))) == [("not this",)]


def test_an_ending_of_several_parts_must_be_whole(tmp_path):
    cats = fill(tmp_path / "cats", names=("cat_.png",), captions=False)
    (tmp_path / "cats" / "cat_12345.txt").write_text("of another picture")
    assert len(problems_of(dataset(SubsetConfig(image_dir=cats, caption_extension=".tags.txt")))) == 1


def test_faces_cut_from_one_picture_share_its_caption(tmp_path):
    names = ("cat_10_20_30_40.png", "cat_50_60_70_80.png", "dog_1_2_3_4.png", "fox_1_2_3.png")
    cats = fill(tmp_path / "cats", names=names, captions=False)
    for stem in ("cat", "dog", "dog_1_2_3_4", "fox"):
        (tmp_path / "cats" / f"{stem}.txt").write_text(f"a {stem}")
    (line,) = problems_of(dataset(SubsetConfig(image_dir=cats)))
    assert "for 1 of 4 pictures: fox_1_2_3.png. " in line
    found = find(SubsetConfig(image_dir=cats, class_tokens="x"))
    assert captions_of(found) == [("a cat",), ("a cat",), ("a dog_1_2_3_4",), ("x",)]
    assert found.notes == (f"{cats}: 1 picture without a caption file, using 'x'",)
    fill(tmp_path / "cats", names=("dog_1_2_3_4.jpg",), captions=False)
    (note,) = find(SubsetConfig(image_dir=cats, class_tokens="x")).notes[1:]
    assert note.endswith(
        ": 1 caption file used for several pictures of the same name, first for dog_1_2_3_4.jpg and dog_1_2_3_4.png"
    )


def test_two_pictures_of_one_stem_share_their_caption(tmp_path):
    cats = fill(tmp_path / "cats", names=("a.jpg", "a-b.png", "a.png", "b.jpg"))
    found = find(SubsetConfig(image_dir=cats))
    assert captions_of(found)[1] == captions_of(found)[2] == ("caption of a.png",)
    assert found.notes == (
        f"{cats}: 1 caption file used for several pictures of the same name, first for a.jpg and a.png",
    )
    assert find(SubsetConfig(image_dir=cats, caption_strategy="filename")).notes == ()


def test_class_tokens_stand_in_for_missing_captions(tmp_path):
    cats = fill(tmp_path / "cats", 2)
    (tmp_path / "cats" / "001.txt").unlink()
    found = find(SubsetConfig(image_dir=cats, class_tokens="sks cat"))
    assert captions_of(found) == [("caption of 000.png",), ("sks cat",)]
    assert found.notes == (f"{cats}: 1 picture without a caption file, using 'sks cat'",)


def test_captions_that_are_not_utf_8_are_named(tmp_path):
    cats = fill(tmp_path / "cats", 2)
    (tmp_path / "cats" / "000.txt").write_bytes(b"caf\xe9")
    assert problems_of(dataset(SubsetConfig(image_dir=cats))) == [
        f"{cats}/000.txt: byte 4 is not UTF-8; save the caption as UTF-8"
    ]


def test_the_name_of_a_file_is_its_caption(tmp_path):
    names = ("two_black__cats.png", "sub/a_dog.v2.png", "_.png")
    cats = fill(tmp_path / "cats", names=names, captions=False)
    found = find(SubsetConfig(image_dir=cats, caption_strategy="filename", recursive=True))
    assert [(sample.key[4:], sample.captions) for sample in found.samples] == [
        ("_.png", ("",)), ("sub/a_dog.v2.png", ("a dog.v2",)), ("two_black__cats.png", ("two black  cats",)),
    ]  # fmt: skip


def test_one_caption_for_all(tmp_path):
    cats = fill(tmp_path / "cats", 2)
    found = find(SubsetConfig(image_dir=cats, caption_strategy="instanceprompt", class_tokens="sks cat"))
    assert captions_of(found) == [("sks cat",)] * 2 and found.notes == ()
    assert found.samples[0].captions is found.samples[1].captions
