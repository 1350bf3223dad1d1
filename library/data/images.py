"""Picture files to RGB pixels: orientation, transparency and unusual modes, then resize, crop and flip.

Transparent pictures are laid on white, so that colours hidden under transparent pixels never show. Numbers above 8 bits
per channel are scaled to 8 bits. Embedded colour profiles are not applied.
"""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.buckets import Placement

_WHITE = (255, 255, 255)


def open_picture(source: str | Path | BytesIO) -> Image.Image:
    """This decodes a picture completely: upright, RGB, 8 bits per channel.

    Raises:
        OSError: The file can't be read, or is no whole picture of a known kind.
    """
    try:
        with Image.open(source) as file:
            file.load()
            ImageOps.exif_transpose(file, in_place=True)
            return _rgb(file)
    except OSError:
        raise
    except Exception as error:  # decoders stumble over broken files in ways of their own
        raise OSError(f"{type(error).__name__}: {error}") from error


def resize(picture: Image.Image, placement: "Placement") -> Image.Image:
    """The picture at its placement: resized with antialiasing, and cropped.

    Shrinking averages over areas, enlarging is Lanczos. Only the part that stays is computed.
    """
    enlarged = placement.resized.width > picture.width or placement.resized.height > picture.height
    across, down = picture.width / placement.resized.width, picture.height / placement.resized.height
    left, top, right, bottom = placement.crop
    part = (left * across, top * down, min(picture.width, right * across), min(picture.height, bottom * down))
    kernel = Image.Resampling.LANCZOS if enlarged else Image.Resampling.BOX
    return picture.resize((placement.bucket.width, placement.bucket.height), kernel, box=part)


def load_pixels(path: str | Path, placement: "Placement", flipped: bool) -> "Tensor":
    """This reads a picture as the VAE wants it.

    Args:
        path: The picture's file.
        placement: How it is resized and cropped.
        flipped: Whether it is mirrored left to right, after cropping.

    Returns:
        Pixels (3, H, W) of the placement's bucket in -1..1, fp32.
    """
    import torch

    picture = resize(open_picture(path), placement)
    pixels = np.asarray(picture)[:, ::-1] if flipped else np.asarray(picture)
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # (H, W, 3) -> (3, H, W)
    return planes.to(torch.float32).div_(127.5).sub_(1.0)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        return _eight_bits(picture).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        canvas = Image.new("RGB", layer.size, _WHITE)
        canvas.paste(layer, mask=layer.getchannel("A"))
        return canvas
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, which Pillow's own conversion would cut off at 255."""
    values = np.asarray(picture).astype(np.float64)
    return Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))
