import pytest

from library.data.bucket_tables import table_resolutions
from library.records import Resolution
from library.sampling.binning import nearest_in_table


@pytest.mark.parametrize("table", ["aspect_512", "aspect_1024", "aspect_2048", "aspect_4096"])
def test_sizes_of_the_table_stay(table):
    for size in table_resolutions(table):
        assert nearest_in_table(table, size) == size


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((300, 300), (1024, 1024)), ((1920, 1080), (1344, 768)), ((1080, 1920), (768, 1344)), ((9000, 10), (2048, 512))],
)
def test_the_nearest_shape_counts_and_not_the_area(size, nearest):
    assert nearest_in_table("aspect_1024", Resolution(*size)) == nearest


@pytest.mark.reference
@pytest.mark.parametrize("side", [512, 1024, 2048, 4096])
def test_it_is_the_choice_of_diffusers(side):
    pytest.importorskip("diffusers")
    from diffusers.image_processor import PixArtImageProcessor
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
    from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

    bins = {
        512: ASPECT_RATIO_512_BIN,
        1024: ASPECT_RATIO_1024_BIN,
        2048: ASPECT_RATIO_2048_BIN,
        4096: ASPECT_RATIO_4096_BIN,
    }[side]
    sides = [*range(64, 4096, 67), 512, 768, 1024, 1152, 1280, 1920]
    sizes = [Resolution(width, height) for width in sides for height in sides]
    if side < 2048:  # their small tables leave out the longest shapes that the models were trained at
        sizes = [size for size in sizes if 0.3 < size.height / size.width < 2.6]
    assert len(sizes) > 2000
    for size in sizes:
        height, width = PixArtImageProcessor.classify_height_width_bin(size.height, size.width, ratios=bins)
        assert nearest_in_table(f"aspect_{side}", size) == (width, height), size
