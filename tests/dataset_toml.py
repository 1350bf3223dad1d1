"""Reads dataset descriptions as a script does, with options by name."""

import dataclasses

from library.config.captions import CaptionConfig
from library.config.data import DataConfig
from library.config.dataset import read_datasets
from library.config.pictures import PictureConfig


def read_with(resolution_step=16, **options):
    """The datasets that these options describe."""
    groups = []
    for group in (DataConfig, PictureConfig, CaptionConfig):
        names = {field.name for field in dataclasses.fields(group)}
        groups.append(group(**{name: options.pop(name) for name in names & set(options)}))
    assert not options, f"no such options: {options}"
    return read_datasets(*groups, resolution_step=resolution_step)
