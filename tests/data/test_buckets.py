import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config.dataset import DatasetConfig
from library.data.buckets import bucket_resolutions, place
from library.records import Box, Resolution


def dataset(resolution=1024, **settings):
    sides = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    return DatasetConfig(resolution=Resolution(*sides), subsets=(), **settings)


@pytest.mark.parametrize(
    ("side", "minimum", "maximum", "count"),
    [(512, 256, 1024, 17), (1024, 256, 1024, 25), (1024, 256, 2048, 41), (1024, 512, 2048, 33)],
)
def test_the_buckets_are_kohyas(side, minimum, maximum, count):
    assert len(bucket_resolutions(Resolution(side, side), minimum, maximum, 64)) == count


@pytest.mark.parametrize(("minimum", "maximum", "smallest"), [(256, 1024, 0.25), (256, 2048, 0.5), (512, 2048, 0.906)])
def test_how_much_area_the_limits_cost(minimum, maximum, smallest):
    areas = [bucket.area for bucket in bucket_resolutions(Resolution(1024, 1024), minimum, maximum, 64)]
    assert min(areas) / 1024**2 == pytest.approx(smallest, abs=0.001)


def test_a_resolution_that_is_not_square_starts_from_the_square_of_its_area():
    assert Resolution(576, 576) in bucket_resolutions(Resolution(512, 768), 256, 1024, 64)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((1920, 1080), (1344, 768), (1365, 768)),
        ((1080, 1920), (768, 1344), (768, 1365)),
        ((800, 600), (1152, 896), (1195, 896)),
        ((512, 512), (1024, 1024), (1024, 1024)),
        ((1344, 768), (1344, 768), (1344, 768)),
        ((1024, 960), (1024, 1024), (1092, 1024)),
    ],
)
def test_choice_with_upscaling(size, bucket, resized):
    placement = place(Resolution(*size), dataset(), 16)
    assert (placement.bucket, placement.resized) == (bucket, resized)


def test_the_crop_is_the_centre():
    assert place(Resolution(1920, 1080), dataset(), 16).crop == Box(10, 0, 1354, 768)
    assert place(Resolution(1080, 1920), dataset(), 16).crop == Box(0, 10, 768, 1354)


def test_shapes_are_compared_by_plain_ratio():
    # 0.74 lies between 768x1024 (0.75) and 704x960 (0.733): the same picture lying would be judged by 1/0.74
    chosen = place(Resolution(740, 1000), dataset(512), 16).bucket
    buckets = bucket_resolutions(Resolution(512, 512), 256, 2048, 64)
    assert chosen == min(buckets, key=lambda b: abs(b.width / b.height - 0.74))


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((4000, 500), (2560, 320), (2560, 320)),
        ((500, 4000), (320, 2560), (320, 2560)),
        ((3072, 3000), (960, 960), (983, 960)),
        ((1000, 700), (960, 640), (1000, 700)),
        ((1051, 1050), (1024, 1024), (1025, 1024)),
        ((1054, 3000), (576, 1600), (576, 1639)),
        ((64, 64), (64, 64), (64, 64)),
        # a side below one step: enlarged, where others make a bucket of 0
        ((100, 63), (64, 64), (102, 64)),
        ((63, 100), (64, 64), (64, 102)),
        ((1, 1), (64, 64), (64, 64)),
    ],
)
def test_choice_without_upscaling(size, bucket, resized):
    placement = place(Resolution(*size), dataset(bucket_no_upscale=True), 16)
    assert (placement.bucket, placement.resized) == (bucket, resized)


@pytest.mark.parametrize("size", [(300, 200), (2000, 1000), (1000, 2000), (512, 768), (1, 1)])
def test_without_buckets_everything_gets_the_one_resolution(size):
    placement = place(Resolution(*size), dataset((512, 768), enable_bucket=False), 16)
    assert placement.bucket == Resolution(512, 768)
    assert placement.resized.width == 512 or placement.resized.height == 768


sides = st.integers(1, 12_000)


@given(width=sides, height=sides, no_upscale=st.booleans(), enable=st.booleans(), step=st.sampled_from([16, 32, 64]))
def test_every_picture_covers_a_bucket_that_the_model_can_take(width, height, no_upscale, enable, step):
    config = dataset(
        512,
        min_bucket_reso=256,
        max_bucket_reso=1024,
        bucket_reso_steps=step,
        bucket_no_upscale=no_upscale,
        enable_bucket=enable,
    )
    bucket, resized, crop = place(Resolution(width, height), config, 16)
    assert bucket.width % step == bucket.height % step == 0
    assert min(bucket) >= step  # never 0
    assert resized.width >= bucket.width and resized.height >= bucket.height
    assert crop.left >= 0 and crop.top >= 0 and crop.right <= resized.width and crop.bottom <= resized.height
    assert (crop.right - crop.left, crop.bottom - crop.top) == bucket
    # the picture's shape is kept, up to the rounding of one side
    assert abs(resized.width * height - resized.height * width) <= max(width, height)
    if not no_upscale or not enable:
        assert bucket.area <= 512 * 512
    elif min(width, height) >= step:
        assert resized.width <= width and resized.height <= height


@given(width=sides, height=sides)
def test_no_bucket_is_nearer_in_shape(width, height):
    bucket = place(Resolution(width, height), dataset(512), 16).bucket
    buckets = bucket_resolutions(Resolution(512, 512), 256, 2048, 64)
    if Resolution(width, height) not in buckets:
        ratio = width / height
        assert abs(bucket.width / bucket.height - ratio) <= min(abs(b.width / b.height - ratio) for b in buckets) + 1e-9


def test_what_cannot_be_placed_is_refused():
    with pytest.raises(ValueError, match="no pixels"):
        place(Resolution(0, 10), dataset(), 16)
    with pytest.raises(ValueError, match="bucket_reso_steps 24 is not a multiple of 16"):
        place(Resolution(10, 10), dataset(bucket_reso_steps=24), 16)
    with pytest.raises(ValueError, match="not a multiple of 32"):
        place(Resolution(10, 10), dataset(528, enable_bucket=False), 32)
    with pytest.raises(ValueError, match="no bucket"):
        bucket_resolutions(Resolution(48, 48), 64, 128, 64)
    with pytest.raises(ValueError, match="multiples of the step"):
        bucket_resolutions(Resolution(512, 512), 100, 1024, 64)
