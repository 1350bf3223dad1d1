"""Picture files to what the VAE sees: decoded, upright, in sRGB, resized, cropped, mirrored; and quick looks at them.

How files keep colours is in ``colours``, how they are decoded in ``decode``, what their headers say in ``headers``.
"""

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from library.data.colours import lay_on, split, to_srgb
from library.data.decode import Decoded, decode, peek_by_decoder
from library.data.headers import read_header
from library.records import Resolution

if TYPE_CHECKING:
    from torch import Tensor

    from library.config.dataset import SubsetConfig
    from library.data.buckets import Placement

_KERNELS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_SHRINKING = "hamming"
_GROWING = "lanczos"

_SPARE = {Image.Resampling.NEAREST: math.inf, Image.Resampling.BOX: 4.0}
"""How many times larger than wanted a JPEG must still be when it is decoded smaller than it is; 2 for other kernels.

Then the result differs from that of a full decode by less than resampling with another kernel would. Nearest takes
single pixels, and box treats neighbouring areas unequally, so both show more of what they are given."""

_MOST_HUE = 4.0
_MOST_GAMMA = 1.05


class PixelSettings(NamedTuple):
    """What shapes the pixels of a picture besides its placement.

    Attributes:
        interpolation: One of ``config.pictures.INTERPOLATIONS``; None: hamming when it shrinks, lanczos when it grows.
        background: What transparent parts are laid on, as ``#rrggbb``.
    """

    interpolation: str | None = None
    background: str = "#ffffff"

    @classmethod
    def of(cls, subset: "SubsetConfig") -> "PixelSettings":
        """The settings of a subset."""
        return cls(subset.resize_interpolation, subset.alpha_color)


class ColourShift(NamedTuple):
    """A small change of a picture's colours.

    Attributes:
        hue: By how many degrees of 360 colours turn around grey; a positive angle turns red towards yellow.
        gamma: The exponent of the brightness curve.
    """

    hue: float
    gamma: float


def colour_shift(rng: random.Random) -> ColourShift | None:
    """This draws the change of one visit: none at half of them, else up to 4 degrees of hue and 5 % of gamma."""
    if rng.random() < 0.5:
        return None
    return ColourShift(rng.uniform(-_MOST_HUE, _MOST_HUE), _MOST_GAMMA ** rng.uniform(-1.0, 1.0))


def open_picture(
    source: str | Path | bytes, *, background: str = "#ffffff", at_least: Resolution | None = None
) -> Image.Image:
    """This decodes a picture completely: upright, RGB, 8 bits per channel, in sRGB.

    Args:
        source: The file, or its bytes.
        background: What transparent parts are laid on.
        at_least: A size that is enough: a JPEG may come in an even fraction of its size, never below this.

    Raises:
        OSError: The file can't be read, or is no whole picture of a known kind; the message is for people.
    """
    return _flat(decode(_bytes(source), at_least), background)


def resize(
    picture: Image.Image,
    placement: "Placement",
    interpolation: str | None = None,
    size: tuple[float, float] | None = None,
) -> Image.Image:
    """The picture at its placement: resized with antialiasing, and cropped. Only the part that stays is computed.

    Args:
        picture: The whole picture.
        placement: Where it goes. It may have been made for a picture of the same shape in another size.
        interpolation: See ``PixelSettings``.
        size: How much of ``picture`` is picture, from its upper left; by default all.
    """
    width, height = size or picture.size
    across, down = width / placement.resized.width, height / placement.resized.height
    left, top, right, bottom = placement.crop
    part = (left * across, top * down, min(width, right * across), min(height, bottom * down))
    kernel = _kernel(interpolation, enlarged=across < 1 or down < 1)
    return picture.resize((placement.bucket.width, placement.bucket.height), kernel, box=part)


def load_pixels(
    data: bytes | str | Path,
    placement: "Placement",
    flipped: bool,
    settings: PixelSettings = PixelSettings(),  # noqa: B008 - it is a constant
    colour: ColourShift | None = None,
) -> "Tensor":
    """This reads a picture as the VAE wants it.

    Args:
        data: The picture's file, or its bytes.
        placement: How it is resized and cropped.
        flipped: Whether it is mirrored left to right, after cropping.
        settings: How it is resized, and what transparent parts are laid on.
        colour: A change of its colours.

    Returns:
        Pixels (3, H, W) of the placement's bucket in -1..1, fp32.

    Raises:
        OSError: See ``open_picture``.
    """
    import torch

    decoded = decode(_bytes(data), _enough(placement, settings.interpolation))
    colours, alpha = split(decoded.picture)
    size = (decoded.width, decoded.height)
    if alpha is None and size[0] * size[1] > placement.resized.area:
        # applying a profile takes longer than all the rest: not to more pixels than needed
        picture = to_srgb(resize(colours, placement, settings.interpolation, size), decoded.profile)
    else:
        picture = resize(_flat(decoded, settings.background), placement, settings.interpolation, size)
    if colour is not None:
        picture = shifted(picture, colour)
    pixels = np.asarray(picture)[:, ::-1] if flipped else np.asarray(picture)
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # (H, W, 3) -> (3, H, W)
    return planes.to(torch.float32).div_(127.5).sub_(1.0)


def shifted(picture: Image.Image, shift: ColourShift) -> Image.Image:
    """The picture with another hue and brightness curve. Greys keep their hue, black and white stay."""
    angle = math.radians(shift.hue)
    # rotation around the axis of greys (Rodrigues' formula)
    same = math.cos(angle) + (1 - math.cos(angle)) / 3
    low = (1 - math.cos(angle)) / 3 - math.sin(angle) / math.sqrt(3)
    high = (1 - math.cos(angle)) / 3 + math.sin(angle) / math.sqrt(3)
    rotation = (same, low, high, 0, high, same, low, 0, low, high, same, 0)
    curve = [round(255 * (level / 255) ** shift.gamma) for level in range(256)]
    return picture.convert("RGB", rotation).point(curve * 3)


def thumbnail(data: bytes, longest: int, *, background: str = "#ffffff") -> Image.Image:
    """The picture on ``background`` with a longest side of ``longest`` pixels, or as large as it is."""
    size = peek(data)[0]
    scale = min(1.0, longest / max(1, *size))
    small = Resolution(*(max(1, round(side * scale)) for side in size))
    picture = open_picture(data, background=background, at_least=Resolution(2 * small.width, 2 * small.height))
    return picture if scale == 1.0 else picture.resize(small, _KERNELS[_SHRINKING])


def near_hash(data: bytes) -> int:
    """A hash of 64 bits that differs in few bits for pictures that look alike.

    It is the difference hash: whether each of 8 x 8 areas is brighter than its left neighbour.
    """
    small = open_picture(data, at_least=Resolution(144, 128)).convert("L").resize((9, 8), _KERNELS["bilinear"])
    values = np.asarray(small)
    return int.from_bytes(np.packbits(values[:, 1:] > values[:, :-1]).tobytes(), "big")


def peek(data: bytes) -> tuple[Resolution, str | None]:
    """This looks at a picture's header and whether the file goes on to its end; nothing is decoded.

    Returns:
        The picture's upright size (0x0 when it isn't known), and why it can't be used, or None.
    """
    header = read_header(data)
    if header.kind is not None and header.problem is None and header.size == (0, 0):
        return peek_by_decoder(data, header.kind)
    return header.upright_size, header.problem


def decode_problem(data: bytes) -> str | None:
    """Why a picture can't be used, found by decoding it completely; None: it can."""
    problem = peek(data)[1]
    if problem is None:
        try:
            decode(data)
        except OSError as error:
            return str(error)
    return problem


def _bytes(source: str | Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _flat(decoded: Decoded, background: str) -> Image.Image:
    """RGB in sRGB, with nothing transparent."""
    colours, alpha = split(decoded.picture)
    picture = to_srgb(colours, decoded.profile)
    return picture if alpha is None else lay_on(picture, alpha, background)


def _kernel(interpolation: str | None, *, enlarged: bool) -> Image.Resampling:
    return _KERNELS[interpolation or (_GROWING if enlarged else _SHRINKING)]


def _enough(placement: "Placement", interpolation: str | None) -> Resolution | None:
    """The size to which a JPEG may shrink while it is decoded; None: it may not."""
    spare = _SPARE.get(_kernel(interpolation, enlarged=False), 2.0)
    if spare == math.inf:
        return None
    return Resolution(*(math.ceil(spare * side) for side in placement.resized))
