import re

import pytest

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.buckets import Placement
from library.records import Box, Resolution, Sample
from tools.inspection.cards import Card, Part, split_captions
from tools.inspection.dataset_section import _settings


class Reads:
    def __init__(self, characters):
        self.characters = characters

    def seen(self, captions):
        return [min(self.characters, len(caption)) for caption in captions]


@pytest.mark.parametrize(
    ("windows", "parts"),
    [
        ({}, [Part("abcdef")]),
        ({"A": 9}, [Part("abcdef")]),
        ({"A": 2}, [Part("ab"), Part("cdef", ("A",), True)]),
        ({"A": 0}, [Part("abcdef", ("A",), True)]),
        ({"A": 2, "B": 9}, [Part("ab"), Part("cdef", ("A",), False)]),
        ({"A": 4, "B": 2, "C": 2}, [Part("ab"), Part("cd", ("B", "C"), False), Part("ef", ("A", "B", "C"), True)]),
    ],
)
def test_captions_are_split_where_an_encoder_stops(windows, parts):
    assert split_captions(["abcdef"], {name: Reads(count) for name, count in windows.items()}) == [tuple(parts)]


def test_an_empty_caption_has_no_parts():
    assert split_captions([""], {"A": Reads(3)}) == [()]


def test_the_crop_of_a_card_is_a_share_of_the_whole_picture():
    sample = Sample("0/0/a.png", "a.png", "c", ("",), Resolution(400, 100), 0, 0)
    placement = Placement(Resolution(64, 32), Resolution(128, 32), Box(16, 0, 80, 32))
    card = Card(sample, placement, False, (), (), False, (), False, False, False)
    assert (card.crop.left, card.crop.top, card.crop.width, card.crop.height) == (0.125, 0.0, 0.5, 1.0)
    assert card.enlargement == 128 / 400


def test_settings_that_differ_from_the_default_are_listed():
    subset = SubsetConfig(image_dir="cats", is_reg=True, num_repeats=3, flip_aug=True, keep_tokens=0,
                          face_crop_aug_range=(2.0, 4.5), conditioning_data_dir="ma<sks")  # fmt: skip
    shown = re.sub(r"<[^>]+>", "|", _settings(subset))
    assert "|regularisation|" in shown and "masks in |ma&lt;sks|" in shown and "num_repeats |3|" in shown
    assert "|flip_aug|" in shown and "face_crop_aug_range |2, 4.5|" in shown and "keep_tokens" not in shown
    dataset = DatasetConfig(resolution=Resolution(512, 512), subsets=(), skip_image_resolution=Resolution(64, 64))
    assert re.sub(r"<[^>]+>", "|", _settings(dataset)) == "|skip_image_resolution |64x64||"
