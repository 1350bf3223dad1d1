"""Small pictures for the dataset page, as data that stands in the page itself."""

import base64
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from os import cpu_count

from PIL import Image

from library.data.colours import alpha_of, first_channel
from library.data.decode import decode
from library.data.images import thumbnail
from library.io.places import read_bytes
from library.records import Sample

LONGEST = 360
"""Pixels of a thumbnail's longer side."""

_QUALITY = 72
_TINT = (236, 20, 120)
_STRONGEST = 0.5
_MOST_THREADS = 8


@dataclass(frozen=True)
class Thumbnail:
    """What is shown of a picture.

    Attributes:
        picture: The whole picture as a data URL; empty when it can't be read any more.
        mask: What its loss mask leaves out, tinted, as a data URL; empty without a mask.
        problem: Why there is no picture.
    """

    picture: str = ""
    mask: str = ""
    problem: str = ""


def make_thumbnails(
    wanted: Sequence[tuple[Sample, bool, str]], progress: Callable[[int, int], None] | None = None
) -> list[Thumbnail]:
    """This makes a thumbnail of each picture, several at a time.

    Args:
        wanted: Samples, whether their mask is shown, and the colour that transparent ones are laid on.
        progress: Is told how many of how many are done.
    """
    made = []
    with ThreadPoolExecutor(min(_MOST_THREADS, cpu_count() or 1)) as pool:
        for one in pool.map(lambda one: _thumbnail(*one), wanted):
            made.append(one)
            if progress is not None:
                progress(len(made), len(wanted))
    return made


def _thumbnail(sample: Sample, masked: bool, background: str) -> Thumbnail:
    try:
        data = read_bytes(sample.path)
        picture = thumbnail(data, LONGEST, background=background)
        mask = _mask(data, sample) if masked else None
    except OSError as error:
        return Thumbnail(problem=error.strerror or str(error))
    return Thumbnail(
        picture=_data_url(picture, "WEBP", quality=_QUALITY),
        mask="" if mask is None else _data_url(_tinted(mask.resize(picture.size)), "WEBP", lossless=True),
    )


def _mask(data: bytes, sample: Sample) -> Image.Image | None:
    """The loss mask in shades of grey: its file's first channel, or the picture's own transparency."""
    if sample.mask is not None:
        return first_channel(decode(read_bytes(sample.mask)).picture)
    return alpha_of(decode(data).picture)


def _tinted(mask: Image.Image) -> Image.Image:
    """A layer of colour over what the mask leaves out."""
    layer = Image.new("RGB", mask.size, _TINT)
    layer.putalpha(mask.point([round((255 - value) * _STRONGEST) for value in range(256)]))
    return layer


def _data_url(picture: Image.Image, kind: str, **options: object) -> str:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
