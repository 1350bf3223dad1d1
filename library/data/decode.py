"""Bytes of a picture file to an upright picture in the colours of the file, JPEGs smaller where that is enough.

Everything is decoded by Pillow, whose JPEG decoder is libjpeg-turbo. simplejpeg gives the same bytes and was measured
to be no faster once the pixels have to become a Pillow picture for resizing.
"""

import importlib
import warnings
from io import BytesIO
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from library.data.formats import PLUGINS
from library.data.headers import CUT, DAMAGED, Header, read_header, size_problem
from library.records import Resolution

# which pictures are too large is decided in headers; a photo of a hundred megapixels is none of them
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_FACTORS = (8, 4, 2)  # what a JPEG can be shrunk by while it is decoded

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoded(NamedTuple):
    """A decoded file.

    Attributes:
        picture: Upright, in one of Pillow's modes.
        width: Of the part of it that is picture; a fraction where a scaled JPEG ends within its last pixel.
        height: The same.
        profile: The ICC profile of its colours.
    """

    picture: Image.Image
    width: float
    height: float
    profile: bytes | None


def decode(data: bytes, at_least: Resolution | None = None) -> Decoded:
    """This decodes a picture completely.

    Args:
        data: The file.
        at_least: A size that is enough: a JPEG may come in an even fraction of its own, never below this.

    Raises:
        OSError: It is no whole picture of a known kind; the message is for people.
    """
    header = read_header(data)
    if header.kind is None:
        raise OSError(header.problem)
    if header.problem is not None and header.problem != CUT:  # what is cut may be worth a try
        raise OSError(header.problem)
    if missing := _missing_plugin(header.kind):
        raise OSError(missing)
    try:
        with Image.open(BytesIO(data), formats=(header.kind,)) as file:
            if header.kind == "JPEG":
                return _jpeg(file, header, _factor(header, at_least))
            file.load()
            return _upright(_with_true_transparency(file, data), header)
    except MemoryError:
        raise
    except Exception as error:  # decoders stumble over broken files in ways of their own
        raise OSError(header.problem or _reason(error)) from error


def peek_by_decoder(data: bytes, kind: str) -> tuple[Resolution, str | None]:
    """The upright size of a picture whose header only its decoder understands, and why it can't be used, or None."""
    if missing := _missing_plugin(kind):
        return Resolution(0, 0), missing
    try:
        with Image.open(BytesIO(data), formats=(kind,)) as file:
            size = Resolution(*file.size)
            turned = _exif_counts(file) and file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except MemoryError:
        raise
    except Exception as error:  # see decode
        return Resolution(0, 0), _reason(error)
    return Resolution(size.height, size.width) if turned else size, size_problem(size)


def _missing_plugin(kind: str) -> str | None:
    """This loads what Pillow needs for a kind that it may not know by itself; what is said when it isn't there."""
    for plugin in PLUGINS.values():
        if plugin.kind == kind and plugin.is_needed:
            if not plugin.is_installed:
                return f"a picture of the kind {kind}; pip install {plugin.package} reads it"
            importlib.import_module(plugin.module)
    return None


def _factor(header: Header, at_least: Resolution | None) -> int:
    """By how much a JPEG may be shrunk while it is decoded."""
    if at_least is None:
        return 1
    width, height = header.upright_size
    for factor in _FACTORS:
        # of a picture whose last pixel is only partly covered, the first one would be after turning it
        fits = header.orientation == 1 or width % factor == height % factor == 0
        if fits and width >= at_least.width * factor and height >= at_least.height * factor:
            return factor
    return 1


def _jpeg(file: Image.Image, header: Header, factor: int) -> Decoded:
    width, height = file.size
    if factor > 1:
        file.draft(None, (width // factor, height // factor))
    file.load()
    profile = file.info.get("icc_profile")
    if header.orientation == 1:
        return Decoded(file, width / factor, height / factor, profile)
    picture = file.transpose(_UPRIGHT[header.orientation])
    return Decoded(picture, *picture.size, profile)


def _upright(file: Image.Image, header: Header) -> Decoded:
    picture = file
    if header.kind in ("AVIF", "JXL"):
        if _exif_counts(file):
            picture = ImageOps.exif_transpose(file)
    elif header.orientation != 1:
        picture = file.transpose(_UPRIGHT[header.orientation])
    return Decoded(picture, *picture.size, file.info.get("icc_profile"))


def _exif_counts(file: Image.Image) -> bool:
    """Whether EXIF says which way is up. JPEG XL says so itself, and its decoder has done it, but for packed JPEGs."""
    return file.format != "JXL" or bool(getattr(file, "jpeg", False))


def _with_true_transparency(file: Image.Image, data: bytes) -> Image.Image:
    """A PNG whose transparent colour is scaled to 8 bits; Pillow scales its pixels alone."""
    colour = file.info.get("transparency")
    if file.format == "PNG" and colour is not None:
        depth, most = data[24], (1 << data[24]) - 1
        if file.mode == "L" and depth in (2, 4) and colour <= most:
            file.info["transparency"] = colour * 255 // most
        elif file.mode == "RGB" and depth == 16:
            file.info["transparency"] = tuple(part >> 8 for part in colour)
    return file


def _reason(error: Exception) -> str:
    """What a decoder's error means to a person."""
    message = " ".join(str(error).split("\n")[0].split())
    if isinstance(error, UnidentifiedImageError):
        return f"{DAMAGED}: its header can't be read"
    if "truncated" in message.lower():
        return CUT
    return f"{DAMAGED}: {message or type(error).__name__}"
