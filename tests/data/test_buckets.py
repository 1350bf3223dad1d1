import math
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.errors import ConfigError
from library.data.buckets import bucket_resolutions, exclusion, place, place_all, vary
from library.data.shapes import nearest_shape
from library.randomness import python_random
from library.records import Box, Resolution, Sample


def dataset(resolution=1024, **settings):
    sides = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    return DatasetConfig(resolution=Resolution(*sides), subsets=(), **settings)


def sample(number=0, size=(64, 64), *, dataset=0, content=None, focus=None):
    name = f"{number}.png"
    content = f"content {number}" if content is None else content
    return Sample(f"{dataset}/0/{name}", name, content, ("",), Resolution(*size), dataset, 0, focus=focus)


def turned(size):
    return Resolution(size[1], size[0])


def size_of(box):
    return Resolution(box.right - box.left, box.bottom - box.top)


@pytest.mark.parametrize(
    ("side", "minimum", "maximum", "count"),
    [(512, 256, 1024, 17), (1024, 256, 1024, 25), (1024, 256, 2048, 41), (1024, 512, 2048, 33)],
)
def test_the_buckets_are_kohyas(side, minimum, maximum, count):
    assert len(bucket_resolutions(Resolution(side, side), minimum, maximum, 64)) == count


@given(
    resolution=st.tuples(st.integers(64, 2000), st.integers(64, 2000)),
    limits=st.sampled_from([(64, 512), (256, 1024), (512, 2048), (64, 8192)]),
    step=st.sampled_from([16, 32, 64]),
)
def test_buckets_keep_to_their_limits(resolution, limits, step):
    minimum, maximum = limits
    assume(minimum <= min(resolution) and max(resolution) <= maximum)
    buckets = bucket_resolutions(Resolution(*resolution), minimum, maximum, step)
    assert list(buckets) == sorted(set(buckets))
    assert max(bucket.area for bucket in buckets) <= resolution[0] * resolution[1]
    assert {turned(bucket) for bucket in buckets} == set(buckets)
    assert len({Fraction(*bucket) for bucket in buckets}) == len(buckets)  # so the nearest shape of a bucket is itself
    square = next(bucket for bucket in buckets if bucket.width == bucket.height)
    for bucket in buckets:
        assert bucket.width % step == bucket.height % step == 0
        assert bucket == square or (minimum <= min(bucket) and max(bucket) <= maximum)


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
    ],
)
@pytest.mark.parametrize("selection", ["log", "ratio"])
def test_choice_with_upscaling(size, bucket, resized, selection):
    placement = place(Resolution(*size), dataset(bucket_selection=selection), 16)
    assert (placement.bucket, placement.resized) == (bucket, resized)


def test_a_tie_of_plain_ratios_is_none_of_their_logarithms():
    # 16:15 is as far from 1:1 as from 17:15, but not as many times
    assert place(Resolution(1024, 960), dataset(bucket_selection="ratio"), 16).bucket == (1024, 1024)
    assert place(Resolution(1024, 960), dataset(), 16).bucket == (1088, 960)


def test_the_crop_is_the_centre():
    assert place(Resolution(1920, 1080), dataset(), 16).crop == Box(10, 0, 1354, 768)
    assert place(Resolution(1080, 1920), dataset(), 16).crop == Box(0, 10, 768, 1354)


def test_kohyas_rule_cuts_more_from_upright_pictures():
    narrow, broad = Resolution(384, 640), Resolution(448, 576)  # 0.6 and 0.778: plain middle 0.689, of logarithms 0.683
    between = Resolution(686, 1000)
    assert nearest_shape(between, (narrow, broad), "ratio") == narrow
    assert nearest_shape(between, (narrow, broad), "log") == broad
    lying, wide, less_wide = turned(between), turned(narrow), turned(broad)  # 1.458; 1.667 and 1.286, middle 1.476
    assert nearest_shape(lying, (wide, less_wide), "ratio") == less_wide
    assert nearest_shape(lying, (wide, less_wide), "log") == less_wide


def test_ties_are_decided():
    half, double, square = Resolution(64, 128), Resolution(128, 64), Resolution(100, 100)
    wide = Resolution(96, 108)  # the middle of 1:2 and 8:9 is 2:3
    assert nearest_shape(Resolution(200, 300), (half, wide), "log") == wide  # the one nearer to a square
    assert nearest_shape(Resolution(300, 200), (double, turned(wide)), "log") == turned(wide)
    assert nearest_shape(Resolution(300, 400), (half, square), "ratio") == half  # the first in order of width
    assert nearest_shape(Resolution(300, 400), (square, half), "ratio") == half
    small = Resolution(32, 64)  # of equal shapes the larger, and kohya's first
    assert nearest_shape(Resolution(5, 10), (small, half), "log") == half
    assert nearest_shape(Resolution(5, 10), (half, small), "ratio") == small
    assert nearest_shape(Resolution(7, 7), (half, double), "log") == half


def kohya_bucket(size, buckets):
    """Its rule in floating point, as documented."""
    if size in buckets:
        return size
    return min(buckets, key=lambda bucket: abs(bucket.width / bucket.height - size.width / size.height))


def kohya_without_upscale(size, area, step):
    """The same: the bucket and the resized picture; None where it makes a bucket of nothing."""
    width, height = size
    ratio = width / height
    if width * height > area:

        def floored(side):
            return int(side + 0.5) - int(side + 0.5) % step

        ideal_width = math.sqrt(area * ratio)
        ideal_height = area / ideal_width
        by_width = (floored(ideal_width), floored(floored(ideal_width) / ratio))
        by_height = (floored(floored(ideal_height) * ratio), floored(ideal_height))
        if 0 in (*by_width, *by_height):
            return None
        errors = [abs(w / h - ratio) for w, h in (by_width, by_height)]
        if errors[0] < errors[1]:
            resized = (by_width[0], int(by_width[0] / ratio + 0.5))
        else:
            resized = (int(by_height[1] * ratio + 0.5), by_height[1])
    else:
        resized = (width, height)
    bucket = tuple(side - side % step for side in resized)
    return None if 0 in bucket else (bucket, resized)


sides = st.integers(1, 12_000)


@given(width=sides, height=sides, limits=st.sampled_from([(512, 256, 1024), (1024, 256, 2048), (1024, 512, 2048)]))
def test_ratio_is_kohyas_rule(width, height, limits):
    resolution, minimum, maximum = limits
    settings = {"min_bucket_reso": minimum, "max_bucket_reso": maximum, "bucket_selection": "ratio"}
    size = Resolution(width, height)
    buckets = bucket_resolutions(Resolution(resolution, resolution), minimum, maximum, 64)
    assert place(size, dataset(resolution, **settings), 16).bucket == kohya_bucket(size, buckets)


@given(width=sides, height=sides, resolution=st.sampled_from([512, 768, 1024]), step=st.sampled_from([32, 64]))
def test_ratio_without_upscaling_is_kohyas_rule(width, height, resolution, step):
    size = Resolution(width, height)
    expected = kohya_without_upscale(size, resolution**2, step)
    assume(expected is not None)  # kohya's buckets of nothing
    config = dataset(resolution, bucket_no_upscale=True, bucket_reso_steps=step, bucket_selection="ratio")
    placement = place(size, config, 16)
    assert (placement.bucket, placement.resized) == expected


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
@pytest.mark.parametrize("selection", ["log", "ratio"])
def test_choice_without_upscaling(size, bucket, resized, selection):
    placement = place(Resolution(*size), dataset(bucket_no_upscale=True, bucket_selection=selection), 16)
    assert (placement.bucket, placement.resized) == (bucket, resized)


@pytest.mark.parametrize("size", [(300, 200), (2000, 1000), (1000, 2000), (512, 768), (1, 1)])
def test_without_buckets_everything_gets_the_one_resolution(size):
    placement = place(Resolution(*size), dataset((512, 768), enable_bucket=False), 16)
    assert placement.bucket == Resolution(512, 768)
    assert placement.resized.width == 512 or placement.resized.height == 768


def test_ties_without_upscaling():
    config = {"bucket_no_upscale": True, "bucket_reso_steps": 32}
    # 15:16 is in the middle of 704:768 and 736:768, and kohya takes the one whose height it rounded first
    placement = place(Resolution(2040, 2176), dataset(768, bucket_selection="ratio", **config), 16)
    assert (placement.bucket, placement.resized) == ((704, 768), (720, 768))
    # both ways lead to one bucket, over one pixel more or less
    upright, lying = (place(Resolution(*size), dataset(768, **config), 16) for size in ((1921, 2691), (2691, 1921)))
    assert upright.bucket == turned(lying.bucket) == (640, 896)
    assert upright.resized == turned(lying.resized)


crops = st.fixed_dictionaries(
    {
        "crop": st.booleans(),
        "crop_aspect": st.sampled_from(["square", "preserve", "closest", "random"]),
        "maximum_image_size": st.none() | st.sampled_from([300.0, 700.0]),
    }
)
faces = st.none() | st.tuples(sides, sides, st.integers(1, 3000), st.integers(1, 3000))


@given(
    width=sides,
    height=sides,
    bucketing=st.sampled_from(["buckets", "no upscale", "table", "short side", "off"]),
    step=st.sampled_from([16, 32, 64]),
    selection=st.sampled_from(["log", "ratio"]),
    style=st.sampled_from(["center", "corner", "random", "face"]),
    crop=crops,
    content=st.text(max_size=3),
    focus=faces,
)
def test_every_picture_covers_a_bucket_that_the_model_can_take(
    width, height, bucketing, step, selection, style, crop, content, focus
):
    settings = {
        "buckets": {},
        "no upscale": {"bucket_no_upscale": True},
        "table": {"bucket_table": "aspect_512"},
        "short side": {"resolution_type": "pixel"},
        "off": {"enable_bucket": False},
    }[bucketing]
    config = dataset(
        512,
        min_bucket_reso=256,
        max_bucket_reso=1024,
        bucket_reso_steps=step,
        bucket_selection=selection,
        crop_style=style,
        crop_aspect_buckets=(0.5, 1.0, 1.33),
        target_downsample_size=250.0,
        **settings,
        **crop,
    )
    size = Resolution(width, height)
    bucket, resized, part = place(size, config, 16, content=content, focus=focus)
    if bucketing == "table" and not (config.crop and config.crop_aspect == "square"):
        step = 32
    assert bucket.width % step == bucket.height % step == 0
    assert min(bucket) >= step  # never 0
    assert resized.width >= bucket.width and resized.height >= bucket.height
    assert part.left >= 0 and part.top >= 0 and part.right <= resized.width and part.bottom <= resized.height
    assert size_of(part) == bucket
    # the picture's shape is kept, up to the rounding of its sides
    assert abs(resized.width * height - resized.height * width) <= max(width, height)
    one_shape = config.crop and config.crop_aspect != "preserve"
    if bucketing == "short side" and (one_shape or config.enable_bucket):
        assert min(bucket) == 512 and max(bucket) <= 1024
    elif bucketing != "no upscale" or one_shape:
        assert bucket.area <= 512 * 512
    elif min(width, height) >= step:
        assert resized.width <= width and resized.height <= height
    if (not config.crop or config.maximum_image_size is None) and (bucketing != "no upscale" or one_shape):
        assert resized.width == bucket.width or resized.height == bucket.height  # just covered


@given(
    width=sides,
    height=sides,
    bucketing=st.sampled_from([{}, {"bucket_no_upscale": True}, {"resolution_type": "pixel"}]),
    resolution=st.sampled_from([512, 1024, (832, 1216)]),
)
def test_a_turned_picture_gets_the_turned_bucket(width, height, bucketing, resolution):
    assume(not (resolution == (832, 1216) and "resolution_type" in bucketing))
    config = dataset(resolution, **bucketing)
    upright, lying = (place(Resolution(*size), config, 16) for size in ((width, height), (height, width)))
    assert upright.bucket == turned(lying.bucket) and upright.resized == turned(lying.resized)
    assert upright.crop == Box(lying.crop.top, lying.crop.left, lying.crop.bottom, lying.crop.right)


@given(width=sides, height=sides, selection=st.sampled_from(["log", "ratio"]))
def test_no_bucket_is_nearer_in_shape(width, height, selection):
    bucket = place(Resolution(width, height), dataset(512, bucket_selection=selection), 16).bucket
    buckets = bucket_resolutions(Resolution(512, 512), 256, 2048, 64)
    ratio = Fraction(width, height)

    def distance(other):
        shape = Fraction(other.width, other.height)
        return max(shape / ratio, ratio / shape) if selection == "log" else abs(shape - ratio)

    if Resolution(width, height) in buckets:
        assert bucket == (width, height)
    else:
        assert distance(bucket) == min(map(distance, buckets))


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((2000, 1000), (1024, 512), (1024, 512)),
        ((1000, 2000), (512, 1024), (512, 1024)),
        ((1000, 700), (704, 512), (731, 512)),
        ((1000, 1000), (512, 512), (512, 512)),
        ((1000, 990), (512, 512), (517, 512)),
        ((300, 100), (1536, 512), (1536, 512)),
        ((5000, 1000), (2048, 512), (2560, 512)),  # at most max_bucket_reso
    ],
)
def test_the_short_side_can_be_what_is_given(size, bucket, resized):
    placement = place(Resolution(*size), dataset(512, resolution_type="pixel"), 16)
    assert (placement.bucket, placement.resized) == (bucket, resized)


def test_the_short_side_is_a_multiple_of_the_bucket_step_too():
    placement = place(Resolution(2000, 1000), dataset(528, resolution_type="pixel"), 16)
    assert placement.bucket == (1024, 512)


@pytest.mark.parametrize(
    ("size", "settings", "reason"),
    [
        ((512, 512), {"skip_image_resolution": Resolution(512, 512)}, "at most the area of skip_image_resolution 512x"),
        ((1024, 256), {"skip_image_resolution": Resolution(512, 512)}, "1024x256 has at most the area"),
        ((513, 512), {"skip_image_resolution": Resolution(512, 512)}, None),
        (
            (300, 200),
            {"minimum_image_size": 512.0},
            "300x200 has the area of a square of 244.949, below minimum_image_",
        ),
        ((1024, 256), {"minimum_image_size": 512.0}, None),
        ((1023, 256), {"minimum_image_size": 512.0}, "511.75, below minimum_image_size 512"),
        ((1024, 256), {"minimum_image_size": 512.0, "resolution_type": "pixel"}, "a short side of 256, below"),
        ((9000, 512), {"minimum_image_size": 512.0, "resolution_type": "pixel"}, None),
        ((500, 500), {"minimum_image_size": 0.25, "resolution_type": "area"}, None),
        ((499, 500), {"minimum_image_size": 0.25, "resolution_type": "area"}, "0.2495 megapixels, below minimum_imag"),
        ((29, 100), {"minimum_aspect_ratio": 0.29, "maximum_aspect_ratio": 0.29}, None),
        ((28, 100), {"minimum_aspect_ratio": 0.29}, "has the aspect ratio 0.28, below minimum_aspect_ratio 0.29"),
        ((30, 100), {"maximum_aspect_ratio": 0.29}, "has the aspect ratio 0.3, above maximum_aspect_ratio 0.29"),
        ((1, 1), {}, None),
    ],
)
def test_pictures_are_left_out_for_their_size_and_shape(size, settings, reason):
    found = exclusion(Resolution(*size), dataset(**settings))
    assert found is None if reason is None else reason in found and found.startswith(f"{size[0]}x{size[1]} has")


def test_a_square_crop():
    for size in ((1920, 1080), (1080, 1920), (300, 300), (10, 2000)):
        assert place(Resolution(*size), dataset((832, 1216), crop=True), 16).bucket == (960, 960)
        pixel = dataset(1024, crop=True, resolution_type="pixel")
        assert place(Resolution(*size), pixel, 16).bucket == (1024, 1024)
        assert place(Resolution(*size), dataset(crop=True, bucket_no_upscale=True), 16).bucket == (1024, 1024)
    assert place(Resolution(1920, 1080), dataset(crop=True), 16).resized == (1820, 1024)


@given(width=sides, height=sides, no_upscale=st.booleans())
def test_a_crop_that_preserves_the_shape_is_a_bucket(width, height, no_upscale):
    size = Resolution(width, height)
    plain = dataset(bucket_no_upscale=no_upscale)
    cropped = dataset(bucket_no_upscale=no_upscale, crop=True, crop_aspect="preserve")
    assert place(size, cropped, 16) == place(size, plain, 16)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1000, 1000), (1024, 1024)),
        ((4000, 1000), (1216, 832)),
        ((1000, 4000), (704, 1408)),
        ((740, 1000), (1024, 1024)),
    ],
)
def test_the_closest_of_the_given_shapes(size, bucket):
    config = dataset(crop=True, crop_aspect="closest", crop_aspect_buckets=(0.5, 1.5, 1.0))
    # 0.74 is nearer to 0.5 (by 0.24) than to 1 (by 0.26), but not by its logarithm
    assert place(Resolution(*size), config, 16).bucket == bucket


def test_the_closest_shape_by_the_short_side():
    config = dataset(512, crop=True, crop_aspect="closest", crop_aspect_buckets=(0.5, 1.5), resolution_type="pixel")
    assert place(Resolution(300, 1000), config, 16).bucket == (512, 1024)
    assert place(Resolution(1000, 300), config, 16).bucket == (768, 512)


def test_a_random_shape_depends_on_the_content_alone():
    config = dataset(crop=True, crop_aspect="random", crop_aspect_buckets=(0.5, 1.0, 1.5))
    buckets = [place(Resolution(800, 800), config, 16, content=str(number)).bucket for number in range(300)]
    counts = {bucket: buckets.count(bucket) for bucket in set(buckets)}
    assert set(counts) == {(704, 1408), (1024, 1024), (1216, 832)}
    assert min(counts.values()) > 60
    assert [place(Resolution(99, 200), config, 16, content=str(number)).bucket for number in range(300)] == buckets


@pytest.mark.parametrize(
    ("size", "settings", "resized"),
    [
        # above the maximum: to the target
        ((3000, 2000), {"maximum_image_size": 1536.0, "target_downsample_size": 1280.0}, (1568, 1045)),
        (
            (3000, 2000),
            {"maximum_image_size": 1.6, "target_downsample_size": 1.5, "resolution_type": "area"},
            (1500, 1000),
        ),
        (
            (3000, 2000),
            {"maximum_image_size": 1200.0, "target_downsample_size": 1100.0, "resolution_type": "pixel"},
            (1650, 1100),
        ),
        # at most the maximum: as it is
        ((1500, 1100), {"maximum_image_size": 1536.0, "target_downsample_size": 1280.0}, (1500, 1100)),
        ((1536, 1536), {"maximum_image_size": 1536.0, "target_downsample_size": 1280.0}, (1536, 1536)),
        # but never so small that it doesn't cover its crop
        ((500, 800), {"maximum_image_size": 1536.0, "target_downsample_size": 1280.0}, (768, 1229)),
        ((3000, 2000), {"maximum_image_size": 800.0, "target_downsample_size": 600.0}, (1152, 768)),
    ],
)
def test_large_pictures_are_shrunk_before_they_are_cropped(size, settings, resized):
    placement = place(Resolution(*size), dataset(768, crop=True, crop_style="corner", **settings), 16)
    assert placement == ((768, 768), resized, (0, 0, 768, 768))


def test_crop_styles():
    size, face = Resolution(1920, 1080), (300, 400, 90, 90)  # resized to 1820 x 1024 and cut to 1024 x 1024
    settings = {"crop": True}

    def crop(style, focus=None, content=""):
        return place(size, dataset(crop_style=style, **settings), 16, content=content, focus=focus).crop

    assert crop("center") == Box(398, 0, 1422, 1024)
    assert crop("corner") == Box(0, 0, 1024, 1024)
    assert crop("face") == crop("center")
    assert crop("face", (900, 400, 90, 90)) == Box(341, 0, 1365, 1024)  # its middle at 900 * 1820 / 1920 = 853
    assert crop("face", face) == Box(0, 0, 1024, 1024)  # as near as the border allows
    assert crop("face", (1900, 400, 90, 90)) == Box(796, 0, 1820, 1024)
    assert crop("center", face) == crop("center")
    lefts = [crop("random", content=str(number)).left for number in range(200)]
    assert min(lefts) < 40 and max(lefts) > 756 and max(lefts) <= 796
    assert lefts == [crop("random", content=str(number)).left for number in range(200)]
    settings = {}  # buckets cut a little, too: 1365 to 1344
    assert crop("corner") == Box(0, 0, 1344, 768)
    assert {crop("random", content=str(number)).left for number in range(300)} == set(range(22))
    assert crop("face", face) == Box(0, 0, 1344, 768)


def test_a_random_crop_is_random_in_both_directions():
    config = dataset(512, crop=True, crop_style="random", maximum_image_size=2000.0, target_downsample_size=1000.0)
    crops = [place(Resolution(1000, 1000), config, 16, content=str(number)).crop for number in range(400)]
    for places in ([crop.left for crop in crops], [crop.top for crop in crops]):
        assert min(places) < 10 and 478 < max(places) <= 488
    apart = sum(abs(crop.left - crop.top) > 50 for crop in crops)
    assert apart > 200  # not one draw for both


def with_subset(config, **settings):
    return config, SubsetConfig(image_dir="pictures", **settings)


def test_without_variation_nothing_varies():
    config, subset = with_subset(dataset())
    size = Resolution(1920, 1080)
    placement = place(size, config, 16)
    assert vary(placement, size, config, subset, (5, 5, 5, 5), python_random(0)) is placement
    _, faces_only = with_subset(config, face_crop_aug_range=(2.0, 4.0))
    assert vary(placement, size, config, faces_only, None, python_random(0)) is placement


def test_a_random_crop_takes_every_place_alike():
    config, subset = with_subset(dataset(), random_crop=True)
    size = Resolution(1920, 1080)
    placement = place(size, config, 16)  # 22 places
    varied = [vary(placement, size, config, subset, None, python_random(number)) for number in range(4400)]
    assert {(one.bucket, one.resized) for one in varied} == {(placement.bucket, placement.resized)}
    upright = Resolution(1080, 1920)
    standing = place(upright, config, 16)
    tops = {vary(standing, upright, config, subset, None, python_random(number)).crop.top for number in range(300)}
    assert tops == set(range(22))
    counts = [sum(one.crop.left == left for one in varied) for left in range(22)]
    assert sum(counts) == 4400 and all(130 < count < 280 for count in counts)  # 200 expected
    assert vary(placement, size, config, subset, None, python_random(7)) == varied[7]


def window(placement, size):
    """What is cut, in pixels of the picture."""
    across, down = (own / scaled for own, scaled in zip(size, placement.resized))
    left, top, right, bottom = placement.crop
    return left * across, top * down, right * across, bottom * down


def test_a_crop_around_the_face():
    config, subset = with_subset(dataset(512, crop=True), face_crop_aug_range=(2.0, 4.0))
    size, face = Resolution(2000, 1500), (1000, 700, 100, 80)
    placement = place(size, config, 16)
    sides = []
    for number in range(300):
        varied = vary(placement, size, config, subset, face, python_random(number))
        left, top, right, bottom = window(varied, size)
        assert varied.bucket == placement.bucket
        assert (left + right) / 2 == pytest.approx(1000, abs=1) and (top + bottom) / 2 == pytest.approx(700, abs=1)
        sides.append(right - left)
    assert 199 <= min(sides) < 205 and 395 < max(sides) <= 401
    assert sum(side < 300 for side in sides) == pytest.approx(150, abs=35)  # uniform


def test_a_crop_around_the_face_stays_in_the_picture_and_in_the_shape():
    config, subset = with_subset(dataset(512), face_crop_aug_range=(3.0, 3.0))
    size = Resolution(3000, 1500)
    placement = place(size, config, 16)
    assert placement.bucket == (704, 320)
    near_corner = vary(placement, size, config, subset, (2990, 10, 100, 100), python_random(0))
    assert window(near_corner, size) == pytest.approx((3000 - 660, 0, 3000, 300), abs=2)
    too_large = vary(placement, size, config, subset, (1500, 750, 900, 900), python_random(0))
    assert too_large == placement


def test_a_face_is_not_enlarged_where_nothing_may_be():
    config, subset = with_subset(dataset(512, bucket_no_upscale=True), face_crop_aug_range=(1.0, 1.0))
    size = Resolution(3000, 1500)
    placement = place(size, config, 16)
    varied = vary(placement, size, config, subset, (1500, 750, 100, 100), python_random(0))
    assert varied.resized == size and size_of(varied.crop) == placement.bucket


@given(
    width=sides,
    height=sides,
    no_upscale=st.booleans(),
    crop=st.booleans(),
    random_crop=st.booleans(),
    focus=faces,
    low=st.floats(1, 20),
    seed=st.integers(0, 2**32),
)
def test_variations_stay_inside(width, height, no_upscale, crop, random_crop, focus, low, seed):
    config, subset = with_subset(
        dataset(512, bucket_no_upscale=no_upscale and not crop, crop=crop),
        random_crop=random_crop,
        face_crop_aug_range=None if random_crop else (low, 2 * low),
    )
    size = Resolution(width, height)
    placement = place(size, config, 16)
    varied = vary(placement, size, config, subset, focus, python_random(seed))
    assert varied == vary(placement, size, config, subset, focus, python_random(seed))
    assert varied.bucket == placement.bucket == size_of(varied.crop)
    assert varied.crop.left >= 0 and varied.crop.right <= varied.resized.width
    assert varied.crop.top >= 0 and varied.crop.bottom <= varied.resized.height
    assert abs(varied.resized.width * height - varied.resized.height * width) <= max(width, height)
    if config.bucket_no_upscale and min(width, height) >= 64:
        assert varied.resized.width <= width and varied.resized.height <= height


def test_all_pictures_are_placed_as_each_would_be():
    datasets = [
        dataset(512),
        dataset(1024, crop_style="random"),
        dataset(768, crop=True, crop_style="face"),
        dataset(768, crop=True, crop_aspect="random", crop_aspect_buckets=(0.5, 2.0)),
    ]
    sizes = [(1000, 700), (640, 640), (700, 1000)]
    faces = [None, (300, 300, 50, 50), (600, 600, 20, 20)]
    samples = [
        sample(number, sizes[number % 3], dataset=number % 4, focus=faces[number // 3 % 3]) for number in range(120)
    ]
    placements = place_all(samples, datasets, 16)
    assert placements == tuple(
        place(one.size, datasets[one.dataset], 16, content=one.content, focus=one.focus) for one in samples
    )
    assert len(set(placements)) > 30
    assert len({id(placement) for placement in placements}) == len(set(placements))


def test_a_hundred_thousand_pictures_are_placed_at_once():
    sizes = [Resolution(500 + number % 40 * 37, 400 + number // 40 * 53) for number in range(1000)]
    samples = [sample(number % 1000, sizes[number % 1000], content="") for number in range(100_000)]
    start = time.process_time()
    placements = place_all(samples, [dataset()], 16, 4096)
    assert time.process_time() - start < 10  # CPU seconds; 0.05 on an idle core
    shared = {id(placement): placement for placement in placements}
    assert len(shared) <= 1000
    assert sys.getsizeof(placements) < 900_000


def test_sides_beyond_the_model_are_refused():
    samples = [sample(number, (4000, 500), dataset=number % 2) for number in range(6)]
    datasets = [dataset(), dataset(768, bucket_no_upscale=True)]
    assert place_all(samples, datasets, 16, 2048)
    with pytest.raises(ConfigError) as caught:
        place_all(samples, datasets, 16, 1200)
    assert str(caught.value).split("\n") == [
        "datasets[0]: the model's table of positions ends at 1200 pixels per side, and 3 of its pictures get more, "
        "such as 0.png (2048x256); set max_bucket_reso = 1152",
        "datasets[1]: the model's table of positions ends at 1200 pixels per side, and 3 of its pictures get more, "
        "such as 1.png (2048x256); lower resolution",
    ]


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"bucket_table": "aspect_1024"}, "choose a bucket_table of smaller sizes"),
        ({"enable_bucket": False}, "lower resolution"),
        ({"crop": True}, "lower resolution"),
        ({"resolution_type": "pixel"}, "lower resolution"),
    ],
)
def test_what_to_do_about_sides_beyond_the_model(settings, remedy):
    with pytest.raises(ConfigError, match=remedy):
        place_all([sample(size=(4000, 1000))], [dataset(**settings)], 16, 960)


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
