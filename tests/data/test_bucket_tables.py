import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config.dataset import DatasetConfig
from library.config.pictures import BUCKET_TABLES
from library.data.bucket_tables import table_resolutions, table_step
from library.data.buckets import place
from library.records import Resolution

SIDES = {512: 0.5, 256: 0.25, 1024: 1, 2048: 2, 4096: 4}


@pytest.mark.parametrize(("name", "side"), BUCKET_TABLES.items())
def test_every_table_has_forty_sizes_around_its_square(name, side):
    sizes = table_resolutions(name)
    assert len(set(sizes)) == len(sizes) == 40 and list(sizes) == sorted(sizes)
    assert Resolution(side, side) in sizes
    assert max(size.area for size in sizes) <= side**2
    assert min(size.area for size in sizes) >= 0.87 * side**2
    ratios = [size.width / size.height for size in sizes]
    assert min(ratios) < 0.28 and 4.0 <= max(ratios) < 4.1


@pytest.mark.parametrize(("name", "lonely"), [("aspect_1024", (1344, 704)), ("aspect_2880", (3776, 1920))])
def test_all_sizes_but_one_have_their_turned_form(name, lonely):
    sizes = set(table_resolutions(name))
    assert {size for size in sizes if (size.height, size.width) not in sizes} == {lonely}


@pytest.mark.parametrize(("side", "factor"), SIDES.items())
def test_the_tables_are_that_for_1024_scaled(side, factor):
    whole = table_resolutions("aspect_1024")
    assert table_resolutions(f"aspect_{side}") == tuple((w * factor, h * factor) for w, h in whole)


def test_what_the_sides_are_multiples_of():
    steps = {name: table_step(name) for name in BUCKET_TABLES}
    assert steps == {f"aspect_{side}": 64 * side // 1024 for side in SIDES} | {"aspect_2880": 64}


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="no bucket table aspect_3; there are aspect_256"):
        table_resolutions("aspect_3")


LEFT_OUT = {(512, 1856), (512, 1920), (512, 1984), (576, 1664), (576, 1792), (1920, 512), (1984, 512)}


@pytest.mark.reference
@pytest.mark.parametrize(
    ("module", "table", "side", "missing"),
    [
        ("sana.pipeline_sana", "ASPECT_RATIO_4096_BIN", 4096, set()),
        ("pixart_alpha.pipeline_pixart_sigma", "ASPECT_RATIO_2048_BIN", 2048, set()),
        ("pixart_alpha.pipeline_pixart_alpha", "ASPECT_RATIO_1024_BIN", 1024, LEFT_OUT),
        ("pixart_alpha.pipeline_pixart_alpha", "ASPECT_RATIO_512_BIN", 512, LEFT_OUT),
        ("pixart_alpha.pipeline_pixart_alpha", "ASPECT_RATIO_256_BIN", 256, LEFT_OUT),
    ],
)
def test_the_tables_are_those_of_diffusers(module, table, side, missing):
    pipelines = pytest.importorskip(f"diffusers.pipelines.{module}")
    published = {(int(width), int(height)) for height, width in getattr(pipelines, table).values()}
    own = set(table_resolutions(f"aspect_{side}"))
    assert published <= own
    assert {(w * 1024 // side, h * 1024 // side) for w, h in own - published} == missing


@given(
    width=st.integers(1, 12_000),
    height=st.integers(1, 12_000),
    name=st.sampled_from(sorted(BUCKET_TABLES)),
    selection=st.sampled_from(["log", "ratio"]),
)
def test_a_picture_gets_the_nearest_size_of_the_table(width, height, name, selection):
    side = BUCKET_TABLES[name]
    dataset = DatasetConfig(
        resolution=Resolution(side, side), bucket_table=name, bucket_selection=selection, subsets=()
    )
    bucket = place(Resolution(width, height), dataset, 16).bucket
    sizes = table_resolutions(name)
    assert bucket in sizes

    def distance(size):
        if selection == "log":  # what the logarithm's distance rises with
            quotient = (size.width * height) / (size.height * width)
            return max(quotient, 1 / quotient)
        return abs(size.width / size.height - width / height)

    if (width, height) in sizes:
        assert bucket == (width, height)
    else:
        assert distance(bucket) <= min(map(distance, sizes)) * (1 + 1e-12)


def test_a_table_that_the_model_cannot_take_is_refused():
    dataset = DatasetConfig(resolution=Resolution(256, 256), bucket_table="aspect_256", subsets=())
    assert place(Resolution(300, 300), dataset, 16).bucket == (256, 256)
    with pytest.raises(ValueError, match="bucket_table aspect_256 are not all multiples of 32"):
        place(Resolution(300, 300), dataset, 32)
