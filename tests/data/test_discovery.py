import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.errors import ConfigError
from library.data.discovery import discover
from library.data.file_index import FileIndex
from library.data.selection import balance, hold_out
from library.records import Resolution, Sample


def fill(folder, count=0, *, names=(), captions=True, first_colour=0):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate([*names, *(f"{number:03}.png" for number in range(count))]):
        colour = first_colour + number
        Image.new("RGB", (4 + number % 2, 3), (colour % 256, colour // 256, 7)).save(folder / name)
        if captions:
            (folder / name).with_suffix(".txt").write_text(f"caption of {name}\n", encoding="utf-8")
    return str(folder)


def dataset(*subsets, **settings):
    return DatasetConfig(resolution=Resolution(64, 64), subsets=subsets, **settings)


def problems_of(*datasets, **settings):
    with pytest.raises(ConfigError) as caught:
        discover(datasets, **settings)
    return str(caught.value).splitlines()


def test_pictures_are_found_in_order_with_their_captions_and_sizes(tmp_path):
    cats = fill(tmp_path / "cats", names=("b.jpg", "a.PNG", "d.webp", "c.bmp", "e.jpeg"))
    (tmp_path / "cats" / "notes.md").write_text("no picture")
    (tmp_path / "cats" / "._a.png").write_text("a note of macOS beside a picture")
    (tmp_path / "cats" / "folder.png").mkdir()
    dogs = fill(tmp_path / "dogs", names=("a.png",))
    found = discover([dataset(SubsetConfig(image_dir=cats, num_repeats=3), SubsetConfig(image_dir=dogs))])
    assert [sample.key for sample in found.samples] == [
        "0/0/a.PNG", "0/0/b.jpg", "0/0/c.bmp", "0/0/d.webp", "0/0/e.jpeg", "0/1/a.png",
    ]  # fmt: skip
    first = found.samples[0]
    assert first == Sample(
        "0/0/a.PNG", os.path.join(cats, "a.PNG"), ("caption of a.PNG",), Resolution(5, 3), 0, 0, num_repeats=3
    )
    assert set(found.contents) == {sample.path for sample in found.samples}
    assert found.validation == () and found.notes == ()


def test_keys_do_not_hold_the_place_of_the_folder(tmp_path):
    keys = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        found = discover([dataset(SubsetConfig(image_dir=fill(tmp_path / name / "cats", 3)))])
        keys.append([sample.key for sample in found.samples])
    assert keys[0] == keys[1]


def test_lines_and_marks_of_caption_files(tmp_path):
    cats = fill(tmp_path / "cats", names=("a.png", "b.png", "c.png", "d.png"), captions=False)
    texts = {"a.txt": b"\xef\xbb\xbfbom\r\nsecond\r\n", "b.txt": b"\n  first  \n\nsecond\n", "c.txt": b" \n"}
    for name, text in {**texts, "d.caption": "käse".encode()}.items():
        (tmp_path / "cats" / name).write_bytes(text)
    found = discover([dataset(SubsetConfig(image_dir=cats))])
    assert [sample.captions for sample in found.samples] == [("bom",), ("first",), ("",), ("käse",)]
    assert found.notes == (
        f"{cats}: 1 caption read from .caption instead of .txt",
        f"{cats}: 1 caption file without text, used as an empty caption",
        f"{cats}: 2 caption files with several lines, of which the first is used (enable_wildcard uses all)",
    )
    found = discover([dataset(SubsetConfig(image_dir=cats, enable_wildcard=True))])
    assert [sample.captions for sample in found.samples] == [("bom", "second"), ("first", "second"), ("",), ("käse",)]


def test_another_caption_extension_has_no_second_guess(tmp_path):
    cats = fill(tmp_path / "cats", 1)
    (line,) = problems_of(dataset(SubsetConfig(image_dir=cats, caption_extension=".tags")))
    assert "no caption (.tags)" in line


def test_class_tokens_stand_in_for_missing_captions(tmp_path):
    cats = fill(tmp_path / "cats", 2)
    (tmp_path / "cats" / "001.txt").unlink()
    found = discover([dataset(SubsetConfig(image_dir=cats, class_tokens="sks cat"))])
    assert [sample.captions for sample in found.samples] == [("caption of 000.png",), ("sks cat",)]
    assert found.notes == (f"{cats}: 1 picture without a caption file, using 'sks cat'",)


def test_everything_that_is_wrong_is_reported_at_once(tmp_path):
    cats = fill(tmp_path / "cats", 8, captions=False)
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    mixed = fill(tmp_path / "mixed", 2)
    (tmp_path / "mixed" / "000.txt").write_bytes(b"caf\xe9")
    (tmp_path / "mixed" / "002.png").write_bytes(b"")
    (tmp_path / "mixed" / "003.png").write_bytes(b"GIF?")
    folders = [cats, str(tmp_path / "empty"), mixed, str(tmp_path / "gone")]
    assert problems_of(dataset(*(SubsetConfig(image_dir=folder) for folder in folders))) == [
        f"{tmp_path}/empty: no pictures (png jpg jpeg webp bmp) in this folder; its sub-folders are not read",
        f"{tmp_path}/gone: can't be read (No such file or directory)",
        "2 pictures can't be read; repair or remove, or start with --skip_bad_images:",
        f"{mixed}/002.png: the file is empty",
        f"{mixed}/003.png: not a picture, or of an unknown kind",
        f"{cats}: no caption (.txt) and no class_tokens for 8 of 8 pictures: 000.png, 001.png, 002.png, 003.png, "
        "004.png and 3 more. Write captions, or set class_tokens",
        f"{mixed}/000.txt: byte 4 is not UTF-8; save the caption as UTF-8",
    ]


def test_bad_pictures_are_skipped_only_when_asked(tmp_path):
    cats = fill(tmp_path / "cats", 2)
    (tmp_path / "cats" / "bad.png").write_bytes(b"")
    found = discover([dataset(SubsetConfig(image_dir=cats))], skip_bad_images=True)
    assert [sample.key for sample in found.samples] == ["0/0/000.png", "0/0/001.png"]
    assert found.notes == (
        "1 picture left out that can't be read (--skip_bad_images):",
        f"{cats}/bad.png: the file is empty",
    )
    for name in ("000.png", "001.png"):
        (tmp_path / "cats" / name).write_bytes(b"")
    assert problems_of(dataset(SubsetConfig(image_dir=cats)), skip_bad_images=True) == [
        f"{cats}: no picture can be read"
    ]


def test_a_set_smaller_than_a_batch_is_noted(tmp_path):
    cats = fill(tmp_path / "cats", 2)
    found = discover([dataset(SubsetConfig(image_dir=cats), batch_size=4)])
    assert found.notes == ("datasets[0]: 2 visits per epoch, less than batch_size 4",)


def reg_samples(count, repeats=1):
    return [Sample(f"0/1/{n}", f"{n}", ("",), Resolution(1, 1), 0, 1, repeats, is_reg=True) for n in range(count)]


@pytest.mark.parametrize(
    ("visits", "count", "repeats", "expected"),
    [
        (5, 3, 1, [2, 2, 1]),
        (10, 3, 1, [4, 3, 3]),
        (5, 12, 1, [1] * 5),
        (5, 12, 3, [3, 3]),
        (0, 3, 1, []),
        (4, 2, 5, [5]),
    ],
)
def test_regularisation_pictures_are_balanced_as_kohya_does(visits, count, repeats, expected):
    assert [sample.num_repeats for sample in balance(reg_samples(count, repeats), visits)] == expected


@given(visits=st.integers(0, 60), count=st.integers(1, 20), repeats=st.integers(1, 5))
def test_balanced_visits_reach_the_others_and_overshoot_by_less_than_one_picture(visits, count, repeats):
    total = sum(sample.num_repeats for sample in balance(reg_samples(count, repeats), visits))
    assert visits <= total < visits + repeats or total == visits == 0


def test_regularisation_counts_against_the_pictures_that_are_trained_on(tmp_path):
    cats, reg = fill(tmp_path / "cats", 10), fill(tmp_path / "reg", 3, first_colour=50)
    subsets = SubsetConfig(image_dir=reg, is_reg=True), SubsetConfig(image_dir=cats, num_repeats=2)
    found = discover([dataset(*subsets, validation_split=0.5)])
    repeats = {sample.key: sample.num_repeats for sample in found.samples if sample.is_reg}
    assert repeats == {"0/0/000.png": 4, "0/0/001.png": 3, "0/0/002.png": 3}
    assert "datasets[0]: 3 of 3 regularisation pictures used, 10 visits against 10 of the others" in found.notes
    assert [sample.subset for sample in found.samples] == [0] * 3 + [1] * 5


@pytest.mark.parametrize(
    ("count", "split"), [(6, 0.25), (7, 0.1), (10, 0.15), (20, 0.33), (37, 0.1), (40, 0.2), (4, 0.1)]
)
def test_validation_takes_its_share_and_shares_nothing(tmp_path, count, split):
    cats, reg = fill(tmp_path / "cats", count), fill(tmp_path / "reg", 2, first_colour=100)
    subsets = SubsetConfig(image_dir=cats, num_repeats=5), SubsetConfig(image_dir=reg, is_reg=True)
    found = discover([dataset(*subsets, validation_split=split)], validation_seed=3)
    trained = {sample.key for sample in found.samples if not sample.is_reg}
    held_out = {sample.key for sample in found.validation}
    assert len(held_out) == round(count * split) and len(trained | held_out) == count and not trained & held_out
    assert all(sample.num_repeats == 1 and not sample.is_reg for sample in found.validation)
    for sample in (*found.samples, *found.validation):
        assert sample.captions == (
            f"caption of {os.path.basename(sample.path)}",
        )  # no caption moved to another picture


def test_the_choice_of_validation_depends_on_seed_and_content_alone(tmp_path):
    cats = fill(tmp_path / "cats", 30)
    subset = SubsetConfig(image_dir=cats)

    def chosen(seed=0, **settings):
        found = discover([dataset(subset, validation_split=0.3, **settings)], validation_seed=seed)
        return {found.contents[sample.path] for sample in found.validation}

    assert chosen(1) == chosen(1) != chosen(2)
    assert chosen(5, validation_seed=1) == chosen(1)
    before = chosen(1)
    for name in (f"{number:03}" for number in range(30)):
        for ending in (".png", ".txt"):
            (tmp_path / "cats" / (name + ending)).rename(tmp_path / "cats" / ("z" + name + ending))
    assert chosen(1) == before


def test_no_content_is_both_trained_on_and_held_out(tmp_path):
    cats, copies = fill(tmp_path / "cats", 10), fill(tmp_path / "copies", 10)
    small = dataset(SubsetConfig(image_dir=cats), validation_split=0.3)
    large = dataset(SubsetConfig(image_dir=copies))
    found = discover([small, large])
    held_out = {found.contents[sample.path] for sample in found.validation}
    assert len(held_out) == 3
    assert not held_out & {found.contents[sample.path] for sample in found.samples}
    assert "3 pictures not trained on: the same content is held out for validation" in found.notes


@given(count=st.integers(1, 60), split=st.floats(0.01, 1), seed=st.integers(0, 2**40))
def test_the_share_is_rounded_once(count, split, seed):
    samples = [Sample(f"0/0/{n}", f"{n}", ("",), Resolution(1, 1), 0, 0) for n in range(count)]
    contents = {sample.path: sample.path for sample in samples}
    chosen = hold_out([dataset(validation_split=split)], samples, contents, seed, [])
    assert len(chosen) == len({sample.key for sample in chosen}) == round(count * split)


def test_everything_held_out_leaves_nothing_to_train_on(tmp_path):
    assert problems_of(dataset(SubsetConfig(image_dir=fill(tmp_path / "cats", 2)), validation_split=1.0)) == [
        "validation_split leaves no picture to train on; lower it"
    ]


def test_one_folder_at_two_sizes_is_read_once(tmp_path, monkeypatch):
    cats = fill(tmp_path / "cats", 3)
    asked = []
    original = FileIndex.facts
    monkeypatch.setattr(
        FileIndex, "facts", lambda self, paths, *rest: original(self, asked.extend(paths) or paths, *rest)
    )
    found = discover([dataset(SubsetConfig(image_dir=cats)), dataset(SubsetConfig(image_dir=cats))])
    assert [sample.dataset for sample in found.samples] == [0] * 3 + [1] * 3
    assert len(asked) == 6 and len(found.contents) == 3


def test_a_dataset_scan_does_not_load_torch(tmp_path):
    folder = fill(tmp_path / "cats", 2)
    code = (
        "import sys\nfrom library.data.discovery import discover\n"
        "from library.config.dataset import DatasetConfig, SubsetConfig\nfrom library.records import Resolution\n"
        f"subset = SubsetConfig(image_dir={folder!r})\n"
        "discover([DatasetConfig(resolution=Resolution(64, 64), subsets=(subset,))])\n"
        "assert 'torch' not in sys.modules and 'PIL' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
