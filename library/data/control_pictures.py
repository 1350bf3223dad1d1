"""Control pictures: what a ControlNet steers by, brought to where its picture goes."""

from pathlib import Path
from typing import TYPE_CHECKING

from library.data.images import PixelSettings, load_pixels

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.buckets import Placement


def load_control(data: bytes | str | Path, placement: "Placement", flipped: bool, settings: PixelSettings) -> "Tensor":
    """This reads a control picture and takes it where its picture goes.

    Args:
        data: The control picture's file, or its bytes.
        placement: That of the picture. A control picture of the same shape in another size is scaled to match.
        flipped: Whether the picture is mirrored.
        settings: How it is resized, and what transparent parts are laid on.

    Returns:
        (3, H, W) of the placement's bucket in 0..1, fp32.

    Raises:
        OSError: The file can't be read, or is no whole picture; the message is for people.
    """
    return load_pixels(data, placement, flipped, settings).add_(1.0).div_(2.0)
