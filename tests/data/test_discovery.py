import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from library.config.dataset import SubsetConfig
from library.data import discovery, folders
from library.data.discovery import discover
from library.data.file_index import FileIndex
from library.data.findings import Skipped
from library.io.places import join, list_files, write_bytes
from library.records import Resolution, Sample
from tests.data.scans import dataset, fill, find, keys, problems_of


def test_pictures_are_found_in_order_with_their_captions_and_sizes(tmp_path):
    cats = fill(tmp_path / "cats", names=("b.jpg", "a.PNG", "d.webp", "c.bmp", "e.jpeg", "f.gif"))
    (tmp_path / "cats" / "notes.md").write_text("no picture")
    (tmp_path / "cats" / "._a.png").write_text("a note of macOS beside a picture")
    (tmp_path / "cats" / "folder.png").mkdir()
    dogs = fill(tmp_path / "dogs", names=("a.png",), first_colour=20)
    found = find(SubsetConfig(image_dir=cats, num_repeats=3), SubsetConfig(image_dir=dogs))
    assert keys(found.samples) == [
        "0/0/a.PNG", "0/0/b.jpg", "0/0/c.bmp", "0/0/d.webp", "0/0/e.jpeg", "0/0/f.gif", "0/1/a.png",
    ]  # fmt: skip
    first = found.samples[0]
    path = os.path.join(cats, "a.PNG")
    expected = Sample("0/0/a.PNG", path, first.content, ("caption of a.PNG",), Resolution(5, 3), 0, 0, num_repeats=3)
    assert first == expected and len(first.content) == 40
    assert len({sample.content for sample in found.samples}) == 7
    assert found == discovery.Discovery(found.samples, (), (), (), (), ())


def test_sub_folders_are_read_on_request(tmp_path):
    cats = fill(tmp_path / "cats", names=("z.png", "sub/b.png", "sub/deep/a.png", "sub/.hidden/no.png"))
    assert keys(find(SubsetConfig(image_dir=cats)).samples) == ["0/0/z.png"]
    found = find(SubsetConfig(image_dir=cats, recursive=True))
    assert keys(found.samples) == ["0/0/sub/b.png", "0/0/sub/deep/a.png", "0/0/z.png"]
    assert found.samples[1].path == os.path.join(cats, "sub", "deep", "a.png")
    assert found.samples[1].captions == ("caption of sub/deep/a.png",)


def test_keys_do_not_hold_the_place_of_the_folder(tmp_path):
    found = [find(SubsetConfig(image_dir=fill(tmp_path / name / "cats", 3))) for name in ("here", "there")]
    assert keys(found[0].samples) == keys(found[1].samples)


def test_kinds_of_pictures_that_need_a_package_are_noted(tmp_path, monkeypatch):
    cats = fill(tmp_path / "cats", 1)
    (tmp_path / "cats" / "new.XYZ").write_bytes(b"a new kind")
    monkeypatch.setattr("library.data.folders.unreadable_extensions", lambda: {".xyz": "pillow-xyz"})
    found = find(SubsetConfig(image_dir=cats))
    assert len(found.samples) == 1
    assert found.notes == (f"{cats}: 1 .xyz picture not read (pip install pillow-xyz)",)
    for name in ("000.png", "000.txt"):
        (tmp_path / "cats" / name).unlink()
    (line,) = problems_of(dataset(SubsetConfig(image_dir=cats)))
    assert line.startswith(f"{cats}: no pictures (png ")
    assert line.endswith(" in this folder, but 1 .xyz picture not read (pip install pillow-xyz)")


def test_everything_that_is_wrong_is_reported_at_once(tmp_path):
    cats = fill(tmp_path / "cats", 8, captions=False)
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "deep", names=("inner/a.png", "inner/b.png"))
    mixed = fill(tmp_path / "mixed", 2)
    (tmp_path / "mixed" / "000.txt").write_bytes(b"caf\xe9")
    (tmp_path / "mixed" / "002.png").write_bytes(b"")
    (tmp_path / "mixed" / "003.png").write_bytes(b"GIF?")
    folders = [cats, str(tmp_path / "empty"), str(tmp_path / "deep"), mixed, str(tmp_path / "gone")]
    lines = problems_of(dataset(*(SubsetConfig(image_dir=folder) for folder in folders)))
    kinds = lines[0][lines[0].index("(") : lines[0].index(")") + 1]
    assert {"png", "jpg", "jpeg", "webp", "bmp", "gif"} <= set(kinds.strip("()").split())
    assert lines == [
        f"{tmp_path}/empty: no pictures {kinds} in this folder",
        f"{tmp_path}/deep: no pictures {kinds} in this folder; recursive = true reads 2 pictures in its sub-folders",
        f"{tmp_path}/gone: can't be read (No such file or directory)",
        "2 pictures can't be read; repair or remove, or start with --skip_bad_images:",
        f"{mixed}/002.png: the file is empty",
        f"{mixed}/003.png: not a picture, or of an unknown kind",
        f"{mixed}/000.txt: byte 4 is not UTF-8; save the caption as UTF-8",
        f"{cats}: no caption (.txt) and no class_tokens for 8 of 8 pictures: 000.png, 001.png, 002.png, 003.png, "
        "004.png and 3 more. Write captions, or set class_tokens",
    ]


def test_what_is_wrong_or_odd_with_a_folder_of_two_datasets_is_told_once(tmp_path):
    cats = fill(tmp_path / "cats", 3)
    (tmp_path / "cats" / "000.txt").write_bytes(b"\xff")
    (tmp_path / "cats" / "001.png").write_bytes(b"")
    (tmp_path / "cats" / "002.txt").unlink()
    assert len(problems_of(*[dataset(SubsetConfig(image_dir=cats))] * 2)) == 4
    (tmp_path / "cats" / "000.txt").write_text("")
    subset = SubsetConfig(image_dir=cats, class_tokens="x")
    assert len(discover([dataset(subset)] * 2, skip_bad_images=True).notes) == 4


def test_bad_pictures_are_skipped_only_when_asked(tmp_path):
    cats = fill(tmp_path / "cats", 2)
    (tmp_path / "cats" / "bad.png").write_bytes(b"")
    found = find(SubsetConfig(image_dir=cats), skip_bad_images=True)
    assert keys(found.samples) == ["0/0/000.png", "0/0/001.png"]
    assert found.skipped == (Skipped(os.path.join(cats, "bad.png"), 0, 0, "the file is empty"),)
    assert found.notes == (
        "1 picture left out that can't be read (--skip_bad_images):",
        f"{cats}/bad.png: the file is empty",
    )
    for name in ("000.png", "001.png"):
        (tmp_path / "cats" / name).write_bytes(b"")
    assert problems_of(dataset(SubsetConfig(image_dir=cats)), skip_bad_images=True) == [
        f"{cats}: no picture can be read"
    ]


def test_a_picture_whose_end_is_missing_is_found_when_it_is_looked_at(tmp_path):
    cats = fill(tmp_path / "cats", 1, size=(64, 64))
    noise = Image.effect_noise((64, 64), 90)
    noise.save(tmp_path / "cats" / "cut.png")
    whole = (tmp_path / "cats" / "cut.png").read_bytes()
    (tmp_path / "cats" / "cut.png").write_bytes(whole[: len(whole) // 2])
    for decode in (False, True):
        lines = problems_of(dataset(SubsetConfig(image_dir=cats, class_tokens="x")), decode=decode)
        assert len(lines) == 2 and lines[1].startswith(f"{cats}/cut.png: ")


def sizes(tmp_path):
    """A folder of three pictures: small, wide and large."""
    for name, size in (("large.png", (40, 40)), ("small.png", (8, 9)), ("wide.png", (80, 20))):
        cats = fill(tmp_path / "cats", names=(name,), size=size)
    return cats


@pytest.mark.parametrize(
    ("limits", "left", "setting"),
    [
        ({"minimum_image_size": 20}, ["large", "wide"], "minimum_image_size 20"),
        ({"skip_image_resolution": Resolution(8, 16)}, ["large", "wide"], "skip_image_resolution 8x16"),
        ({"maximum_aspect_ratio": 2.0}, ["large", "small"], "maximum_aspect_ratio 2"),
        ({"minimum_aspect_ratio": 0.95}, ["large", "wide"], "minimum_aspect_ratio 0.95"),
    ],
)
def test_pictures_of_an_unwanted_size_or_shape_are_left_out_and_counted(tmp_path, limits, left, setting):
    cats = sizes(tmp_path)
    found = discover([dataset(SubsetConfig(image_dir=cats), **limits), dataset(SubsetConfig(image_dir=cats))])
    assert keys(found.samples)[:-3] == [f"0/0/{name}.png" for name in left] and len(found.samples) == 5
    assert found.notes == (f"{cats}: 1 picture left out of datasets[0] by {setting}",)
    ((path, number, position, reason),) = found.skipped
    assert os.path.basename(path)[:-4] not in left and (number, position) == (0, 0) and setting in reason


def test_a_subset_of_which_nothing_is_left_says_why(tmp_path):
    cats = sizes(tmp_path)
    (tmp_path / "cats" / "bad.png").write_bytes(b"")
    dogs = fill(tmp_path / "dogs", 1, size=(100, 100))
    config = dataset(
        SubsetConfig(image_dir=dogs), SubsetConfig(image_dir=cats), minimum_image_size=30, maximum_aspect_ratio=0.9
    )
    assert problems_of(config, skip_bad_images=True) == [
        f"{dogs}: none of 1 picture is used in datasets[0]: 1 left out by maximum_aspect_ratio 0.9",
        f"{cats}: none of 4 pictures is used in datasets[0]: 2 left out by maximum_aspect_ratio 0.9, 1 left out by "
        "minimum_image_size 30, 1 can't be read",
    ]


def test_an_excluded_picture_needs_no_caption(tmp_path):
    cats = sizes(tmp_path)
    (tmp_path / "cats" / "small.txt").unlink()
    assert len(discover([dataset(SubsetConfig(image_dir=cats), minimum_image_size=20)]).samples) == 2


def test_copies_in_a_dataset_are_found(tmp_path):
    cats, dogs = fill(tmp_path / "cats", 3), fill(tmp_path / "dogs", 2)
    one = dataset(SubsetConfig(image_dir=cats), SubsetConfig(image_dir=dogs))
    groups = tuple((os.path.join(cats, name), os.path.join(dogs, name)) for name in ("000.png", "001.png"))
    assert discover([one]).duplicates == groups
    assert discover([one, one]).duplicates == groups
    assert discover([dataset(SubsetConfig(image_dir=cats)), dataset(SubsetConfig(image_dir=dogs))]).duplicates == ()
    assert discover([dataset(SubsetConfig(image_dir=cats))] * 2).duplicates == ()


def test_files_that_two_subsets_have_are_noted_and_no_duplicates(tmp_path):
    cats = fill(tmp_path / "cats", names=("a.png", "sub/b.png"))
    inner = SubsetConfig(image_dir=os.path.join(cats, "sub"), num_repeats=2)
    found = find(SubsetConfig(image_dir=cats, recursive=True), inner)
    assert found.duplicates == ()
    assert found.notes == ("datasets[0]: 1 picture used again, in another of its subsets",)


def test_near_duplicates_are_looked_for_on_request(tmp_path):
    folder = tmp_path / "cats"
    fill(folder, 0)
    noise = Image.effect_noise((64, 64), 90)
    noise.save(folder / "a.png")
    noise.resize((60, 60)).save(folder / "b.jpg", quality=90)
    noise.save(folder / "copy.png")
    Image.effect_noise((64, 64), 90).rotate(90).save(folder / "other.png")
    subset = SubsetConfig(image_dir=str(folder), class_tokens="noise")
    assert find(subset).near_duplicates == ()
    found = find(subset, near_duplicates=True)
    assert found.near_duplicates == ((str(folder / "a.png"), str(folder / "b.jpg")),)
    assert found.duplicates == ((str(folder / "a.png"), str(folder / "copy.png")),)


def test_validation_takes_its_share_by_content(tmp_path):
    cats, reg = fill(tmp_path / "cats", 40), fill(tmp_path / "reg", 5, first_colour=100)
    subsets = (
        SubsetConfig(image_dir=cats, num_repeats=5, validation_split=0.3),
        SubsetConfig(image_dir=reg, is_reg=True, validation_split=0.3),
    )
    found = find(*subsets, validation_seed=3)
    trained = {sample.key for sample in found.samples if not sample.is_reg}
    held_out = {sample.key for sample in found.validation}
    assert len(trained | held_out) == 40 and not trained & held_out and 4 <= len(held_out) <= 20
    assert all(sample.num_repeats == 1 and not sample.is_reg for sample in found.validation)
    for sample in (*found.samples, *found.validation):
        assert sample.captions == (f"caption of {os.path.basename(sample.path)}",)  # none moved to another picture
    chosen = {sample.content for sample in found.validation}
    assert chosen != {sample.content for sample in find(*subsets, validation_seed=4).validation}
    for number in range(40):
        for ending in ("png", "txt"):
            (tmp_path / "cats" / f"{number:03}.{ending}").rename(tmp_path / "cats" / f"{-number + 99}.{ending}")
    fill(tmp_path / "cats", names=[f"more{n}.png" for n in range(10)], first_colour=200)
    found = find(*subsets, validation_seed=3)
    old = {sample.content for sample in found.validation if "more" not in sample.path}
    assert old == chosen


def test_everything_held_out_leaves_nothing_to_train_on(tmp_path):
    subset = SubsetConfig(image_dir=fill(tmp_path / "cats", 2), validation_split=1.0)
    assert problems_of(dataset(subset)) == ["validation_split leaves no picture to train on; lower it"]


def test_pictures_without_a_face_are_noted(tmp_path):
    pytest.importorskip("cv2")
    cats = fill(tmp_path / "cats", names=("a_2_1_2_2.png", "b.png"))
    found = discover([dataset(SubsetConfig(image_dir=cats), crop_style="face")])
    assert found.notes == (f"{cats}: no face in 1 of 2 pictures, cropped in the middle",)


@pytest.fixture
def asked(monkeypatch):
    """The files that were looked up, each with how."""
    seen = []
    facts = FileIndex.facts

    def spy(self, entries, **options):
        seen.extend((entry.name, options) for entry in entries)
        return facts(self, entries, **options)

    monkeypatch.setattr(FileIndex, "facts", spy)
    return seen


def test_one_folder_at_two_sizes_is_listed_and_read_once(tmp_path, monkeypatch, asked):
    cats = fill(tmp_path / "cats", 3)
    listed = []
    monkeypatch.setattr(folders, "list_files", lambda path, **how: listed.append(path) or list_files(path, **how))
    found = discover([dataset(SubsetConfig(image_dir=cats)), dataset(SubsetConfig(image_dir=cats))])
    assert [sample.dataset for sample in found.samples] == [0] * 3 + [1] * 3
    assert len(asked) == 3 and listed == [cats]
    assert found.samples[0].captions is found.samples[3].captions


def test_faces_are_looked_for_once_and_only_where_crops_go_around_them(tmp_path, asked):
    cats = fill(tmp_path / "cats", names=("a_2_1_2_2.png",))
    plain = dataset(SubsetConfig(image_dir=cats))
    by_style = dataset(SubsetConfig(image_dir=cats), crop_style="face")
    by_range = dataset(SubsetConfig(image_dir=cats, face_crop_aug_range=(2.0, 4.0)))
    found = discover([plain, by_style, by_range])
    assert [sample.focus for sample in found.samples] == [None, (2, 1, 2, 2), (2, 1, 2, 2)]
    assert [(name, how["faces"]) for name, how in asked] == [("a_2_1_2_2.png", True)]


def test_pictures_and_masks_are_decoded_on_request(tmp_path, asked):
    cats, masks = fill(tmp_path / "cats", 1), fill(tmp_path / "masks", 1, captions=False)
    for decode in (True, False):
        find(SubsetConfig(image_dir=cats, conditioning_data_dir=masks), decode=decode)
        assert [how["decode"] for _, how in asked] == [decode] * 2
        asked.clear()


def test_progress_tells_how_many_new_files_were_read(tmp_path):
    cats = fill(tmp_path / "cats", 3)
    told = []
    find(SubsetConfig(image_dir=cats), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (3, 3)


def test_source_files_are_left_as_they_are(tmp_path):
    cats = fill(tmp_path / "cats", 2)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "cats").iterdir()}
    find(SubsetConfig(image_dir=cats), decode=True, near_duplicates=True)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "cats").iterdir()} == before


def test_a_dataset_scan_does_not_load_torch(tmp_path):
    folder = fill(tmp_path / "cats", 2)
    code = (
        "import sys\nfrom library.data.discovery import discover\n"
        "from library.config.dataset import DatasetConfig, SubsetConfig\nfrom library.records import Resolution\n"
        "heavy = {'torch', 'numpy', 'PIL', 'transformers'}\n"
        "assert not heavy & set(sys.modules)\n"
        f"subset = SubsetConfig(image_dir={folder!r})\n"
        "discover([DatasetConfig(resolution=Resolution(64, 64), subsets=(subset,))])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def remote_copy(folder, url):
    """The files of a folder, behind a URL."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        write_bytes(join(url, path.relative_to(folder).as_posix()), path.read_bytes())
    return url


@pytest.fixture(params=["memory", "s3"])
def remote(request, tmp_path):
    if request.param == "memory":
        pytest.importorskip("fsspec")
        return f"memory://{tmp_path.name}"
    pytest.importorskip("obstore")
    return request.getfixturevalue("s3_bucket") + "/data"


def test_remote_folders_hold_what_local_ones_do(tmp_path, remote):
    fill(tmp_path / "cats", names=("a.png", "b.jpg", "sub/c.png"))
    (tmp_path / "cats" / "b.txt").rename(tmp_path / "cats" / "b.caption")
    for name in ("a.png", "b.png", "sub/c.png"):
        fill(tmp_path / "masks", names=(name,), captions=False, size=(8, 6))
    fill(tmp_path / "cats", names=("a.png", "b.jpg", "sub/c.png"), captions=False, size=(4, 3))
    settings = {"recursive": True}
    local = find(
        SubsetConfig(image_dir=str(tmp_path / "cats"), conditioning_data_dir=str(tmp_path / "masks"), **settings)
    )
    images, masks = remote_copy(tmp_path / "cats", f"{remote}/cats"), remote_copy(tmp_path / "masks", f"{remote}/masks")
    index = FileIndex(tmp_path / "index.sqlite")
    for _ in range(2):
        found = find(SubsetConfig(image_dir=images, conditioning_data_dir=masks, **settings), index=index)
        assert [
            sample._replace(
                path=local_path(sample.path, remote, tmp_path), mask=local_path(sample.mask, remote, tmp_path)
            )
            for sample in found.samples
        ] == list(local.samples)
        assert found.notes == tuple(note.replace(str(tmp_path), remote) for note in local.notes) != ()


def local_path(url, remote, folder):
    return url.replace(remote, str(folder))


def test_a_list_may_name_remote_pictures(tmp_path, remote):
    fill(tmp_path / "cats", names=("a.png", "b.png"))
    images = remote_copy(tmp_path / "cats", f"{remote}/cats")
    source = f"{remote}/meta.jsonl"
    write_bytes(
        source, b'{"file_name": "b", "text": "one"}\n{"file_name": "%s/a.png", "text": "two"}' % images.encode()
    )
    found = find(SubsetConfig(image_dir=images, metadata_file=source))
    assert [(sample.key, sample.captions) for sample in found.samples] == [
        ("0/0/a.png", ("two",)),
        ("0/0/b.png", ("one",)),
    ]
    write_bytes(source, b'{"file_name": "%s/a.png", "text": "two"}' % images.encode())
    (sample,) = find(SubsetConfig(image_dir=None, metadata_file=source)).samples
    assert sample.path == f"{images}/a.png"


def test_a_remote_folder_that_is_not_there_is_told(remote):
    (line,) = problems_of(dataset(SubsetConfig(image_dir=f"{remote}/gone")))
    assert line.startswith(f"{remote}/gone: ")
