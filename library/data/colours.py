"""From the many ways in which files keep colours to RGB with 8 bits per channel in sRGB.

Numbers of more than 8 bits are scaled, not cut. An embedded colour profile is applied; one that is broken, or that
isn't for this kind of picture, is passed over, as every viewer does.
"""

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, ImageColor

_PROFILE_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
"""Colour space in a profile's header -> the mode of the pictures that it is for."""

_PIXELS_AT_ONCE = 1 << 20
_STEPS = (0, 51, 102, 153, 204, 255)


def split(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """This separates a picture's colours from its transparency.

    Returns:
        The colours, of mode L, RGB or CMYK, and the opacity, of mode L; None where nothing is transparent.
    """
    alpha = alpha_of(picture)
    if alpha is not None and alpha.getextrema() == (255, 255):
        alpha = None
    if picture.mode.startswith(("I", "F")):
        return _eight_bits(picture), alpha
    if picture.mode in ("L", "RGB", "CMYK"):
        return picture, alpha
    grey = picture.mode in ("1", "LA", "La")
    return picture.convert("L" if grey else "RGB"), alpha


def alpha_of(picture: Image.Image) -> Image.Image | None:
    """A picture's opacity, of mode L; None where its kind has none."""
    if picture.mode.startswith("I") and "transparency" in picture.info:
        opaque = np.asarray(picture) != picture.info["transparency"]
        return Image.fromarray(opaque.astype(np.uint8) * 255)
    if not picture.has_transparency_data or picture.mode.startswith(("I", "F")):
        return None
    return picture.convert("RGBA").getchannel("A")


def first_channel(picture: Image.Image) -> Image.Image:
    """The red channel of a picture or the only one of a grey one, as the file has it, of mode L."""
    colours, _ = split(picture)
    if colours.mode == "CMYK":
        colours = colours.convert("RGB")
    return colours if colours.mode == "L" else colours.getchannel("R")


def to_srgb(colours: Image.Image, profile: bytes | None) -> Image.Image:
    """This gives RGB in sRGB.

    Args:
        colours: Of mode L, RGB or CMYK.
        profile: The picture's ICC profile, if any.
    """
    mode = _PROFILE_MODES.get(profile[16:20]) if profile else None
    if profile and mode and (mode == colours.mode or (mode == "RGB" and colours.mode == "L")):
        transform = _transform(profile, mode)
        if transform is not None:
            return transform.apply(colours.convert(mode))
    return colours if colours.mode == "RGB" else colours.convert("RGB")


def lay_on(colours: Image.Image, alpha: Image.Image, background: str) -> Image.Image:
    """This lays a picture of mode RGB on a background such as ``#ffffff``."""
    canvas = Image.new("RGB", colours.size, ImageColor.getrgb(background))
    canvas.paste(colours, mask=alpha)
    return canvas


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, or of fractions up to 1, which Pillow's own conversion would cut off at 255."""
    values = np.asarray(picture)
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, _PIXELS_AT_ONCE // max(1, values.shape[1]))
    for start in range(0, len(values), rows):  # a large picture takes eight times its size in fractions
        part = values[start : start + rows].astype(np.float64)
        part = part * 255 if picture.mode == "F" else part / 257
        levels[start : start + rows] = np.clip(np.rint(part), 0, 255)
    return Image.fromarray(levels)


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where the profile is sRGB itself, whatever it is called, or can't be used.

    Building one takes longer than applying it to a small picture, and the pictures of a set share few profiles.
    """
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            flags=ImageCms.Flags.NOCACHE,  # threads share it
        )
        probe = _probe(mode)
        changed = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return transform if np.abs(changed).max() > 1 else None


def _probe(mode: str) -> Image.Image:
    """A picture with colours from all over the mode's space."""
    axes = np.meshgrid(*[_STEPS] * len(mode), indexing="ij")
    colours = np.stack(axes, axis=-1).astype(np.uint8)
    return Image.frombytes(mode, (1, len(_STEPS) ** len(mode)), colours.tobytes())
