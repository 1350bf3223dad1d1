"""Options of the pictures: which are used, what size and shape they get, and how they are changed on the way.

Every one is a key of the dataset TOML too.
"""

import re
from dataclasses import dataclass
from typing import Any

from library.config.options import option
from library.records import Resolution

_SIZE = re.compile(r"\s*(\d+)\s*(?:[,x]\s*(\d+)\s*)?")
_COLOURS = {"white": "#ffffff", "black": "#000000", "grey": "#808080", "gray": "#808080"}

BUCKET_TABLES = {
    "aspect_256": 256,
    "aspect_512": 512,
    "aspect_1024": 1024,
    "aspect_2048": 2048,
    "aspect_2880": 2880,
    "aspect_4096": 4096,
}
"""Names of the published tables of buckets -> the side of their square."""

INTERPOLATIONS = ("nearest", "box", "area", "bilinear", "linear", "hamming", "bicubic", "cubic", "lanczos")


class Megapixels(float):
    """A size in millions of pixels."""


def parse_resolution(value: Any) -> Resolution | Megapixels:
    """This reads a size, width first: ``512``, ``"512"``, ``"512,768"``, ``"512x768"``, ``[512, 768]``; or megapixels.

    Megapixels have a decimal point: ``1.0``.
    """
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        sides: list[Any] = [int(side) for side in match.groups() if side is not None]
    elif isinstance(value, str) and re.fullmatch(r"\s*\d*\.\d+\s*", value):
        return parse_resolution(float(value))
    elif isinstance(value, float) and 0 < value < 1000:
        return Megapixels(value)
    elif isinstance(value, list | tuple) and len(value) in (1, 2):
        sides = list(value)
    else:
        sides = [value]
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"expected a size such as 1024 or 832,1216 (width,height), got {value!r}")
    return Resolution(sides[0], sides[-1])


def parse_area(value: Any) -> Resolution:
    """This reads a size in pixels, as ``parse_resolution`` does, but for megapixels."""
    size = parse_resolution(value)
    if isinstance(size, Megapixels):
        raise ValueError(f"expected a size in pixels such as 512 or 512,768 (width,height), got {value!r}")
    return size


def parse_colour(value: Any) -> str:
    """This reads a colour: ``white``, ``black``, ``grey`` or ``#ff8000``."""
    colour = _COLOURS.get(str(value).lower(), str(value).lower())
    if not re.fullmatch(r"#[0-9a-f]{6}", colour):
        raise ValueError(f"expected a colour such as white, black, grey or #ff8000, got {value!r}")
    return colour


def parse_factors(value: Any) -> tuple[float, float]:
    """This reads two rising numbers of at least 1: ``[2.0, 4.0]`` or ``"2.0,4.0"``."""
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and len(parts) == 2 and not any(isinstance(part, bool) for part in parts):
        try:
            low, high = (float(part) for part in parts)
        except (TypeError, ValueError):
            low = high = 0.0
        if 1 <= low <= high < 1000:
            return low, high
    raise ValueError(f"expected two rising numbers of at least 1 such as 2.0,4.0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """Picture sizes and shapes (what the dataset TOML says goes first)."""

    resolution: Resolution | Megapixels | None = option(
        None,
        "Size in pixels: 1024, or 832,1216 for width,height. With buckets it says the area that each picture gets, not "
        "its shape. --resolution_type gives it another meaning. There is no default.",
        metavar="SIZE",
        parse=parse_resolution,
    )
    resolution_type: str = option(
        "pixel_area",
        "What --resolution and the three sizes below say. pixel_area: a picture gets the area of a square with this "
        "side. pixel: its short side gets this length. area: millions of pixels, such as 1.0.",
        choices=("pixel_area", "pixel", "area"),
    )
    enable_bucket: bool = option(
        True,
        "Keep each picture's shape: it goes into the bucket of the nearest aspect ratio. Without, all are cut to the "
        "shape of --resolution. (kohya's default is off.)",
    )
    min_bucket_reso: int = option(
        256,
        "Shortest side of a bucket in pixels, rounded down to --bucket_reso_steps. --bucket_no_upscale doesn't use it.",
        minimum=1,
    )
    max_bucket_reso: int = option(
        2048,
        "Longest side of a bucket in pixels, rounded up to --bucket_reso_steps; --bucket_no_upscale doesn't use it. "
        "kohya's 1024 leaves wide and tall pictures at 1024 px as little as a quarter of the area.",
        minimum=1,
    )
    bucket_reso_steps: int = option(64, "Bucket sides are multiples of this many pixels.", minimum=1)
    bucket_no_upscale: bool = option(
        False,
        "Never enlarge a picture: smaller ones get a bucket of their own size. Only a side below one bucket step is "
        "enlarged, to that step.",
    )
    bucket_selection: str = option(
        "log",
        "How the nearest bucket is found. log: by the logarithm of width divided by height, so that a picture and the "
        "same one turned get the same bucket, turned. ratio: by width divided by height itself, as kohya does it, "
        "which cuts more from upright pictures.",
        choices=("log", "ratio"),
    )
    bucket_table: str | None = option(
        None,
        "Use the published sizes of the Sana models instead of computed buckets. It sets --resolution too. By default "
        "buckets are computed.",
        choices=tuple(BUCKET_TABLES),
    )
    skip_image_resolution: Resolution | None = option(
        None,
        "Leave out pictures of at most this area: 512, or 512,768. For a folder that is used at several sizes. By "
        "default none.",
        metavar="SIZE",
        parse=parse_area,
    )
    minimum_image_size: float | None = option(
        None, "Leave out pictures that are smaller, measured as --resolution_type says. By default none.", minimum=0
    )
    maximum_image_size: float | None = option(
        None,
        "With --crop: shrink pictures that are larger to --target_downsample_size before they are cropped, and crop "
        "the others as large as they are. By default every picture is scaled until it just covers its crop.",
        minimum=0,
    )
    target_downsample_size: float | None = option(None, "See --maximum_image_size.", minimum=0)
    minimum_aspect_ratio: float | None = option(
        None, "Leave out pictures with a lower width divided by height. By default none.", minimum=0
    )
    maximum_aspect_ratio: float | None = option(
        None, "Leave out pictures with a higher width divided by height. By default none.", minimum=0
    )
    crop: bool = option(False, "Crop pictures to the shape of --crop_aspect instead of keeping theirs.")
    crop_style: str = option(
        "center",
        "What stays of a picture that is cropped. center: its middle. corner: its upper left. random: another place "
        "for each picture, always the same for one picture. face: as much as possible around a face, from a file name "
        "that ends in _x_y_w_h (its centre and size) or found by OpenCV, which must be installed.",
        choices=("center", "corner", "random", "face"),
    )
    crop_aspect: str = option(
        "square",
        "Shape that --crop gives. preserve: the picture's own, in a bucket. closest: the one of --crop_aspect_buckets "
        "that is nearest. random: one of them, always the same for one picture.",
        choices=("square", "preserve", "closest", "random"),
    )
    crop_aspect_buckets: tuple[float, ...] = option(
        (), "Width divided by height of the shapes for --crop_aspect closest and random.", minimum=0.1, maximum=10
    )
    random_crop: bool = option(
        False, "Crop at another place at every visit of a picture. Not with cached latents: see --crop_style random."
    )
    face_crop_aug_range: tuple[float, float] | None = option(
        None,
        "Crop around the face, at every visit in another size: its short side is between these multiples of the "
        "face's, such as 2.0,4.0. Faces are found as with --crop_style face. Not with cached latents.",
        metavar="LOW,HIGH",
        parse=parse_factors,
    )
    resize_interpolation: str | None = option(
        None,
        "How pixels are computed when a picture is scaled, with antialiasing but for nearest. area is box, linear is "
        "bilinear, cubic is bicubic. By default hamming when it shrinks and lanczos when it grows.",
        choices=INTERPOLATIONS,
    )
    flip_aug: bool = option(False, "Mirror each picture left to right at half of its visits, at random.")
    color_aug: bool = option(
        False, "Change hue and brightness curve a little at half of a picture's visits. Not with cached latents."
    )
    alpha_color: str = option(
        "#ffffff",
        "What transparent pictures are laid on: white, black, grey or #rrggbb.",
        metavar="COLOUR",
        parse=parse_colour,
    )
    alpha_mask: bool = option(
        False, "Use a picture's transparency as its loss mask: opaque parts are trained, transparent ones not."
    )
    unmasked_weight: float = option(
        0.0, "Weight of the loss where a mask is black; where it is white it is 1.", minimum=0, maximum=1
    )
    recursive: bool = option(False, "Read the sub-folders of a folder with pictures too.")
