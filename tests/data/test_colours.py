"""The ways in which files keep colours: modes, transparency, numbers above 8 bits, and profiles."""

import struct

import numpy as np
import pytest
from PIL import Image

from library.data import colours
from library.data.buckets import Placement
from library.data.images import PixelSettings, load_pixels, open_picture
from library.records import Box, Resolution
from tests.picture_files import XYZ_OF_SRGB, cmyk_profile, encoded, gradient, grey_profile, png, rgb_profile

SWAPPED = XYZ_OF_SRGB[:, [1, 0, 2]]
"""A profile with these primaries means green where it says red."""


def pixels(data, **options):
    return np.asarray(open_picture(data, **options)).astype(int)


def first(data, **options):
    return tuple(pixels(data, **options)[0, 0])


def samples(*values, depth=16):
    return b"\x00" + np.array(values, dtype=">u2" if depth == 16 else "u1").tobytes()


def test_unusual_modes_become_rgb():
    assert first(encoded(Image.new("L", (2, 2), 100), "PNG")) == (100, 100, 100)
    assert first(encoded(Image.new("1", (2, 2), 1), "PNG")) == (255, 255, 255)
    assert first(encoded(Image.new("LA", (2, 2), (70, 255)), "PNG")) == (70, 70, 70)
    palette = Image.new("P", (1, 1))
    palette.putpalette([1, 2, 3])
    assert first(encoded(palette, "PNG")) == (1, 2, 3)
    assert first(encoded(Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK"), "JPEG", quality=100)) == (
        pytest.approx((200, 30, 60), abs=4)
    )


def test_grey_of_sixteen_bits_is_scaled_not_cut():
    data = png(4, 1, 16, 0, samples(0, 257, 128 * 257, 65535))
    assert pixels(data)[0].tolist() == [[level] * 3 for level in (0, 1, 128, 255)]


def test_colour_of_sixteen_bits_is_scaled_not_cut():
    data = png(2, 1, 16, 2, samples(0, 257, 128 * 257, 65535, 200 * 257, 3 * 257))
    assert pixels(data)[0].tolist() == [[0, 1, 128], [255, 200, 3]]


def test_grey_and_alpha_of_sixteen_bits():
    data = png(2, 1, 16, 4, samples(100 * 257, 65535, 100 * 257, 0))
    assert pixels(data)[0].tolist() == [[100] * 3, [255] * 3]


@pytest.mark.parametrize("background", ["#ffffff", "#ff8000"])
def test_transparency_lies_on_the_background_and_hidden_colours_stay_hidden(background):
    under = tuple(int(background[place : place + 2], 16) for place in (1, 3, 5))
    picture = Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(255, 0, 0, 0), (255, 0, 0, 255), (0, 0, 0, 128)]):
        picture.putpixel((x, 0), colour)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        row = pixels(encoded(picture, kind, **options), background=background)[0]
        assert tuple(row[0]) == under and tuple(row[1]) == (255, 0, 0)
        assert np.abs(row[2] - np.array(under) * 127 / 255).max() <= 1
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 9, 9])
    assert first(encoded(palette, "PNG", transparency=0), background=background) == under
    assert first(encoded(palette, "GIF", transparency=0), background=background) == under
    assert first(encoded(Image.new("LA", (1, 1), (10, 0)), "PNG"), background=background) == under


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "transparent"),
    [
        (1, 0, bytes([0, 0b01000000]), 1),
        (2, 0, bytes([0, 0b00100000]), 2),
        (4, 0, bytes([0, 0x03]), 3),
        (8, 0, bytes([0, 7, 9]), 9),
        (16, 0, samples(300, 301), 301),
    ],
)
def test_one_shade_of_grey_that_is_transparent(depth, colour_type, row, transparent):
    data = png(2, 1, depth, colour_type, row, (b"tRNS", struct.pack(">H", transparent)))
    shown, hidden = pixels(data, background="#0000ff")[0].tolist()
    assert hidden == [0, 0, 255] and shown[0] == shown[1] == shown[2]


def test_one_colour_that_is_transparent():
    colours_of_8 = png(2, 1, 8, 2, samples(1, 2, 3, 4, 5, 6, depth=8), (b"tRNS", struct.pack(">3H", 4, 5, 6)))
    assert pixels(colours_of_8)[0].tolist() == [[1, 2, 3], [255, 255, 255]]
    clear = (1031, 1290, 1551)
    colours_of_16 = png(2, 1, 16, 2, samples(257, 514, 771, *clear), (b"tRNS", struct.pack(">3H", *clear)))
    assert pixels(colours_of_16)[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_a_profile_is_applied():
    picture = Image.new("RGB", (2, 2), (200, 100, 50))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100, "subsampling": 0})):
        shown = first(encoded(picture, kind, icc_profile=rgb_profile(SWAPPED), **options))
        assert shown == pytest.approx((100, 200, 50), abs=6), kind


def test_a_profiles_curve_is_applied():
    level = round(255 * (55 / 255) ** (1 / 2.2))
    linear = rgb_profile(gamma=1.0)
    assert first(encoded(Image.new("RGB", (2, 2), (55,) * 3), "PNG", icc_profile=linear)) == pytest.approx(
        (level,) * 3, abs=3
    )
    grey = Image.new("L", (2, 2), 55)
    for profile in (linear, grey_profile(1.0)):  # grey pictures come with both kinds
        assert first(encoded(grey, "PNG", icc_profile=profile)) == pytest.approx((level,) * 3, abs=3)


def test_a_palette_has_a_profile_too():
    palette = Image.new("P", (1, 1))
    palette.putpalette([200, 100, 50])
    assert first(encoded(palette, "PNG", icc_profile=rgb_profile(SWAPPED))) == pytest.approx((100, 200, 50), abs=6)


def test_a_cmyk_profile_is_applied():
    def ink(corner):  # whatever holds black is black, cyan alone is this red, paper is white
        return (0, 0, 0) if corner[3] else ((50, 60, 40) if corner == (1, 0, 0, 0) else (100, 0, 0))

    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    with_profile = first(encoded(cyan, "JPEG", quality=100, icc_profile=cmyk_profile(ink)))
    assert with_profile == pytest.approx((204, 61, 56), abs=12)  # Lab 50, 60, 40
    assert first(encoded(cyan, "JPEG", quality=100)) == pytest.approx((0, 255, 255), abs=3)


def test_the_background_is_not_changed_by_the_profile():
    picture = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    picture.putpixel((1, 0), (1, 2, 3, 0))
    row = pixels(encoded(picture, "PNG", icc_profile=rgb_profile(SWAPPED)), background="#c80a0a")[0]
    assert tuple(row[0]) == pytest.approx((100, 200, 50), abs=6) and tuple(row[1]) == (0xC8, 10, 10)


@pytest.mark.parametrize(
    "profile",
    [
        b"",
        b"nonsense",
        rgb_profile()[:200],
        b"\x00" * 128 + rgb_profile()[128:],
        grey_profile(1.0),
        rgb_profile()[:131],
    ],
)
def test_a_profile_that_is_broken_or_for_another_kind_of_picture_is_passed_over(profile):
    picture = gradient(16, 16)
    assert np.array_equal(pixels(encoded(picture, "PNG", icc_profile=profile)), np.asarray(picture))
    cmyk = Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK")
    assert first(encoded(cmyk, "JPEG", quality=100, icc_profile=profile)) == pytest.approx((200, 30, 60), abs=4)


def test_srgb_is_recognised_by_what_it_does_and_left_alone():
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert colours._transform(srgb, "RGB") is None
    assert colours._transform(rgb_profile(gamma=2.2), "RGB") is not None  # near, but not the same curve
    picture = gradient(32, 32)
    assert np.array_equal(pixels(encoded(picture, "PNG", icc_profile=srgb)), np.asarray(picture))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_training_applies_profiles_like_everyone_else(mode):
    """It does so after shrinking, which is quicker; what it sees must be the same to the eye."""
    picture = gradient(256, 192).convert(mode)
    data = encoded(picture, "PNG", icc_profile=rgb_profile(XYZ_OF_SRGB @ np.diag([0.8, 1.0, 1.2]), 1.8))
    target = Resolution(64, 48)
    trained = load_pixels(data, Placement(target, target, Box(0, 0, 64, 48)), False, PixelSettings("box"))
    opened = np.asarray(open_picture(data).resize(target, Image.Resampling.BOX))
    seen = ((trained + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(seen - opened).max() <= 2
    assert np.abs(opened - np.asarray(picture.convert("RGB").resize(target)).astype(int)).max() > 8
