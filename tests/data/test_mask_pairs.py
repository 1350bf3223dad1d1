import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.config.dataset import SubsetConfig
from library.data.findings import Skipped
from library.data.mask_pairs import same_shape
from library.records import Resolution
from tests.data.scans import dataset, fill, find, keys, problems_of


@pytest.fixture
def masked(tmp_path):
    """Makes a subset with pictures of 40x30 and masks of the names and sizes that are asked for."""

    def make(masks, *, names=("a.png", "b.png"), **settings):
        folder = tmp_path / "masks"
        folder.mkdir(exist_ok=True)
        for name, size in masks.items():
            (folder / name).parent.mkdir(exist_ok=True)
            Image.new("L", size, 255).save(folder / name)
        cats = fill(tmp_path / "cats", names=names, size=(40, 30))
        return SubsetConfig(image_dir=cats, conditioning_data_dir=str(folder), **settings)

    return make


def test_a_mask_is_the_file_of_the_same_stem(masked):
    subset = masked({"a.jpg": (40, 30), "b.png": (20, 15)})
    found = find(subset)
    assert [sample.mask for sample in found.samples] == [
        os.path.join(subset.conditioning_data_dir, name) for name in ("a.jpg", "b.png")
    ]
    assert len({sample.mask_content for sample in found.samples} | {sample.content for sample in found.samples}) == 4
    assert found.notes == ()


def test_masks_of_sub_folders_stand_in_sub_folders(masked):
    names = ("a.png", "sub/a.png")
    subset = masked({"a.png": (40, 30), "sub/a.png": (20, 15)}, names=names, recursive=True)
    found = find(subset)
    assert [os.path.relpath(sample.mask, subset.conditioning_data_dir) for sample in found.samples] == list(names)


def test_missing_masks_are_counted_and_named(masked):
    subset = masked({"a.png": (40, 30)})
    assert problems_of(dataset(subset)) == [
        f"{subset.conditioning_data_dir}: no mask for 1 of 2 pictures: b.png. A mask is named like its picture"
    ]


def test_masks_of_a_kind_that_needs_a_package(masked, monkeypatch):
    subset = masked({"a.png": (40, 30)})
    with open(os.path.join(subset.conditioning_data_dir, "b.xyz"), "wb"):
        pass
    monkeypatch.setattr("library.data.folders.unreadable_extensions", lambda: {".xyz": "pillow-xyz"})
    (line,) = problems_of(dataset(subset))
    assert line.endswith("A mask is named like its picture; 1 .xyz picture not read (pip install pillow-xyz)")


def test_pictures_that_are_not_used_need_no_mask_and_their_masks_are_not_extra(masked, tmp_path):
    subset = masked({"a.png": (40, 30), "b.png": (40, 30)}, names=("a.png", "b.png"))
    fill(tmp_path / "cats", names=("small.png",), size=(4, 3))
    Image.new("RGB", (4, 3)).save(os.path.join(subset.image_dir, "b.png"))
    found = find_limited(subset)
    assert keys(found.samples) == ["0/0/a.png"]
    assert found.notes == (f"{subset.image_dir}: 2 pictures left out of datasets[0] by minimum_image_size 20",)


def find_limited(subset):
    from library.data.discovery import discover

    return discover([dataset(subset, minimum_image_size=20)])


def test_extra_and_shared_masks_are_noted(masked):
    masks = {"a.png": (40, 30), "b.png": (40, 30), "b.jpg": (40, 30), "c.png": (4, 3)}
    subset = masked(masks, names=("a.png", "a.jpg", "b.png"), class_tokens="x", caption_strategy="instanceprompt")
    found = find(subset)
    folder = subset.conditioning_data_dir
    assert found.notes == (
        f"{folder}: 1 mask of no picture: c.png",
        f"{folder}: 1 mask used for several pictures of the same name, first for a.jpg and a.png",
        f"{folder}: 1 picture with several masks, using b.jpg",
    )
    assert [os.path.basename(sample.mask) for sample in found.samples] == ["a.png", "a.png", "b.jpg"]


def test_a_mask_of_another_shape_is_refused(masked):
    subset = masked({"a.png": (30, 40), "b.png": (20, 15)})
    assert problems_of(dataset(subset)) == [
        f"{subset.conditioning_data_dir}: 1 mask of another shape than the picture: a.png is 30x40, its picture 40x30"
    ]


def test_a_mask_goes_before_transparency(masked):
    subset = masked({"a.png": (40, 30), "b.png": (40, 30)}, alpha_mask=True)
    found = find(subset)
    assert all(sample.mask is not None for sample in found.samples)
    assert found.notes == (
        f"{subset.image_dir}: masks come from {subset.conditioning_data_dir}; alpha_mask is not used",
    )
    found = find(SubsetConfig(image_dir=subset.image_dir, alpha_mask=True))
    assert all(sample.mask is None and not sample.mask_content for sample in found.samples)


def test_unreadable_masks_stop_the_run_or_take_their_pictures_with_them(masked):
    subset = masked({"a.png": (40, 30), "b.png": (40, 30)})
    mask = os.path.join(subset.conditioning_data_dir, "a.png")
    with open(mask, "wb"):
        pass
    assert problems_of(dataset(subset)) == [
        "1 mask can't be read; repair or remove, or start with --skip_bad_images:",
        f"{mask}: the file is empty",
    ]
    found = find(subset, skip_bad_images=True)
    assert [(sample.key, os.path.basename(sample.mask)) for sample in found.samples] == [("0/0/b.png", "b.png")]
    assert found.skipped == (Skipped(os.path.join(subset.image_dir, "a.png"), 0, 0, "its mask can't be read"),)
    assert found.notes == (
        "1 mask left out that can't be read (--skip_bad_images):",
        f"{mask}: the file is empty",
        f"{subset.image_dir}: 1 picture left out with an unreadable mask",
    )
    with open(os.path.join(subset.conditioning_data_dir, "b.png"), "wb"):
        pass
    assert problems_of(dataset(subset), skip_bad_images=True) == [
        f"{subset.conditioning_data_dir}: no mask can be read"
    ]


sides = st.integers(1, 3000)


@given(width=sides, height=sides, numerator=st.integers(1, 50), denominator=st.integers(1, 50))
def test_a_scaled_mask_has_the_same_shape_however_it_is_rounded(width, height, numerator, denominator):
    for rounding in (0, denominator // 2, denominator - 1):  # down, to the nearest, up
        scaled = [(side * numerator + rounding) // denominator for side in (width, height)]
        assert not all(scaled) or same_shape(Resolution(width, height), Resolution(*scaled))


@given(width=sides, height=sides, other=sides, more=sides)
def test_shapes_are_compared_the_same_in_any_order(width, height, other, more):
    one, two = Resolution(width, height), Resolution(other, more)
    assert same_shape(one, two) == same_shape(two, one)


@pytest.mark.parametrize(("one", "two"), [((512, 512), (512, 515)), ((1024, 768), (768, 1024)), ((100, 50), (10, 7))])
def test_other_shapes_differ(one, two):
    assert not same_shape(Resolution(*one), Resolution(*two))
