import io

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.dataset import DatasetConfig
from library.data.buckets import Placement, place
from library.data.images import load_pixels, open_picture, resize
from library.records import Box, Resolution


def whole(width, height):
    return Placement(Resolution(width, height), Resolution(width, height), Box(0, 0, width, height))


def saved(picture, tmp_path, name="a.png", **options):
    path = tmp_path / name
    picture.save(path, **options)
    return path


def gradient(width, height):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def test_pixels_are_planes_from_minus_one_to_one(tmp_path):
    picture = Image.new("RGB", (4, 2), (0, 255, 51))
    pixels = load_pixels(saved(picture, tmp_path), whole(4, 2), False)
    assert pixels.shape == (3, 2, 4) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels[:, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])


def test_flipping_mirrors_left_to_right_after_cropping(tmp_path):
    path = saved(gradient(64, 48), tmp_path)
    placement = place(
        Resolution(64, 48), DatasetConfig(resolution=Resolution(32, 32), enable_bucket=False, subsets=()), 16
    )
    plain, flipped = load_pixels(path, placement, False), load_pixels(path, placement, True)
    assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)
    assert flipped.is_contiguous()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = gradient(6, 4)
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> transposition that undoes it
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(stored, tmp_path, exif=exif)
    assert np.array_equal(np.asarray(open_picture(path)), np.asarray(upright))


def test_transparency_lies_on_white_and_hidden_colours_stay_hidden(tmp_path):
    picture = Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(255, 0, 0, 0), (255, 0, 0, 255), (0, 0, 0, 128)]):
        picture.putpixel((x, 0), colour)
    rgb = open_picture(saved(picture, tmp_path))
    assert [rgb.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (255, 0, 0), (127, 127, 127)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 9, 9])
    assert open_picture(saved(palette, tmp_path, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.new("LA", (1, 1), (10, 0))
    assert open_picture(saved(grey, tmp_path)).getpixel((0, 0)) == (255, 255, 255)


def test_unusual_modes_become_rgb(tmp_path):
    assert open_picture(saved(Image.new("L", (2, 2), 100), tmp_path)).getpixel((0, 0)) == (100, 100, 100)
    assert open_picture(saved(Image.new("1", (2, 2), 1), tmp_path)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1))
    palette.putpalette([1, 2, 3])
    assert open_picture(saved(palette, tmp_path)).getpixel((0, 0)) == (1, 2, 3)
    cmyk = Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK")
    assert open_picture(saved(cmyk, tmp_path, "a.jpg", quality=100)).getpixel((4, 4)) == pytest.approx(
        (200, 30, 60), abs=4
    )


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    rgb = open_picture(saved(Image.fromarray(values), tmp_path))
    assert [rgb.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    assert rgb.mode == "RGB"


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
    kernel = Image.Resampling.LANCZOS if enlarged else Image.Resampling.BOX
    everything = np.asarray(picture.resize(tuple(placement.resized), kernel).crop(placement.crop)).astype(int)
    assert np.abs(np.asarray(resize(picture, placement)).astype(int) - everything).max() <= 1


def test_shrinking_averages_and_does_not_alias():
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (64, 32)))
    small = np.asarray(resize(stripes, whole(16, 16)))
    assert small.min() >= 127 and small.max() <= 128


def test_an_extreme_shape_does_not_need_the_memory_of_its_resized_form():
    config = DatasetConfig(resolution=Resolution(64, 64), min_bucket_reso=64, bucket_reso_steps=64, subsets=())
    placement = place(Resolution(1, 60_000), config, 16)
    assert placement.resized.area > 100_000_000  # 700 MB as RGB
    assert resize(Image.new("RGB", (1, 60_000)), placement).size == tuple(placement.bucket)


def test_whatever_is_wrong_with_a_file_is_an_os_error(tmp_path):
    buffer = io.BytesIO()
    gradient(64, 64).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    for broken in (b"", b"hello", data[: len(data) // 2], bytes(data[:20]) + b"\xff\xff\xff" + bytes(data[23:])):
        (tmp_path / "broken.png").write_bytes(broken)
        with pytest.raises(OSError):
            open_picture(tmp_path / "broken.png")
