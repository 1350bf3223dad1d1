import pytest
from PIL import Image

from library.sampling.grid import make_grid

RED, BLUE = (255, 0, 0), (0, 0, 255)


def count(sheet: Image.Image, colour) -> int:
    return sum(number for number, found in sheet.getcolors(sheet.width * sheet.height) if found == colour)


def test_every_picture_stands_whole_in_its_cell():
    rows = [[Image.new("RGB", (64, 32), RED), Image.new("RGB", (32, 64), BLUE)] for _ in range(2)]
    sheet = make_grid(rows, ["a", "b"], ["before", "after"])
    assert sheet.mode == "RGB"
    assert count(sheet, RED) == count(sheet, BLUE) == 2 * 64 * 32
    left = sheet.crop((0, 0, sheet.width // 2, sheet.height))
    assert (count(left, RED), count(left, BLUE)) == (2 * 64 * 32, 0)


def test_labels_take_room_and_are_drawn():
    picture = Image.new("RGB", (100, 50), RED)
    plain = make_grid([[picture]], [""], [""])
    labelled = make_grid([[picture]], ["a photo"], [""])
    long = make_grid([[picture]], ["a photo of a thing with a very long name indeed"], [""])
    assert plain.size == (116, 66)
    assert plain.height < labelled.height < long.height
    assert plain.width == labelled.width == long.width
    white_and_red = count(labelled, (255, 255, 255)) + count(labelled, RED)
    assert white_and_red < labelled.width * labelled.height


def test_wrong_shapes():
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="equally long"):
        make_grid([[picture], [picture, picture]], ["", ""], [""])
    with pytest.raises(ValueError, match="equally long"):
        make_grid([], [], [])
    with pytest.raises(ValueError, match="labels"):
        make_grid([[picture]], ["", ""], [""])
