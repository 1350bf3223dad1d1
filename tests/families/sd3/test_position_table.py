import math

import pytest
import torch

from library.families.sd3.position_table import (
    centre_offset,
    crop,
    random_offsets,
    scaled_side,
    scaled_size,
    scaled_table,
    sincos_table,
    token_side,
)
from library.records import Resolution


def numbered(size):
    """A table whose two channels tell row and column."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([row, column], dim=-1).reshape(1, size * size, 2)


@pytest.mark.reference
@pytest.mark.parametrize("size", [192, 384, 17])
def test_the_table_equals_that_of_diffusers(size):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    theirs = embeddings.PatchEmbed(128, 128, patch_size=2, in_channels=4, embed_dim=24, pos_embed_max_size=size)
    assert torch.allclose(sincos_table(size, 24), theirs.pos_embed, rtol=0, atol=1e-6)


def test_the_first_half_of_the_channels_tells_the_column():
    table = sincos_table(8, 12).view(8, 8, 12)
    assert torch.equal(table[0, :, :6], table[5, :, :6])
    assert torch.equal(table[:, 0, 6:], table[:, 5, 6:])
    assert table[3, 2, 0].item() == pytest.approx(math.sin(2 * 64 / 8))
    assert table[3, 2, 9].item() == pytest.approx(math.cos(3 * 64 / 8))


def test_the_default_crop_is_the_middle():
    rows, columns = crop(numbered(9), 4, 3).view(4, 3, 2).unbind(-1)
    assert rows[:, 0].tolist() == [2, 3, 4, 5]
    assert columns[0].tolist() == [3, 4, 5]
    assert crop(numbered(9), 9, 9).equal(numbered(9))


def test_every_sample_gets_its_own_window():
    offsets = torch.tensor([[0, 6], [5, 0], list(centre_offset(9, 4, 3))])
    windows = crop(numbered(9), 4, 3, offsets)
    assert windows.shape == (3, 12, 2)
    for window, (top, left) in zip(windows, offsets.tolist()):
        assert window[0].tolist() == [top, left]
        assert window[1].tolist() == [top, left + 1]
        assert window[-1].tolist() == [top + 3, left + 2]
    assert torch.equal(windows[2:], crop(numbered(9), 4, 3))


def test_random_offsets_reach_every_window_and_none_beyond():
    uniform = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offsets = random_offsets(uniform, 9, 4, 9)
    assert torch.bincount(offsets[:, 0]).tolist() == pytest.approx([4000 / 6] * 6, rel=0.15)
    assert offsets[:, 1].unique().tolist() == [0]
    ends = random_offsets(torch.tensor([[2.0**-53, 1 - 2.0**-53]], dtype=torch.float64), 9, 4, 4)
    assert ends.tolist() == [[0, 5]]
    crop(numbered(9), 4, 9, offsets)


@pytest.mark.parametrize("offsets", [[[-1, 0]], [[0, 7]], [[6, 0]]])
def test_a_window_beyond_the_edge_is_refused(offsets):
    with pytest.raises(ValueError, match=r"are not between 0 and \[5, 6\]"):
        crop(numbered(9), 4, 3, torch.tensor(offsets))


def test_a_window_larger_than_the_table_is_refused():
    for cut in (lambda: crop(numbered(9), 10, 3), lambda: random_offsets(torch.rand(1, 2), 9, 10, 3)):
        with pytest.raises(ValueError, match="10x3 tokens do not fit into a position table of 9x9"):
            cut()


def test_a_scaled_table_has_the_same_values_in_its_middle_at_every_resolution():
    """A square of native size covers positions 0 to 16, whatever its number of tokens."""
    for side in (32, 48, 64):
        square = scaled_table([side], side, side, 8).view(side, side, 8)
        assert square[0, 0, 0].item() == pytest.approx(0.0, abs=1e-6)
        assert square[0, side // 2, 0].item() == pytest.approx(math.sin(8), abs=1e-6)
        assert square[side // 4, 0, 4].item() == pytest.approx(math.sin(4), abs=1e-6)
    wide = scaled_table([32], 16, 48, 8).view(16, 48, 8)
    assert wide[0, 0, 0].item() == pytest.approx(math.sin(-8 * 16 / 32), abs=1e-6)
    assert wide[0, 0, 4].item() == pytest.approx(math.sin(8 * 16 / 32), abs=1e-6)


def test_windows_of_the_scaled_table_are_those_of_the_whole():
    whole = scaled_table([8], 12, 12, 8)
    assert scaled_size(8) == 12
    offsets = torch.tensor([[1, 7], [4, 0]])
    assert torch.allclose(scaled_table([8], 7, 5, 8, offsets=offsets), crop(whole, 7, 5, offsets), atol=1e-6)
    assert torch.allclose(scaled_table([8], 7, 5, 8), crop(whole, 7, 5), atol=1e-6)
    with pytest.raises(ValueError, match="not between 0 and"):
        scaled_table([8], 7, 5, 8, offsets=torch.tensor([[6, 0]]))


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [
        (32, 32, 48),
        (50, 64, 48),  # 3200 = (48^2 + 64^2) / 2, the border
        (51, 63, 64),
        (64, 64, 64),
        (96, 96, 64),
        (97, 96, 97),  # larger than any table
        (24, 72, 48),
        (24, 73, 73),  # too wide for the table of 48, which has 72 columns
        (1, 2304, 2304),
    ],
)
def test_the_scaled_table_is_that_of_the_nearest_resolution(height, width, side):
    assert scaled_side([64, 48, 64], height, width) == side


def test_token_side_is_that_of_the_square_of_equal_area():
    assert token_side(Resolution(1024, 1024), 16) == 64
    assert token_side(Resolution(2048, 512), 16) == 64
    assert token_side(Resolution(768, 768), 16) == 48
