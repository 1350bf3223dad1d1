"""Decoding: every kind of file, upright, and JPEGs smaller than they are."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data import decode as module
from library.data.buckets import Placement
from library.data.formats import PLUGINS
from library.data.images import open_picture, peek, resize
from library.records import Box, Resolution
from tests.picture_files import encoded, exif, gradient, rgb_profile

PHOTOS = Path(__file__).parents[2] / "examples" / "data" / "photos"


def levels(picture):
    return np.asarray(picture.convert("RGB")).astype(int)


def psnr(one, other):
    return 10 * np.log10(255**2 / max(1e-9, ((levels(one) - levels(other)) ** 2).mean()))


def photo(name):
    return Image.open(PHOTOS / name).convert("RGB")


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 98, "subsampling": 0}, 4),
        ("JPEG", {"quality": 98, "subsampling": 0, "progressive": True}, 4),
        ("AVIF", {"quality": 98, "subsampling": "4:4:4"}, 8),
        ("JXL", {"lossless": True}, 0),
    ],
)
def test_every_kind_gives_the_pixels_that_went_in(kind, options, most):
    for plugin in PLUGINS.values():
        if plugin.kind == kind and plugin.is_needed:
            pytest.importorskip(plugin.module)
    picture = gradient(40, 24)
    back = open_picture(encoded(picture, kind, **options))
    assert back.mode == "RGB" and back.size == (40, 24)
    assert np.abs(levels(back) - levels(picture)).max() <= most


def test_a_gif_is_its_first_frame():
    red, blue = Image.new("RGB", (9, 5), (255, 0, 0)), Image.new("RGB", (9, 5), (0, 0, 255))
    picture = open_picture(encoded(red, "GIF", save_all=True, append_images=[blue]))
    assert picture.size == (9, 5) and picture.getpixel((4, 2)) == (255, 0, 0)


def test_a_grey_jpeg_becomes_three_equal_channels():
    values = levels(open_picture(encoded(gradient(64, 32).convert("L"), "JPEG", quality=98)))
    assert (values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all()
    assert np.abs(values - levels(gradient(64, 32).convert("L"))).max() <= 4


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "PCX"])
def test_other_kinds_are_not_decoded(kind):
    with pytest.raises(OSError, match="unknown kind"):
        open_picture(encoded(gradient(8, 8), kind))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_exif_orientation_is_applied_to_every_kind_that_has_it(kind, orientation):
    if kind == "AVIF" and PLUGINS[".avif"].is_needed:
        pytest.importorskip("pillow_avif")
    upright = gradient(96, 64)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> transposition that undoes it
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    back = open_picture(encoded(stored, kind, exif=exif(orientation)[6 if kind == "AVIF" else 0 :], quality=95))
    assert back.size == upright.size
    assert np.abs(levels(back) - levels(upright)).mean() < 3


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(640, 424), (641, 427)])
def test_a_smaller_decode_is_never_below_what_is_enough(size, orientation):
    data = encoded(photo("china.jpg").resize(size), "JPEG", exif=exif(orientation))
    upright = size if orientation < 5 else size[::-1]
    for share in (1.0, 0.7, 0.51, 0.5, 0.3, 0.25, 0.13, 0.1):
        enough = Resolution(max(1, int(upright[0] * share)), max(1, int(upright[1] * share)))
        decoded = module.decode(data, enough)
        assert decoded.picture.width >= enough.width and decoded.picture.height >= enough.height
        assert decoded.picture.width - 1 < decoded.width <= decoded.picture.width
        factor = round(upright[0] / decoded.width)
        assert decoded.width * factor == upright[0] and decoded.height * factor == upright[1]
        fits = (f for f in (8, 4, 2, 1) if all(side >= e * f for side, e in zip(upright, enough)))
        # the partly covered last pixels of a picture that is turned would come first
        assert factor == next(f for f in fits if orientation == 1 or not any(side % f for side in size))


@pytest.mark.parametrize("enough", [(300, 10), (10, 150)])
def test_both_sides_stay_as_large_as_needed(enough):
    picture = open_picture(encoded(gradient(512, 256), "JPEG"), at_least=Resolution(*enough))
    assert picture.size == (512, 256)


def test_only_jpegs_come_smaller():
    assert open_picture(encoded(gradient(256, 256), "PNG"), at_least=Resolution(16, 16)).size == (256, 256)
    assert open_picture(encoded(gradient(256, 256), "JPEG"), at_least=Resolution(16, 16)).size == (32, 32)
    assert open_picture(encoded(gradient(256, 256), "JPEG")).size == (256, 256)


@pytest.mark.parametrize(("kernel", "spare", "least"), [("hamming", 2, 40), ("lanczos", 2, 40), ("box", 4, 33)])
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg", "grass.png", "brick.png", "astronaut.png"])
def test_a_smaller_decode_is_close_to_a_full_one(name, kernel, spare, least):
    picture = photo(name)
    for subsampling, factor, more in product((0, 2), (2, 4), (1.0, 1.3)):
        data = encoded(picture, "JPEG", quality=92, subsampling=subsampling)
        target = Resolution(*(int(side / factor / spare / more) for side in picture.size))
        placement = Placement(target, target, Box(0, 0, *target))
        small = module.decode(data, Resolution(target.width * spare, target.height * spare))
        assert small.picture.width <= -(-picture.width // factor)
        at_once = resize(open_picture(data), placement, kernel)
        assert psnr(at_once, resize(small.picture, placement, kernel, (small.width, small.height))) >= least


def test_the_last_partly_covered_pixel_of_a_smaller_decode_shifts_nothing():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 513).astype(np.uint8), (65, 1)))
    small = module.decode(encoded(ramp, "JPEG", quality=100), Resolution(64, 8))
    assert small.picture.size == (65, 9) and (small.width, small.height) == (513 / 8, 65 / 8)
    target = Resolution(32, 4)
    placement = Placement(target, target, Box(0, 0, 32, 4))
    row = levels(resize(small.picture, placement, "box", (small.width, small.height)))[1, :, 0]
    assert np.abs(row - levels(resize(ramp, placement, "box"))[1, :, 0]).max() <= 2


def test_a_profile_survives_a_smaller_decode():
    profile = rgb_profile(gamma=1.4)
    data = encoded(photo("flower.jpg").crop((0, 0, 128, 128)), "JPEG", icc_profile=profile)
    assert module.decode(data, Resolution(60, 60)).profile == module.decode(data).profile == profile


def test_the_first_picture_of_several_in_a_jpeg_is_taken():
    more = [gradient(32, 16).transpose(Image.Transpose.ROTATE_180)]
    data = encoded(gradient(128, 64), "MPO", save_all=True, append_images=more, quality=98, subsampling=0)
    assert peek(data) == (Resolution(128, 64), None)
    assert np.abs(levels(open_picture(data)) - levels(gradient(128, 64))).max() <= 4
    assert open_picture(data, at_least=Resolution(64, 32)).size == (64, 32)


def test_every_factor_is_the_one_that_was_asked_for():
    for width, height, factor in product((9, 15, 16, 33, 64), (8, 17, 31), (1, 2, 4, 8)):
        data = encoded(gradient(width, height), "JPEG")
        decoded = module.decode(data, Resolution(width // factor, height // factor))
        assert decoded.picture.size == (-(-width // factor), -(-height // factor))
        assert (decoded.width, decoded.height) == (width / factor, height / factor)


def test_a_missing_plugin_is_named(monkeypatch):
    jxl = PLUGINS[".jxl"]._replace(module="no_such_module")
    monkeypatch.setitem(PLUGINS, ".jxl", jxl)
    with pytest.raises(OSError, match="pip install pillow-jxl-plugin"):
        open_picture(b"\xff\x0a" + bytes(40))


def test_a_jpeg_xl_is_turned_by_its_decoder_and_not_again(tmp_path):
    pytest.importorskip("pillow_jxl")
    data = encoded(gradient(96, 64), "JXL", lossless=True, exif=exif(6)[6:])
    assert peek(data)[0] == open_picture(data).size == (96, 64)
    (tmp_path / "a.jpg").write_bytes(encoded(gradient(96, 64), "JPEG", exif=exif(6)))
    with Image.open(tmp_path / "a.jpg") as file:
        file.save(tmp_path / "a.jxl", lossless_jpeg=True)
    packed = (tmp_path / "a.jxl").read_bytes()
    assert peek(packed)[0] == open_picture(packed).size == (64, 96)
