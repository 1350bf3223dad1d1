import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.pictures import INTERPOLATIONS
from library.data import images
from library.data.buckets import Placement, place
from library.data.images import (
    ColourShift,
    PixelSettings,
    colour_shift,
    load_pixels,
    near_hash,
    open_picture,
    resize,
    shifted,
    thumbnail,
)
from library.randomness import python_random
from library.records import Box, Resolution
from tests.picture_files import encoded, exif, gradient

PHOTOS = Path(__file__).parents[2] / "examples" / "data" / "photos"


def whole(width, height):
    return Placement(Resolution(width, height), Resolution(width, height), Box(0, 0, width, height))


def photo(name):
    return Image.open(PHOTOS / name).convert("RGB")


def stripes(width, height):
    return Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (height, width // 2)))


def saturation(picture):
    values = np.asarray(picture).astype(int)
    return (values.max(-1) - values.min(-1)).mean()


def test_pixels_are_planes_from_minus_one_to_one(tmp_path):
    data = encoded(Image.new("RGB", (4, 2), (0, 255, 51)), "PNG")
    pixels = load_pixels(data, whole(4, 2), False)
    assert pixels.shape == (3, 2, 4) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels[:, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])
    (tmp_path / "a.png").write_bytes(data)
    assert torch.equal(pixels, load_pixels(tmp_path / "a.png", whole(4, 2), False))
    assert torch.equal(pixels, load_pixels(str(tmp_path / "a.png"), whole(4, 2), False))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_flipping_mirrors_left_to_right_after_cropping(kind):
    data = encoded(gradient(64, 48), kind)
    dataset = DatasetConfig(resolution=Resolution(32, 32), enable_bucket=False, subsets=())
    placement = place(Resolution(64, 48), dataset, 16)
    plain, flipped = load_pixels(data, placement, False), load_pixels(data, placement, True)
    assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)
    assert flipped.is_contiguous()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = gradient(6, 4)
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> transposition that undoes it
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    data = encoded(stored, "PNG", exif=exif(orientation))
    assert np.array_equal(np.asarray(open_picture(data)), np.asarray(upright))
    pixels = load_pixels(data, whole(6, 4), False)
    assert torch.equal(pixels, load_pixels(encoded(upright, "PNG"), whole(6, 4), False))


def test_settings_come_from_the_subset():
    subset = SubsetConfig(image_dir="a", resize_interpolation="area", alpha_color="#102030")
    assert PixelSettings.of(subset) == PixelSettings("area", "#102030")
    assert PixelSettings.of(SubsetConfig(image_dir="a")) == PixelSettings()


def test_transparent_parts_lie_on_the_background_of_the_settings():
    data = encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "PNG")
    for size in (16, 8, 32):
        pixels = load_pixels(data, whole(size, size), False, PixelSettings(background="#00ff33"))
        assert pixels[:, 3, 3].tolist() == pytest.approx([-1.0, 1.0, -0.6])


@pytest.mark.parametrize("size", [(700, 500), (100, 60), (512, 512), (60, 400), (33, 40)])
@pytest.mark.parametrize("no_upscale", [False, True])
def test_resizing_only_what_stays_is_the_same_as_resizing_all(size, no_upscale):
    picture = gradient(*size)
    config = DatasetConfig(
        resolution=Resolution(256, 256),
        min_bucket_reso=64,
        max_bucket_reso=512,
        bucket_no_upscale=no_upscale,
        subsets=(),
    )
    placement = place(Resolution(*size), config, 16)
    enlarged = placement.resized.width > size[0] or placement.resized.height > size[1]
    kernel = Image.Resampling.LANCZOS if enlarged else Image.Resampling.HAMMING
    everything = np.asarray(picture.resize(tuple(placement.resized), kernel).crop(placement.crop)).astype(int)
    assert np.abs(np.asarray(resize(picture, placement)).astype(int) - everything).max() <= 1


def test_shrinking_averages_and_does_not_alias():
    small = np.asarray(resize(stripes(64, 64), whole(16, 16)))[:, 1:-1]
    assert small.min() >= 127 and small.max() <= 128
    # between whole factors too, where averaging over whole pixels would leave some stripes as they are
    small = np.asarray(resize(stripes(64, 64), whole(36, 16)))[:, 2:-2]
    assert small.min() >= 80 and small.max() <= 175
    box = np.asarray(resize(stripes(64, 64), whole(36, 16), "box"))
    assert box.min() == 0 and box.max() == 255


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_every_interpolation_has_its_kernel(name):
    kernels = {"area": "box", "linear": "bilinear", "cubic": "bicubic"}
    kernel = Image.Resampling[kernels.get(name, name).upper()]
    picture = photo("coffee.png").resize((200, 140))
    for target in (Resolution(64, 48), Resolution(320, 224)):
        expected = np.asarray(picture.resize(target, kernel))
        data = encoded(picture, "PNG")
        pixels = load_pixels(data, whole(*target), False, PixelSettings(interpolation=name))
        assert np.array_equal(((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy(), expected)


def test_by_default_pictures_shrink_by_hamming_and_grow_by_lanczos():
    data = encoded(photo("coffee.png").resize((200, 140)), "PNG")
    for target, name in ((whole(64, 48), "hamming"), (whole(320, 224), "lanczos"), (whole(100, 150), "lanczos")):
        named = load_pixels(data, target, False, PixelSettings(interpolation=name))
        assert torch.equal(load_pixels(data, target, False), named)


def test_an_extreme_shape_does_not_need_the_memory_of_its_resized_form():
    config = DatasetConfig(resolution=Resolution(64, 64), min_bucket_reso=64, bucket_reso_steps=64, subsets=())
    placement = place(Resolution(1, 60_000), config, 16)
    assert placement.resized.area > 100_000_000  # 700 MB as RGB
    assert resize(Image.new("RGB", (1, 60_000)), placement).size == tuple(placement.bucket)


@pytest.mark.parametrize(
    ("name", "factor"),
    [(None, 2), ("hamming", 2), ("bilinear", 2), ("bicubic", 2), ("lanczos", 2), ("box", 4), ("area", 4)],
)
def test_large_jpegs_are_decoded_smaller_when_much_is_left_over(monkeypatch, name, factor):
    wanted = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda data, enough=None: wanted.append(enough) or decode(data, enough))
    data = encoded(photo("rocket.jpg").resize((640, 448)), "JPEG", quality=92)
    placement = Placement(Resolution(64, 64), Resolution(100, 70), Box(18, 3, 82, 67))
    load_pixels(data, placement, False, PixelSettings(interpolation=name))
    assert wanted == [Resolution(100 * factor, 70 * factor)]


def test_nearest_takes_its_pixels_from_the_whole_picture():
    picture = photo("rocket.jpg").resize((640, 448))
    data = encoded(picture, "JPEG", quality=92)
    pixels = load_pixels(data, whole(32, 24), False, PixelSettings(interpolation="nearest"))
    expected = np.asarray(open_picture(data).resize((32, 24), Image.Resampling.NEAREST))
    assert np.array_equal(((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_decoded_smaller_lands_where_a_png_does(orientation):
    picture = photo("china.jpg").resize((643, 421))
    placement = Placement(Resolution(64, 64), Resolution(98, 64), Box(17, 0, 81, 64))
    if orientation == 6:
        placement = Placement(Resolution(64, 64), Resolution(64, 98), Box(0, 17, 64, 81))
    jpeg = encoded(picture, "JPEG", quality=98, subsampling=0, exif=exif(orientation))
    png = encoded(picture, "PNG", exif=exif(orientation))
    small, full = load_pixels(jpeg, placement, False), load_pixels(png, placement, False)
    assert (small - full).abs().mean() < 0.01
    assert (small - full.roll(1, -1)).abs().mean() > 0.05


def test_whatever_is_wrong_with_a_file_is_an_os_error(tmp_path):
    data = bytearray(encoded(gradient(64, 64), "PNG"))
    for broken in (b"", b"hello", data[: len(data) // 2], bytes(data[:20]) + b"\xff\xff\xff" + bytes(data[23:])):
        (tmp_path / "broken.png").write_bytes(broken)
        with pytest.raises(OSError):
            open_picture(tmp_path / "broken.png")
        with pytest.raises(OSError):
            load_pixels(bytes(broken), whole(64, 64), False)
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "missing.png")


def test_half_of_the_visits_shift_colours_a_little():
    shifts = [colour_shift(python_random("colour", visit)) for visit in range(2000)]
    assert shifts == [colour_shift(python_random("colour", visit)) for visit in range(2000)]
    some = [shift for shift in shifts if shift is not None]
    assert 900 < len(some) < 1100
    hues, gammas = [shift.hue for shift in some], [shift.gamma for shift in some]
    assert -4 <= min(hues) < -3.9 and 3.9 < max(hues) <= 4
    assert 1 / 1.05 <= min(gammas) < 0.96 and 1.045 < max(gammas) <= 1.05
    assert abs(np.corrcoef(hues, gammas)[0, 1]) < 0.1


def test_hue_turns_colours_and_leaves_greys():
    assert shifted(Image.new("RGB", (1, 1), (200, 50, 50)), ColourShift(20.0, 1.0)).getpixel((0, 0))[1] > 55
    assert shifted(Image.new("RGB", (1, 1), (200, 50, 50)), ColourShift(-20.0, 1.0)).getpixel((0, 0))[2] > 55
    for grey in (0, 90, 255):
        assert shifted(Image.new("RGB", (1, 1), (grey,) * 3), ColourShift(30.0, 1.0)).getpixel((0, 0)) == (grey,) * 3
    # a third of the circle turns each colour into the next
    assert shifted(Image.new("RGB", (1, 1), (200, 100, 50)), ColourShift(120.0, 1.0)).getpixel((0, 0)) == (50, 200, 100)
    picture = photo("coffee.png")
    assert saturation(shifted(picture, ColourShift(4.0, 1.0))) == pytest.approx(saturation(picture), rel=0.05)


def test_gamma_bends_brightness_between_black_and_white():
    grey = Image.new("RGB", (1, 1), (128, 128, 128))
    assert shifted(grey, ColourShift(0.0, 1.05)).getpixel((0, 0))[0] == round(255 * (128 / 255) ** 1.05) == 124
    for end in (0, 255):
        assert shifted(Image.new("RGB", (1, 1), (end,) * 3), ColourShift(0.0, 1.05)).getpixel((0, 0)) == (end,) * 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pixels_are_shifted_when_asked(kind):
    data = encoded(photo("coffee.png").resize((96, 64)), kind)
    plain = load_pixels(data, whole(48, 32), False)
    assert torch.equal(load_pixels(data, whole(48, 32), False, colour=ColourShift(0.0, 1.0)), plain)
    other = load_pixels(data, whole(48, 32), False, colour=ColourShift(4.0, 1.05))
    assert 0.01 < (other - plain).abs().mean() < 0.1


def bits(one, other):
    return (one ^ other).bit_count()


@pytest.mark.parametrize(
    "name", ["astronaut.png", "chelsea.png", "china.jpg", "coffee.png", "flower.jpg", "rocket.jpg"]
)
def test_near_hashes_stand_resizing_and_recompression(name):
    picture = photo(name)
    original = near_hash(encoded(picture, "PNG"))
    assert 0 <= original < 1 << 64 and original
    width, height = picture.size
    for size in ((width // 2, height // 2), (width // 3, height // 3), (2 * width, 2 * height), (300, 300)):
        assert bits(original, near_hash(encoded(picture.resize(size, Image.Resampling.LANCZOS), "PNG"))) <= 4
    for quality in (30, 60, 90):
        assert bits(original, near_hash(encoded(picture, "JPEG", quality=quality))) <= 4
        assert bits(original, near_hash(encoded(picture.resize((1600, 1200)), "JPEG", quality=quality))) <= 4
    assert bits(original, near_hash(encoded(picture, "WEBP", quality=50))) <= 4
    assert near_hash(encoded(picture, "PNG", exif=exif(1))) == original


@pytest.mark.parametrize(
    ("row", "byte"),
    [((0, 9, 0, 9, 0, 9, 0, 9, 0), 0xAA), ((0, 1, 2, 3, 4, 5, 6, 7, 8), 0xFF), ((8, 7, 6, 5, 4, 3, 2, 1, 0), 0)],
)
def test_a_near_hash_says_where_a_picture_grows_brighter_to_the_right(row, byte):
    values = np.tile(np.array(row, dtype=np.uint8) * 20, (8, 1)).repeat(16, axis=0).repeat(16, axis=1)
    assert near_hash(encoded(Image.fromarray(values), "PNG")) == int.from_bytes(bytes([byte] * 8), "big")


def test_near_hashes_of_different_pictures_differ():
    names = sorted(path for path in PHOTOS.iterdir() if path.suffix in (".png", ".jpg"))
    hashes = [near_hash(path.read_bytes()) for path in names]
    distances = [bits(one, other) for index, one in enumerate(hashes) for other in hashes[:index]]
    assert len(names) > 8 and min(distances) > 8
    mirrored = photo("astronaut.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert bits(near_hash(encoded(mirrored, "PNG")), near_hash(encoded(photo("astronaut.png"), "PNG"))) > 8


def test_thumbnails_fit_and_keep_the_shape():
    for kind in ("PNG", "JPEG"):
        small = thumbnail(encoded(photo("china.jpg"), kind), 64)
        assert small.size == (64, 43) and small.mode == "RGB"
    assert thumbnail(encoded(gradient(40, 20), "JPEG", exif=exif(6)), 10).size == (5, 10)
    assert thumbnail(encoded(gradient(40, 20), "PNG"), 64).size == (40, 20)
    assert thumbnail(encoded(gradient(400, 1), "PNG"), 64).size == (64, 1)
    clear = encoded(Image.new("RGBA", (9, 9), (1, 2, 3, 0)), "PNG")
    assert thumbnail(clear, 5, background="#ff0000").getpixel((2, 2)) == (255, 0, 0)


def test_drawing_a_shift_uses_only_its_generator():
    random.seed(1)
    first = colour_shift(random.Random(5))
    random.seed(2)
    assert colour_shift(random.Random(5)) == first
