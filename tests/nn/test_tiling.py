import pytest
import torch
import torch.nn.functional as F

from library.nn.tiling import decode_in_tiles

STRIDE = 4


def enlarge(latents):
    return F.interpolate(latents, scale_factor=STRIDE, mode="nearest")


def blurred(latents):
    """A decoder whose pixels depend on two latents around them, and on the missing ones at an edge."""
    kernel = torch.ones(1, 1, 5, 5) / 25
    return enlarge(F.conv2d(latents, kernel, padding=2))


def noise(height, width):
    return torch.randn(2, 1, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (40, 16), (16, 64), (37, 53), (25, 100)])
@pytest.mark.parametrize("decode", [enlarge, blurred])
def test_tiles_are_the_whole_where_they_reach_far_enough(size, decode):
    latents = noise(*size)
    tiled = decode_in_tiles(decode, latents, stride=STRIDE, tile=16, overlap=8)
    torch.testing.assert_close(tiled, decode(latents))


def test_a_tile_is_all_that_is_ever_decoded():
    asked = []

    def decode(latents):
        asked.append(tuple(latents.shape[2:]))
        return enlarge(latents)

    decode_in_tiles(decode, noise(40, 24), stride=STRIDE, tile=16, overlap=4)
    assert set(asked) == {(16, 16)} and len(asked) == 6
    asked.clear()
    decode_in_tiles(decode, noise(16, 10), stride=STRIDE, tile=16, overlap=4)
    assert asked == [(16, 10)]


def test_tiles_that_disagree_fade_into_each_other():
    """As where a decoder looks at all of its tile: each tile has its own brightness."""
    levels = iter(range(100))

    def decode(latents):
        return enlarge(torch.full_like(latents, float(next(levels))))

    tiled = decode_in_tiles(decode, noise(16, 40), stride=STRIDE, tile=16, overlap=8)
    steps = tiled.diff(dim=3).abs()
    assert tiled[..., 0].unique() == 0 and tiled[..., -1].unique() == 3
    assert steps.max() < 1.01 / (8 / 2 * STRIDE), "the largest step is that of an even fade"


def test_the_type_is_that_of_the_decoder():
    tiled = decode_in_tiles(enlarge, noise(16, 40).bfloat16(), stride=STRIDE, tile=16, overlap=8)
    assert tiled.dtype == torch.bfloat16 and torch.equal(tiled, enlarge(noise(16, 40).bfloat16()))


@pytest.mark.parametrize("overlap", [0, 16, 20])
def test_overlaps_that_cannot_be_are_refused(overlap):
    with pytest.raises(ValueError, match="can't overlap"):
        decode_in_tiles(enlarge, noise(40, 40), stride=STRIDE, tile=16, overlap=overlap)
