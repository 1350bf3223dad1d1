"""Folders of small pictures with captions, and what is found in them."""

import pytest
from PIL import Image

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.errors import ConfigError
from library.data.discovery import Discovery, discover
from library.records import Resolution


def fill(folder, count=0, *, names=(), captions=True, first_colour=0, size=None):
    """Pictures of different colours, 4 or 5 pixels wide and 3 high, each with a caption file."""
    folder.mkdir(exist_ok=True, parents=True)
    for number, name in enumerate([*names, *(f"{number:03}.png" for number in range(count))]):
        colour = first_colour + number
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        shape = size or (4 + number % 2, 3)
        Image.new("RGB", shape, (colour % 256, colour // 256, 7)).save(folder / name)
        if captions:
            (folder / name).with_suffix(".txt").write_text(f"caption of {name}\n", encoding="utf-8")
    return str(folder)


def dataset(*subsets: SubsetConfig, **settings) -> DatasetConfig:
    return DatasetConfig(resolution=Resolution(64, 64), subsets=subsets, **settings)


def find(*subsets: SubsetConfig, **settings) -> Discovery:
    """What is found in one dataset of these subsets."""
    return discover([dataset(*subsets)], **settings)


def keys(samples) -> list[str]:
    return [sample.key for sample in samples]


def captions_of(found: Discovery) -> list[tuple[str, ...]]:
    return [sample.captions for sample in found.samples]


def problems_of(*datasets: DatasetConfig, **settings) -> list[str]:
    """The lines of the error that looking at these datasets ends with."""
    with pytest.raises(ConfigError) as caught:
        discover(datasets, **settings)
    return str(caught.value).splitlines()
