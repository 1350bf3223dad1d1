"""Loss masks: a picture of its own or a picture's transparency, brought to the latent grid."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from library.data.colours import alpha_of, first_channel
from library.data.decode import decode
from library.data.images import resize

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.buckets import Placement


def load_mask(data: bytes | str | Path, placement: "Placement", flipped: bool, *, stride: int, alpha: bool) -> "Tensor":
    """This reads a loss mask and takes it where its picture goes.

    Args:
        data: The mask's file or its bytes; the picture's for ``alpha``.
        placement: That of the picture. A mask of the same shape in another size is scaled to match.
        flipped: Whether the picture is mirrored.
        stride: Pixels per latent position, on each side.
        alpha: Whether the picture's own opacity is the mask (255 everywhere where nothing is transparent), not the
            first channel of a mask picture.

    Returns:
        The mean of the mask over each latent position (1, h, w), 0..255, uint8.

    Raises:
        OSError: The file can't be read, or is no whole picture; the message is for people.
        ValueError: The bucket isn't a whole number of latent positions.
    """
    import torch

    width, height = placement.bucket
    if width % stride or height % stride:
        raise ValueError(f"a bucket of {placement.bucket} has no whole number of latent positions of {stride} pixels")
    decoded = decode(data if isinstance(data, bytes) else Path(data).read_bytes())
    channel = alpha_of(decoded.picture) if alpha else first_channel(decoded.picture)
    if channel is None:
        return torch.full((1, height // stride, width // stride), 255, dtype=torch.uint8)
    # box keeps a mask's two values apart, where other kernels would blur its edge or overshoot
    placed = np.asarray(resize(channel, placement, "box"))
    sums = placed.reshape(height // stride, stride, width // stride, stride).sum(axis=(1, 3), dtype=np.uint32)
    means = ((2 * sums + stride * stride) // (2 * stride * stride)).astype(np.uint8)  # rounded half up
    return torch.from_numpy(np.ascontiguousarray(means[None, :, ::-1] if flipped else means[None]))
