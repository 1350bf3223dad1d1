import numpy as np
import pytest
import torch
from PIL import Image

from library.config.dataset import DatasetConfig
from library.data.buckets import Placement, place
from library.data.images import load_pixels
from library.data.masks import load_mask
from library.records import Box, Resolution
from tests.picture_files import encoded, exif, grey_profile, png

STRIDE = 8


def whole(width, height):
    return Placement(Resolution(width, height), Resolution(width, height), Box(0, 0, width, height))


def disc(width, height):
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1.2, 0.8, height))
    return Image.fromarray(((x**2 + y**2 < 0.4) * 255).astype(np.uint8))


def mask_of(picture, placement=None, kind="PNG", *, flipped=False, stride=STRIDE, alpha=False, **options):
    placement = placement or whole(*picture.size)
    return load_mask(encoded(picture, kind, **options), placement, flipped, stride=stride, alpha=alpha)


def test_a_mask_is_the_mean_over_each_latent_position():
    values = np.random.default_rng(0).integers(0, 256, (16, 24)).astype(np.uint8)
    mask = mask_of(Image.fromarray(values))
    assert mask.shape == (1, 2, 3) and mask.dtype == torch.uint8 and mask.is_contiguous()
    means = values.reshape(2, 8, 3, 8).mean(axis=(1, 3))
    assert np.abs(mask[0].numpy() - means).max() <= 0.5
    assert mask_of(Image.new("L", (16, 16), 255)).eq(255).all() and mask_of(Image.new("L", (16, 16), 0)).eq(0).all()


@pytest.mark.parametrize("size", [(700, 500), (100, 60), (60, 400), (333, 217)])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("scale", [1, 0.5, 2])
def test_a_mask_goes_where_its_picture_goes(size, flipped, scale):
    dataset = DatasetConfig(resolution=Resolution(256, 256), min_bucket_reso=64, max_bucket_reso=512, subsets=())
    placement = place(Resolution(*size), dataset, 16)
    white = disc(*size)
    picture = encoded(Image.merge("RGB", [white] * 3), "PNG")
    pixels = (load_pixels(picture, placement, flipped)[:1] + 1) / 2
    expected = torch.nn.functional.avg_pool2d(pixels, STRIDE) * 255
    other_size = tuple(round(side * scale) for side in size)
    mask = mask_of(disc(*other_size), placement, flipped=flipped)
    assert mask.shape == expected.shape and 0.05 < (mask > 127).float().mean() < 0.9
    assert (mask.float() - expected).abs().mean() < (3 if scale == 1 else 12)
    if scale == 1:
        assert (mask.float() - expected.flip(-2)).abs().mean() > 20  # the disc is not in the middle


def test_a_mask_is_mirrored_with_its_picture():
    values = np.zeros((16, 32), dtype=np.uint8)
    values[:, :8] = 255
    plain, flipped = (mask_of(Image.fromarray(values), flipped=flipped) for flipped in (False, True))
    assert plain[0, 0].tolist() == [255, 0, 0, 0] and flipped[0, 0].tolist() == [0, 0, 0, 255]
    assert flipped.is_contiguous()


def test_a_mask_is_upright():
    values = np.zeros((16, 32), dtype=np.uint8)
    values[:8, :8] = 255
    mask = mask_of(Image.fromarray(values), whole(16, 32), exif=exif(6))
    assert mask.shape == (1, 4, 2) and mask[0, 0].tolist() == [0, 255] and mask.sum() == 255


def test_masks_of_every_kind_of_colours():
    level = 200
    grey = Image.new("L", (16, 16), level)
    assert mask_of(grey).eq(level).all()
    assert mask_of(Image.new("RGB", (16, 16), (level, 0, 7))).eq(level).all()
    assert mask_of(Image.new("RGBA", (16, 16), (level, 0, 7, 3))).eq(level).all()
    assert mask_of(Image.new("LA", (16, 16), (level, 0))).eq(level).all()
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, level, 9, 9])
    assert mask_of(palette).eq(level).all() and mask_of(palette, transparency=1).eq(level).all()
    bilevel = disc(16, 16).convert("1")
    assert torch.equal(mask_of(bilevel), mask_of(bilevel.convert("L")))
    rows = (b"\x00" + np.full(16, level * 257, dtype=">u2").tobytes()) * 16
    assert load_mask(png(16, 16, 16, 0, rows), whole(16, 16), False, stride=8, alpha=False).eq(level).all()
    assert (mask_of(grey, kind="JPEG").int() - level).abs().max() <= 2
    assert mask_of(grey, kind="BMP").eq(level).all()


def test_a_mask_holds_numbers_not_colours():
    """A profile doesn't change it."""
    assert mask_of(Image.new("L", (16, 16), 55), icc_profile=grey_profile(1.0)).eq(55).all()


def test_a_pictures_own_opacity_is_its_mask():
    opacity = disc(64, 48)
    picture = Image.merge("RGBA", [Image.new("L", (64, 48), 90)] * 3 + [opacity])
    expected = mask_of(opacity)
    assert torch.equal(mask_of(picture, alpha=True), expected) and 0 < expected.float().mean() < 255
    assert torch.equal(mask_of(picture, kind="WEBP", alpha=True, lossless=True), expected)
    assert torch.equal(mask_of(picture.convert("LA"), alpha=True), expected)
    crop = Placement(Resolution(32, 48), Resolution(64, 48), Box(32, 0, 64, 48))
    assert torch.equal(mask_of(picture, crop, alpha=True), expected[..., 4:])
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert mask_of(palette, alpha=True, transparency=1).eq(0).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_without_transparency_everything_is_trained(kind):
    mask = mask_of(Image.new("RGB", (32, 16), (0, 0, 0)), kind=kind, alpha=True)
    assert mask.shape == (1, 2, 4) and mask.dtype == torch.uint8 and mask.eq(255).all()


def test_a_masks_two_values_stay_apart_when_it_grows():
    values = np.zeros((4, 4), dtype=np.uint8)
    values[:, 2:] = 255
    assert set(mask_of(Image.fromarray(values), whole(64, 64)).unique().tolist()) == {0, 255}


def test_a_bucket_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="20x16 has no whole number of latent positions of 8 pixels"):
        mask_of(disc(20, 16))


def test_masks_come_from_files_and_bytes(tmp_path):
    path = tmp_path / "a.png"
    disc(32, 32).save(path)
    masks = [
        load_mask(source, whole(32, 32), False, stride=8, alpha=False)
        for source in (path, str(path), path.read_bytes())
    ]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(OSError, match="the file ends too early"):
        load_mask(path, whole(32, 32), False, stride=8, alpha=False)
